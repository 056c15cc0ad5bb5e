//! A body that must move on.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::BoxError;

/// Ends with an error when no frame came for a while. Waiting for the reader does not count: it is the source's clock.
#[derive(Debug)]
pub struct TimedBody<B> {
    inner: B,
    patience: Duration,
    /// What its trailers must not say: one hop further they could pass for headers.
    cleans_trailers: Option<fn(&mut HeaderMap)>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> TimedBody<B> {
    /// Of a body that has `patience` for each of its frames.
    pub const fn new(inner: B, patience: Duration) -> Self {
        Self { inner, patience, cleans_trailers: None, timer: None }
    }

    /// The same with `clean` applied to its trailers.
    #[must_use]
    pub fn cleaning_trailers(mut self, clean: fn(&mut HeaderMap)) -> Self {
        self.cleans_trailers = Some(clean);
        self
    }
}

/// The source of a body said nothing for too long.
#[derive(Debug, thiserror::Error)]
#[error("the body did not move on in time")]
struct Stalled;

impl<B> Body for TimedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Poll::Ready(mut frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.timer = None;
            if let (Some(clean), Some(Ok(frame))) = (this.cleans_trailers, &mut frame)
                && let Some(trailers) = frame.trailers_mut()
            {
                clean(trailers);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(this.patience)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(Stalled.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
