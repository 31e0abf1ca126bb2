//! Everything that speaks RESP.
//!
//! The redis crate packs commands and decodes replies; the connection itself is ours, for two reasons. The sweep reads
//! millions of key names that it needs only to drop: [`conn::Conn::scan`] skips them in the read buffer, where the
//! crate would allocate each (measured: half the client CPU, 1.2 times the keys per second). And a hostile or broken
//! peer must meet bounds that we set, on size, depth and time.

pub mod acl;
pub mod commands;
pub mod conn;
pub mod error;
pub mod info;
pub mod tls;
pub mod topology;
pub mod wire;
