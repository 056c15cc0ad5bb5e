//! What a worker begins new sessions with, which a reload replaces.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use super::Context;

/// A worker's cell: looked at once for each connection or request, written by a reload. Empty until the first one.
///
/// All contexts of a worker have the same cell, so that none of them, however old, keeps more than the newest alive.
#[derive(Clone, Default)]
pub struct Current(Arc<RwLock<Option<Arc<Context>>>>);

impl Current {
    /// From now on this one. The one before it goes with the last of its sessions.
    pub fn set(&self, context: Arc<Context>) {
        let before = self.0.write().unwrap_or_else(PoisonError::into_inner).replace(context);
        // Without the lock.
        drop(before);
    }

    pub(super) fn get(&self) -> Option<Arc<Context>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Current {
    /// Without its content, which has this in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Current").finish_non_exhaustive()
    }
}
