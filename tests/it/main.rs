//! All integration tests, in one binary.

mod harness;

mod close_table;
mod config;
mod crowd;
mod harness_self;
mod memory;
