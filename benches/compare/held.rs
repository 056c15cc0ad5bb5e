//! Sessions that are there, each with an echo now and then, while others come all at once. Both must be served: who comes,
//! and who is there.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    load::{Order, Outcome, limited},
    spike::{LIMIT, Script, Seen, count},
    watch::Watch,
    wire::Connection,
};

/// Between two echoes of a held session.
const PAUSE: Duration = Duration::from_secs(5);

/// Held sessions before the others come.
const QUIET: Duration = Duration::from_secs(1);

/// `sessions` are held while `clients` come at once.
pub async fn held(order: &Order, sessions: usize, clients: usize) -> anyhow::Result<Outcome> {
    let script = Script::new(order, false);
    let held = open(order, &script, sessions).await;
    let opened = held.len();

    let end = CancellationToken::new();
    let slowest = Arc::new(AtomicU64::new(0));
    let mut holding: JoinSet<io::Result<()>> = JoinSet::new();
    for connection in held {
        holding.spawn(hold(connection, script.clone(), end.clone(), Arc::clone(&slowest)));
    }
    sleep(QUIET).await;

    slowest.store(0, Ordering::Relaxed);
    let mut coming: JoinSet<Seen> = JoinSet::new();
    let watch = Watch::begin(order)?;
    script.burst(clients, &mut coming).await?;
    let seen = coming.join_all().await;
    let mut outcome = watch.end(order).await?;
    count(&mut outcome, seen);
    outcome.insert("held_slowest_echo_ms", slowest.load(Ordering::Relaxed) as f64 / 1e3);

    // Each has a last echo and an orderly end: who was lost meanwhile has not.
    end.cancel();
    let mut kept = 0;
    for result in holding.join_all().await {
        match result {
            Ok(()) => kept += 1,
            Err(error) => *outcome.errors.entry(format!("held: {error}")).or_default() += 1,
        }
    }
    outcome.insert("held", opened as f64);
    outcome.insert("held_lost", (sessions - kept) as f64);
    Ok(outcome)
}

/// A few at a time.
pub async fn open(order: &Order, script: &Script, sessions: usize) -> Vec<Connection> {
    let mut tasks = JoinSet::new();
    for nth in 0..order.connections {
        let share = (sessions + nth) / order.connections;
        let script = script.clone();
        tasks.spawn(async move {
            let mut open = Vec::with_capacity(share);
            for _ in 0..share {
                let session = async {
                    let mut connection = Connection::open(script.address).await?;
                    connection.echo(&script.message, script.bytes).await?;
                    io::Result::Ok(connection)
                };
                // Those that are missing are counted as lost.
                open.extend(limited(session).await.ok());
            }
            open
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn hold(
    mut connection: Connection,
    script: Script,
    end: CancellationToken,
    slowest: Arc<AtomicU64>,
) -> io::Result<()> {
    // Spread evenly from the first one on.
    let mut pause = PAUSE.mul_f64(rand::random::<f64>());
    while end.run_until_cancelled(sleep(pause)).await.is_some() {
        let begun = Instant::now();
        limited(connection.echo(&script.message, script.bytes)).await?;
        slowest.fetch_max(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        pause = PAUSE;
    }
    let last = async {
        connection.echo(&script.message, script.bytes).await?;
        connection.close(&script.close).await.map(drop)
    };
    timeout(LIMIT, last).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
