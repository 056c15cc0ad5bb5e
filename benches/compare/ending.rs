//! What thousands of talking clients see when what they talk to goes away: the proxy, which is asked to stop in good order and has some
//! seconds for it (`drain`), or the backend, which is killed (`kill`). Each has a message echoed five times a second, answers a Close, and
//! then waits for the FIN.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, sleep_until},
};

use crate::{
    held,
    load::{Order, Outcome, limited},
    procfs,
    spike::{Script, ms, quantile},
    wire::{BINARY, CLOSE, Connection, Received, Role, frame},
};

/// What a proxy has for an orderly stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// Talking before anything happens.
const BEFORE: Duration = Duration::from_secs(2);

/// From then on; who is there afterwards stays.
pub const AFTER: Duration = Duration::from_secs(8);

/// Between two messages of a client.
const PAUSE: Duration = Duration::from_millis(200);

/// Between two looks at whether the proxy's process goes on.
const GONE_POLL: Duration = Duration::from_millis(5);

/// Of a timeline, which begins so much earlier than what happens.
const STEP_MS: u32 = 100;
const SHOWN_BEFORE: Duration = Duration::from_secs(1);

/// How a proxy is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    Term,
    Quit,
    Usr1,
    /// Over its admin listener: `/drain_listeners?graceful`, and `/quitquitquit` when its time is over.
    Envoy(SocketAddr),
}

/// What happens per step of time, in all rounds the same steps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// Of the first step, counted from what happens.
    pub from_ms: i64,
    pub step_ms: u32,
    pub series: BTreeMap<String, Vec<u64>>,
}

/// How it ended for one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Fin,
    Rst,
    Other(ErrorKind),
}

/// What one client saw.
#[derive(Debug, Default)]
struct Seen {
    sent: u64,
    answered: Vec<Instant>,
    /// That of the first Close; 1005: without one.
    code: Option<u16>,
    closed: Option<Instant>,
    end: Option<(Instant, End)>,
}

impl Seen {
    /// As a report counts it.
    fn name(&self) -> &'static str {
        match (self.code, &self.end) {
            (_, None) => "still_there",
            (Some(_), Some((_, End::Fin))) => "close_fin",
            (Some(_), Some(_)) => "close_rst",
            (None, Some((_, End::Fin))) => "bare_fin",
            (None, Some(_)) => "bare_rst",
        }
    }

    /// In words.
    fn words(&self) -> String {
        let close = self.code.map_or_else(|| "no Close".to_owned(), |code| format!("Close {code}"));
        let end = match self.end {
            None => "still there".to_owned(),
            Some((_, End::Fin)) => "FIN".to_owned(),
            Some((_, End::Rst)) => "RST".to_owned(),
            Some((_, End::Other(kind))) => kind.to_string(),
        };
        format!("{close}, {end}")
    }
}

/// `stop`: the proxy is asked to; else the backend is killed.
pub async fn ending(order: &Order, sessions: usize, stop: bool) -> anyhow::Result<Outcome> {
    let script = Script::new(order, false);
    let open = held::open(order, &script, sessions).await;
    let mut outcome = Outcome { count: open.len() as u64, ..Outcome::default() };
    outcome.failures = (sessions - open.len()) as u64;
    ensure!(!open.is_empty(), "no session could be opened");
    let until = Instant::now() + BEFORE + AFTER;
    let mut clients = JoinSet::new();
    for connection in open {
        clients.spawn(talk(connection, script.clone(), until));
    }
    sleep(BEFORE).await;

    let happened = Instant::now();
    let mut stopping: JoinSet<()> = JoinSet::new();
    let mut going: JoinSet<Option<Duration>> = JoinSet::new();
    if stop {
        let stop = order.stop.context("a proxy that can't be stopped in good order")?;
        let main = *order.proxy.first().context("no proxy")?;
        match stop {
            Stop::Term => signal(main, Signal::TERM)?,
            Stop::Quit => signal(main, Signal::QUIT)?,
            Stop::Usr1 => signal(main, Signal::USR1)?,
            Stop::Envoy(admin) => {
                limited(post(admin, "/drain_listeners?graceful")).await?;
                stopping.spawn(async move {
                    sleep_until((happened + GRACE).into()).await;
                    // It may end before it answers.
                    let _ = limited(post(admin, "/quitquitquit")).await;
                });
            }
        }
        going.spawn(async move {
            while procfs::goes_on(main) {
                sleep_until((Instant::now() + GONE_POLL).min(until).into()).await;
                if Instant::now() >= until {
                    return None;
                }
            }
            Some(happened.elapsed())
        });
    } else {
        signal(order.backend, Signal::KILL)?;
    }

    let seen = clients.join_all().await;
    if let Some(gone) = going.join_all().await.into_iter().flatten().next() {
        outcome.insert("gone_ms", ms(gone));
    }
    tell(&mut outcome, &seen, happened);
    Ok(outcome)
}

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// A request without a body; the answer's head is enough.
async fn post(address: SocketAddr, path: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    if answer == *b"HTTP/1.1 200" { Ok(()) } else { Err(io::Error::other(format!("{path} was not answered with 200"))) }
}

/// One client, to its end, or until it is not looked at any more.
async fn talk(mut connection: Connection, script: Script, until: Instant) -> Seen {
    let mut seen = Seen::default();
    // Spread evenly from the first one on.
    let mut due = Instant::now() + PAUSE.mul_f64(rand::random::<f64>());
    let mut is_waiting = false;
    let result = loop {
        let heard = tokio::select! {
            heard = connection.next() => Some(heard),
            () = sleep_until(due.into()), if !is_waiting && seen.code.is_none() => None,
            () = sleep_until(until.into()) => return seen,
        };
        match heard {
            None => {
                seen.sent += 1;
                is_waiting = true;
                if let Err(error) = connection.write(&script.message).await {
                    break Err(error);
                }
            }
            Some(Ok(Some(Received { opcode: BINARY, .. }))) => {
                seen.answered.push(Instant::now());
                is_waiting = false;
                due += PAUSE;
            }
            Some(Ok(Some(Received { opcode: CLOSE, control, .. }))) => {
                seen.closed.get_or_insert_with(Instant::now);
                let code = control.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                if seen.code.replace(code).is_none()
                    && let Err(error) = connection.write(&frame(Role::Client, CLOSE, &control)).await
                {
                    break Err(error);
                }
            }
            Some(Ok(Some(_))) => {}
            Some(Ok(None)) => break Ok(()),
            Some(Err(error)) => break Err(error),
        }
    };
    let end = match result.map_err(|error| error.kind()) {
        Ok(()) => End::Fin,
        // A write finds that it was reset before.
        Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => End::Rst,
        Err(kind) => End::Other(kind),
    };
    seen.end = Some((Instant::now(), end));
    seen
}

fn tell(outcome: &mut Outcome, seen: &[Seen], happened: Instant) {
    for name in ["close_fin", "close_rst", "bare_fin", "bare_rst", "still_there"] {
        outcome.insert(name, seen.iter().filter(|seen| seen.name() == name).count() as f64);
    }
    for client in seen {
        *outcome.endings.entry(client.words()).or_default() += 1;
    }
    let ended = seen.iter().filter(|seen| seen.end.is_some());
    // One at most for each: it waits for its answer.
    let lost: u64 = ended.map(|seen| seen.sent - seen.answered.len() as u64).sum();
    outcome.insert("lost", lost as f64);
    let before = seen.iter().flat_map(|seen| &seen.answered).filter(|at| **at < happened).count();
    outcome.insert("messages_per_second", before as f64 / BEFORE.as_secs_f64());
    let sorted = |of: fn(&Seen) -> Option<Instant>| -> Vec<Duration> {
        let mut times: Vec<Duration> =
            seen.iter().filter_map(|seen| Some(of(seen)?.saturating_duration_since(happened))).collect();
        times.sort_unstable();
        times
    };
    let (closed, ended) = (sorted(|seen| seen.closed), sorted(|seen| seen.end.map(|(at, _)| at)));
    for (name, times, per_mille) in [
        ("close_p50_ms", &closed, 500),
        ("close_max_ms", &closed, 1000),
        ("first_end_ms", &ended, 0),
        ("end_p50_ms", &ended, 500),
        ("last_end_ms", &ended, 1000),
    ] {
        if let Some(time) = quantile(times, per_mille) {
            outcome.insert(name, ms(time));
        }
    }

    let steps = (SHOWN_BEFORE + AFTER).as_millis() / u128::from(STEP_MS);
    let mut timeline = Timeline {
        from_ms: -i64::try_from(SHOWN_BEFORE.as_millis()).unwrap_or_default(),
        step_ms: STEP_MS,
        series: BTreeMap::new(),
    };
    let mut count = |name: &str, at: Instant| {
        let series = timeline.series.entry(name.to_owned());
        let series = series.or_insert_with(|| vec![0; usize::try_from(steps).unwrap_or_default()]);
        let step =
            (at + SHOWN_BEFORE).checked_duration_since(happened).map(|since| since.as_millis() / u128::from(STEP_MS));
        if let Some(step) = step.and_then(|step| series.get_mut(usize::try_from(step).ok()?)) {
            *step += 1;
        }
    };
    for client in seen {
        client.answered.iter().for_each(|at| count("answered", *at));
        if let Some((at, _)) = client.end {
            count(client.name(), at);
        }
    }
    outcome.timeline = Some(timeline);
}
