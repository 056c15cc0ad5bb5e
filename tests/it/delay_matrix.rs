//! `close.delay` against the moment of the backend's last message: what becomes of a result for a client that has left.
//!
//! A test for each `close.delay` prints its rows of docs/close-delay.md (`cargo test --test it delay_matrix -- --nocapture`). With
//! `TIDEGATE_STRICT=1` each cell has 1,000 sessions, and 60 s are waited for; by default a cell has few, and those that would be
//! held for a minute are ended by their backend. Times are printed, and not asserted, but that nothing happens before its time.

use crate::harness::{
    Board, DEADLINE, Frame, LIMIT,
    crowd::{Backend, Front, Member, Stage, connect, echo_on, is_strict},
    lab::Counters,
    ws::{CLOSE, TEXT},
};
use futures_util::future::join_all;
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

/// The backend's last message, after its client left.
const LAST_MS: [u64; 4] = [30, 90, 500, 1500];

/// Longer than a session is held for without having something done meanwhile.
const LONG: Duration = Duration::from_secs(5);

/// For so long it is looked at what those cost that are held.
const HELD_WATCH: Duration = Duration::from_secs(30);

/// How a client leaves without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// Close and FIN. It still reads.
    HalfClose,
    /// Close and FIN, and the socket is gone: whatever comes is answered with RST.
    Gone,
    /// The same in two packets. tidegate gives the FIN 2 ms, since the client had the last word; with one that comes later
    /// it was a client that waits, and nothing was held back.
    Apart,
    /// RST.
    Reset,
}

const WAYS: [Way; 4] = [Way::HalfClose, Way::Gone, Way::Apart, Way::Reset];

/// What a backend does that hears of the end before it has sent its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Manner {
    /// Its library answers the Close at once; its program then finds the session closed, which is its error.
    Obedient,
    /// It sends the result first, and answers then.
    Finishing,
}

const MANNERS: [Manner; 2] = [Manner::Obedient, Manner::Finishing];

/// One cell: what its clients and its backend's scripts share.
#[derive(Clone, Debug)]
struct Cell {
    last: Duration,
    /// When each client left.
    left: Arc<[Board<Option<Instant>>]>,
    /// So many have sent their last message, or found that they can't.
    done: Board<usize>,
    /// Of these, the ones that had been told before.
    early: Board<usize>,
    /// Ends what is still held: the backends send a Close of their own.
    released: Board<bool>,
}

impl Cell {
    fn new(count: usize, last: Duration) -> Self {
        let left = (0..count).map(|_| Board::new(None)).collect();
        Self { last, left, done: Board::new(0), early: Board::new(0), released: Board::new(false) }
    }

    fn way(index: usize) -> Way {
        WAYS[index % WAYS.len()]
    }

    fn manner(index: usize) -> Manner {
        MANNERS[index / WAYS.len() % MANNERS.len()]
    }
}

/// What a backend saw of a session whose client has left. Times count from then.
#[derive(Clone, Debug)]
struct Outcome {
    index: usize,
    left_at: Instant,
    /// The result was written.
    is_sent: bool,
    /// The Close came; None: it was ended before that.
    told: Option<Duration>,
    /// The program wanted to write into a session that had been closed.
    is_error: bool,
    /// Of writes.
    failures: Vec<io::ErrorKind>,
    close: (u16, String),
    end: String,
    held: Duration,
}

/// A session as the client's first word wants it: "wait" is an echo, a number one that is left.
async fn serve(mut member: Member, cell: &Board<Option<Cell>>) -> Option<Outcome> {
    member.handshake().await;
    let word = member.frame().await.expect("a first word");
    member.send(&word.again()).await.expect("an open session");
    let Ok(index) = word.text().parse::<usize>() else {
        echo_on(member).await;
        return None;
    };
    let cell = cell.read(Clone::clone).expect("a cell before its clients");
    assert_eq!(member.frame().await.expect("what it asks for").text(), "a result, please");
    let left_at = cell.left[index].until(DEADLINE, |left| *left).await.expect("a client that leaves");
    let result_at = (left_at + cell.last).into();
    let (mut failures, mut is_sent, mut is_error) = (Vec::new(), false, false);
    let mut note = |result: io::Result<()>| {
        failures.extend(result.as_ref().err().map(io::Error::kind));
        result.is_ok()
    };

    let early = timeout_at(result_at, member.frame()).await.ok();
    let mut told = early.is_some().then(|| left_at.elapsed());
    match Cell::manner(index) {
        Manner::Obedient if told.is_some() => is_error = true,
        _ => {
            sleep_until(result_at).await;
            is_sent = note(member.send(&Frame::text("the result")).await);
        }
    }
    cell.early.change(|early| *early += usize::from(told.is_some()));
    cell.done.change(|done| *done += 1);
    let is_released = async { cell.released.until(LIMIT, |released| released.then_some(())).await };
    let close = if let Some(frame) = early {
        frame
    } else {
        tokio::select! {
            frame = member.frame() => {
                told = Some(left_at.elapsed());
                frame
            }
            released = is_released => {
                released.expect("an end of the test");
                note(member.send(&Frame::close(1000, "released")).await);
                member.frame().await
            }
        }
    };
    let close = close.unwrap_or_else(|end| panic!("{index}: {end:?} instead of a Close"));
    assert_eq!(close.opcode, CLOSE, "{close:?}");
    note(member.send(&Frame::new(CLOSE, &close.payload[..2])).await);
    let end = member.fin_and_rest().await.summary();
    let close = (close.code(), close.text());
    Some(Outcome { index, left_at, is_sent, told, is_error, failures, close, end, held: left_at.elapsed() })
}

/// Leaves; what it still gets, if it reads: whether the result came, and then what.
async fn leave(mut client: Member, index: usize, cell: &Cell) -> Option<(bool, String)> {
    let close = Frame::close(4000, &format!("client {index}"));
    cell.left[index].change(|left| *left = Some(Instant::now()));
    match Cell::way(index) {
        Way::Reset => client.rst(),
        Way::Apart => client.send(&close).await.expect("an open session"),
        Way::Gone => client.send_with_fin(&close).await.expect("an open session"),
        Way::HalfClose => {
            client.send_with_fin(&close).await.expect("an open session");
            let (mut is_delivered, mut closes) = (false, Vec::new());
            let end = loop {
                match timeout(LIMIT, client.frame()).await.expect("an end of the session") {
                    Ok(frame) if frame.opcode == TEXT && closes.is_empty() => is_delivered = true,
                    Ok(frame) => closes.push(format!("Close {}, ", frame.code())),
                    Err(end) => break end,
                }
            };
            return Some((is_delivered, format!("{}{end:?}", closes.concat())));
        }
    }
    None
}

/// A client that closes as it should: how long it waited, from its Close to both answers.
async fn close_and_wait(mut client: Member) -> Duration {
    client.send(&Frame::text("wait")).await.expect("an open session");
    assert_eq!(client.frame().await.expect("an echo").text(), "wait");
    let begun = Instant::now();
    client.send(&Frame::close(1000, "")).await.expect("an open session");
    let rest = client.rest().await;
    assert_eq!(rest.summary(), "Close 1000, Fin", "{rest:?}");
    begun.elapsed()
}

/// Like [`close_and_wait`], so many of them, one after the other.
async fn closes_that_wait(address: SocketAddr, count: u32, within: Duration) -> Vec<Duration> {
    let mut waits = Vec::new();
    for _ in 0..count {
        let client = connect(address, 1).await.pop().expect("there is one");
        waits.push(close_and_wait(client).await);
        sleep(within / count).await;
    }
    waits
}

/// Of sorted times, the one below which so many per cent are.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

fn millis(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1e3;
    if millis < 100.0 && millis.fract() > 0.0 { format!("{millis:.1}") } else { format!("{millis:.0}") }
}

/// The most connections that were held at the same moment.
fn most_at_once(outcomes: &[Outcome]) -> usize {
    let mut events: Vec<_> = outcomes.iter().flat_map(|o| [(o.left_at, 1), (o.left_at + o.held, -1)]).collect();
    events.sort_unstable();
    let mut open = 0_isize;
    let most = events.into_iter().map(|(_, change)| {
        open += change;
        open.unsigned_abs()
    });
    most.max().unwrap_or(0)
}

/// Of one `close.delay`: a stage, and what comes of its cells.
struct Row {
    stage: Stage,
    delay: Duration,
    current: Board<Option<Cell>>,
    backend: Backend<Option<Outcome>>,
}

impl Row {
    fn new(delay: Duration) -> Self {
        let (stage, current) = (Stage::new(), Board::new(None));
        let backend = {
            let current = current.clone();
            stage.backend(async move |member| serve(member, &current).await)
        };
        Self { stage, delay, current, backend }
    }

    /// tidegate with this delay. A backend that takes its time with the answer is waited for: that it does so is not the matter here.
    fn tidegate(&self, settings: &str) -> Front<'_> {
        let settings =
            format!("close = {{ delay = '{}ms', handshake_timeout = '10s' }}\n{settings}", self.delay.as_millis());
        self.stage.tidegate(&settings, self.backend.address)
    }

    /// So many sessions that are known to be relayed, each with its number.
    async fn sessions(&self, t: &Front<'_>, cell: &Cell) -> Vec<Member> {
        self.current.change(|current| *current = Some(cell.clone()));
        let mut clients = connect(t.address, cell.left.len()).await;
        for (index, client) in clients.iter_mut().enumerate() {
            client.send(&Frame::text(&index.to_string())).await.expect("an open session");
            assert_eq!(client.frame().await.expect("an echo").text(), index.to_string());
            client.send(&Frame::text("a result, please")).await.expect("an open session");
        }
        clients
    }

    fn outcomes(&self, sessions: usize, others: usize) -> Vec<Outcome> {
        let outcomes: Vec<_> = self.backend.results(sessions + others).into_iter().flatten().collect();
        assert_eq!(outcomes.len(), sessions, "sessions whose client left");
        outcomes
    }

    fn run(&self) {
        let t = self.tidegate("");
        for last in LAST_MS {
            self.run_cell(&t, Duration::from_millis(last));
        }
        t.assert_nothing_left();
    }

    fn run_cell(&self, t: &Front<'_>, last: Duration) {
        let delay = self.delay;
        // As many of each way and manner.
        let count = if is_strict() { 1000 } else { 16 };
        let (waiting, fresh) = if is_strict() { (100, 100) } else { (10, 10) };
        // A thousand in a second: what is late because all leave at once is another test's.
        let spacing = Duration::from_millis(if is_strict() { 1 } else { 5 });
        let is_held = delay > LONG;
        let cell = &Cell::new(count, last);
        let before = t.counters();
        let (left, (mut waits, served)) = self.stage.clients(async || {
            let clients = self.sessions(t, cell).await;
            let start = tokio::time::Instant::now();
            let leaving = join_all(clients.into_iter().zip(0_u32..).map(async |(client, index)| {
                sleep_until(start + spacing * index).await;
                leave(client, usize::try_from(index).expect("a small number"), cell).await
            }));
            let closing = async {
                let meanwhile = spacing * u32::try_from(count).expect("a small number") + delay.min(last);
                let waits = closes_that_wait(t.address, waiting, meanwhile).await;
                let mut served = 0;
                if is_held {
                    let all_done = cell.done.until(LIMIT, |done| (*done == count).then_some(())).await;
                    assert!(all_done.is_some(), "{:?} of {count} results", cell.done);
                    // All that had to be are still held, and nobody is kept out by that.
                    let held = count - cell.early.read(|early| *early);
                    t.metrics_when("that all are held", |metrics| {
                        metrics.count("tidegate_connections_active") == held as u64
                    });
                    let clients = connect(t.address, fresh).await;
                    served = join_all(clients.into_iter().map(close_and_wait)).await.len();
                    if is_strict() {
                        let (resident, cpu) = (t.resident(), t.cpu_time());
                        sleep(HELD_WATCH).await;
                        let cpu = t.cpu_time().saturating_sub(cpu);
                        println!("{held} held, {served} served: resident {resident} B, CPU in {HELD_WATCH:?}: {cpu:?}");
                    }
                    cell.released.change(|released| *released = !is_strict());
                }
                (waits, served)
            };
            tokio::join!(leaving, closing)
        });
        let outcomes = self.outcomes(count, waits.len() + served);
        t.assert_sent_no_rst();
        for outcome in &outcomes {
            self.assert_orderly(outcome, left[outcome.index].as_ref());
        }
        waits.sort_unstable();
        self.print(last, &outcomes, &waits, &(&t.counters() - &before));
        self.assert_demanded(last, &outcomes, &waits);
    }

    /// What holds for each session in every cell.
    #[track_caller]
    fn assert_orderly(&self, outcome: &Outcome, left: Option<&(bool, String)>) {
        let way = Cell::way(outcome.index);
        assert!(outcome.failures.is_empty(), "writes of the backend failed: {outcome:?}");
        assert_eq!(outcome.end, "Fin", "{outcome:?}");
        let may_be_early = way == Way::Apart;
        assert!(
            may_be_early || outcome.told.is_none_or(|told| told >= self.delay),
            "told before its time: {outcome:?}"
        );
        let is_released = outcome.told.is_none();
        let close = match (way, is_released) {
            (Way::HalfClose | Way::Gone | Way::Apart, _) => (4000, format!("client {}", outcome.index)),
            (Way::Reset, false) => (1001, String::new()),
            // It sent a Close first, and this is the answer.
            (Way::Reset, true) => (1000, String::new()),
        };
        assert_eq!(outcome.close, close, "{outcome:?}");
        if way == Way::HalfClose {
            // Whatever the backend still sends is delivered, in front of its answer.
            let code = if is_released { 1000 } else { 4000 };
            assert_eq!(left, Some(&(outcome.is_sent, format!("Close {code}, Fin"))), "{outcome:?}");
        }
    }

    /// What the cell is there for.
    #[track_caller]
    fn assert_demanded(&self, last: Duration, outcomes: &[Outcome], waits: &[Duration]) {
        let judged = outcomes.iter().filter(|outcome| !self.was_early(outcome));
        let judged: Vec<_> = judged.filter(|outcome| Cell::manner(outcome.index) == Manner::Obedient).collect();
        let (obedient, errors) = (judged.len(), judged.iter().filter(|outcome| outcome.is_error).count());
        // On a busy machine a backend may miss its moment, or tidegate be slow to tell; in each cell some are as they should be.
        let tolerated = if is_strict() { obedient / 100 } else { obedient - 1 };
        if last < self.delay {
            assert!(errors <= tolerated, "{errors} of {obedient} were told before their result: {outcomes:#?}");
        } else {
            assert!(errors + tolerated >= obedient, "only {errors} of {obedient} were told in time: {outcomes:#?}");
        }
        // On a busy machine a FIN may be late.
        let early = outcomes.iter().filter(|outcome| self.was_early(outcome)).count();
        assert!(!is_strict() || early * 100 <= outcomes.len(), "{early} were taken for clients that wait");
        // None is delayed. Of what is shorter than the scheduler's whims nothing can be said.
        if self.delay >= Duration::from_secs(1) {
            let judged = if is_strict() { 100 } else { 50 };
            assert!(percentile(waits, judged) < self.delay, "closes that wait are delayed: {waits:?}");
        }
    }

    /// It was told as a client that waits: see [`Way::Apart`].
    fn was_early(&self, outcome: &Outcome) -> bool {
        outcome.told.is_some_and(|told| told < self.delay)
    }

    fn print(&self, last: Duration, outcomes: &[Outcome], waits: &[Duration], counters: &Counters) {
        let count = |test: &dyn Fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| test(outcome)).count();
        let reads = |outcome: &Outcome| Cell::way(outcome.index) == Way::HalfClose;
        let mut held: Vec<_> = outcomes.iter().map(|outcome| outcome.held).collect();
        held.sort_unstable();
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} / {} | {} | {} / {} |",
            millis(self.delay),
            millis(last),
            outcomes.len(),
            count(&|outcome| self.was_early(outcome)),
            count(&|outcome| reads(outcome) && outcome.is_sent),
            count(&|outcome| !reads(outcome) && outcome.is_sent),
            count(&|outcome| outcome.is_error && !self.was_early(outcome)),
            count(&|outcome| !outcome.failures.is_empty()),
            counters.get("OutRsts"),
            millis(percentile(waits, 50)),
            millis(percentile(waits, 100)),
            most_at_once(outcomes),
            millis(percentile(&held, 50)),
            millis(percentile(&held, 100)),
        );
    }
}

#[test]
fn without_a_delay_only_what_is_on_its_way_is_in_time() {
    Row::new(Duration::ZERO).run();
}

#[test]
fn a_delay_of_100_ms_spares_who_is_just_writing() {
    Row::new(Duration::from_millis(100)).run();
}

#[test]
fn a_delay_of_1_s_delays_no_close_that_waits() {
    Row::new(Duration::from_secs(1)).run();
}

/// The field's collapse was this one: what waits for a minute must keep nobody out.
#[test]
fn a_delay_of_60_s_keeps_nobody_out() {
    Row::new(Duration::from_mins(1)).run();
}

/// Sessions that are held for a client that has left are no reason to be cut: a drain tells their backends in its window.
#[test]
fn a_drain_ends_what_a_delay_holds() {
    const COUNT: usize = 16;
    let row = Row::new(Duration::from_mins(1));
    let t = row.tidegate("drain = { delay = '0s', window = '500ms', timeout = '5s' }");
    let cell = &Cell::new(COUNT, Duration::ZERO);
    row.stage.clients(async || {
        let clients = row.sessions(&t, cell).await;
        let leaving = join_all(clients.into_iter().enumerate().map(|(index, client)| leave(client, index, cell)));
        let terminating = async {
            let all_done = cell.done.until(LIMIT, |done| (*done == COUNT).then_some(())).await;
            assert!(all_done.is_some(), "{:?} of {COUNT} results", cell.done);
            t.sigterm();
        };
        tokio::join!(leaving, terminating)
    });
    let outcomes = row.outcomes(COUNT, 0);
    for outcome in &outcomes {
        assert!(outcome.failures.is_empty() && outcome.end == "Fin" && outcome.told.is_some(), "{outcome:?}");
    }
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    t.assert_sent_no_rst();
}
