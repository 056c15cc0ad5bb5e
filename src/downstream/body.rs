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
use tokio::time::{Instant, Sleep, sleep};

use super::BoxError;

/// Ends with an error when no frame came for a while, or too little. Waiting for the reader does not count: it is the source's clock.
#[derive(Debug)]
pub struct TimedBody<B> {
    inner: B,
    patience: Duration,
    /// Bytes for which a second of it is given back; 0: any number gives back all.
    rate: u32,
    /// What is left of it.
    left: Duration,
    /// What its trailers must not say: one hop further they could pass for headers.
    cleans_trailers: Option<fn(&mut HeaderMap)>,
    /// Since when it is waited for, and until when at most.
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<B> TimedBody<B> {
    /// Of a body that has `patience` for each of its frames.
    pub const fn new(inner: B, patience: Duration) -> Self {
        Self { inner, patience, rate: 0, left: patience, cleans_trailers: None, timer: None }
    }

    /// The same, of a source that has to send so many bytes in each second that it is waited for, over and above its patience.
    #[must_use]
    pub const fn at_pace(mut self, rate: u32) -> Self {
        self.rate = rate;
        self
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
            let waited = this.timer.take().map_or(Duration::ZERO, |(since, _)| since.elapsed());
            let bytes = match &frame {
                Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
                _ => 0,
            };
            let earned = u64::try_from(bytes)
                .unwrap_or(u64::MAX)
                .saturating_mul(1_000_000_000)
                .checked_div(u64::from(this.rate));
            let earned = earned.map_or(this.patience, Duration::from_nanos);
            this.left = this.left.saturating_sub(waited).saturating_add(earned).min(this.patience);
            if let (Some(clean), Some(Ok(frame))) = (this.cleans_trailers, &mut frame)
                && let Some(trailers) = frame.trailers_mut()
            {
                clean(trailers);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let left = this.left;
        let (_, timer) = this.timer.get_or_insert_with(|| (Instant::now(), Box::pin(sleep(left))));
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    /// A body of pieces of this length, with a pause before each.
    async fn read(pieces: usize, length: usize, pause: Duration, rate: u32) -> Result<usize, BoxError> {
        let pieces = stream::unfold(0, move |count| async move {
            sleep(pause).await;
            (count < pieces).then(|| (Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; length]))), count + 1))
        });
        let body = TimedBody::new(Box::pin(StreamBody::new(pieces)), Duration::from_secs(10)).at_pace(rate);
        Ok(body.collect().await?.to_bytes().len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_moves_on_at_its_pace() {
        let second = Duration::from_secs(1);
        // As much as is asked for, for hours; and half of it, for as long as the patience lasts.
        assert_eq!(read(10_000, 100, second, 100).await.expect("at its pace"), 1_000_000);
        assert_eq!(read(15, 50, second, 100).await.expect("within its patience"), 750);
        assert!(read(30, 50, second, 100).await.is_err(), "15 seconds behind");
        // What is ahead is not saved up.
        assert!(read(2, 1_000_000, 11 * second, 100).await.is_err(), "a pause");
        // Without a pace every piece counts.
        assert_eq!(read(1000, 1, 9 * second, 0).await.expect("it moves"), 1000);
        assert!(read(2, 1, 11 * second, 0).await.is_err(), "a pause");
    }
}
