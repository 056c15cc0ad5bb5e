//! From a socket to one that is encrypted, as its client or as its server. Whatever becomes of the handshake, the socket comes back.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{
    Accept, TlsAcceptor, TlsConnector,
    rustls::{
        self, HandshakeKind,
        pki_types::{ServerName, UnixTime},
        server::danger::ClientCertVerifier,
    },
    server,
};

use super::{super::Stream, BUFFER, Back, Raw, Tls, TlsClient, TlsServer};

/// A handshake with a client, under way.
///
/// Its error is given with the socket, as far as it is there: an alert may be on its way, so it is to be ended in order. What TLS says
/// is found by [`tls_error`].
pub struct Accepting {
    accept: Accept<Raw>,
    back: Arc<Back>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

/// Encrypts a connection, as its client. `protocols`: what it may be used for, as in ALPN.
///
/// # Errors
///
/// With the socket, as far as it is there: the server may have seen something of it, so it is to be ended in order. What TLS says
/// is found by [`tls_error`]; `TimedOut`: `deadline` has passed.
pub async fn encrypt(
    stream: Stream,
    client: &TlsClient,
    server: ServerName<'static>,
    protocols: &[&[u8]],
    deadline: Instant,
) -> Result<Stream, (io::Error, Option<Stream>)> {
    let (raw, back) = Raw::lend(stream, Bytes::new());
    let connector = TlsConnector::from(Arc::clone(&client.config));
    let protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let connect = connector.with_alpn(protocols).connect_with(server, raw, |session| {
        session.set_buffer_limit(Some(BUFFER));
    });
    // The socket is back when this is over.
    let result = match timeout_at(deadline, connect).await {
        Ok(Ok(mut stream)) => {
            stream.get_mut().0.back = None;
            return Ok(Tls::of(stream.into(), false));
        }
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    Err((result, back.take()))
}

impl Accepting {
    /// Of a client of which `early` was read already, and to which HTTP/2 is offered, or not.
    pub fn new(stream: Stream, early: Bytes, server: &TlsServer, offers_http2: bool) -> Self {
        let (raw, back) = Raw::lend(stream, early);
        let config = if offers_http2 { &server.with_http2 } else { &server.config };
        let accept = TlsAcceptor::from(Arc::clone(config)).accept_with(raw, |session| {
            session.set_buffer_limit(Some(BUFFER));
        });
        Self { accept, back, clients: server.clients.clone() }
    }

    /// A ticket says that a certificate was good when it was given out. It may have expired since, whoever still has its keys.
    fn is_still_believed(&self, stream: &server::TlsStream<Raw>) -> Result<(), rustls::Error> {
        let session = stream.get_ref().1;
        let Some(clients) = self.clients.as_ref().filter(|_| session.handshake_kind() == Some(HandshakeKind::Resumed))
        else {
            return Ok(());
        };
        match session.peer_certificates().and_then(<[_]>::split_first) {
            Some((own, between)) => clients.verify_client_cert(own, between, UnixTime::now()).map(|_| ()),
            None if clients.client_auth_mandatory() => Err(rustls::Error::NoCertificatesPresented),
            None => Ok(()),
        }
    }

    /// Bytes that the client has needed for it so far. rustls keeps what is no whole message yet, 64 KiB at most.
    pub fn count(&self) -> usize {
        self.back.count.load(Ordering::Relaxed)
    }

    /// Gives it up.
    pub fn into_stream(self) -> Option<Stream> {
        let Self { accept, back, .. } = self;
        drop(accept);
        back.take()
    }
}

impl Future for Accepting {
    type Output = Result<Stream, (io::Error, Option<Stream>)>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        Poll::Ready(match ready!(Pin::new(&mut this.accept).poll(cx)) {
            Ok(mut stream) => {
                stream.get_mut().0.back = None;
                let believed = this.is_still_believed(&stream);
                let asks = this.clients.is_some();
                let stream = Tls::of(stream.into(), asks);
                match believed {
                    Ok(()) => Ok(stream),
                    Err(error) => Err((io::Error::new(io::ErrorKind::InvalidData, error), Some(stream))),
                }
            }
            Err(error) => Err((error, this.back.take())),
        })
    }
}

impl fmt::Debug for Accepting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepting").field("count", &self.count()).finish_non_exhaustive()
    }
}
