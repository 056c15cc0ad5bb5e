//! Clients of a crowd of whom nothing is taken for granted: whatever becomes of one is an [`Outcome`], to be counted.

use super::{
    DEADLINE, End, Frame, Message,
    crowd::{Member, tally},
    ws::{CLOSE, TEXT},
};
use std::{
    collections::BTreeMap,
    fmt,
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// How long an answer may be in coming: a machine with other things to do takes its time over thousands of clients.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// A WebSocket session with one echo, and a clean end.
    Echo,
    /// A plain GET, and a clean end.
    Get,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It got all that it wanted, and a FIN at the end.
    Served,
    /// 503 with Retry-After, and a FIN.
    Refused,
    /// Another status, and a FIN.
    Status(u16),
    /// A Close before its own, and a FIN: an end in order.
    Closed(u16),
    /// A FIN where something else was due: an end without a word.
    Fin(Stage),
    /// No connection.
    Unconnected(ErrorKind),
    /// RST.
    Reset(Stage),
    /// Nothing came for [`DEADLINE`].
    Silence(Stage),
    /// What came was not what was due, or the socket failed in another way.
    Strange(Stage),
}

/// How far it had got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It waited for the answer to its request.
    Answer,
    /// It waited for its echo.
    Echo,
    /// It waited for the end, FIN or Close.
    End,
}

impl Outcome {
    /// An end that came too early, or not at all.
    fn by(end: End, stage: Stage) -> Self {
        match end {
            End::Fin | End::Truncated => Self::Fin(stage),
            // EPIPE is what the kernel makes of a RST that comes behind a FIN.
            End::Rst | End::Error(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => Self::Reset(stage),
            End::Timeout => Self::Silence(stage),
            End::Left | End::Error(_) => Self::Strange(stage),
        }
    }
}

/// A client that has asked: it has a session, or its visit is over.
#[derive(Debug)]
pub struct Arrival {
    pub result: Result<Member, Outcome>,
    /// From its `connect()` to its answer.
    pub took: Duration,
}

/// A client that wants a session, whose answer may be `patience` in coming.
pub async fn arrive(address: SocketAddr, patience: Duration) -> Arrival {
    let begun = Instant::now();
    let result = match ask(address, &Message::websocket("/"), patience).await {
        Ok((member, response)) if response.code() == 101 => Ok(member),
        Ok((member, response)) => Err(turned_away(member, &response).await),
        Err(outcome) => Err(outcome),
    };
    Arrival { result, took: begun.elapsed() }
}

async fn ask(address: SocketAddr, request: &Message, patience: Duration) -> Result<(Member, Message), Outcome> {
    let mut member = Member::try_connect(address, patience).await.map_err(Outcome::Unconnected)?;
    // Who is turned away may be told so, and its connection be ended, before it has asked.
    let sent = member.send_bytes(&request.bytes()).await.map_err(|error| error.kind());
    let answer = timeout(patience, member.message()).await.unwrap_or(Err(End::Timeout));
    match (answer, sent) {
        (Ok(response), _) => Ok((member, response)),
        (Err(_), Err(kind)) => Err(Outcome::by(End::Error(kind), Stage::Answer)),
        (Err(end), Ok(())) => Err(Outcome::by(end, Stage::Answer)),
    }
}

/// The rest of a visit whose answer was no 101.
async fn turned_away(member: Member, response: &Message) -> Outcome {
    let may_come_again = response.field("Retry-After").is_some_and(|after| after.parse::<u32>().is_ok());
    let outcome = match response.code() {
        503 if may_come_again => Outcome::Refused,
        status => Outcome::Status(status),
    };
    match member.fin_and_rest().await {
        rest if rest.end == End::Fin && rest.messages == 0 && !rest.is_ragged => outcome,
        rest if rest.end == End::Fin => Outcome::Strange(Stage::End),
        rest => Outcome::by(rest.end, Stage::End),
    }
}

/// One message and its echo.
pub async fn echo(member: &mut Member, text: &str) -> Result<(), Outcome> {
    // A failure is seen with the echo that does not come.
    let _ = member.send(&Frame::text(text)).await;
    match timeout(DEADLINE, member.frame()).await.unwrap_or(Err(End::Timeout)) {
        Ok(frame) if frame.opcode == TEXT && frame.text() == text => Ok(()),
        Ok(frame) if frame.opcode == CLOSE => {
            let code = frame.code();
            let _ = member.send(&Frame::new(CLOSE, &frame.payload[..frame.payload.len().min(2)])).await;
            let end = member.rest().await.end;
            Err(if end == End::Fin { Outcome::Closed(code) } else { Outcome::by(end, Stage::End) })
        }
        Ok(_) => Err(Outcome::Strange(Stage::Echo)),
        Err(end) => Err(Outcome::by(end, Stage::Echo)),
    }
}

/// The Close handshake, begun here, and the FIN behind it.
pub async fn leave(mut member: Member) -> Outcome {
    let _ = member.send(&Frame::close(1000, "")).await;
    let rest = member.rest().await;
    match rest.closes.first().map(super::ws::SeenFrame::code) {
        _ if rest.end != End::Fin => Outcome::by(rest.end, Stage::End),
        Some(1000) if rest.messages == 0 && !rest.is_ragged => Outcome::Served,
        // Two Closes that met on their way.
        Some(code) if rest.messages == 0 && !rest.is_ragged => Outcome::Closed(code),
        Some(_) => Outcome::Strange(Stage::End),
        None => Outcome::Fin(Stage::End),
    }
}

/// A visit from its beginning to its end.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    pub outcome: Outcome,
    /// From its `connect()` to its answer, or to the end that came instead.
    pub took: Duration,
}

pub async fn visit(address: SocketAddr, errand: Errand) -> Visit {
    let begun = Instant::now();
    match errand {
        Errand::Echo => {
            let Arrival { result, took } = arrive(address, PATIENCE).await;
            let outcome = match result {
                Ok(mut member) => match echo(&mut member, "a").await {
                    Ok(()) => leave(member).await,
                    Err(outcome) => outcome,
                },
                Err(outcome) => outcome,
            };
            Visit { outcome, took }
        }
        Errand::Get => {
            let asked = ask(address, &Message::get("/"), PATIENCE).await;
            let took = begun.elapsed();
            let outcome = match asked {
                Ok((member, response)) => match turned_away(member, &response).await {
                    Outcome::Status(200) if response.body == b"anything" => Outcome::Served,
                    outcome => outcome,
                },
                Err(outcome) => outcome,
            };
            Visit { outcome, took }
        }
    }
}

/// How many visits went how.
pub fn outcomes<'a>(visits: impl IntoIterator<Item = &'a Visit>) -> BTreeMap<Outcome, usize> {
    tally(visits.into_iter().map(|visit| visit.outcome))
}

/// Each of `count` visits was served.
#[track_caller]
pub fn assert_served(visits: &[Visit], count: usize) {
    assert_eq!(outcomes(visits), BTreeMap::from([(Outcome::Served, count)]));
}

/// How long answers took, for a line of figures.
pub struct Spread(Vec<Duration>);

impl Spread {
    pub fn of(took: impl IntoIterator<Item = Duration>) -> Self {
        let mut took: Vec<_> = took.into_iter().collect();
        took.sort_unstable();
        Self(took)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(last) = self.0.len().checked_sub(1) else { return f.write_str("nothing") };
        let [median, p99] = [self.0[last / 2], self.0[last * 99 / 100]];
        write!(f, "median {median:.0?}, p99 {p99:.0?}, worst {:.0?}", self.0[last])
    }
}
