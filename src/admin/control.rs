//! What may be asked of the process at the admin listener, and how it gets there.

use std::time::Duration;

use http::StatusCode;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use crate::drain::{Drain, Phase, Status};

/// Something that is asked for; answered when it is done.
#[derive(Debug)]
pub enum Order {
    /// Begin a drain, if none has begun.
    Drain(oneshot::Sender<()>),
    /// Undo it; false: it is too late.
    Undo(oneshot::Sender<bool>),
    /// Give the log this filter; an error says what is wrong with it.
    Filter(String, oneshot::Sender<Result<(), String>>),
    /// Read the configuration again.
    Reload(oneshot::Sender<Reloaded>),
}

/// What came of a reload.
#[derive(Debug)]
pub struct Reloaded {
    /// What it amounts to.
    pub status: StatusCode,
    /// The rest of it.
    pub json: String,
}

/// The way to who decides.
#[derive(Debug)]
pub struct Control {
    drain: Drain,
    orders: mpsc::Sender<Order>,
}

impl Control {
    /// And the other end of it.
    pub fn new(drain: Drain) -> (Self, mpsc::Receiver<Order>) {
        let (orders, received) = mpsc::channel(1);
        (Self { drain, orders }, received)
    }

    pub(super) fn status(&self) -> Status {
        *self.drain.status().borrow()
    }

    /// The same, to be waited for.
    pub(super) fn watch(&self) -> watch::Receiver<Status> {
        self.drain.status()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.drain.is_ready()
    }

    pub(super) async fn drain(&self) {
        let _ = self.ask(Order::Drain).await;
    }

    pub(super) async fn undo(&self) -> bool {
        self.ask(Order::Undo).await.unwrap_or(false)
    }

    /// `None`: the process is about to end.
    pub(super) async fn filter(&self, filter: String) -> Option<Result<(), String>> {
        self.ask(|told| Order::Filter(filter, told)).await
    }

    pub(super) async fn reload(&self) -> Option<Reloaded> {
        self.ask(Order::Reload).await
    }

    /// Waits for the end of the drain; false: none began within `patience`, or it was undone.
    pub(super) async fn drained(&self, patience: Duration) -> bool {
        let mut status = self.drain.status();
        loop {
            let begun = status.wait_for(|status| status.phase != Phase::Running);
            if !matches!(timeout(patience, begun).await, Ok(Ok(_))) {
                return false;
            }
            match status.wait_for(|status| matches!(status.phase, Phase::Running | Phase::Drained)).await {
                Ok(status) if status.phase == Phase::Drained => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// `None`: the process is about to end.
    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Option<T> {
        let (told, answer) = oneshot::channel();
        self.orders.send(order(told)).await.ok()?;
        answer.await.ok()
    }
}
