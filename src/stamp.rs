//! A moment in half the room of an `Instant`: thousands of sessions keep a dozen each.

use std::{
    num::NonZeroU64,
    ops::{Add, Sub},
    sync::OnceLock,
    time::Duration,
};

use tokio::time::Instant;

/// Nanoseconds since a moment before the process began. What is too late for it, in 584 years, is the latest there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(NonZeroU64);

/// How long before. Clocks of tests may be set back by less.
const BEFORE: Duration = Duration::from_hours(24 * 365);

impl Stamp {
    /// The moment that it is.
    pub fn now() -> Self {
        Instant::now().into()
    }

    /// In milliseconds, of which only differences tell something: it begins anew every 49 days.
    #[expect(clippy::cast_possible_truncation, reason = "that is what is wanted")]
    pub const fn short(self) -> u32 {
        (self.0.get() / 1_000_000) as u32
    }

    /// Since then; zero of a moment to come.
    pub fn elapsed(self) -> Duration {
        Self::now() - self
    }
}

/// What all are counted from.
fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(|| {
        let now = Instant::now();
        now.checked_sub(BEFORE).unwrap_or(now)
    })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl From<Instant> for Stamp {
    fn from(instant: Instant) -> Self {
        Self(NonZeroU64::MIN.saturating_add(nanoseconds(instant.saturating_duration_since(epoch()))))
    }
}

impl From<Stamp> for Instant {
    fn from(stamp: Stamp) -> Self {
        epoch() + Duration::from_nanos(stamp.0.get() - 1)
    }
}

impl Add<Duration> for Stamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanoseconds(duration)))
    }
}

/// Zero where the other one is later.
impl Sub for Stamp {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.get().saturating_sub(earlier.0.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There and back again is the same moment, and sums and differences are those of `Instant`.
    #[test]
    fn it_is_as_good_as_an_instant() {
        let now = Instant::now();
        let stamp = Stamp::from(now);
        assert_eq!(Instant::from(stamp), now);
        let later = stamp + Duration::from_millis(1500);
        assert_eq!(later - stamp, Duration::from_millis(1500));
        assert_eq!(Instant::from(later), now + Duration::from_millis(1500));
        assert_eq!(stamp - later, Duration::ZERO);
        assert!(stamp + Duration::MAX > later);
    }
}
