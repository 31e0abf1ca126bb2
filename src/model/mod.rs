//! The terms of the domain: tasks, shards, positions, limits, reasons.
//!
//! Everything here is plain data and pure functions. Nothing in this module uses a socket, a clock, a file or a wire format; every other
//! module may import it.

pub mod bounds;
pub mod event;
pub mod failure;
pub mod format;
pub mod progress;
pub mod schedule;
pub mod shard;
pub mod slots;
pub mod target;
pub mod task;
pub mod throttle;
pub mod words;
