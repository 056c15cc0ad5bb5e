//! The sessions that there are, for whoever asks: who, since when, to where. Each worker has a list of its own.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use slab::Slab;

use super::{About, report::millis, secure::Client};
use crate::{downstream::TraceId, hub::Known, net::Secured, stamp::Stamp, upstream::Mode};

/// See the module. A session is in it from its 101 until both legs have ended.
#[derive(Debug, Default)]
pub struct Roster(Mutex<Slab<Arc<Entry>>>);

/// One session: what its log lines and whoever asks say of it. There are thousands, so what most do not have is in a box of its own.
#[derive(Debug)]
pub struct Entry {
    /// The client's, an IPv4 address mapped to IPv6.
    ip: Ipv6Addr,
    scope_id: u32,
    port: u16,
    is_ipv4: bool,
    is_http2: bool,
    /// How its connection to the backend is used.
    pub(super) way: Mode,
    pub(super) begun: Stamp,
    pub(super) path: Box<str>,
    pub(super) request_id: Box<str>,
    pub(super) route: Arc<str>,
    pub(super) endpoint: Arc<str>,
    more: Option<Box<More>>,
}

#[derive(Debug)]
struct More {
    secured: Option<Arc<Secured>>,
    trace_id: Option<Box<TraceId>>,
    shared: Option<Arc<Known>>,
}

/// What is told of a session.
#[derive(Debug, Serialize)]
pub struct Session<'a> {
    client: String,
    age_ms: u64,
    /// Its path in the configuration; empty: none is for it.
    route: &'a str,
    endpoint: &'a str,
    way: &'static str,
    /// Of the WebSocket that it shares with others.
    key: Option<String>,
    http: &'static str,
    tls: Option<&'static str>,
    /// Without the query.
    path: &'a str,
    request_id: &'a str,
    trace_id: Option<String>,
}

impl Roster {
    /// In four bytes, since each session keeps one.
    pub(super) fn add(&self, entry: Arc<Entry>) -> u32 {
        let key = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(entry);
        key.try_into().expect("a worker has far fewer than 2^32 sessions")
    }

    pub(super) fn remove(&self, key: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_remove(key as usize);
    }

    /// All of them, as they are now.
    pub fn sessions(&self) -> Vec<Arc<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, entry)| Arc::clone(entry)).collect()
    }
}

impl Entry {
    pub(super) fn new(about: About, endpoint: Arc<str>, way: Mode) -> Self {
        let About { client, path, request_id, trace_id, route, shared } = about;
        let Client { address, secured, is_http2 } = client;
        let (ip, scope_id) = match address {
            SocketAddr::V4(address) => (address.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
        };
        let has_more = secured.is_some() || trace_id.is_some() || shared.is_some();
        Self {
            ip,
            scope_id,
            port: address.port(),
            is_ipv4: address.is_ipv4(),
            is_http2,
            way,
            begun: Stamp::now(),
            path,
            request_id,
            route,
            endpoint,
            more: has_more.then(|| Box::new(More { secured, trace_id, shared })),
        }
    }

    /// Its client.
    pub(super) fn whose(&self) -> Client {
        let address = match self.ip.to_ipv4_mapped().filter(|_| self.is_ipv4) {
            Some(ip) => SocketAddr::from((ip, self.port)),
            None => SocketAddrV6::new(self.ip, self.port, 0, self.scope_id).into(),
        };
        let secured = self.more.as_ref().and_then(|more| more.secured.clone());
        Client { address, secured, is_http2: self.is_http2 }
    }

    pub(super) fn trace_id(&self) -> Option<&TraceId> {
        self.more.as_ref()?.trace_id.as_deref()
    }

    /// The WebSocket that it shares with others.
    pub(super) fn shared(&self) -> Option<&Arc<Known>> {
        self.more.as_ref()?.shared.as_ref()
    }

    /// The peer's address, or who a trusted balancer says that it is.
    pub fn client(&self) -> IpAddr {
        self.whose().ip()
    }

    /// The configuration's.
    pub fn route(&self) -> &str {
        &self.route
    }

    /// The address of its backend.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Since its 101.
    pub fn begun(&self) -> Stamp {
        self.begun
    }

    /// What is told of it.
    pub fn told(&self, now: Stamp) -> Session<'_> {
        let client = self.whose();
        Session {
            client: client.to_string(),
            age_ms: millis(now - self.begun),
            route: &self.route,
            endpoint: &self.endpoint,
            way: self.way.as_str(),
            key: self.shared().map(|shared| shared.key().to_string()),
            http: client.http(),
            tls: client.tls(),
            path: &self.path,
            request_id: &self.request_id,
            trace_id: self.trace_id().map(ToString::to_string),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client's address is told as it was, of whatever kind it is, and nothing that most sessions do not have makes all of them larger:
    /// with its two counts an entry is in one line of the cache and a half.
    #[test]
    fn an_entry_is_small_and_knows_its_client() {
        const { assert!(size_of::<Entry>() + 2 * size_of::<usize>() <= 128) };
        for address in ["192.0.2.1:80", "[2001:db8::1]:443", "[::ffff:192.0.2.1]:65535", "[fe80::1%7]:1"] {
            for is_http2 in [false, true] {
                let client = Client { is_http2, ..Client::plain(address.parse().expect("an address")) };
                let (path, request_id, route) = ("/feed".into(), "7".into(), "".into());
                let about = About { client, path, request_id, trace_id: None, route, shared: None };
                let entry = Entry::new(about, "127.0.0.1:9000".into(), Mode::Dedicated);
                assert!(entry.more.is_none());
                assert_eq!((entry.whose().to_string(), entry.whose().is_http2), (address.to_owned(), is_http2));
            }
        }
    }
}
