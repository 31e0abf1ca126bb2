//! `ttlsweep` frees the memory of expired keys that Redis and Valkey still hold. This is the library behind the program.
//!
//! Commands go down, events come up:
//!
//! ```text
//! cli / api / scheduler --command--> tasks --plan + control--> engine --request--> node (connections to masters)
//!                                      ^                          |
//!          store <--checkpoint--+      +------- ScanEvent --------+     bounded channel, one consumer
//!                               +-- tasks::recorder
//!          bar, JSON <--watch---+   (the latest view wins; a slow reader never slows the sweep)
//! ```
//!
//! A module imports only from those above it in this list, and a test keeps it so:
//!
//! | module | what it is |
//! |---|---|
//! | [`model`] | the terms of the domain as plain data and pure functions |
//! | [`settings`] | parses and checks settings |
//! | [`node`] | connections to Redis and Valkey: everything that speaks RESP |
//! | [`store`] | records that outlive the process: tasks, checkpoints, schedules |
//! | [`metrics`] | metrics for Prometheus |
//! | [`notify`] | sends notifications to a webhook |
//! | [`engine`] | sweeps the shards of an instance: pacing, throttling, exact counts |
//! | [`check`] | inspects a server without changing anything |
//! | [`forecast`] | estimates from a sample which keys expire when |
//! | [`tasks`] | runs tasks and records them; the only writer of task state |
//! | [`scheduler`] | starts the scans that are due |
//! | [`keeper`] | starts the keep runs of instances with a bound |
//! | [`overdue`] | reports instances that have not been swept for too long |
//! | [`api`] | the DCS contract, our own calls beside it, the web page |
//! | [`shutdown`] | signal handling of the daemon |
//! | [`telemetry`] | the log, and the export of spans |
//! | [`daemon`] | connects all of these, and starts and stops them in order |
//! | [`cli`] | parses the arguments, calls the library, prints the result |

#![forbid(unsafe_code)]
// What is `pub` is used by the program, the tests or the benches; Cargo.toml allows it for these, which nobody imports.
#![warn(unreachable_pub)]
#![allow(rustdoc::private_intra_doc_links, reason = "`make docs` builds them with private items, for maintainers")]

mod api;
mod check;
pub mod cli;
mod daemon;
pub mod engine;
mod forecast;
mod keeper;
pub mod metrics;
pub mod model;
pub mod node;
mod notify;
mod overdue;
mod scheduler;
pub mod settings;
mod shutdown;
pub mod store;
mod tasks;
mod telemetry;
