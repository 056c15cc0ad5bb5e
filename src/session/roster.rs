//! The sessions that there are, for whoever asks: who, since when, to where. Each worker has a list of its own.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use slab::Slab;

use super::{About, report::millis};
use crate::{stamp::Stamp, upstream::Mode};

/// See the module. A session is in it from its 101 until both legs have ended.
#[derive(Debug, Default)]
pub struct Roster(Mutex<Slab<Arc<Entry>>>);

/// One session.
#[derive(Debug)]
pub struct Entry {
    pub(super) about: About,
    pub(super) endpoint: Arc<str>,
    /// How its connection to the backend is used.
    pub(super) way: Mode,
    pub(super) begun: Stamp,
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
    /// The peer's address, or who a trusted balancer says that it is.
    pub fn client(&self) -> IpAddr {
        self.about.client.ip()
    }

    /// The configuration's.
    pub fn route(&self) -> &str {
        &self.about.route
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
        let About { client, path, request_id, trace_id, route, shared } = &self.about;
        Session {
            client: client.to_string(),
            age_ms: millis(now - self.begun),
            route,
            endpoint: &self.endpoint,
            way: self.way.as_str(),
            key: shared.as_ref().map(|shared| shared.key().to_string()),
            http: client.http(),
            tls: client.tls(),
            path,
            request_id,
            trace_id: trace_id.as_ref().map(ToString::to_string),
        }
    }
}
