//! Who hears the order to end: all who have their alarms in one place. A future for each session would be a twentieth of an idle one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::alarms::Alarms;

/// Those of all workers.
#[derive(Debug, Default)]
pub(super) struct Ears(Mutex<Vec<Weak<Alarms>>>);

impl Ears {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Alarms>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more. Those that are gone make room.
    pub(super) fn add(&self, alarms: &Arc<Alarms>) {
        let mut all = self.lock();
        all.retain(|alarms| alarms.strong_count() > 0);
        all.push(Arc::downgrade(alarms));
    }

    /// Wakes all.
    pub(super) fn wake(&self) {
        let all: Vec<_> = self.lock().iter().filter_map(Weak::upgrade).collect();
        for alarms in all {
            alarms.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        task::Wake,
        time::Duration,
    };

    use super::{
        super::{Config, Drain, Readiness},
        *,
    };

    #[derive(Debug, Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn drain() -> Drain {
        Drain::new(Config {
            delay: Duration::ZERO,
            window: Duration::from_secs(1),
            quiet: Duration::ZERO,
            timeout: Duration::from_secs(1),
            close_code: 1001,
            reason: String::new(),
            readiness: Readiness::AfterDelay,
        })
    }

    /// Each order wakes each who listens once, whosever alarms he is in, and nobody who has gone.
    #[test]
    fn each_order_is_heard_once() {
        let drain = drain();
        let all: Vec<_> = (0..3).map(|_| Alarms::new()).collect();
        for alarms in &all {
            drain.wakes(alarms);
        }
        drain.wakes(&Alarms::new());
        let ears: Vec<_> = (0..40)
            .map(|nth| {
                let (alarms, count) = (&all[nth % all.len()], Arc::new(Count::default()));
                (alarms, alarms.join(&Arc::clone(&count).into()), count)
            })
            .collect();
        let woken = || ears.iter().map(|(.., count)| count.0.load(Ordering::Relaxed)).collect::<Vec<_>>();
        for _ in 0..2 {
            drain.begin();
            assert_eq!(woken(), vec![1; 40]);
        }
        ears.iter().step_by(3).for_each(|(alarms, place, _)| alarms.leave(*place));
        drain.hurry();
        assert_eq!(woken(), (0..40).map(|nth| if nth % 3 == 0 { 1 } else { 2 }).collect::<Vec<_>>());
        drain.wakes(&all[0]);
        assert_eq!(drain.inner.ears.lock().len(), all.len() + 1);
    }
}
