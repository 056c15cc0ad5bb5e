//! The admin listener: `/livez`, `/readyz`, `/metrics`. Nothing here changes anything.
//!
//! It runs on a thread of its own, so a busy worker does not delay a probe.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::{
    close,
    drain::Drain,
    metrics::Metrics,
    net::{Kept, Stream},
    upstream::Upstream,
};

/// Connections at once; a further one waits in the accept queue. They are short: one request each.
const MAX_CONNECTIONS: usize = 256;

/// For a request's header, and for a connection as a whole: a dial of the backend may be part of it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);

/// The backend is dialled at most this often, however many ask.
const READINESS_AGE: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Admin {
    metrics: Arc<Metrics>,
    upstream: Upstream,
    drain: Drain,
    close: close::Config,
    /// When the backend was last dialled, and what came of it.
    readiness: Mutex<Option<(Instant, Result<(), String>)>>,
    tracker: TaskTracker,
}

impl Admin {
    /// Of a process with these parts.
    pub fn new(
        metrics: Arc<Metrics>,
        upstream: Upstream,
        drain: Drain,
        close: close::Config,
        tracker: TaskTracker,
    ) -> Self {
        Self { metrics, upstream, drain, close, readiness: Mutex::new(None), tracker }
    }

    /// Serves until the runtime ends.
    pub async fn serve(self, listener: TcpListener) {
        let this = Arc::new(self);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = Arc::clone(&this).connection(stream, slot);
                    this.tracker.spawn(connection);
                }
                Err(error) => {
                    debug!(%error, "admin: accept failed");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, slot: OwnedSemaphorePermit) {
        let service = {
            let this = Arc::clone(&self);
            service_fn(move |request| {
                let this = Arc::clone(&this);
                Box::pin(async move { Ok::<_, Infallible>(this.answer(&request).await) })
            })
        };
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // One that stayed would keep others out.
            .keep_alive(false)
            .header_read_timeout(HEADER_TIMEOUT)
            .max_header_size(16 * 1024)
            .serve_connection(TokioIo::new(Kept::new(Stream::Tcp(stream), CONNECTION_TIMEOUT)), service);
        if let Ok(Err(error)) = timeout(CONNECTION_TIMEOUT, &mut connection).await {
            debug!(%error, "admin connection ended");
        }
        drop(slot);
        close::linger(connection.into_parts().io.into_inner().into_inner(), false, &self.close).await;
    }

    async fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/livez" => plain(StatusCode::OK, "ok\n"),
            "/readyz" => self.readyz().await,
            "/metrics" => {
                let mut response = plain(StatusCode::OK, self.metrics.encode());
                let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(open_metrics));
                response
            }
            "/" => plain(StatusCode::OK, "tidegate: /livez /readyz /metrics\n"),
            _ => plain(StatusCode::NOT_FOUND, "not found: there are /livez /readyz /metrics\n"),
        }
    }

    /// 200 when a new client would be served: not draining (after the delay), and the backend takes connections.
    async fn readyz(self: &Arc<Self>) -> Response<Full<Bytes>> {
        if self.drain.has_begun() {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
        }
        // In a task of its own: a prober that does not wait must not make the next one dial again.
        let this = Arc::clone(self);
        let asked = self.tracker.spawn(async move {
            // Held during the dial, so that those who ask at once share one.
            let mut readiness = this.readiness.lock().await;
            match &*readiness {
                Some((at, result)) if at.elapsed() < READINESS_AGE => result.clone(),
                _ => {
                    let result = this.dial().await;
                    let was = readiness.as_ref().is_none_or(|(_, result)| result.is_ok());
                    match &result {
                        Err(error) if was => warn!(error, "not ready"),
                        Ok(()) if !was => info!("ready again"),
                        _ => {}
                    }
                    this.metrics.backend_up.set(result.is_ok().into());
                    *readiness = Some((Instant::now(), result.clone()));
                    result
                }
            }
        });
        let result = asked.await.unwrap_or_else(|error| Err(error.to_string()));
        match result {
            Ok(()) => plain(StatusCode::OK, "ok\n"),
            Err(error) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        }
    }

    /// Connects to the backend and leaves again by FIN.
    async fn dial(&self) -> Result<(), String> {
        let stream = self.upstream.connect().await.map_err(|error| error.to_string())?;
        // A backend may answer the end of a connection without a request, or wait for one before it closes: its side of the
        // end is waited for, but not for long.
        let patience = close::Config { linger: Duration::from_millis(200), linger_max: Duration::from_millis(200) };
        close::linger(stream, false, &patience).await;
        Ok(())
    }
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
