//! An epoll of its own, for many sockets that one task watches: it costs the process nothing for each but the kernel's entry.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{Timespec, epoll};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use super::sys;

/// See the module.
#[derive(Debug)]
pub struct Poller {
    fd: Arc<OwnedFd>,
}

/// A poller that is itself watched by a runtime.
#[derive(Debug)]
pub struct Watch {
    fd: AsyncFd<Arc<OwnedFd>>,
}

impl Poller {
    /// Watches nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?) })
    }

    /// From now on `fd` is watched, until it is closed: it has news as long as there is something to be read from it.
    pub fn add(&self, fd: impl AsFd, id: u64) -> io::Result<()> {
        Ok(epoll::add(&*self.fd, fd, epoll::EventData::new_u64(id), epoll::EventFlags::IN)?)
    }

    /// The ids of those that have news, as many as `ids` has room for, without waiting.
    pub fn ready(&self, ids: &mut Vec<u64>) {
        let mut events = Vec::with_capacity(ids.capacity());
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It fails when a signal came: then the next look finds them.
        if epoll::wait(&*self.fd, rustix::buffer::spare_capacity(&mut events), Some(&now)).is_ok() {
            ids.extend(events.iter().map(|event: &epoll::Event| event.data.u64()));
        }
    }

    /// Lets the runtime that this is called on watch it.
    pub fn watch(&self) -> io::Result<Watch> {
        Ok(Watch { fd: sys::watch_poller(Arc::clone(&self.fd))? })
    }
}

impl Watch {
    /// Resolves when the poller has news; cleared, when it has none any more.
    pub async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, Arc<OwnedFd>>> {
        self.fd.readable().await
    }
}
