//! All integration tests, in one binary.

mod harness;

mod close_table;
mod config;
mod handshake;
mod harness_self;
mod http;
