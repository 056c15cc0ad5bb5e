//! A panic on purpose, for tests of what it leaves unharmed. Debug builds only.

use std::sync::LazyLock;

/// The payload of a Ping that makes the relay of its session panic. No `TIDEGATE_`: those are keys of the configuration.
const VARIABLE: &str = "FAULT_PING";

static PAYLOAD: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(VARIABLE).ok());

/// Panics if this is the payload.
pub(super) fn strike(payload: &[u8]) {
    assert!(PAYLOAD.as_ref().is_none_or(|fault| fault.as_bytes() != payload), "a fault was asked for");
}
