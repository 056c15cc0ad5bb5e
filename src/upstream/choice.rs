//! Which endpoint is next, and which is left alone for a while: rules on numbers and moments.
//!
//! Not here: connecting, clocks, locks. Randomness is an argument.

use std::time::Duration;

use rand::{Rng, RngExt as _};
use tokio::time::Instant;

/// When an endpoint is left alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// After so many failures in a row.
    pub after: u32,
    /// For how long, the first time.
    pub time: Duration,
}

/// Each time in a row that it is left alone takes twice as long as the one before; this often, so 16 times as long at most.
const DOUBLINGS: u32 = 4;

/// Up to this part of a time is added to it at random: what was left alone together comes back one by one.
const JITTER: f64 = 0.2;

/// What came of connecting to an endpoint.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// In a row.
    failures: u32,
    ejected: Option<Ejected>,
    /// How often it was, without having been well for as long in between.
    times: u32,
    /// When it was last found to be well again, and how long it had been left alone for.
    returned: Option<(Instant, Duration)>,
}

/// It is left alone.
#[derive(Debug, Clone, Copy)]
struct Ejected {
    since: Instant,
    until: Instant,
    /// Somebody finds out whether it is well again.
    is_on_trial: bool,
}

impl Health {
    /// Since when it is left alone.
    pub(super) fn ejected_since(&self) -> Option<Instant> {
        self.ejected.map(|ejected| ejected.since)
    }

    /// It was left alone for long enough, and nobody is finding out yet: whoever asks does. One attempt decides.
    pub(super) fn begin_trial(&mut self, now: Instant) -> bool {
        let due = self.ejected.as_mut().filter(|ejected| !ejected.is_on_trial && ejected.until <= now);
        due.map(|ejected| ejected.is_on_trial = true).is_some()
    }

    /// A connection came about. True: it was left alone until now.
    pub(super) fn succeeded(&mut self, now: Instant) -> bool {
        self.failures = 0;
        let Some(ejected) = self.ejected.take() else { return false };
        self.returned = Some((now, ejected.until - ejected.since));
        true
    }

    /// None came about. True: it is left alone from now on.
    pub(super) fn failed(&mut self, now: Instant, policy: Policy, random: f64) -> bool {
        self.failures = self.failures.saturating_add(1);
        match self.ejected {
            // What was under way when it was ejected says nothing new.
            Some(ejected) if !ejected.is_on_trial => false,
            Some(_) => {
                self.eject(now, policy, random);
                false
            }
            None if self.failures >= policy.after => {
                self.eject(now, policy, random);
                true
            }
            None => false,
        }
    }

    /// Nobody finds out any more.
    pub(super) fn end_trial(&mut self) {
        if let Some(ejected) = &mut self.ejected {
            ejected.is_on_trial = false;
        }
    }

    fn eject(&mut self, now: Instant, policy: Policy, random: f64) {
        if self.returned.take().is_some_and(|(at, length)| now.saturating_duration_since(at) > length) {
            self.times = 0;
        }
        let length = policy.time * 2_u32.pow(self.times.min(DOUBLINGS));
        self.times = self.times.saturating_add(1);
        let until = now + length.mul_f64(1.0 + JITTER * random);
        self.ejected = Some(Ejected { since: now, until, is_on_trial: false });
    }
}

/// An endpoint as it looks at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// Sessions and requests that are with it, or on their way.
    pub load: usize,
    /// It is left alone since then.
    pub ejected: Option<Instant>,
    /// It was tried already, for the same client.
    pub is_tried: bool,
}

/// The less loaded one of two that are drawn from those that are well; so many may choose at once without all choosing the
/// same. When none is well, the one that was left alone for the longest. `None`: all were tried.
pub(super) fn choose(candidates: &[Candidate], random: &mut impl Rng) -> Option<usize> {
    let untried = || candidates.iter().enumerate().filter(|(_, candidate)| !candidate.is_tried);
    let well: Vec<usize> =
        untried().filter(|(_, candidate)| candidate.ejected.is_none()).map(|(index, _)| index).collect();
    match well[..] {
        [] => untried().min_by_key(|(_, candidate)| candidate.ejected).map(|(index, _)| index),
        [only] => Some(only),
        _ => {
            let first = random.random_range(0..well.len());
            let second = (first + random.random_range(1..well.len())) % well.len();
            let (first, second) = (well[first], well[second]);
            // Equal ones by the order in which they were drawn, which is random.
            Some(if candidates[second].load < candidates[first].load { second } else { first })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    const POLICY: Policy = Policy { after: 2, time: Duration::from_secs(5) };

    fn secs(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn failures_in_a_row_eject_and_one_attempt_brings_back() {
        let start = Instant::now();
        let mut health = Health::default();
        assert!(!health.failed(start, POLICY, 0.0));
        assert!(!health.succeeded(start));
        assert!(!health.failed(start, POLICY, 0.0), "the row was broken");
        assert!(health.failed(start, POLICY, 0.0));
        assert_eq!(health.ejected_since(), Some(start));
        // Those that were under way.
        assert!(!health.failed(start + secs(1), POLICY, 0.0));
        assert!(!health.begin_trial(start + secs(4)));
        assert!(health.begin_trial(start + secs(5)));
        assert!(!health.begin_trial(start + secs(5)), "one is enough");
        assert!(health.succeeded(start + secs(5)));
        assert_eq!(health.ejected_since(), None);
    }

    #[test]
    fn the_time_doubles_up_to_a_bound_until_it_was_well_for_long() {
        let mut now = Instant::now();
        let mut health = Health::default();
        health.failed(now, POLICY, 0.0);
        health.failed(now, POLICY, 0.0);
        for length in [5, 10, 20, 40, 80, 80] {
            assert!(!health.begin_trial(now + secs(length) - Duration::from_millis(1)));
            now += secs(length);
            assert!(health.begin_trial(now), "{length}");
            assert!(!health.failed(now, POLICY, 0.0));
        }
        // Back for a moment only: it goes on where it was.
        now += secs(80);
        assert!(health.begin_trial(now) && health.succeeded(now));
        health.failed(now, POLICY, 0.0);
        assert!(health.failed(now, POLICY, 1.0));
        assert!(!health.begin_trial(now + secs(95)));
        now += secs(96);
        assert!(health.begin_trial(now) && health.succeeded(now));
        now += secs(97);
        health.failed(now, POLICY, 0.0);
        health.failed(now, POLICY, 0.0);
        assert!(health.begin_trial(now + secs(5)), "it was well for longer than it was left alone");
    }

    #[test]
    fn when_none_is_well_the_longest_ejected_is_tried() {
        let start = Instant::now();
        let at = |after| Candidate { load: 0, ejected: Some(start + secs(after)), is_tried: false };
        let mut all = [at(3), at(1), at(2)];
        let mut random = StdRng::seed_from_u64(1);
        for expected in [Some(1), Some(2), Some(0), None] {
            let chosen = choose(&all, &mut random);
            assert_eq!(chosen, expected);
            if let Some(index) = chosen {
                all[index].is_tried = true;
            }
        }
    }

    proptest! {
        /// Never one that is left alone while others are well, never one that was tried.
        #[test]
        fn the_chosen_one_is_well_if_any_is(
            all in prop::collection::vec((0_usize..50, any::<bool>(), any::<bool>()), 0..12),
            seed: u64,
        ) {
            let now = Instant::now();
            let all: Vec<_> = all.into_iter().map(|(load, is_ejected, is_tried)| {
                Candidate { load, ejected: is_ejected.then_some(now), is_tried }
            }).collect();
            let chosen = choose(&all, &mut StdRng::seed_from_u64(seed));
            let any_untried = all.iter().any(|one| !one.is_tried);
            let any_well = all.iter().any(|one| !one.is_tried && one.ejected.is_none());
            prop_assert_eq!(chosen.is_some(), any_untried);
            if let Some(chosen) = chosen {
                prop_assert!(!all[chosen].is_tried);
                prop_assert_eq!(all[chosen].ejected.is_none(), any_well);
                // Of all that are well, not the single most loaded one.
                let well: Vec<_> = all.iter().filter(|one| !one.is_tried && one.ejected.is_none()).collect();
                let more = well.iter().filter(|one| one.load >= all[chosen].load).count();
                prop_assert!(well.len() < 2 || more >= 2);
            }
        }

        /// Under churn each has its share, whatever the seed; one that is away gets nothing, and when it is back, its share again.
        #[test]
        fn shares_are_even_under_churn(seed: u64, endpoints in 2_usize..8) {
            let mut churn = Churn { random: StdRng::seed_from_u64(seed), sessions: Vec::new(), loads: vec![0; endpoints] };
            churn.go_on(300 * endpoints, None);
            prop_assert!(churn.is_even(), "{:?}", churn.loads);
            churn.sessions.retain(|at| *at != 0);
            churn.loads[0] = 0;
            churn.go_on(100, Some(0));
            prop_assert_eq!(churn.loads[0], 0);
            churn.go_on(400 * endpoints, None);
            prop_assert!(churn.is_even(), "{:?}", churn.loads);
        }
    }

    /// Sessions that come to endpoints, 100 for each, and leave at random.
    struct Churn {
        random: StdRng,
        sessions: Vec<usize>,
        loads: Vec<usize>,
    }

    impl Churn {
        fn go_on(&mut self, steps: usize, away: Option<usize>) {
            let now = Instant::now();
            for _ in 0..steps {
                let candidate = |(index, load): (usize, &usize)| Candidate {
                    load: *load,
                    ejected: (away == Some(index)).then_some(now),
                    is_tried: false,
                };
                let all: Vec<_> = self.loads.iter().enumerate().map(candidate).collect();
                let chosen = choose(&all, &mut self.random).expect("one");
                self.sessions.push(chosen);
                self.loads[chosen] += 1;
                if self.sessions.len() > 100 * self.loads.len() {
                    let leaves = self.random.random_range(0..self.sessions.len());
                    self.loads[self.sessions.swap_remove(leaves)] -= 1;
                }
            }
        }

        fn is_even(&self) -> bool {
            let even = self.sessions.len() / self.loads.len();
            self.loads.iter().all(|load| load.abs_diff(even) <= even / 5)
        }
    }
}
