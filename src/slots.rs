//! Semaphores that become larger or smaller while they are in use.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// Makes it one of `to` permits that was one of `from`. What is in use beyond that is waited for, in turn, by a task.
pub fn resize(slots: &Arc<Semaphore>, from: usize, to: usize, tracker: &TaskTracker) {
    if let Some(more) = to.checked_sub(from) {
        slots.add_permits(more);
        return;
    }
    let fewer = from - to;
    let left = fewer - slots.forget_permits(fewer);
    if left > 0 {
        let (slots, left) = (Arc::clone(slots), u32::try_from(left).unwrap_or(u32::MAX));
        tracker.spawn(async move {
            // Nobody closes it.
            if let Ok(permits) = slots.acquire_many_owned(left).await {
                permits.forget();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever was in use when it became smaller, in the end there are as many as was said last.
    #[tokio::test]
    async fn in_the_end_there_are_as_many_as_was_said() {
        let (slots, tracker) = (Arc::new(Semaphore::new(8)), TaskTracker::new());
        let mut used: Vec<_> = (0..6).map(|_| Arc::clone(&slots).try_acquire_owned().expect("a permit")).collect();
        resize(&slots, 8, 2, &tracker);
        assert_eq!((slots.available_permits(), tracker.len()), (0, 1));
        tokio::task::yield_now().await;
        used.truncate(2);
        tokio::task::yield_now().await;
        assert!(slots.try_acquire().is_err(), "two are in use");
        // One that is not yet small enough becomes larger again.
        used.extend(slots.clone().try_acquire_owned());
        resize(&slots, 2, 1, &tracker);
        tokio::task::yield_now().await;
        resize(&slots, 1, 4, &tracker);
        used.clear();
        tracker.close();
        tracker.wait().await;
        assert_eq!(slots.available_permits(), 4);
    }
}
