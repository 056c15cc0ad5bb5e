//! Feeds, and those who watch them: numbered messages that say when they were sent, so that whoever hears them finds each gap.

use super::{
    Board, DEADLINE, End, Frame, LIMIT, Message,
    crowd::Member,
    ws::{CLOSE, PING, PONG, SeenFrame, TEXT},
};
use std::{
    fmt,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::Semaphore,
    time::{interval, timeout},
};

/// Handshakes of watchers that are under way at once.
const JOINING: usize = 128;

/// What a feed of the echo process says: its size, and its pace.
pub const BYTES: usize = 256;
pub const EVERY: Duration = Duration::from_millis(10);

/// Of a clock that all processes of a test read.
pub fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set");
    u64::try_from(now.as_micros()).expect("a date of this era")
}

/// A message: which feed, its number there, and when it was sent.
pub fn say(feed: u64, number: u64, bytes: usize) -> Frame {
    let mut text = format!("{feed} {number} {} ", now_us());
    text.extend(std::iter::repeat_n('x', bytes.saturating_sub(text.len())));
    Frame::text(&text)
}

/// What a message says of itself.
fn said(frame: &SeenFrame) -> Option<[u64; 3]> {
    let text = std::str::from_utf8(&frame.payload).ok().filter(|_| frame.opcode == TEXT)?;
    let mut words = text.split(' ').map_while(|word| word.parse().ok());
    Some([words.next()?, words.next()?, words.next()?])
}

/// A connection of a backend that says something every so often, so many messages as it may (`None`: any number), and answers what it has to. Gives
/// the code of its Close; `None`: there was none.
pub async fn feed_on(mut member: Member, every: Duration, bytes: usize, may: Option<&Board<u64>>) -> Option<u16> {
    let (feed, mut ticks, mut number) = (now_us(), interval(every), 0);
    loop {
        let next = async {
            if let Some(may) = may {
                may.until(LIMIT, |may| (number < *may).then_some(())).await.expect("a test that goes on");
            }
            ticks.tick().await;
        };
        tokio::select! {
            frame = member.frame() => match frame {
                Ok(frame) if frame.opcode == CLOSE => {
                    let code = frame.code();
                    end(member, &frame).await;
                    return Some(code);
                }
                // The failure of an answer is seen with the next read.
                Ok(frame) if frame.opcode == PING => _ = member.send(&Frame::new(PONG, &frame.payload)).await,
                Ok(_) => {}
                Err(_) => {
                    member.fin_and_rest().await;
                    return None;
                }
            },
            () = next => {
                let _ = member.send(&say(feed, number, bytes)).await;
                number += 1;
            }
        }
    }
}

/// Answers a Close, and closes first as a server should.
pub async fn end(mut member: Member, close: &SeenFrame) {
    let _ = member.send(&Frame::new(CLOSE, &close.payload[..close.payload.len().min(2)])).await;
    member.fin_and_rest().await;
}

/// A client with its handshake done.
pub async fn join(address: SocketAddr, request: &Message) -> Member {
    let mut member = Member::connect(address).await;
    let response = ask(&mut member, request).await;
    assert_eq!(response.code(), 101, "{response:?}");
    member
}

/// The answer to a handshake.
pub async fn ask(member: &mut Member, request: &Message) -> Message {
    member.send_bytes(&request.bytes()).await.expect("the other side has just accepted");
    let answer = timeout(DEADLINE, member.message()).await.expect("in time");
    answer.unwrap_or_else(|end| panic!("{end:?} instead of an answer to {request:?}"))
}

/// So many of them.
pub async fn join_all(address: SocketAddr, request: &Message, count: usize) -> Vec<Member> {
    join_by(JOINING, address, request, count).await
}

/// As [`join_all`], so few at a time.
pub async fn join_by(at_once: usize, address: SocketAddr, request: &Message, count: usize) -> Vec<Member> {
    let turns = Semaphore::new(at_once);
    let one = async || {
        let _turn = turns.acquire().await.expect("nobody closes it");
        join(address, request).await
    };
    futures_util::future::join_all((0..count).map(|_| one())).await
}

/// A part of a feed without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub feed: u64,
    pub first: u64,
    pub last: u64,
}

impl Part {
    pub fn messages(&self) -> u64 {
        self.last - self.first + 1
    }
}

/// All that a watcher has heard, in the order in which it came.
#[derive(Clone, Debug, Default)]
pub struct Heard(pub Vec<Part>);

impl Heard {
    /// A message that comes out of its order is a part of its own.
    fn take(&mut self, feed: u64, number: u64) {
        match self.0.last_mut() {
            Some(part) if part.feed == feed && part.last + 1 == number => part.last = number,
            _ => self.0.push(Part { feed, first: number, last: number }),
        }
    }

    /// Of the feed that was heard last, and of it only what came since the last gap.
    pub fn messages(&self) -> u64 {
        self.0.last().map_or(0, Part::messages)
    }

    pub fn feeds(&self) -> usize {
        self.0.chunk_by(|a, b| a.feed == b.feed).count()
    }
}

/// Why a watcher stopped.
#[derive(Debug)]
pub enum Stop {
    Enough,
    /// Not answered yet.
    Close(SeenFrame),
    End(End),
    /// Nothing came for [`DEADLINE`].
    Silence,
}

/// Listens until `enough` says so with what came until then, or the end; tells `delays` how long each message was under way.
pub async fn follow(
    member: &mut Member,
    heard: &mut Heard,
    delays: &mut Delays,
    mut enough: impl FnMut(&Heard) -> bool,
) -> Stop {
    loop {
        match timeout(DEADLINE, member.frame()).await {
            Ok(Ok(frame)) if frame.opcode == CLOSE => return Stop::Close(frame),
            Ok(Ok(frame)) => {
                let [feed, number, at] = said(&frame).unwrap_or_else(|| panic!("{frame:?} is not of a feed"));
                heard.take(feed, number);
                delays.take(now_us().saturating_sub(at));
            }
            Ok(Err(end)) => return Stop::End(end),
            Err(_) => return Stop::Silence,
        }
        if enough(heard) {
            return Stop::Enough;
        }
    }
}

/// How long messages were under way, in steps of 100 us up to a minute.
#[derive(Clone, Debug, Default)]
pub struct Delays {
    steps: Vec<u32>,
}

const STEP_US: u64 = 100;
const STEPS: usize = 600_000;

impl Delays {
    fn take(&mut self, us: u64) {
        let step = usize::try_from(us / STEP_US).map_or(STEPS, |step| step.min(STEPS));
        if self.steps.len() <= step {
            self.steps.resize(step + 1, 0);
        }
        self.steps[step] += 1;
    }

    pub fn add(&mut self, other: &Self) {
        if self.steps.len() < other.steps.len() {
            self.steps.resize(other.steps.len(), 0);
        }
        for (sum, count) in self.steps.iter_mut().zip(&other.steps) {
            *sum += count;
        }
    }

    fn quantile(&self, per_mille: u64) -> Duration {
        let all: u64 = self.steps.iter().copied().map(u64::from).sum();
        let mut left = (all * per_mille).div_ceil(1000);
        let step = self.steps.iter().position(|count| {
            left = left.saturating_sub((*count).into());
            left == 0
        });
        Duration::from_micros(step.map_or(0, |step| (step as u64 + 1) * STEP_US))
    }
}

impl fmt::Display for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, p99, worst] = [500, 990, 1000].map(|per_mille| self.quantile(per_mille));
        write!(f, "median {median:.1?}, p99 {p99:.1?}, worst {worst:.1?}")
    }
}

/// The end of a watcher that has had enough: its Close, what was still under way, the answer, FIN.
pub async fn leave(mut member: Member) -> String {
    let _ = member.send(&Frame::close(1000, "")).await;
    member.rest().await.summary()
}
