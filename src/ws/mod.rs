//! RFC 6455 on bytes: where frames begin and end, what a header may say, what a Close carries.
//!
//! Nothing here reads, writes, waits, logs or allocates per frame; a payload is looked at only in control frames.

pub mod close;
pub mod frame;
mod tracker;

pub use close::{CloseFrame, Code};
pub use frame::{Header, Opcode};
pub use tracker::{Limits, Position, Rsv, Sender, Step, Tracker, Violation};
