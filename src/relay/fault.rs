//! Faults on purpose, for tests of what they leave unharmed, and of who notices. Debug builds only.

use std::sync::LazyLock;

/// The payload of a Ping that makes the relay of its session panic. No `TIDEGATE_`: those are keys of the configuration.
const VARIABLE: &str = "FAULT_PING";

/// The payload of one by which a worker is stuck for good.
const STUCK_VARIABLE: &str = "FAULT_STUCK";

static PAYLOAD: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(VARIABLE).ok());

static STUCK: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(STUCK_VARIABLE).ok());

/// Panics, or never comes back, if this is the payload.
pub(super) fn strike(payload: &[u8]) {
    assert!(PAYLOAD.as_ref().is_none_or(|fault| fault.as_bytes() != payload), "a fault was asked for");
    while STUCK.as_ref().is_some_and(|fault| fault.as_bytes() == payload) {
        std::thread::park();
    }
}
