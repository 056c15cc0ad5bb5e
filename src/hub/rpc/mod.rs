//! Many clients of an id-carrying protocol, JSON-RPC 2.0, on one connection of a backend.
//!
//! ```text
//! core.rs     who asked what and gets which answer, as a state machine without I/O, lock or clock; core/ are its parts
//! message.rs  messages as text
//! methods.rs  which methods are about subscriptions
//! ```

pub mod core;
pub mod message;
pub mod methods;
