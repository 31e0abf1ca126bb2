//! placeholder
#![forbid(unsafe_code)]
pub mod model;
pub mod node;
pub mod settings;
