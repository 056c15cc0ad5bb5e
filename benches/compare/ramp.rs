//! The experiment of a field report: a few clients more each second, up to some hundreds at once. A client connects and
//! upgrades, waits (1 to 5 s, at random), sends a message, gets its result, for which the backend works 10 to 50 ms, and does
//! the Close handshake up to the FIN. Then another one takes its place, so that as many stay at once until the end.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    io,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until},
};

use crate::{
    load::{Order, Outcome, limited},
    spike::{Script, ms},
    watch::Watch,
    wire::Connection,
};

/// What a client waits between its 101 and its message.
const THINK_SECONDS: std::ops::RangeInclusive<f64> = 1.0..=5.0;

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ramp {
    /// Clients more per second.
    pub rate: f64,
    /// At once, in the end.
    pub clients: u32,
    /// For how long they are as many, in seconds.
    pub hold: f64,
}

impl Ramp {
    /// Until no client comes any more.
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(f64::from(self.clients) / self.rate + self.hold)
    }
}

/// One client's times.
struct Times {
    /// To the 101.
    connect: Duration,
    /// From the message to its answer.
    result: Duration,
    /// From the Close to the FIN.
    close: Duration,
}

pub async fn ramp(order: &Order, ramp: &Ramp) -> anyhow::Result<Outcome> {
    let script = Script::new(order, false);
    let mut places = JoinSet::new();
    let watch = Watch::begin(order)?;
    let begun = Instant::now();
    let end = begun + ramp.duration();
    for place in 0..ramp.clients {
        let script = script.clone();
        let from = begun + Duration::from_secs_f64(f64::from(place) / ramp.rate);
        places.spawn(async move {
            sleep_until(from.into()).await;
            let mut seen = Vec::new();
            while Instant::now() < end {
                seen.push(client(&script).await);
            }
            seen
        });
    }
    let seen: Vec<Result<Times, String>> = places.join_all().await.into_iter().flatten().collect();
    let mut outcome = watch.end(order).await?;
    let mut clients = Vec::new();
    for result in seen {
        match result {
            Ok(times) => clients.push(times),
            Err(error) => *outcome.errors.entry(error).or_default() += 1,
        }
    }
    outcome.count = clients.len() as u64;
    outcome.failures = outcome.errors.values().sum();
    let columns = [
        ("connect", clients.iter().map(|times| ms(times.connect)).collect::<Vec<_>>()),
        ("result", clients.iter().map(|times| ms(times.result)).collect()),
        ("close", clients.iter().map(|times| ms(times.close)).collect()),
    ];
    for (name, times) in columns {
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / times.len() as f64;
        outcome.insert(&format!("{name}_max_ms"), times.iter().copied().fold(0.0, f64::max));
        outcome.insert(&format!("{name}_mean_ms"), mean);
        outcome.insert(&format!("{name}_deviation_ms"), variance.sqrt());
    }
    Ok(outcome)
}

async fn client(script: &Script) -> Result<Times, String> {
    let at = |stage: &'static str| move |error: io::Error| format!("{stage}: {error}");
    let begun = Instant::now();
    let mut connection = limited(Connection::open(script.address)).await.map_err(at("connect"))?;
    let connect = begun.elapsed();
    sleep(Duration::from_secs_f64(rand::random_range(THINK_SECONDS))).await;
    let begun = Instant::now();
    limited(connection.echo(&script.message, script.bytes)).await.map_err(at("result"))?;
    let result = begun.elapsed();
    let begun = Instant::now();
    limited(connection.close(&script.close)).await.map_err(at("close"))?;
    Ok(Times { connect, result, close: begun.elapsed() })
}
