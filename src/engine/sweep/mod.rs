//! The sweep of one shard: the only part of the engine that keeps state across waits.
//!
//! | file | what it does |
//! |---|---|
//! | `shard` | the shard's sweep from beginning to end, DB after DB |
//! | `session` | what is known of one server process; replaced with it |
//! | `retry` | connects to the master, and reconnects |
//! | `pass` | the sweep of one DB: begins, goes back, ends |
//! | `batch_loop` | one turn: wait, send, receive, judge, count, apply |
//! | `laps` | lap after lap at the pace that keeps a bound |
//! | `lap_state` | that pace, and where in the lap the sweep is |
//! | `pipeline` | the workers and their connections |
//! | `hold` | everything that makes the loop stand still |
//! | `expire_effort` | raises the effort of active expiry first |
//! | `timer` | sleeps of microseconds |

mod batch_loop;
mod expire_effort;
mod hold;
mod lap_state;
mod laps;
mod pass;
mod pipeline;
mod retry;
mod session;
mod shard;
mod timer;

pub(super) use shard::{ShardJob, ShardResult, run};
