mod harness;

mod harness_self;

// mod close_table; // to be taken in as soon as `tidegate run` relays
