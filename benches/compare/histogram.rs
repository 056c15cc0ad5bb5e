//! Times by their size, as `HdrHistogram` keeps them: 64 steps for each doubling, so a value is known to within 1.6 %, and the largest
//! exactly. All of it goes into the JSON, so that other quantiles, and those of several rounds together, can be had later.

#![expect(clippy::cast_precision_loss, reason = "times far below 2^52")]

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

/// Of a value that so many bits count.
const BITS: u32 = 7;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Histogram {
    max_ns: u64,
    /// By the smallest value of their step, in nanoseconds.
    counts: BTreeMap<u64, u64>,
}

/// The bits of `ns` that are not looked at.
fn shift(ns: u64) -> u32 {
    (u64::BITS - ns.leading_zeros()).saturating_sub(BITS)
}

impl Histogram {
    pub fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let shift = shift(ns);
        *self.counts.entry(ns >> shift << shift).or_default() += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    pub fn add(&mut self, other: &Self) {
        for (from, count) in &other.counts {
            *self.counts.entry(*from).or_default() += count;
        }
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }

    /// What so many of 100,000 do not exceed, in microseconds; none of nothing.
    pub fn quantile_us(&self, of_100_000: u64) -> Option<f64> {
        let mut left = (self.count() * of_100_000).div_ceil(100_000).max(1);
        let (from, _) = self.counts.iter().find(|(_, count)| {
            left = left.saturating_sub(**count);
            left == 0
        })?;
        let to = from + (1 << shift(*from)) - 1;
        Some(to.min(self.max_ns) as f64 / 1e3)
    }
}
