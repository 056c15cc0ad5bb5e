//! `/connections`: the sessions that there are, and the connections toward backends that they share.
//!
//! Of thousands the oldest 100 are told, unless the query says otherwise: `sort`, `address`, `route`, `older`, `limit`.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use serde::Serialize;

use super::{MAX_ENDPOINTS, MAX_WEBSOCKETS, Parts};
use crate::{
    hub::Told,
    session::{Entry, Roster, Session},
    stamp::Stamp,
    upstream::Shared,
};

/// Sessions of an answer, and the most that may be asked for: each is some 300 bytes.
const LIMIT: usize = 100;
const MAX_LIMIT: usize = 10_000;

/// What is asked for.
#[derive(Debug)]
struct Query<'a> {
    sort: Sort,
    network: Option<IpNet>,
    route: Option<&'a str>,
    older: Duration,
    limit: usize,
}

#[derive(Debug, Clone, Copy)]
enum Sort {
    Age,
    Address,
    Route,
    Endpoint,
}

#[derive(Debug, Serialize)]
struct Connections<'a> {
    /// Toward endpoints; so many at most.
    shared: Vec<Shared>,
    /// Endpoints besides.
    more: usize,
    /// That clients share; so many at most, the worst and the largest first.
    websockets: Vec<Told>,
    more_websockets: usize,
    /// All that there are.
    total: usize,
    /// Those that are asked for, of which `sessions` has some.
    matching: usize,
    sessions: Vec<Session<'a>>,
}

/// The answer, or what is wrong with the query.
pub(super) fn connections(query: &str, rosters: &[Arc<Roster>], parts: &Parts) -> Result<String, String> {
    let query = Query::read(query)?;
    let mut sessions: Vec<Arc<Entry>> = rosters.iter().flat_map(|roster| roster.sessions()).collect();
    let (total, now) = (sessions.len(), Stamp::now());
    sessions.retain(|session| query.wants(session, now));
    // Those that are alike by their age.
    match query.sort {
        Sort::Age => sessions.sort_by_key(|session| session.begun()),
        Sort::Address => sessions.sort_by_key(|session| (session.client(), session.begun())),
        Sort::Route => sessions.sort_by(|a, b| (a.route(), a.begun()).cmp(&(b.route(), b.begun()))),
        Sort::Endpoint => sessions.sort_by(|a, b| (a.endpoint(), a.begun()).cmp(&(b.endpoint(), b.begun()))),
    }
    let (shared, more) = parts.upstreams.shared(MAX_ENDPOINTS);
    let (websockets, more_websockets) = parts.hubs.told(MAX_WEBSOCKETS);
    let matching = sessions.len();
    let told = sessions.iter().take(query.limit).map(|session| session.told(now)).collect();
    let all = Connections { shared, more, websockets, more_websockets, total, matching, sessions: told };
    let mut text = serde_json::to_string(&all).expect("numbers and texts are JSON");
    text.push('\n');
    Ok(text)
}

impl<'a> Query<'a> {
    /// Values are taken as they are written: none needs an escape.
    fn read(text: &'a str) -> Result<Self, String> {
        let mut query = Self { sort: Sort::Age, network: None, route: None, older: Duration::ZERO, limit: LIMIT };
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let bad = |what: &str| format!("{key}={value}: {what}");
            match key {
                "sort" => {
                    query.sort = match value {
                        "age" => Sort::Age,
                        "address" => Sort::Address,
                        "route" => Sort::Route,
                        "endpoint" => Sort::Endpoint,
                        _ => return Err(bad("there are age, address, route, endpoint")),
                    }
                }
                "address" => {
                    let network = value.parse().ok().or_else(|| Some(value.parse::<IpAddr>().ok()?.into()));
                    query.network = Some(network.ok_or_else(|| bad("no address, and no network as 10.0.0.0/8"))?);
                }
                "route" => query.route = Some(value),
                "older" => {
                    let seconds = value.strip_suffix('s').unwrap_or(value).parse();
                    query.older = Duration::from_secs(seconds.map_err(|_| bad("no number of seconds"))?);
                }
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
                    query.limit = limit.ok_or_else(|| bad("no number from 1 to 10000"))?;
                }
                _ => return Err(bad("there are sort, address, route, older, limit")),
            }
        }
        Ok(query)
    }

    fn wants(&self, session: &Entry, now: Stamp) -> bool {
        let client = session.client().to_canonical();
        self.network.is_none_or(|network| network.contains(&client))
            && self.route.is_none_or(|route| session.route() == route)
            && now - session.begun() >= self.older
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        for good in ["", "&", "sort=route&limit=1", "address=10.0.0.0/8&older=60s", "address=::1&route=/chat/*&older=5"]
        {
            assert!(Query::read(good).is_ok(), "{good}");
        }
        for bad in
            ["sort=", "sort=path", "address=10.0.0.0/33", "address=a", "older=1m", "limit=0", "limit=10001", "page=2"]
        {
            let error = Query::read(bad).expect_err(bad);
            assert!(error.starts_with(bad), "{error}");
        }
    }
}
