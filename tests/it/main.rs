mod harness;

mod harness_self;

// To be taken in as soon as `tidegate run` relays:
// mod close_table;
