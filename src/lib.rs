//! `ttlsweep` frees the memory of expired keys that Redis and Valkey still hold.
//!
//! Commands go down, facts come up:
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
//! | [`model`] | the words of the domain: plain data, pure functions |
//! | [`settings`] | what was typed becomes what is valid |
//! | [`node`] | everything that speaks RESP |
//! | [`store`] | records that outlive the process |
//! | [`metrics`] | figures for Prometheus |
//! | [`notify`] | tells a webhook what went wrong |
//! | [`engine`] | the sweep: its pacing and its truthfulness |
//! | [`check`] | the look at a server that touches nothing |
//! | [`forecast`] | what will expire when, by a sample of the keys |
//! | [`tasks`] | from request to record; the only writer of task state |
//! | [`scheduler`] | starts the scans that are due |
//! | [`keeper`] | begins the runs that keep a bound |
//! | [`overdue`] | notices an instance that has not been swept for too long |
//! | [`api`] | the contract, our own calls, the page |
//! | [`shutdown`] | signals of the daemon |
//! | [`telemetry`] | the log |
//! | [`daemon`] | wires all of these, owns start and stop order |
//! | [`cli`] | parse, hand over, print |

#![forbid(unsafe_code)]

pub mod api;
pub mod check;
pub mod cli;
pub mod daemon;
pub mod engine;
pub mod forecast;
pub mod keeper;
pub mod metrics;
pub mod model;
pub mod node;
pub mod notify;
pub mod overdue;
pub mod scheduler;
pub mod settings;
pub mod shutdown;
pub mod store;
pub mod tasks;
pub mod telemetry;
