//! The sweep.
//!
//! # How a key is reclaimed
//!
//! Redis frees an expired key when a client touches it or when active expiry samples it. SCAN touches: the server checks the TTL of
//! each key that it is about to return, and deletes the expired ones before it replies. So a sweep is one SCAN walk over each DB,
//! without MATCH and without TYPE (either makes some servers skip keys), and needs no right to read or write a key.
//!
//! # How it is counted
//!
//! Each batch is `DBSIZE`, `SCAN cursor COUNT n`, `DBSIZE` in one write. The server runs the commands of one buffer back to back, so
//! the difference is what this SCAN reclaimed, whatever other clients do. On a server that may evict keys, `INFO stats` goes with each
//! `DBSIZE`: see [`crate::node::conn::CountedBy`].
//!
//! # How it is fast and gentle
//!
//! Fast: as many batches are under way as fit into a round trip. A pass is cut into [`segments`](policy::segments), each walked over a
//! connection of its own, and the [`depth`](policy::depth) follows the round trip.
//!
//! Gentle: batches are short and spaced; see [`pacer`](policy::pacer). [`throttle`](policy::throttle) decides from what the
//! [`sampler`] saw whether the sweep may go on, and how much of the master's time it may take. The
//! [`expiry_guard`](policy::expiry_guard) refuses or ends a sweep that would leave more expired keys behind than
//! no sweep.
//!
//! # How it stays truthful
//!
//! A server that may not delete just now (paused, failing over, a replica) hides expired keys instead, and a naive sweep would
//! "succeed". [`hidden_keys`](policy::hidden_keys) proves by arithmetic that keys were hidden; the loop then goes back and holds until
//! deletions work again. After a lost connection the pass goes on from its lowest cursor if the server process is the same (`run_id`).
//! Otherwise it begins again, since a cursor means nothing to another process.
//!
//! # One turn of the batch loop
//!
//! `turn` in `sweep/batch_loop.rs` is one turn. The functions without a file are there too.
//!
//! 1. Wait until nothing holds the sweep (`must_stand_still`, `stand_still` in `sweep/hold.rs`). With no batch under way: control,
//!    foreground, throttle, permit. Before each batch: rest, ceiling (`Pacer::may_send`).
//! 2. Send the next batch of each free worker's segment, up to the depth: `send`, which asks `claim` for the worker and `compose` for the
//!    batch, and [`Conn::send_scan`](crate::node::conn::Conn::send_scan).
//! 3. Receive the oldest reply: `receive`, and [`Conn::receive_scan`](crate::node::conn::Conn::receive_scan). The worker's next batch is
//!    sent as soon as the cursor has arrived, so `receive` sends batches too.
//! 4. Judge the reply: `take`, `judge`. [`verdict`](policy::verdict) is pure, and its table of tests lists all rules.
//! 5. Count the reply, whatever its verdict: `count`, `count_scan`. The number of reclaimed keys is `Reply::reclaimed`.
//! 6. Carry the verdict out: send a follow-up about the same range (`take`), or advance the segment, go back, begin again, or end
//!    (`apply`).
//! 7. Make the count safe and known: `advance` writes the batch journal (`write_journal` in `sweep/pass.rs`). At most each 100 ms `report`
//!    sends the figures to `tasks::recorder`, which writes a checkpoint each second.
//!
//! # The map
//!
//! | module | what it does |
//! |---|---|
//! | [`rounds`] | sweeps all shards of an instance, and again while masters move |
//! | [`plan`] | what is to be swept and how, and how that ended |
//! | [`control`] | stops, holds and tunes a running sweep |
//! | [`sampler`] | observes a master on a connection of its own |
//! | [`policy`] | the rules: pure, without any waiting |
//! | `shards` | where each shard's master is, and which of them may be swept now |
//! | `sweep` | sweeps one shard: the only state that lives across waits |
//!
//! Called by `tasks`. The engine writes the batch journal beside the state file, since a count has to be safe before the next batch is
//! sent. It writes no records and prints nothing.

pub(crate) mod control;
pub(crate) mod plan;
pub mod policy;
pub(crate) mod rounds;
pub(crate) mod sampler;
mod shards;
mod sweep;

pub use plan::{Outcome, ScanPlan};
pub use policy::profile::may_be_swept;
pub use rounds::run;
