//! The sweep of one shard: the only part of the engine that keeps state across waits.
//!
//! | file | what it does |
//! |---|---|
//! | `shard` | the shard's sweep from beginning to end, DB after DB |
//! | `session` | what is known of one server process; gone with it |
//! | `retry` | comes to the master, and back to it |
//! | `pass` | the sweep of one DB: begins, goes back, ends |
//! | `batch_loop` | one turn: wait, send, receive, judge, apply |
//! | `keep` | the pace that keeps a bound |
//! | `laps` | lap after lap at that pace |
//! | `pipeline` | the workers and their connections |
//! | `hold` | what makes the loop stand still, in order |
//! | `expire_effort` | lets the server's own expiry try harder first |
//! | `timer` | sleeps of microseconds |

mod batch_loop;
mod expire_effort;
mod hold;
mod keep;
mod laps;
mod pass;
mod pipeline;
mod retry;
mod session;
mod shard;
mod timer;

pub(super) use shard::{ShardJob, ShardResult, run};
