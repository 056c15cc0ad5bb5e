//! Who a client is, where a balancer says so first (PROXY protocol): who may, how long is waited for it, and what becomes of the others.
//!
//! Until its header is there as a whole it is looked at where it lies, in the kernel (`MSG_PEEK`): whoever sends it in pieces has
//! nothing here but a socket and a task. Then it is taken away, and what follows is a client like any other, at the address that it names:
//! in logs, limits, and for `http.trusted_proxies`. It has the rest of the one deadline (`http.header_timeout`) from the header's first byte on.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    pin::pin,
    sync::Arc,
};

use tokio::{
    io::{Interest, Ready},
    net::TcpStream,
    time::Instant,
};
use tracing::{debug, warn};

use super::{Context, answer::lost};
use crate::{
    downstream::{self, BadProxyHeader, ProxyHeader, ProxyProtocol},
    listen::{Accepted, Accounting},
    metrics::ProxyResult,
    net::{Stream, peek, skip},
    sparse::Sparse,
};

/// Why a connection is ended: for the metrics, and for the log.
#[derive(Debug)]
pub(super) struct Unheard(ProxyResult, Option<BadProxyHeader>);

impl Context {
    /// Connections of `peer` may not begin, since they are to begin with a header and it is none of those who may send one.
    pub(super) fn is_unproxied(&self, peer: IpAddr) -> bool {
        let downstream::Config { proxy_protocol, trusted_proxies, .. } = &self.downstream;
        *proxy_protocol == ProxyProtocol::Required && !downstream::is_trusted(peer, trusted_proxies)
    }

    /// For a connection that has something to be read: it, once its header is taken away. `None`: that is not all there yet, or it is ended.
    pub(super) fn hear(self: &Arc<Self>, mut accepted: Accepted) -> Option<Accepted> {
        if self.downstream.proxy_protocol == ProxyProtocol::Off || accepted.left.is_some() {
            return Some(accepted);
        }
        let result = self.look(&accepted.stream, accepted.peer);
        let Accepted { stream, peer, accounting, .. } = match result {
            Ok(Some(peer)) => {
                (accepted.peer, accepted.left) = (peer, Some(self.downstream.header_timeout));
                // Who may have no more says why in its place.
                self.count_address(peer, &mut accepted.accounting.place);
                return Some(accepted);
            }
            _ => accepted,
        };
        match (TcpStream::from_std(stream), result) {
            (Ok(stream), Err(why)) => self.end_unheard(stream, peer, accounting, &why),
            (Ok(stream), Ok(_)) => _ = self.tracker.spawn(Arc::clone(self).hear_out(stream, peer, accounting)),
            (Err(error), _) => lost(peer, &error),
        }
        None
    }

    /// Waits for the rest of a header.
    async fn hear_out(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, mut accounting: Accounting) {
        let deadline = Instant::now() + self.downstream.header_timeout;
        match self.heard(&stream, peer, deadline).await {
            Ok(client) => match stream.into_std() {
                Ok(stream) => {
                    let left = Some(deadline.saturating_duration_since(Instant::now()));
                    self.count_address(client, &mut accounting.place);
                    self.latest().admit(Accepted { stream, peer: client, accounting, left });
                }
                Err(error) => lost(client, &error),
            },
            Err(why) => self.end_unheard(stream, peer, accounting, &why),
        }
    }

    /// Who the client is, once its header is here; that is taken away.
    pub(super) async fn heard(
        &self,
        stream: &TcpStream,
        peer: SocketAddr,
        deadline: Instant,
    ) -> Result<SocketAddr, Unheard> {
        let mut late = pin!(self.late(deadline));
        loop {
            let ready = tokio::select! {
                ready = stream.ready(Interest::READABLE) => ready,
                () = &mut late => return Err(Unheard(ProxyResult::Timeout, None)),
            };
            if let Some(client) = self.look(stream, peer)? {
                return Ok(client);
            }
            // What came before its end was there to be looked at.
            if ready.map_or(true, Ready::is_read_closed) {
                return Err(Unheard(ProxyResult::Abandoned, None));
            }
            // Nothing was read, so that the runtime does not know that there is nothing new.
            let _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
    }

    /// `None`: it is not all there yet.
    fn look(&self, socket: impl AsFd, peer: SocketAddr) -> Result<Option<SocketAddr>, Unheard> {
        if self.is_unproxied(peer.ip()) {
            return Err(Unheard(ProxyResult::Untrusted, None));
        }
        let abandoned = || Unheard(ProxyResult::Abandoned, None);
        let found = peek(&socket, downstream::V2_MOST, |bytes| {
            if bytes.is_empty() { Err(abandoned()) } else { downstream::proxy_header(bytes).map_err(Unheard::from) }
        });
        let Some(found) = found.map_err(|_| abandoned())? else { return Ok(None) };
        let Some(ProxyHeader { source, length }) = found? else { return Ok(None) };
        skip(&socket, length).map_err(|_| abandoned())?;
        self.metrics.proxy_header(if source.is_some() { ProxyResult::Accepted } else { ProxyResult::Local });
        Ok(Some(source.unwrap_or(peer)))
    }

    /// Without a word: whoever it is, nobody knows what it speaks.
    pub(super) fn end_unheard(&self, stream: TcpStream, peer: SocketAddr, accounting: Accounting, why: &Unheard) {
        static SAID: [Sparse; 2] = [const { Sparse::new() }; 2];
        let Unheard(result, error) = why;
        self.metrics.proxy_header(*result);
        let fix = match result {
            ProxyResult::Untrusted => {
                "if it is a balancer, add its network to http.trusted_proxies; if clients come by themselves, set listen.proxy_protocol to \
                 \"off\", or have them come by the balancer"
            }
            ProxyResult::Missing | ProxyResult::Broken => {
                "have the balancer begin with it, its health checks too (HAProxy: send-proxy-v2 and check-send-proxy; nginx: proxy_protocol \
                 on; AWS: proxy_protocol_v2.enabled), or set listen.proxy_protocol to \"off\""
            }
            _ => "",
        };
        let (result, error) = (result.as_str(), error.map(|error| error.to_string()));
        let error = error.as_deref();
        if !fix.is_empty()
            && let Some(unsaid) = SAID[usize::from(error.is_some())].is_due()
        {
            warn!(client = %peer, result, error, fix, unsaid, "no PROXY header of somebody who may send one: the connection is ended");
        } else {
            debug!(client = %peer, result, error, "no PROXY header of somebody who may send one: the connection is ended");
        }
        self.linger(Stream::Tcp(stream), &self.short_linger(), accounting);
    }

    /// The connection of somebody who may not send a header is not waited for.
    pub(super) fn end_unproxied(&self, stream: TcpStream, peer: SocketAddr, accounting: Accounting) {
        self.end_unheard(stream, peer, accounting, &Unheard(ProxyResult::Untrusted, None));
    }
}

impl From<BadProxyHeader> for Unheard {
    fn from(error: BadProxyHeader) -> Self {
        let result = match error {
            BadProxyHeader::Missing => ProxyResult::Missing,
            BadProxyHeader::Broken(_) | BadProxyHeader::TooLong => ProxyResult::Broken,
        };
        Self(result, Some(error))
    }
}
