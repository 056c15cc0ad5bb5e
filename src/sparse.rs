//! A message that may be due thousands of times a second, and is said once in a while.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two times that the same thing is said.
const PAUSE: Duration = Duration::from_secs(5);

/// One for each message.
#[derive(Debug)]
pub struct Sparse(Mutex<State>);

#[derive(Debug)]
struct State {
    said: Option<Instant>,
    unsaid: u64,
}

impl Sparse {
    /// Never said yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State { said: None, unsaid: 0 }))
    }

    /// Whether it is to be said now: then how often it was not, since the last time.
    pub fn is_due(&self) -> Option<u64> {
        self.is_due_at(Instant::now())
    }

    fn is_due_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.said.is_some_and(|said| now.saturating_duration_since(said) < PAUSE) {
            state.unsaid += 1;
            return None;
        }
        state.said = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }
}

impl Default for Sparse {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_and_the_others_are_counted() {
        let (sparse, begun) = (Sparse::new(), Instant::now());
        assert_eq!(sparse.is_due_at(begun), Some(0));
        assert_eq!(sparse.is_due_at(begun + PAUSE / 2), None);
        assert_eq!(sparse.is_due_at(begun + PAUSE / 2), None);
        assert_eq!(sparse.is_due_at(begun + PAUSE), Some(2));
        assert_eq!(sparse.is_due_at(begun + PAUSE * 3), Some(0));
    }
}
