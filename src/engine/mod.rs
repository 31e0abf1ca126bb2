//! The sweep.
//!
//! # How a key is reclaimed
//!
//! Redis frees an expired key when somebody touches it or when its own cycle samples it. SCAN touches: for each key
//! that it is about to return, the server checks the TTL and deletes what is over, before it replies. So a sweep is one
//! SCAN walk over each DB, without MATCH and without TYPE (either makes some servers skip keys), and needs no
//! right to read or write a key.
//!
//! # How it is counted
//!
//! Each batch is `DBSIZE`, `SCAN cursor COUNT n`, `DBSIZE` in one write. The server runs the commands of one buffer back
//! to back, so the difference is what this SCAN freed, whatever others do. Where the server evicts keys, `INFO stats` goes
//! beside each `DBSIZE`: see [`crate::node::conn::Gauge`].
//!
//! # How it is fast and gentle
//!
//! Fast by having as many batches under way as the round trip takes: a pass is cut into [`segments`](policy::segments), each
//! walked over a connection of its own, and the [`depth`](policy::depth) follows the round trip. Gentle by keeping each batch
//! short and spacing them: see [`pacer`](policy::pacer). [`throttle`](policy::throttle) decides by what the [`sampler`] saw whether the
//! sweep may go on at all, and how much it may take. The [`expiry_guard`](policy::expiry_guard) sees to it that it is never worse than
//! no sweep.
//!
//! # How it stays truthful
//!
//! A server that may not delete just now (paused, failing over, a replica) hides expired keys instead, and a naive
//! sweep would "succeed". [`hidden_keys`](policy::hidden_keys) proves them by arithmetic; the loop then goes back and stands still
//! until deletions work again. After a lost connection it goes on from the lowest cursor if the process is the same
//! (`run_id`), and begins the pass again if it is not, since a cursor means nothing to another process.
//!
//! # One turn of the batch loop
//!
//! 1. Wait until nothing holds it. With no batch under way: orders, foreground, throttle, permit. Before each batch: rest, ceiling.
//! 2. Send, for each worker that is free, the next batch of its segment, as many as the depth allows.
//! 3. Receive the oldest reply. The same worker's next batch is sent as soon as the cursor has come.
//! 4. Judge the reply: [`verdict`](policy::verdict) is pure, and its table of tests is the list of all rules.
//! 5. Apply: advance the segment, ask for something more, go back, begin again, or end.
//!
//! # The map
//!
//! | room | what it is |
//! |---|---|
//! | [`rounds`] | all shards of an instance, and again while masters move |
//! | [`plan`] | what is to be swept and how, and how that ended |
//! | [`control`] | what may be said to a running sweep |
//! | [`sampler`] | looks at a master on its own connection |
//! | [`policy`] | the rules: pure, without any waiting |
//! | `shards` | where each shard's master is, and which of them may be swept now |
//! | `sweep` | one shard: the only state that lives across waits |
//!
//! Called by `tasks`. The batch journal beside the state file is written from here, since a count has to be safe before the next batch
//! is sent; records are not, and nothing is printed.

pub mod control;
pub mod plan;
pub mod policy;
pub mod rounds;
pub mod sampler;
mod shards;
mod sweep;

pub use plan::{Outcome, ScanPlan};
pub use policy::profile::may_be_swept;
pub use rounds::run;
