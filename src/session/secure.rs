//! A client's connection until it has TLS: the handshake, its deadline and its memory, and what becomes of those that fail.
//!
//! One deadline (`http.header_timeout`) is for this and the head of the first request together, from the client's first byte on. A
//! connection stays with the worker that has begun its handshake. Whoever has to be waited for gives its place at the gate to others,
//! and has to have another for its request.

use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::rustls::{self, AlertDescription};
use tracing::{debug, warn};

use super::{Context, REFUSED_LINGER, http::Asked};
use crate::{
    downstream::Whole,
    gate::Permit,
    listen::Accounting,
    metrics::TlsHandshake,
    net::{Accepting, Kept, Secured, Stream, TlsServer, concat, read_ahead_of, tls_error},
    sparse::Sparse,
};

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) address: SocketAddr,
    /// What was agreed on; `None`: it has no TLS.
    pub(super) secured: Option<Arc<Secured>>,
    /// Its requests are streams.
    pub(super) is_http2: bool,
}

impl Client {
    pub(super) const fn plain(address: SocketAddr) -> Self {
        Self { address, secured: None, is_http2: false }
    }

    fn of(address: SocketAddr, stream: &Stream) -> Self {
        Self { address, secured: stream.secured().map(Arc::new), is_http2: stream.is_http2() }
    }

    pub(super) fn ip(&self) -> IpAddr {
        self.address.ip()
    }

    /// The version of HTTP, for the log.
    pub(super) const fn http(&self) -> &'static str {
        if self.is_http2 { "h2" } else { "http/1.1" }
    }

    /// The version of TLS, for the log.
    pub(super) fn tls(&self) -> Option<&'static str> {
        self.secured.as_ref().map(|secured| secured.version)
    }

    /// The name that it asked for, for the log.
    pub(super) fn sni(&self) -> Option<&str> {
        self.secured.as_ref()?.name.as_deref()
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// What came of it.
pub(super) enum Outcome {
    /// TLS.
    Secured(Stream),
    /// Plain HTTP, or what looks like that, as far as it was read.
    PlainHttp(Stream, Bytes),
    /// It failed; what is left is to be ended in order.
    Failed(Option<Stream>),
}

/// What a handshake may have read before it has to ask for memory: more than those that have no client certificate.
const USUAL: usize = 4 << 10;

/// What rustls may then keep of one message, and as much for its buffer.
const UNUSUAL_BYTES: u64 = 128 << 10;

/// What is read in a handshake at most.
const MOST: usize = 96 << 10;

static PLAIN_SAID: Sparse = Sparse::new();

const PLAIN_HTTP: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\
    Content-Length: 63\r\n\r\n400 Bad Request: this port speaks TLS: use https:// or wss://\r\n";

impl Context {
    /// A connection with TLS, from its first bytes on, until it has ended or become a session. `deadline`: it has begun before.
    #[expect(clippy::too_many_arguments, reason = "what is known of a connection")]
    pub(super) async fn serve_secure(
        self: Arc<Self>,
        server: TlsServer,
        stream: TcpStream,
        early: Bytes,
        address: SocketAddr,
        accounting: Accounting,
        mut permit: Option<Permit>,
        deadline: Option<Instant>,
    ) {
        let deadline = deadline.unwrap_or_else(|| Instant::now() + self.downstream.header_timeout);
        let stream = match self.secure(&server, stream, early, address, deadline, &mut permit).await {
            Outcome::Secured(stream) => stream,
            Outcome::PlainHttp(mut stream, _) => {
                drop(permit);
                // Whatever the rest of its request is: the answer is the same, and fits into any socket.
                let _ = timeout(REFUSED_LINGER, stream.write_all(PLAIN_HTTP)).await;
                self.linger(stream, &self.short_linger(), accounting);
                return;
            }
            Outcome::Failed(stream) => {
                if let Some(stream) = stream {
                    self.linger(stream, &self.short_linger(), accounting);
                }
                return;
            }
        };
        let client = Client::of(address, &stream);
        let mut stream = Kept::new(stream, self.relay.config.write_timeout);
        if client.is_http2 {
            // Each of its requests has to have a place there.
            drop(permit);
            // In a task of its own, since that of the handshake is larger.
            self.tracker.spawn(Box::pin(self.latest().serve_http2(stream, client, accounting, deadline, None)));
            return;
        }
        let early = {
            let mut late = pin!(self.late(deadline));
            poll_fn(|cx| {
                if let Poll::Ready(read) = stream.poll_some(cx) {
                    return Poll::Ready(read.ok().filter(|bytes| !bytes.is_empty()));
                }
                permit = None;
                late.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        let Some(early) = early else {
            self.linger(stream.into_inner(), &self.short_linger(), accounting);
            return;
        };
        // What a client waits for its turn does not count.
        let left = deadline.saturating_duration_since(Instant::now());
        let (permit, early) = if let Some(permit) = permit {
            (permit, early)
        } else {
            let permit = self.gate.turn().await;
            // It may have lost its patience.
            let more = poll_fn(|cx| match stream.poll_some(cx) {
                Poll::Ready(read) => Poll::Ready(read.ok().filter(|bytes| !bytes.is_empty())),
                Poll::Pending => Poll::Ready(Some(Bytes::new())),
            });
            let Some(more) = more.await else {
                self.linger(stream.into_inner(), &self.short_linger(), accounting);
                return;
            };
            (permit, concat(early, more))
        };
        let this = self.latest();
        match Whole::read(early, &this.downstream) {
            Ok((handshake, early)) => {
                let asked = Asked { handshake, early };
                Box::pin(this.shake_hands(stream, asked, client, accounting, Some(permit))).await;
            }
            Err(early) => {
                let deadline = Instant::now() + left;
                Box::pin(this.serve(stream.rewind(early), client, accounting, Some(permit), Some(deadline))).await;
            }
        }
    }

    /// The handshake. `early`: what was read already, which is something. The permit goes as soon as the client has to be waited for.
    pub(super) async fn secure(
        &self,
        server: &TlsServer,
        stream: TcpStream,
        early: Bytes,
        client: SocketAddr,
        deadline: Instant,
        permit: &mut Option<Permit>,
    ) -> Outcome {
        let mut late = pin!(self.late(deadline));
        // A record of a handshake begins with 22 (RFC 8446 5.1), a request with a letter.
        if early[0].is_ascii_alphabetic() {
            self.metrics.tls_handshake(TlsHandshake::PlainHttp);
            if let Some(unsaid) = PLAIN_SAID.is_due() {
                let fix = "whoever is in front (an ingress, a load balancer and its health checks) must speak https and wss to this port";
                warn!(%client, fix, unsaid, "plain HTTP on a port that speaks TLS: it gets 400");
            } else {
                debug!(%client, "plain HTTP on a port that speaks TLS: it gets 400");
            }
            return Outcome::PlainHttp(Stream::Tcp(stream), early);
        }
        // Until epoll has said so nothing can be written, and an alert is not waited for.
        let is_writable = tokio::select! {
            writable = stream.writable() => writable.is_ok(),
            () = &mut late => false,
        };
        if !is_writable {
            return Outcome::Failed(Some(Stream::Tcp(stream)));
        }
        let mut accepting = Accepting::new(Stream::Tcp(stream), early, server, self.downstream.http2.is_on);
        let mut memory = None;
        // `Err`: it is not waited for any longer.
        let result = poll_fn(|cx| {
            if let Poll::Ready(result) = Pin::new(&mut accepting).poll(cx) {
                return Poll::Ready(Ok(result));
            }
            *permit = None;
            let count = accepting.count();
            if count > USUAL && memory.is_none() {
                memory = self.admission.more_memory(UNUSUAL_BYTES);
                if memory.is_none() {
                    return Poll::Ready(Err(TlsHandshake::Shed));
                }
            }
            if count > MOST {
                return Poll::Ready(Err(TlsHandshake::Failed));
            }
            late.as_mut().poll(cx).map(|()| Err(TlsHandshake::Timeout))
        })
        .await;
        let (result, why, stream) = match result {
            Ok(Ok(stream)) => {
                let is_resumed = stream.secured().is_some_and(|secured| secured.is_resumed);
                self.metrics.tls_handshake(if is_resumed { TlsHandshake::Resumed } else { TlsHandshake::Full });
                return Outcome::Secured(stream);
            }
            Ok(Err((error, stream))) => (judge(&error), Some(error), stream),
            Err(result) => (result, None, accepting.into_stream()),
        };
        self.metrics.tls_handshake(result);
        complain(result, why.as_ref(), client);
        Outcome::Failed(stream)
    }

    /// Resolves when a client is waited for no longer: at its deadline, or soon after the drain has begun.
    pub(super) async fn late(&self, deadline: Instant) {
        tokio::select! {
            () = sleep_until(deadline) => return,
            () = self.relay.drain.begun() => {}
        }
        // It was accepted, so its request may be on its way.
        let soon = sleep(REFUSED_LINGER.min(deadline.saturating_duration_since(Instant::now())));
        tokio::select! {
            () = soon => {}
            () = self.relay.drain.hurried() => {}
        }
    }

    /// For who is turned away: nothing but its answer goes over it. A handshake is dearer than an answer, so it is for those alone for
    /// whom there is a place at the gate now.
    pub(super) async fn secure_for_answer(
        &self,
        stream: TcpStream,
        client: SocketAddr,
        deadline: Instant,
        is_last_resort: bool,
    ) -> Result<(Stream, Bytes), Option<Stream>> {
        let server = self.downstream.tls.server.clone();
        if server.is_none() && !self.downstream.http2.is_on {
            return Ok((Stream::Tcp(stream), Bytes::new()));
        }
        let first = tokio::select! {
            first = read_ahead_of(&stream) => first.ok().filter(|bytes| !bytes.is_empty()),
            () = self.late(deadline) => None,
        };
        // Which HTTP it speaks, the answer is to speak.
        let Some(server) = server else {
            return match first {
                Some(first) => Ok((Stream::Tcp(stream), first)),
                None => Err(Some(Stream::Tcp(stream))),
            };
        };
        let mut permit = self.gate.try_permit().filter(|_| !is_last_resort);
        let (Some(first), true) = (first, permit.is_some()) else { return Err(Some(Stream::Tcp(stream))) };
        match Box::pin(self.secure(&server, stream, first, client, deadline, &mut permit)).await {
            Outcome::Secured(stream) => Ok((stream, Bytes::new())),
            // That it is turned away is no secret.
            Outcome::PlainHttp(stream, early) => Ok((stream, early)),
            Outcome::Failed(stream) => Err(stream),
        }
    }
}

fn judge(error: &io::Error) -> TlsHandshake {
    match tls_error(error) {
        Some(rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked,
        )) => TlsHandshake::Distrusted,
        Some(rustls::Error::NoCertificatesPresented) => TlsHandshake::NoCertificate,
        Some(rustls::Error::InvalidCertificate(_)) => TlsHandshake::BadCertificate,
        Some(_) => TlsHandshake::Failed,
        None => TlsHandshake::Abandoned,
    }
}

/// Only what can be our fault is worth more than a line for who looks for it: whoever finds the port may send anything.
fn complain(result: TlsHandshake, error: Option<&io::Error>, client: SocketAddr) {
    static SAID: [Sparse; 3] = [const { Sparse::new() }; 3];
    let kind = match result {
        TlsHandshake::Distrusted => 0,
        TlsHandshake::NoCertificate | TlsHandshake::BadCertificate => 1,
        _ => 2,
    };
    let fix = match error.and_then(|error| tls_error(error)) {
        _ if result == TlsHandshake::Distrusted => {
            "listen.tls_certificate must be for the name that clients use, valid, and have those between it and its root behind it; \
             openssl s_client -connect HOST:PORT -servername NAME shows what they get"
        }
        _ if result == TlsHandshake::NoCertificate => {
            "give the client a certificate; listen.tls_client_auth = \"optional\" serves those without one too"
        }
        _ if result == TlsHandshake::BadCertificate => {
            "a client's certificate must be valid, for client authentication, and signed by somebody in listen.tls_client_ca; its chain must \
             come with it"
        }
        Some(rustls::Error::PeerIncompatible(_) | rustls::Error::NoApplicationProtocol) => {
            "TLS 1.2 and 1.3 are spoken here, HTTP/1.1, and HTTP/2 if http2.enabled: whatever is in front may insist on something else"
        }
        _ => "",
    };
    let (result, error) = (result.as_str(), error.map(ToString::to_string));
    let error = error.as_deref();
    if !fix.is_empty()
        && let Some(unsaid) = SAID[kind].is_due()
    {
        warn!(%client, result, error, fix, unsaid, "no TLS with a client");
    } else {
        debug!(%client, result, error, "no TLS with a client");
    }
}
