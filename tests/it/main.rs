mod harness;

mod close_table;
mod harness_self;
