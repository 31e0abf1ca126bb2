//! The integration tests: everything that needs a real server, in one crate, one file per theme.
//!
//! They run against the binary that `TTLSWEEP_TEST_SERVER` names (default: the `redis-server` on the PATH);
//! `make matrix` runs them against each server that the project promises to work with.

#![allow(clippy::print_stdout, reason = "a test that a server cannot run says so")]

mod support;

mod chaos;
mod check;
mod cli;
mod client;
mod cluster;
mod cluster_forms;
mod crash;
mod daemons;
mod dcs;
mod demo;
mod deploy;
mod doc_blocks;
mod exact;
mod files;
mod fleet;
mod forecast;
mod instances;
mod keep;
mod load;
mod logs;
mod monitoring;
mod network;
mod notify;
mod page;
mod records;
mod resume;
mod retention;
mod rights;
mod scale;
mod schedule;
mod sdk;
mod sentinel;
mod service;
mod support_test;
mod tls;
mod touch;
mod traces;
mod trouble;
mod walks;
