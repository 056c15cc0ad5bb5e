//! `tidegate connections`: the sessions of the proxy that runs here, as a table.

use std::fmt::Write as _;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::{
    operate::{self, Admin},
    table::{age, columns},
};

/// Which of them.
#[derive(Debug, Args)]
pub(super) struct Wanted {
    /// In which order; those that are alike, the oldest first
    #[arg(long, value_enum, default_value_t = Sort::Age)]
    sort: Sort,
    /// Only of clients of this address or network: "10.0.0.0/8"
    #[arg(long, value_name = "NET")]
    address: Option<String>,
    #[arg(long, value_name = "PATH")]
    #[arg(help = "Only of this route, as its path is in the file; \"\" for those of none")]
    route: Option<String>,
    /// Only those that are older than so many seconds
    #[arg(long, value_name = "SECONDS")]
    older: Option<u64>,
    /// At most so many
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Sort {
    /// The oldest first
    Age,
    /// By the client's address
    Address,
    /// By the route's path
    Route,
    /// By the backend's address
    Endpoint,
}

#[derive(Debug, Deserialize)]
struct Answer {
    total: usize,
    matching: usize,
    sessions: Vec<Session>,
}

#[derive(Debug, Deserialize)]
struct Session {
    client: String,
    age_ms: u64,
    route: String,
    endpoint: String,
    way: String,
    key: Option<String>,
    http: String,
    tls: Option<String>,
    path: String,
    request_id: String,
}

impl Wanted {
    fn query(&self) -> String {
        let sort = self.sort.to_possible_value().expect("none is skipped");
        let mut query = format!("sort={}&limit={}", sort.get_name(), self.limit);
        for (key, value) in [("address", &self.address), ("route", &self.route)] {
            if let Some(value) = value {
                write!(query, "&{key}={value}").expect("a String takes everything");
            }
        }
        if let Some(seconds) = self.older {
            write!(query, "&older={seconds}").expect("a String takes everything");
        }
        query
    }
}

/// As the admin listener says it.
pub(super) fn json(admin: &Admin, wanted: &Wanted) -> anyhow::Result<String> {
    operate::look(admin, &format!("/connections?{}", wanted.query()))
}

/// A table, and how many there are.
pub(super) fn table(admin: &Admin, wanted: &Wanted) -> anyhow::Result<(String, String)> {
    let answer: Answer = serde_json::from_str(&json(admin, wanted)?).context("what it says is no list of sessions")?;
    let Answer { total, matching, sessions } = answer;
    let count = format!("{} shown of {matching} that match, {total} in all", sessions.len());
    let head = ["CLIENT", "AGE", "ROUTE", "BACKEND", "WAY", "KEY", "OVER", "PATH", "REQUEST"].map(str::to_owned);
    let rows = sessions.into_iter().map(|session| {
        let Session { client, age_ms, route, endpoint, way, key, http, tls, path, request_id } = session;
        let route = if route.is_empty() { "-".to_owned() } else { route };
        let over = tls.map_or_else(|| http.clone(), |tls| format!("{http} TLS {tls}"));
        let key = key.unwrap_or_else(|| "-".to_owned());
        // Not for a terminal to obey.
        let cells = [client, age(age_ms), route, endpoint, way, key, over, path, request_id];
        cells.map(|text| text.escape_debug().to_string())
    });
    Ok((columns(&[head].into_iter().chain(rows).collect::<Vec<_>>()), count))
}
