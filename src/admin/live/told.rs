//! The shape of `/live.json`, which `docs/live-page.md` describes. Only shape: nothing is gathered here.

use serde::{Serialize, Serializer};

use super::problems::{Limit, Problem};
use crate::{
    doctor, hub,
    upstream::{EndpointState, Shared},
};

#[derive(Debug, Serialize)]
pub(super) struct Told<'a> {
    pub version: &'static str,
    pub pid: u32,
    pub unix_ms: u64,
    pub uptime_ms: u64,
    pub listen: String,
    pub phase: &'static str,
    pub phase_ms: u64,
    pub phase_left_ms: Option<u64>,
    pub drain: Option<Drain>,
    pub sessions: i64,
    pub connections: i64,
    pub lingering: i64,
    pub problems: Vec<Problem>,
    pub limits: Vec<Limit>,
    /// Length and limit of each.
    pub queues: Vec<[u32; 2]>,
    pub windows: Windows,
    pub kernel: Named<u32>,
    pub endpoints: Vec<EndpointState>,
    pub more_endpoints: usize,
    pub shared: Vec<Shared>,
    pub more_shared: usize,
    pub websockets: Vec<hub::Told>,
    pub more_websockets: usize,
    pub pool: Pool,
    pub seq: u64,
    pub sample: Named<Option<u32>>,
    // Not in each event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<History>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doctor: Option<&'a [doctor::Finding]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Drain {
    pub sessions_at_start: i64,
    pub window_left_ms: Option<u64>,
    pub window_ms: u64,
    pub timeout_ms: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Windows {
    #[serde(rename = "1m")]
    pub minute: Window,
    #[serde(rename = "15m")]
    pub quarter: Window,
}

#[derive(Debug, Serialize)]
pub(super) struct Window {
    pub seconds: u64,
    pub handshakes: Named<u32>,
    pub refused: Named<u32>,
    pub requests: Named<u32>,
    pub messages: [u32; 2],
    pub closes: Vec<End>,
    pub abnormal: Named<u32>,
    pub websockets: Named<u32>,
    pub connect: Took,
    pub close: Took,
    pub kernel: Named<u32>,
}

#[derive(Debug, Serialize)]
pub(super) struct End {
    pub initiator: &'static str,
    pub clean: bool,
    pub code: &'static str,
    pub count: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct Took {
    pub count: u64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub max_ms: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Pool {
    pub keys: i64,
    pub references: i64,
    pub waiters: i64,
}

#[derive(Debug, Serialize)]
pub(super) struct History {
    pub step_ms: u64,
    pub last_seq: u64,
    pub series: Named<Vec<Option<u32>>>,
}

/// Written as a map.
#[derive(Debug)]
pub(super) struct Named<T>(pub Vec<(&'static str, T)>);

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}
