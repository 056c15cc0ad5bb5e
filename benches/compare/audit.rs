//! Who leaves in the middle, and what the backend sees of it. A backend writes a result in three frames, 10 ms apart, and goes on to its
//! end; the client sends Close when it has the first of them. Then it closes its socket at once, as many do, or it waits for the answering Close and the FIN.
//!
//! Sessions come at a fixed rate that leaves the machine time, so that it is the 10 ms that decide, and not who gets a CPU.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    io::{self, ErrorKind, Write as _},
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    load::{Order, Outcome, limited},
    process::Process,
    procfs::connections,
    spike::{ms, quantile},
    watch::Watch,
    wire::{AUDIT, BINARY, CLOSE, CLOSE_NORMAL, Connection, Received, Role, frame},
};

/// Sessions that begin in a second.
pub const RATE: u32 = 500;

const FRAMES: u32 = 3;
const BETWEEN: Duration = Duration::from_millis(10);

/// For a session's end, as the backend sees it: who has not sent a FIN by then sends none.
const END_LIMIT: Duration = Duration::from_secs(15);

/// Between two looks at what is left.
const POLL: Duration = Duration::from_millis(50);

/// What the backend says of each session, and under which name it is counted.
const ENDS: [(&str, &str); 4] = [
    ("Close and FIN", "backend_clean"),
    ("FIN without Close", "backend_fin"),
    ("EPIPE or RST", "backend_rst"),
    ("no end", "backend_open"),
];

/// The backend's side of one session; prints how it ended.
pub async fn serve(connection: Connection) -> io::Result<()> {
    let end = match timeout(END_LIMIT, result(connection)).await {
        Ok(Ok(true)) => 0,
        Ok(Ok(false)) => 1,
        Ok(Err(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => 2,
        Ok(Err(error)) => return writeln!(io::stdout(), "{error}"),
        Err(_) => 3,
    };
    writeln!(io::stdout(), "{}", ENDS[end].0)
}

/// All frames, whatever comes meanwhile: who works on a result does not look. Then the rest. True: it ended with a Close.
async fn result(mut connection: Connection) -> io::Result<bool> {
    let message = frame(Role::Backend, BINARY, &[b'x'; 64]);
    for nth in 0..FRAMES {
        if nth > 0 {
            sleep(BETWEEN).await;
        }
        connection.write(&message).await?;
    }
    loop {
        match connection.next().await? {
            Some(Received { opcode: CLOSE, .. }) => {
                return connection.closed(&frame(Role::Backend, CLOSE, &CLOSE_NORMAL)).await.map(|()| true);
            }
            Some(_) => {}
            None => return Ok(false),
        }
    }
}

/// `sessions` that leave; `waits`: for the answering Close and the FIN.
pub async fn audit(order: &Order, sessions: usize, waits: bool) -> anyhow::Result<Outcome> {
    let watch = Watch::begin(order)?;
    let mut clients = JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for _ in 0..sessions {
        ticks.tick().await;
        let address = order.address;
        clients.spawn(async move {
            let mut connection = limited(Connection::open_at(address, AUDIT)).await?;
            limited(client(&mut connection)).await?;
            if !waits {
                return Ok(None);
            }
            let begun = Instant::now();
            limited(rest(connection)).await?;
            io::Result::Ok(Some(begun.elapsed()))
        });
    }
    let seen = clients.join_all().await;
    // The proxy has its other legs to end.
    let begun = Instant::now();
    while begun.elapsed() < END_LIMIT && connections(order.backend)? > 0 {
        sleep(POLL).await;
    }
    let mut outcome = watch.end(order).await?;
    let mut times = Vec::new();
    for result in seen {
        match result {
            Ok(time) => {
                outcome.count += 1;
                times.extend(time);
            }
            Err(error) => *outcome.errors.entry(error.to_string()).or_default() += 1,
        }
    }
    outcome.failures = outcome.errors.values().sum();
    times.sort_unstable();
    for (name, per_mille) in [("close_p50_ms", 500), ("close_p99_ms", 990), ("close_max_ms", 1000)] {
        if let Some(time) = quantile(&times, per_mille) {
            outcome.insert(name, ms(time));
        }
    }
    Ok(outcome)
}

/// Up to its Close.
async fn client(connection: &mut Connection) -> io::Result<()> {
    match connection.next().await? {
        Some(Received { opcode: BINARY, .. }) => {}
        other => return Err(io::Error::other(format!("instead of a result: {other:?}"))),
    }
    connection.write(&frame(Role::Client, CLOSE, &CLOSE_NORMAL)).await
}

/// What was under way, the answering Close, and the FIN.
async fn rest(mut connection: Connection) -> io::Result<()> {
    loop {
        match connection.next().await? {
            Some(Received { opcode: CLOSE, .. }) => return connection.until_fin().await,
            Some(_) => {}
            None => return Err(io::Error::other("FIN without a Close")),
        }
    }
}

/// What the backend has printed of its sessions, when it has seen the end of all of them.
pub async fn backend_saw(backend: &Process, sessions: usize, outcome: &mut Outcome) {
    let begun = Instant::now();
    let mut printed = backend.printed();
    // The first line is its address.
    while printed.lines().count() <= sessions && begun.elapsed() < END_LIMIT {
        sleep(POLL).await;
        printed = backend.printed();
    }
    for (_, name) in ENDS {
        outcome.insert(name, 0.0);
    }
    for line in printed.lines().skip(1) {
        match ENDS.iter().find(|(end, _)| *end == line) {
            Some((_, name)) => *outcome.values.entry((*name).to_owned()).or_default() += 1.0,
            None => *outcome.errors.entry(format!("the backend: {line}")).or_default() += 1,
        }
    }
    // Of sessions that never came to it there is no line.
    let missing = (sessions + 1).saturating_sub(printed.lines().count());
    outcome.insert("backend_missing", missing as f64);
}
