//! When a backend that was lost is tried again, and for how long.

use tokio::time::{Duration, Instant};

/// Between two tries, the first and the longest; half of it at least, at random.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A backend that stays for so long has come back for good: for the next loss all begins anew.
pub(super) const STEADY: Duration = Duration::from_secs(1);

/// With less than that left of the grace it is over.
const LEAST: Duration = Duration::from_millis(5);

/// See the module. One that comes and goes at once is looked for by the same one, and so uses up one grace.
#[derive(Debug)]
pub(super) struct Search {
    since: Instant,
    until: Instant,
    /// The next one, at most.
    pause: Duration,
}

impl Search {
    /// It was lost just now.
    pub(super) fn new(grace: Duration) -> Self {
        let since = Instant::now();
        Self { since, until: since + grace, pause: BACKOFF.0 }
    }

    /// It was found, and was lost again.
    pub(super) fn again(self) -> Self {
        Self { since: Instant::now(), ..self }
    }

    /// It was lost again, but not for good, since it was there: nobody wants it, or it did not like what a client had said. All of the grace is
    /// there anew, but no try comes sooner.
    pub(super) fn later(self, grace: Duration) -> Self {
        Self { pause: self.pause, ..Self::new(grace) }
    }

    /// Until the next try; `None`: the grace is over. What is left of it is used, too.
    pub(super) fn next(&mut self) -> Option<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left < LEAST {
            return None;
        }
        let wait = self.pause.mul_f64(0.5 + rand::random::<f64>() / 2.0).min(left / 2);
        self.pause = (self.pause * 2).min(BACKOFF.1);
        Some(wait)
    }

    /// The end of the grace: no try lasts longer.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// For how long it has been lost, for the log.
    pub(super) fn lost_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tries are further and further apart, and until the end of the grace there are some, however long the last pause was; one that is lost
    /// again has what is left of it. Method: a clock that is moved.
    #[test]
    fn all_of_the_grace_is_used() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let grace = Duration::from_secs(10);
            let (begun, mut search, mut longest) = (Instant::now(), Search::new(grace), Duration::ZERO);
            for at in 0_u32.. {
                let Some(wait) = search.next() else { break };
                let left = grace.saturating_sub(begun.elapsed());
                let pause = (BACKOFF.0 * 2_u32.pow(at.min(9))).min(BACKOFF.1);
                assert!(wait <= pause && wait <= left / 2 && wait >= (pause / 2).min(left / 2), "{at}: {wait:?}");
                longest = longest.max(wait);
                tokio::time::advance(wait).await;
                if at == 3 {
                    search = search.again();
                    assert_eq!(search.lost_ms(), 0);
                }
            }
            assert!(longest >= BACKOFF.1 / 2 && grace.saturating_sub(begun.elapsed()) < LEAST, "{longest:?}");
            assert_eq!(search.until(), begun + grace);
            let pause = search.pause;
            let search = search.later(grace);
            assert_eq!((search.until(), search.pause), (Instant::now() + grace, pause));
            assert_eq!(Search::new(Duration::ZERO).next(), None);
        });
    }
}
