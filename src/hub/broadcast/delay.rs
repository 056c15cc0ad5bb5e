//! How long messages wait for others to go out with: from the first of them on, whatever comes behind it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep};

/// See the module.
#[derive(Debug)]
pub(super) struct Delay {
    length: Duration,
    /// Of no meaning unless something waits.
    over: Pin<Box<Sleep>>,
    is_waiting: bool,
}

impl Delay {
    /// Nothing waits.
    pub(super) fn new(length: Duration) -> Self {
        Self { length, over: Box::pin(sleep(length)), is_waiting: false }
    }

    /// Something came: it `waits`, behind whatever else does, or all went out.
    pub(super) fn came(&mut self, waits: bool) {
        if waits && !self.is_waiting {
            self.over.as_mut().reset(Instant::now() + self.length);
        }
        self.is_waiting = waits;
    }

    /// Nothing is to wait any longer. Gives whether something did.
    pub(super) fn stop(&mut self) -> bool {
        std::mem::take(&mut self.is_waiting)
    }

    /// Until something has waited for long enough: then it no longer does.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.is_waiting {
            return Poll::Pending;
        }
        ready!(self.over.as_mut().poll(cx));
        self.is_waiting = false;
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::*;

    /// What waits is over so long after the first of it came, and not later because of what came behind; nothing is over that went out before.
    #[tokio::test(start_paused = true)]
    async fn the_first_waits_longest() {
        let (length, step) = (Duration::from_millis(20), Duration::from_millis(8));
        let mut delay = Delay::new(length);
        let over = async |delay: &mut Delay, within| timeout(within, poll_fn(|cx| delay.poll(cx))).await.is_ok();
        assert!(!over(&mut delay, 2 * length).await);
        for _ in 0..2 {
            delay.came(true);
            let since = Instant::now();
            assert!(!over(&mut delay, step).await);
            delay.came(true);
            assert!(!over(&mut delay, step).await);
            delay.came(true);
            assert!(over(&mut delay, step).await);
            assert_eq!(since.elapsed(), length);
            assert!(!over(&mut delay, 2 * length).await);
        }
        delay.came(true);
        assert!(!over(&mut delay, step).await);
        delay.came(false);
        assert!(!over(&mut delay, 2 * length).await);
        delay.came(true);
        assert!(delay.stop() && !delay.stop());
        assert!(!over(&mut delay, 2 * length).await);
    }
}
