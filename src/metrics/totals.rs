//! What was counted, as plain numbers that can be subtracted from one another: for the live page, which wants to know what came
//! in a minute. Nothing of the metrics crate, and no clock.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::{ABNORMAL, CODES, Handshake, INITIATORS, STATUS_CLASSES};
use crate::admission::Reason;

/// Upper bounds of durations in nanoseconds: 62.5 us to about 16 s, four for each time that it doubles. What an estimate within
/// one of them is wrong by is a tenth or so.
const BOUNDS_NANOS: [u64; 73] = {
    // Roots of two, in millionths.
    const STEPS: [u64; 4] = [1_000_000, 1_189_207, 1_414_214, 1_681_793];
    let mut bounds = [0; 73];
    let mut index = 0;
    while index < bounds.len() {
        bounds[index] = (62_500 << (index / 4)) * STEPS[index % 4] / 1_000_000;
        index += 1;
    }
    bounds
};

/// What `/metrics` tells begins at 0.5 ms, with one bound each time that it doubles.
const COARSE: usize = 12;
const PER_DOUBLING: usize = 4;

/// How long something took, counted by [`BOUNDS_NANOS`].
#[derive(Debug)]
pub(super) struct Durations {
    counts: [AtomicU64; BOUNDS_NANOS.len() + 1],
    nanos: AtomicU64,
    longest_nanos: AtomicU64,
}

impl Default for Durations {
    fn default() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; BOUNDS_NANOS.len() + 1],
            nanos: AtomicU64::new(0),
            longest_nanos: AtomicU64::new(0),
        }
    }
}

impl Durations {
    pub(super) fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.counts[BOUNDS_NANOS.partition_point(|bound| *bound < nanos)].fetch_add(1, Relaxed);
        self.nanos.fetch_add(nanos, Relaxed);
        self.longest_nanos.fetch_max(nanos, Relaxed);
    }

    /// Upper bounds in seconds, the last one infinite, each with how many are below it and above the one before.
    pub(super) fn coarse(&self) -> Vec<(f64, u64)> {
        let mut buckets = Vec::new();
        let mut count = 0;
        for (index, counted) in self.counts.iter().enumerate() {
            count += counted.load(Relaxed);
            let bound = BOUNDS_NANOS.get(index);
            if bound.is_none() || (index >= COARSE && (index - COARSE).is_multiple_of(PER_DOUBLING)) {
                let seconds = bound.map_or(f64::INFINITY, |nanos| Duration::from_nanos(*nanos).as_secs_f64());
                buckets.push((seconds, std::mem::take(&mut count)));
            }
        }
        buckets
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.counts.iter().map(|count| count.load(Relaxed))
    }

    pub(super) fn seconds(&self) -> f64 {
        Duration::from_nanos(self.nanos.load(Relaxed)).as_secs_f64()
    }

    /// The longest since it was taken last.
    pub(super) fn longest(&self, takes: bool) -> Duration {
        let nanos = if takes { self.longest_nanos.swap(0, Relaxed) } else { self.longest_nanos.load(Relaxed) };
        Duration::from_nanos(nanos)
    }
}

/// Sessions that ended: by who began it, cut or clean, and the code.
#[derive(Debug)]
pub(super) struct Closes([AtomicU64; CLOSES]);

const CLOSES: usize = INITIATORS.len() * 2 * CODES.len();

impl Default for Closes {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; CLOSES])
    }
}

impl Closes {
    pub(super) fn count(&self, initiator: &'static str, clean: bool, code: usize) {
        let initiator = INITIATORS.iter().position(|name| *name == initiator).expect("one of the names");
        self.0[(initiator * 2 + usize::from(clean)) * CODES.len() + code].fetch_add(1, Relaxed);
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().map(|count| count.load(Relaxed))
    }

    /// Those of which there are any.
    pub(super) fn all(&self) -> impl Iterator<Item = (Close, u64)> + '_ {
        self.0.iter().enumerate().map(|(index, count)| (Close::at(index), count.load(Relaxed)))
    }
}

/// A kind of end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Close {
    /// `client`, `backend` or `tidegate`.
    pub initiator: &'static str,
    /// Both Close handshakes were completed.
    pub clean: bool,
    /// As in `tidegate_closes_total`.
    pub code: &'static str,
}

impl Close {
    const fn at(index: usize) -> Self {
        let who = index / CODES.len();
        Self { initiator: INITIATORS[who / 2], clean: who % 2 == 1, code: CODES[index % CODES.len()] }
    }
}

/// What the parts of [`Totals`] are, and where they begin.
const HANDSHAKES: Range<usize> = 0..Handshake::ALL.len();
const REFUSED: Range<usize> = HANDSHAKES.end..HANDSHAKES.end + Reason::ALL.len();
const REQUESTS: Range<usize> = REFUSED.end..REFUSED.end + STATUS_CLASSES.len();
const CAUSES: Range<usize> = REQUESTS.end..REQUESTS.end + ABNORMAL.len();
const SHARED: Range<usize> = CAUSES.end..CAUSES.end + super::SHARED.len();
const MESSAGES: Range<usize> = SHARED.end..SHARED.end + 2;
const ENDS: Range<usize> = MESSAGES.end..MESSAGES.end + CLOSES;
const CONNECT: Range<usize> = ENDS.end..ENDS.end + BOUNDS_NANOS.len() + 1;
const CLOSE: Range<usize> = CONNECT.end..CONNECT.end + BOUNDS_NANOS.len() + 1;
const KERNEL: Range<usize> = CLOSE.end..CLOSE.end + super::KERNEL.len();

/// Counters at one moment, or what they counted between two. The lower half of each: a difference is right up to four thousand
/// million, and many can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Totals([u32; KERNEL.end]);

impl Default for Totals {
    fn default() -> Self {
        Self([0; KERNEL.end])
    }
}

impl Totals {
    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = self.clone();
        for (count, before) in difference.0.iter_mut().zip(&earlier.0) {
            *count = count.wrapping_sub(*before);
        }
        difference
    }

    pub(super) fn set(&mut self, part: Part, counts: impl IntoIterator<Item = u64>) {
        for (slot, count) in self.0[part.range()].iter_mut().zip(counts) {
            // The lower half is what is wanted.
            *slot = u32::try_from(count & u64::from(u32::MAX)).expect("it was just cut");
        }
    }

    /// Takes over what the kernel counts, which is looked at less often.
    pub fn keep_kernel(&mut self, from: &Self) {
        self.0[KERNEL].copy_from_slice(&from.0[KERNEL]);
    }

    /// Numbers of a part, in the order of its names.
    pub fn part(&self, part: Part) -> &[u32] {
        &self.0[part.range()]
    }

    /// Those of a part that are not 0, with their names; of messages, ends and durations there are none.
    pub fn named(&self, part: Part) -> Vec<(&'static str, u32)> {
        let name = move |index: usize| match part {
            Part::Handshakes => Handshake::ALL[index].as_str(),
            Part::Refused => Reason::ALL[index].as_str(),
            Part::Requests => STATUS_CLASSES[index],
            Part::Causes => ABNORMAL[index],
            Part::Shared => super::SHARED[index],
            Part::Kernel => super::KERNEL[index].0,
            Part::Messages | Part::Ends | Part::Connect | Part::Close => "",
        };
        let all = self.part(part).iter().enumerate().map(move |(index, count)| (name(index), *count));
        all.filter(|(name, count)| *count > 0 && !name.is_empty()).collect()
    }

    /// One of [`Self::named`].
    pub fn get(&self, part: Part, name: &str) -> u32 {
        self.named(part).into_iter().find(|(found, _)| *found == name).map_or(0, |(_, count)| count)
    }

    /// Sessions that ended, by kind.
    pub fn ends(&self) -> impl Iterator<Item = (Close, u32)> + '_ {
        let all = self.part(Part::Ends).iter().enumerate().map(|(index, count)| (Close::at(index), *count));
        all.filter(|(_, count)| *count > 0)
    }

    /// So many durations of a part are known, and `share` of them took no longer than so many milliseconds: an estimate, as if they
    /// were spread evenly between two bounds. `None`: there are none.
    pub fn quantile(&self, part: Part, share: f64) -> Option<f64> {
        let counts = self.part(part);
        let total: f64 = counts.iter().copied().map(f64::from).sum();
        let mut left = total * share;
        let nanos = |index: usize| {
            let bound = BOUNDS_NANOS[index.min(BOUNDS_NANOS.len() - 1)];
            Duration::from_nanos(bound).as_secs_f64() * 1e3
        };
        for (index, count) in counts.iter().copied().map(f64::from).enumerate().filter(|(_, count)| *count > 0.0) {
            if left <= count {
                let from = index.checked_sub(1).map_or(0.0, nanos);
                return Some(from + (nanos(index) - from) * left / count);
            }
            left -= count;
        }
        None
    }
}

/// What is counted in a [`Totals`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Handshakes by result.
    Handshakes,
    /// Clients that were turned away, by reason.
    Refused,
    /// Plain requests by the class of their answer.
    Requests,
    /// Ends that were no Close handshake, by cause.
    Causes,
    /// What clients who share a WebSocket suffer, by [`super::SHARED`].
    Shared,
    /// Text and binary messages, of clients and of backends.
    Messages,
    /// Ends of sessions, by kind.
    Ends,
    /// How long handshakes took that went well, by [`BOUNDS_NANOS`].
    Connect,
    /// How long ends of sessions took, likewise.
    Close,
    /// What the kernel counts.
    Kernel,
}

impl Part {
    const fn range(self) -> Range<usize> {
        match self {
            Self::Handshakes => HANDSHAKES,
            Self::Refused => REFUSED,
            Self::Requests => REQUESTS,
            Self::Causes => CAUSES,
            Self::Shared => SHARED,
            Self::Messages => MESSAGES,
            Self::Ends => ENDS,
            Self::Connect => CONNECT,
            Self::Close => CLOSE,
            Self::Kernel => KERNEL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is exposed has the bounds that it always had: 0.5 ms to about 16 s, each twice the one before. Each duration is below
    /// its bound, and a duration that is a bound belongs to it (`le`).
    #[test]
    fn buckets_are_those_of_the_exposition() {
        let durations = Durations::default();
        for micros in [1, 500, 501, 1000, 20_000_000] {
            durations.observe(Duration::from_micros(micros));
        }
        let buckets = durations.coarse();
        let mut bound = 0.000_5;
        for (seconds, _) in &buckets[..16] {
            assert!((seconds - bound).abs() < 1e-12, "{seconds} for {bound}");
            bound *= 2.0;
        }
        assert!(buckets[16].0.is_infinite());
        let counts: Vec<_> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!((counts[0], counts[1], counts[16], counts.iter().sum()), (2, 2, 1, 5_u64));
        assert_eq!(durations.longest(true), Duration::from_secs(20));
        assert_eq!(durations.longest(true), Duration::ZERO);
    }

    /// Of durations that are spread evenly, the estimates are right by a tenth; of none there is no estimate.
    #[test]
    fn quantiles_are_estimated() {
        let durations = Durations::default();
        (1..=1000).for_each(|millis| durations.observe(Duration::from_millis(millis)));
        let mut totals = Totals::default();
        assert_eq!(totals.quantile(Part::Connect, 0.5), None);
        totals.set(Part::Connect, durations.counts.iter().map(|count| count.load(Relaxed)));
        for (share, wanted) in [(0.5, 500.0), (0.99, 990.0)] {
            let found = totals.quantile(Part::Connect, share).expect("there are some");
            assert!((found - wanted).abs() < wanted / 10.0, "{share}: {found} for {wanted}");
        }
    }

    /// A counter that passed the end of its lower half since an earlier look counts on.
    #[test]
    fn differences_pass_the_end_of_the_numbers() {
        let (mut before, mut after) = (Totals::default(), Totals::default());
        before.set(Part::Messages, [u64::from(u32::MAX), 5]);
        after.set(Part::Messages, [u64::from(u32::MAX) + 3, 5]);
        assert_eq!(after.since(&before).part(Part::Messages), [3, 0]);
    }
}
