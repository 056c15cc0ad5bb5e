//! Exchanges with the backend whose client has left.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use bytes::Bytes;

use super::{Context, http::rsv};
use crate::{
    close::Keeps,
    relay::{self, Leg, Relay},
    side::Side,
    upstream::{Answer, Error, Exchange, Failure, Placed, Reply},
};

impl Context {
    /// Waits for an exchange for as long as the client does; then it is ended behind our back.
    pub(super) async fn carried_out<T: Orphan>(self: &Arc<Self>, exchange: Exchange<T>) -> Result<T, Error> {
        let guarded = Guarded { exchange: Some(exchange), context: Arc::clone(self) };
        guarded.await.map_err(|Failure { error, stream }| {
            if let Some(stream) = stream {
                self.linger_left(Side::Backend, stream);
            }
            error
        })
    }
}

/// An exchange whose client may leave: what the backend has begun is then brought to an orderly end all the same.
pub(super) struct Guarded<T: Orphan> {
    exchange: Option<Exchange<T>>,
    context: Arc<Context>,
}

impl<T: Orphan> Future for Guarded<T> {
    type Output = Result<T, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let exchange = self.exchange.as_mut().expect("a future is not polled after it is ready");
        let result = std::task::ready!(Pin::new(exchange).poll(cx));
        self.exchange = None;
        Poll::Ready(result)
    }
}

impl<T: Orphan> Drop for Guarded<T> {
    fn drop(&mut self) {
        let Some(exchange) = self.exchange.take().filter(Exchange::has_begun) else { return };
        let context = Arc::clone(&self.context);
        // Others may have its turn. How many are carried on is bounded apart; the rest gets its FIN at once.
        exchange.end_turn();
        let is_worth_waiting = T::IS_WORTH_WAITING && exchange.is_connected();
        let slot = if is_worth_waiting { Arc::clone(&context.orphans).try_acquire_owned().ok() } else { None };
        if slot.is_none() {
            exchange.give_up();
        }
        self.context.tracker.spawn(async move {
            match exchange.await {
                Ok(orphan) => orphan.end(context).await,
                Err(Failure { stream: Some(stream), .. }) => context.linger_left(Side::Backend, stream),
                Err(Failure { stream: None, .. }) => {}
            }
            drop(slot);
        });
    }
}

/// What a backend gave to a client that is gone.
pub(super) trait Orphan: Send + 'static {
    /// The backend's answer obliges us to something: a 101 to a Close.
    const IS_WORTH_WAITING: bool;

    /// Ends it in order.
    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

impl<T: Orphan> Orphan for Placed<T> {
    const IS_WORTH_WAITING: bool = T::IS_WORTH_WAITING;

    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            self.what.end(context).await;
            drop(self.load);
        })
    }
}

impl Orphan for Reply {
    const IS_WORTH_WAITING: bool = false;

    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            drop(self.response);
            if let Some(stream) = self.connection.await {
                context.linger_left(Side::Backend, stream);
            }
        })
    }
}

impl Orphan for Answer {
    const IS_WORTH_WAITING: bool = true;

    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match self {
            Self::Refusal(reply) => reply.end(context),
            Self::Tunnel { stream, early, head } => Box::pin(async move {
                // A session whose client was reset: the backend gets its Close, and time to answer it.
                let client = Leg { stream: None, early: Bytes::new() };
                let backend = Leg { stream: Some(stream), early };
                let rsv = rsv(&head);
                // It has no place that somebody else could have.
                let shared = relay::Shared { delays: Arc::default(), ..relay::Shared::clone(&context.relay) };
                let mut relay = Relay::new(Arc::new(shared), rsv, client, backend);
                for _ in Side::BOTH {
                    let ended = relay.next_ended().await;
                    context.let_go(ended, Keeps::Nothing);
                }
            }),
        }
    }
}
