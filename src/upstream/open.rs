//! A connection to one of a backend's endpoints: whose turn it is, which one, and another one when nobody is there.
//!
//! Nothing of a client's is sent before a connection is there, with its TLS, so whatever fails until then may be tried elsewhere: each
//! endpoint once, within the same deadlines that a single one has.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, warn};

use super::{
    Control, End, Error, Failure, Inner, Upstream,
    endpoints::{Endpoint, Load, Looks, Nobody},
    idle::{Idle, Kind},
    tls::{self, Speaks},
    turns::Begun,
};
use crate::{
    metrics::{Counted, Port},
    net::{self, Address, DialError, Lack, Stream},
};

pub(super) const LATE: &str = "backend did not take the connection in time";

/// An endpoint that took no connection for so long, or for a quarter of `connect_timeout`, is late. For less we may just have had no
/// more time: others were asked before, or a name was long in being looked up.
const PATIENT: Duration = Duration::from_secs(1);

/// A connection.
pub(super) struct Opened {
    pub stream: Stream,
    pub load: Load,
    /// It may not be accepted yet; `None`: it has waited for its use.
    pub fresh: Option<(OwnedSemaphorePermit, Begun)>,
    /// That the backend has something to answer.
    pub _pending: Counted,
}

/// Whose turn it is.
enum Turn {
    Fresh(OwnedSemaphorePermit),
    Waited(Stream),
}

/// What was tried for one client.
pub(super) struct Attempts<'a> {
    pub tried: Vec<Arc<Endpoint>>,
    /// What is left of `connect_timeout`.
    left: Duration,
    /// Why the last one was in vain.
    pub failure: Option<Error>,
    /// Takes the sockets of those that got no TLS.
    end: &'a End,
}

impl Attempts<'_> {
    pub(super) fn spend(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }

    pub(super) const fn is_left(&self) -> bool {
        !self.left.is_zero()
    }
}

impl Upstream {
    /// A connection for a WebSocket handshake or a plain request, in its turn: one of those that wait, or a fresh one; to `first` before others.
    pub(super) async fn open(
        &self,
        is_handshake: bool,
        end: &End,
        idle: Option<(&Idle, Kind)>,
        mut first: Option<Load>,
        control: &Control,
    ) -> Result<Opened, Failure> {
        let Inner { config, endpoints, metrics, .. } = &*self.inner;
        let deadline = self.deadline();
        let mut attempts = self.attempts(end);
        loop {
            let waiting = Counted::new(metrics.upstream_waiting(is_handshake));
            let load = match first.take() {
                Some(load) => load,
                None => self.pick(&mut attempts).await?,
            };
            let endpoint = Arc::clone(load.get());
            control.is_for(load.endpoint());
            let turns = async {
                if is_handshake {
                    control.begin_turn(endpoint.handshakes.next(deadline).await?);
                }
                // In the backend's accept queue it has had its turn.
                if let Some(stream) = idle.and_then(|(idle, kind)| idle.take(kind, &endpoint)) {
                    return Some(Turn::Waited(stream));
                }
                endpoint.connects.next(deadline).await.map(Turn::Fresh)
            };
            let turn = tokio::select! {
                biased;
                // While it waits, others may find that nobody is there.
                () = endpoints.is_in_vain(&endpoint, &attempts.tried) => {
                    control.end_turn();
                    attempts.tried.push(endpoint);
                    continue;
                }
                turn = turns => turn.ok_or(Error::QueueTimeout)?,
            };
            drop(waiting);
            let pending = Counted::new(metrics.upstream_pending(is_handshake));
            let turn = match turn {
                Turn::Waited(stream) => {
                    control.begin();
                    return Ok(Opened { stream, load, fresh: None, _pending: pending });
                }
                Turn::Fresh(turn) => turn,
            };
            control.begun.store(true, Ordering::Relaxed);
            let begun = endpoint.connects.begin();
            match self.dial(&endpoint, &mut attempts, config.connect_timeout, Speaks::Http1).await {
                Ok(stream) => {
                    control.connected.store(true, Ordering::Relaxed);
                    return Ok(Opened { stream, load, fresh: Some((turn, begun)), _pending: pending });
                }
                Err(Some(failure)) => return Err(failure),
                Err(None) => {
                    control.begun.store(false, Ordering::Relaxed);
                    control.end_turn();
                }
            }
        }
    }

    /// A connection, within `connect_timeout`, to any endpoint that takes one. `end`: for the sockets of others that were tried.
    pub async fn connect(&self, end: &End) -> Result<Stream, Failure> {
        let mut attempts = self.attempts(end);
        loop {
            let load = self.pick(&mut attempts).await?;
            match self.dial(load.get(), &mut attempts, self.inner.config.connect_timeout, Speaks::Http1).await {
                Ok(stream) => return Ok(stream),
                Err(Some(failure)) => return Err(failure),
                Err(None) => {}
            }
        }
    }

    pub(super) fn attempts<'a>(&self, end: &'a End) -> Attempts<'a> {
        Attempts { tried: Vec::new(), left: self.inner.config.connect_timeout, failure: None, end }
    }

    pub(super) async fn pick(&self, attempts: &mut Attempts<'_>) -> Result<Load, Error> {
        let Inner { config, socket, endpoints, sources, .. } = &*self.inner;
        let begun = Instant::now();
        let picked = timeout(attempts.left, endpoints.pick(&attempts.tried, &Looks { config, sources, socket })).await;
        attempts.left = attempts.left.saturating_sub(begun.elapsed());
        match picked {
            Ok(Ok(load)) => Ok(load),
            Ok(Err(Nobody { failure: Some((address, source)) })) => Err(Error::Unreachable { address, source }),
            Ok(Err(Nobody { failure: None })) => {
                let (address, source) =
                    (self.address(), io::Error::new(io::ErrorKind::NotFound, "no endpoint is left"));
                Err(Error::Unreachable { address, source })
            }
            Err(_) => Err(Error::Timeout(LATE)),
        }
    }

    fn address(&self) -> Address {
        self.inner.config.address.as_slice().first().cloned().expect("there is one address at least")
    }

    /// Connects to an endpoint, with TLS if that is configured. `Err(None)`: in vain, and another one may be tried.
    pub(super) async fn dial(
        &self,
        endpoint: &Arc<Endpoint>,
        attempts: &mut Attempts<'_>,
        whole: Duration,
        speaks: Speaks,
    ) -> Result<Stream, Option<Failure>> {
        let Inner { config, socket, endpoints, sources, metrics, .. } = &*self.inner;
        attempts.tried.push(Arc::clone(endpoint));
        let has_another = endpoints.has_another(&attempts.tried, false);
        // One that says nothing must leave time for the next.
        let patience = if has_another { attempts.left / 2 } else { attempts.left };
        let begun = Instant::now();
        let deadline = begun + patience;
        let dial = net::dial(endpoint.address(), sources, socket, || self.one_more_port(endpoint));
        let (failure, may_retry) = match timeout_at(deadline, dial).await {
            Ok(Ok(stream)) => match tls::secure(stream, endpoint.address(), config, speaks, deadline).await {
                Ok(stream) => {
                    endpoints.heard(endpoint, Ok(()), config);
                    return Ok(stream);
                }
                Err(failure) => (failure, true),
            },
            Ok(Err(DialError::Io(source))) => {
                (Error::Unreachable { address: endpoint.address().clone(), source }.into(), true)
            }
            // Not the endpoint's fault; but toward each there are other ports.
            Ok(Err(DialError::Shortage { lack, error: source })) => {
                (Error::Shortage { address: endpoint.address().clone(), lack, source }.into(), lack == Lack::Ports)
            }
            Err(_) => (Error::Timeout(LATE).into(), true),
        };
        attempts.left = attempts.left.saturating_sub(begun.elapsed()).min(whole);
        let Failure { error, stream } = failure;
        let is_to_blame = match &error {
            Error::Shortage { .. } => false,
            Error::Timeout(_) => patience >= PATIENT.min(whole / 4),
            _ => true,
        };
        if is_to_blame {
            endpoints.heard(endpoint, Err(&error), config);
        }
        if may_retry && has_another && !attempts.left.is_zero() {
            debug!(%error, "another endpoint is tried");
            metrics.upstream_retries.inc();
            attempts.failure = Some(error);
            // The endpoint has seen something of us.
            if let Some(stream) = stream {
                (attempts.end)(stream);
            }
            return Err(None);
        }
        Err(Some(Failure { error, stream }))
    }

    /// Says it once when four fifths of an endpoint's ports are in use, and again only after they were not for a while.
    pub(super) fn one_more_port(&self, endpoint: &Endpoint) -> Port {
        let Endpoint { ports, has_warned, .. } = endpoint;
        let (port, limit) = (Port::new(ports), &self.inner.ports);
        let in_use = ports.in_use();
        if *limit > 0 {
            if in_use * 10 >= limit * 8 {
                if !has_warned.swap(true, Ordering::Relaxed) {
                    let fix = "name more addresses of this host in upstream.source_addresses, widen \
                               net.ipv4.ip_local_port_range, or use a Unix socket";
                    let endpoint = endpoint.name();
                    warn!(endpoint, in_use, limit, fix, "ports toward the backend become scarce");
                }
            } else if in_use * 10 < limit * 6 {
                has_warned.store(false, Ordering::Relaxed);
            }
        }
        port
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::{
        config::Settings,
        metrics::Metrics,
        upstream::{Addresses, Upstreams},
    };

    fn upstreams(at: &[std::net::SocketAddr], metrics: &Arc<Metrics>, change: impl FnOnce(&mut Settings)) -> Upstreams {
        let mut settings = Settings::default();
        let address = |at: &std::net::SocketAddr| Address::Tcp { host: at.ip().to_string(), port: at.port() };
        settings.upstream.address = Addresses::new(at.iter().map(address).collect()).expect("one at least");
        change(&mut settings);
        Upstreams::new(settings.upstream, [], &settings.socket, metrics, None)
    }

    /// Endpoints that are asked one after the other by the same client have less and less time each. Only those that had enough
    /// of it may have been too slow.
    #[tokio::test(start_paused = true)]
    async fn an_endpoint_is_not_blamed_for_our_haste() {
        let silent = || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
            socket.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
            // One connection fills its accept queue, so that whoever comes then hears nothing.
            socket.listen(0).expect("an accept queue");
            let at = socket.local_addr().expect("bound").as_socket().expect("TCP");
            let first = std::net::TcpStream::connect(at).expect("the first");
            (at, socket, first)
        };
        let endpoints: Vec<_> = std::iter::repeat_with(silent).take(5).collect();
        let at: Vec<_> = endpoints.iter().map(|(at, ..)| *at).collect();
        let metrics = Arc::new(Metrics::new());
        let upstreams = upstreams(&at, &metrics, |settings| {
            settings.upstream.connect_timeout = Duration::from_secs(4);
            settings.upstream.eject_after = 2;
            settings.upstream.eject_time = Duration::from_hours(1);
        });
        let connect = async || {
            let failure = upstreams.otherwise().connect(&drop).await.expect_err("nobody answers");
            assert!(matches!(failure.error, Error::Timeout(_)), "{failure}");
        };
        // Two of the five have a second or more: 2 s and 1 s.
        for _ in 0..2 {
            connect().await;
        }
        assert_eq!(metrics.upstream_retries.get(), 8, "all of them were asked each time");
        assert!(metrics.upstream_ejections.get() <= 2, "{}", metrics.upstream_ejections.get());
        // The first of five has enough of it: after six times it was the same one twice.
        for _ in 0..4 {
            connect().await;
        }
        assert!(metrics.upstream_ejections.get() >= 1, "those that are silent are left alone");
    }

    /// Ports are counted for each endpoint, whoever leads there, until their sockets are closed.
    #[tokio::test]
    async fn each_endpoint_has_ports_of_its_own() {
        let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
        let at = listeners.each_ref().map(|listener| listener.local_addr().expect("bound"));
        let metrics = Arc::new(Metrics::new());
        let upstreams = upstreams(&at, &metrics, |_| {});
        let upstream = upstreams.otherwise();
        let mut attempts = upstream.attempts(&drop);
        let (first, second) = {
            let mut next = async || {
                let load = upstream.pick(&mut attempts).await.expect("an endpoint");
                attempts.tried.push(Arc::clone(load.get()));
                load
            };
            (next().await, next().await)
        };
        // Sessions that share connections take no ports.
        let in_use = || [&first, &second].map(|load| load.get().ports.in_use());
        assert_eq!(in_use(), [0, 0]);
        let dial = async |load: &Load| {
            let (mut attempts, timeout) = (upstream.attempts(&drop), upstream.config().connect_timeout);
            upstream.dial(load.get(), &mut attempts, timeout, Speaks::Http1).await.expect("a connection")
        };
        let streams = [dial(&first).await, dial(&first).await, dial(&second).await];
        assert_eq!((in_use(), metrics.upstream_ports.get()), ([2, 1], 3));
        drop(streams);
        assert_eq!((in_use(), metrics.upstream_ports.get()), ([0, 0], 0));
    }

    /// Whoever waits for a turn at an endpoint that turns out to be gone goes to another one at once.
    #[tokio::test]
    async fn nobody_waits_for_a_turn_at_an_endpoint_that_is_gone() {
        let there = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let [there_at, gone_at] = [&there, &gone].map(|at| at.local_addr().expect("bound"));
        drop(gone);
        let metrics = Arc::new(Metrics::new());
        let upstreams = upstreams(&[there_at, gone_at], &metrics, |settings| settings.upstream.max_pending = 1);
        let upstream = upstreams.otherwise();
        // So that it is the less loaded one, and its turn is taken.
        let mut attempts = upstream.attempts(&drop);
        let mut loads = Vec::new();
        for _ in 0..2 {
            let load = upstream.pick(&mut attempts).await.expect("an endpoint");
            attempts.tried.push(Arc::clone(load.get()));
            loads.push(load);
        }
        let at = |at: std::net::SocketAddr, loads: &[Load]| {
            let name = at.to_string();
            Arc::clone(loads.iter().find(|load| **load.endpoint() == *name).expect("both").get())
        };
        let (there_endpoint, gone_endpoint) = (at(there_at, &loads), at(gone_at, &loads));
        loads.retain(|load| Arc::ptr_eq(load.get(), &there_endpoint));
        let deadline = Instant::now() + Duration::from_secs(5);
        let turn = gone_endpoint.handshakes.next(deadline).await.expect("the only one");

        let control = Control::default();
        let opening = upstream.open(true, &drop, None, None, &control);
        let failing = async {
            tokio::task::yield_now().await;
            for _ in 0..2 {
                assert_eq!(gone_endpoint.load(), 1, "it waits there");
                upstream.inner.endpoints.heard(&gone_endpoint, Err(&"refused"), &upstream.inner.config);
            }
        };
        let (opened, ()) = tokio::join!(opening, failing);
        let opened = opened.expect("a connection");
        assert!(Arc::ptr_eq(opened.load.get(), &there_endpoint));
        assert_eq!((there_endpoint.load(), gone_endpoint.load()), (2, 0));
        assert_eq!(metrics.upstream_retries.get(), 0, "nothing was tried in vain");
        drop(turn);
    }
}
