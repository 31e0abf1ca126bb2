//! What leaves the process for other programs.

pub mod dto;
