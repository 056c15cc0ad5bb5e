//! The seam between the pool and what runs it: locks, tasks and timeouts, or loom's in their place.
//!
//! Atomics are not in it: they only count. Tokens of cancellation are tokio's also under loom: nothing is given from one
//! thread to another by them.

#[cfg(loom)]
pub(super) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(super) use std::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(super) use tokio::sync::oneshot;

use std::{sync::PoisonError, time::Duration};

/// Nothing that can panic leaves what is behind a lock of the pool half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the pool's tasks run.
#[cfg(not(loom))]
#[derive(Debug)]
pub(super) struct Tasks {
    pub(super) tracker: tokio_util::task::TaskTracker,
    pub(super) runtime: tokio::runtime::Handle,
}

#[cfg(not(loom))]
impl Tasks {
    /// From any thread.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // Boxed, or each kind of pool would have the runtime's code for tasks once more.
        let task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(task);
        self.tracker.spawn_on(task, &self.runtime);
    }
}

/// `None`: it took too long.
#[cfg(not(loom))]
pub(super) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, future).await.ok()
}

/// Each task is a thread of the model.
#[cfg(loom)]
#[derive(Debug)]
pub(super) struct Tasks;

#[cfg(loom)]
impl Tasks {
    #[expect(clippy::unused_self, reason = "as above")]
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        loom::thread::spawn(|| loom::future::block_on(task));
    }
}

/// Nothing ever takes too long.
#[cfg(loom)]
pub(super) async fn within<T>(_: Duration, future: impl Future<Output = T>) -> Option<T> {
    Some(future.await)
}

/// As tokio's, with a lock that loom knows: what is sent may meet a receiver that leaves.
#[cfg(loom)]
pub(super) mod oneshot {
    use std::{
        pin::Pin,
        sync::Arc,
        task::{Context, Poll, Waker},
    };

    use super::{Mutex, lock};

    struct Slot<T> {
        value: Option<T>,
        waker: Option<Waker>,
        has_left: bool,
    }

    pub(in super::super) struct Sender<T>(Arc<Mutex<Slot<T>>>);
    pub(in super::super) struct Receiver<T>(Arc<Mutex<Slot<T>>>);

    /// Nobody sent anything, or not yet.
    #[derive(Debug)]
    pub(in super::super) struct Nothing;

    pub(in super::super) fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let slot = Arc::new(Mutex::new(Slot { value: None, waker: None, has_left: false }));
        (Sender(Arc::clone(&slot)), Receiver(slot))
    }

    impl<T> Sender<T> {
        pub(in super::super) fn send(self, value: T) -> Result<(), T> {
            let mut slot = lock(&self.0);
            if slot.has_left {
                return Err(value);
            }
            slot.value = Some(value);
            let waker = slot.waker.take();
            drop(slot);
            waker.into_iter().for_each(Waker::wake);
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        pub(in super::super) fn try_recv(&mut self) -> Result<T, Nothing> {
            lock(&self.0).value.take().ok_or(Nothing)
        }
    }

    impl<T> Future for Receiver<T> {
        type Output = Result<T, Nothing>;

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            let mut slot = lock(&self.0);
            match slot.value.take() {
                Some(value) => Poll::Ready(Ok(value)),
                None => {
                    slot.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            let mut slot = lock(&self.0);
            slot.has_left = true;
            let unread = slot.value.take();
            drop(slot);
            drop(unread);
        }
    }
}
