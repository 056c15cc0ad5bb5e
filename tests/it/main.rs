//! All integration tests, in one binary.

mod harness;

mod close_table;
mod harness_self;
