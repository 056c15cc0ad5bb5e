//! Little of everything: descriptors, memory, ports, places, turns. Whoever can't be served is told so in words, or waits, and
//! is never reset; those who are in notice nothing; and what was given back is given to the next one.
//!
//! Each test prints its figures. The full sizes are for `TIDEGATE_STRICT=1`.

use crate::harness::{
    Board, DEADLINE, End, LIMIT, Message, Side,
    cgroup::MemoryGroup,
    crowd::{self, Front, Member, Stage, connect, is_strict, tally},
    proxy::Surroundings,
    visit::{self, Arrival, Errand, Outcome, arrive, leave, visit},
};
use futures_util::future::join_all;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Clients that come in the same moment, or nearly so: those that have got a session, and what became of the others.
async fn crowd_of(address: SocketAddr, count: usize) -> (Vec<Member>, BTreeMap<Outcome, usize>) {
    // More of them would keep each other from asking, and who does not ask gets no answer.
    let turns = Semaphore::new(1000);
    let one = async || {
        let _turn = turns.acquire().await.expect("nobody closes it");
        arrive(address, LIMIT).await
    };
    let arrivals = join_all((0..count).map(|_| one())).await;
    let (mut members, mut others) = (Vec::new(), Vec::new());
    for arrival in arrivals {
        match arrival.result {
            Ok(member) => members.push(member),
            Err(outcome) => others.push(outcome),
        }
    }
    (members, tally(others))
}

/// Each of them is still served.
async fn assert_all_echo(members: &mut [Member]) {
    let count = members.len();
    let echoes = join_all(members.iter_mut().map(async |member| visit::echo(member, "still here").await)).await;
    assert_eq!(tally(echoes), [(Ok(()), count)].into());
}

/// All of them leave, in order.
async fn leave_all(members: Vec<Member>) {
    let ends = join_all(members.into_iter().map(leave)).await;
    assert!(ends.iter().all(|end| *end == Outcome::Served), "{:?}", tally(ends));
}

/// Comes again and again until there is a session; who is refused until then is told so. How long that took.
async fn until_served(address: SocketAddr) -> (Member, Duration) {
    let begun = Instant::now();
    loop {
        match arrive(address, DEADLINE).await.result {
            Ok(member) => return (member, begun.elapsed()),
            Err(outcome) => assert_eq!(outcome, Outcome::Refused),
        }
        assert!(begun.elapsed() < DEADLINE, "nobody new is served");
        sleep(Duration::from_millis(5)).await;
    }
}

/// How many were turned away for that reason.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters of a test are small")]
fn refused(t: &Front<'_>, reason: &str) -> usize {
    t.metrics().sum_with("tidegate_refused_total", &format!("reason=\"{reason}\"")).round() as usize
}

/// A handshake's request is on its way, and tidegate has read it: who asks next comes behind it.
async fn ask(stage: &Stage, t: &Front<'_>, target: &str) -> Member {
    let mut member = Member::connect(t.address).await;
    member.send_bytes(&Message::websocket(target).bytes()).await.expect("an open connection");
    let (client, begun) = (member.local(), Instant::now());
    let is_read = |all: &[crate::harness::lab::Socket]| {
        let own = all.iter().find(|s| s.local == client && s.remote == t.address);
        let theirs = all.iter().find(|s| s.local == t.address && s.remote == client);
        own.is_some_and(|s| s.unacked == 0) && theirs.is_some_and(|s| s.inode != 0 && s.unread == 0)
    };
    while !is_read(&[stage.lab().sockets(Side::Client), stage.lab().sockets(Side::Proxy)].concat()) {
        assert!(begun.elapsed() < DEADLINE, "nobody reads the request");
        sleep(Duration::from_millis(1)).await;
    }
    member
}

/// The status of the answer; the member is a session if it is 101.
async fn answer(member: &mut Member) -> u16 {
    timeout(DEADLINE, member.message()).await.expect("an answer").expect("an answer").code()
}

/// The time of the processor that tidegate takes in two seconds; as a share of one, in per cent.
async fn cpu_share(t: &Front<'_>) -> f64 {
    let (begun, before) = (Instant::now(), t.cpu_time());
    sleep(Duration::from_secs(2)).await;
    t.cpu_time().saturating_sub(before).as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0
}

/// Whoever has nothing to do takes nothing, however slow the machine is; a debug build may take a little.
#[track_caller]
fn assert_is_idle(share: f64) {
    let bound = if is_strict() { 5.0 } else { 20.0 };
    assert!(share < bound, "tidegate takes {share:.1} % of a processor while nothing happens");
}

/// 64 descriptors for 200 clients: at most an eighth of them are accept queues. Each client is served, is told to come again, or
/// waits in a queue, which costs next to no time of the processor; and when the first have left, others are served.
#[test]
fn few_descriptors_serve_few_at_a_time() {
    const COUNT: usize = 200;
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    // Many queues would be needed.
    let _ = stage.lab().set(Side::Proxy, "core/somaxconn", "128");
    let surroundings = Surroundings { descriptors: Some(64), ..Surroundings::default() };
    let t = stage.tidegate_in(surroundings, "", backend.address);
    let queues = stage.lab().sockets(Side::Proxy);
    let queues = queues.iter().filter(|s| s.state == "LISTEN" && s.local == t.address).count();
    assert!((1..=8).contains(&queues), "{queues} accept queues of 64 descriptors");

    let (served, told, may_go) = (Board::new(0), Board::new(0), Board::new(false));
    let client = async || {
        let outcome = match arrive(t.address, LIMIT).await.result {
            Ok(mut member) => {
                let echo = visit::echo(&mut member, "a").await;
                served.change(|served| *served += 1);
                may_go.until(LIMIT, |may_go| may_go.then_some(())).await.expect("the test goes on");
                match echo {
                    Ok(()) => leave(member).await,
                    Err(outcome) => outcome,
                }
            }
            Err(outcome) => outcome,
        };
        told.change(|told| *told += 1);
        outcome
    };
    let scene = async {
        // Nothing has moved for a second: the rest waits.
        let (mut last, mut since) = ((0, 0), Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            sleep(Duration::from_millis(10)).await;
            let now = (served.read(|n| *n), told.read(|n| *n));
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        let (first, refused) = last;
        let share = cpu_share(&t).await;
        may_go.change(|may_go| *may_go = true);
        let begun = Instant::now();
        let next = if first + refused == COUNT {
            let (member, took) = until_served(t.address).await;
            leave_all(vec![member]).await;
            took
        } else {
            served
                .until(DEADLINE, |served| (*served > first).then_some(()))
                .await
                .expect("somebody who waited is served");
            begun.elapsed()
        };
        (first, refused, share, next)
    };
    let (outcomes, (first, refused, share, next), last) = stage.clients(async || {
        let (outcomes, scene) = tokio::join!(join_all((0..COUNT).map(|_| client())), scene);
        let (member, last) = until_served(t.address).await;
        leave_all(vec![member]).await;
        (tally(outcomes), scene, last)
    });
    println!(
        "64 descriptors, {queues} accept queues, {COUNT} clients: {first} served, {refused} told to come again, {} waiting, at \
         {share:.1} % of a processor; the next one served {next:.1?} after these could leave; in the end {outcomes:?}; a new \
         one then in {last:.1?}",
        COUNT - first - refused,
    );
    assert!(first > 0, "nobody was served");
    assert_is_idle(share);
    if is_strict() {
        assert!(next < Duration::from_secs(1) && last < Duration::from_secs(1), "{next:?} and {last:?}");
    }
    assert!(outcomes.keys().all(|o| matches!(o, Outcome::Served | Outcome::Refused)), "{outcomes:?}");
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Descriptors run out in spite of the budget, as when something else in the process takes them: the log names it and says what
/// to do, nothing spins, nobody is reset, and when descriptors are free again so is the door.
#[test]
fn a_full_descriptor_table_is_named() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate("", backend.address);
    let is_named = |line: &serde_json::Value| line["name"] == "EMFILE";
    t.limit_descriptors(t.descriptors() as u64 + 6);
    let (share, lines, outcomes, next) = stage.clients(async || {
        // One descriptor each, and nothing said: they stay until their header is overdue.
        let idle: Vec<_> = join_all((0..12).map(|_| Member::connect(t.address))).await;
        let line = t.has_logged("that descriptors ran out", is_named).await.to_string();
        assert!(line.contains("RLIMIT_NOFILE") || line.contains("ulimit"), "no word on what to do: {line}");
        let before = t.log().iter().filter(|line| is_named(line)).count();
        let share = cpu_share(&t).await;
        let lines = t.log().iter().filter(|line| is_named(line)).count() - before;
        let coming = join_all((0..6).map(|_| arrive(t.address, LIMIT)));
        let leaving = join_all(idle.into_iter().map(Member::fin_and_rest));
        let (coming, ends) = tokio::join!(coming, leaving);
        assert!(ends.iter().all(|rest| rest.end == End::Fin), "{ends:?}");
        let (mut members, mut outcomes) = (Vec::new(), Vec::new());
        for Arrival { result, .. } in coming {
            outcomes.push(result.as_ref().map(drop).map_err(|outcome| *outcome));
            members.extend(result);
        }
        leave_all(members).await;
        let (member, next) = until_served(t.address).await;
        leave_all(vec![member]).await;
        (share, lines, tally(outcomes), next)
    });
    println!(
        "6 descriptors, 12 idle clients: {lines} lines of log in two seconds, at {share:.1} % of a processor; as they left \
         {outcomes:?}; a new one then in {next:.1?}"
    );
    assert!(lines < 100, "{lines} lines of log in two seconds");
    assert_is_idle(share);
    assert!(outcomes.keys().all(|outcome| matches!(outcome, Ok(()) | Err(Outcome::Refused))), "{outcomes:?}");
    assert!(t.metrics().get("tidegate_accept_errors_total{error=\"EMFILE\"}") > 0.5);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// More clients than memory: some get a session and keep it, the others get a 503, and when all have left there is room again.
/// Returns how many had a session.
fn memory_is_not_overrun(stage: &Stage, t: &Front<'_>, count: usize) -> usize {
    let (held, others, next) = stage.clients(async || {
        let (mut members, others) = crowd_of(t.address, count).await;
        assert_all_echo(&mut members).await;
        let held = members.len();
        leave_all(members).await;
        let (member, next) = until_served(t.address).await;
        leave_all(vec![member]).await;
        (held, others, next)
    });
    println!("{count} clients: {held} served, {others:?}; a new one after their end in {next:.1?}");
    assert_eq!(t.exit_status(), None, "tidegate has ended");
    assert!(held > 0, "nobody was served");
    assert_eq!(others, [(Outcome::Refused, count - held)].into());
    let of_memory = refused(t, "memory");
    assert!(of_memory > 0 && of_memory >= count - held, "{of_memory} refused for memory");
    t.assert_nothing_left();
    t.assert_no_rst();
    held
}

/// A cgroup of 64 MiB, and more clients than it can hold.
#[test]
fn a_small_cgroup_turns_clients_away_before_the_oom_killer_comes() {
    let (mib, count) = if is_strict() { (64, 10_000) } else { (20, 1500) };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let Some(group) = MemoryGroup::new(mib << 20) else { return };
    let surroundings = Surroundings { memory: Some(&group), ..Surroundings::default() };
    let t = stage.tidegate_in(surroundings, "", backend.address);
    memory_is_not_overrun(&stage, &t, count);
    println!("    in a cgroup of {mib} MiB, of which at most {} KiB were used", group.peak() / 1024);
    assert_eq!(group.oom_kills(), 0);
    drop(t);
}

/// `limits.memory` does the same without any cgroup.
#[test]
fn a_memory_limit_of_its_own() {
    let (mib, count) = if is_strict() { (48, 10_000) } else { (34, 1500) };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate(&format!("limits.memory = '{mib}MiB'"), backend.address);
    memory_is_not_overrun(&stage, &t, count);
    println!("    with limits.memory = {mib} MiB; {} KiB are resident after it", t.resident() / 1024);
    assert!(t.resident() < mib << 20, "{} bytes are resident", t.resident());
}

/// 30 clients where there is room for 10: ten sessions, and for the others a 503 with Retry-After and a FIN; who says nothing at
/// all gets its FIN, too. A place that is given back is given to the next one. The metrics say who was refused, and why.
#[test]
fn clients_beyond_the_limit_are_told_so() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate("limits.max_connections = 10", backend.address);
    stage.clients(async || {
        let (mut members, others) = crowd_of(t.address, 30).await;
        assert_eq!((members.len(), others), (10, [(Outcome::Refused, 20)].into()));
        assert_eq!(refused(&t, "max_connections"), 20);
        assert_eq!(visit(t.address, Errand::Get).await.outcome, Outcome::Refused);
        let mut silent = Member::connect(t.address).await;
        assert_eq!(timeout(DEADLINE, silent.message()).await.expect("an end"), Err(End::Fin));
        assert_eq!(refused(&t, "max_connections"), 22);
        assert_all_echo(&mut members).await;
        leave_all(members.split_off(9)).await;
        t.metrics_when("that one has left", |metrics| metrics.get("tidegate_client_connections") < 9.5);
        members.push(arrive(t.address, DEADLINE).await.result.expect("a place was given back"));
        assert_eq!(arrive(t.address, DEADLINE).await.result.err(), Some(Outcome::Refused));
        leave_all(members).await;
    });
    assert_eq!(refused(&t, "max_connections"), 23);
    assert_eq!(backend.results(11).len(), 11);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// 50 handshakes in the same moment where there may be 20 in a second and none waits for longer than 200 ms: the first are served,
/// at once or a little later, the others get their 503, and none is lost. Without the limit all are served.
#[test]
fn handshakes_beyond_the_rate_are_told_so() {
    for limited in [true, false] {
        let stage = Stage::new();
        let backend = stage.backend(crowd::anything);
        let settings = if limited { "limits = { handshakes_per_second = 20, handshake_delay = '200ms' }" } else { "" };
        let t = stage.tidegate(settings, backend.address);
        let (served, others) = stage.clients(async || {
            let (members, others) = crowd_of(t.address, 50).await;
            let served = members.len();
            leave_all(members).await;
            // Plain requests are no handshakes.
            assert_eq!(visit(t.address, Errand::Get).await.outcome, Outcome::Served);
            (served, others)
        });
        println!("50 handshakes at once, limited: {limited}: {served} served, {others:?}");
        if limited {
            // One at once, and one for each 50 ms of the 200.
            assert!((5..50).contains(&served), "{served} of 50 were served");
            assert_eq!(others, [(Outcome::Refused, 50 - served)].into());
        } else {
            assert_eq!(served, 50);
        }
        assert_eq!(refused(&t, "rate"), 50 - served);
        assert_eq!(backend.results(served + 1).len(), served + 1);
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// Handshakes that are delayed for the rate's sake are served in the order in which they came.
#[test]
fn delayed_handshakes_stay_in_order() {
    const COUNT: usize = 6;
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate("limits = { handshakes_per_second = 5, handshake_delay = '60s' }", backend.address);
    stage.clients(async || {
        let mut members = Vec::new();
        for _ in 0..COUNT {
            members.push(ask(&stage, &t, "/").await);
        }
        let (order, index) = (RefCell::new(Vec::new()), Cell::new(0));
        let members = crowd::together(members, async |mut member| {
            let index = index.replace(index.get() + 1);
            assert_eq!(answer(&mut member).await, 101);
            order.borrow_mut().push(index);
            member
        });
        let members = members.await;
        assert_eq!(order.into_inner(), (0..COUNT).collect::<Vec<_>>());
        leave_all(members).await;
    });
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A backend that answers a handshake only when it is told to, and what it has seen of them.
#[derive(Clone, Debug)]
struct Desk {
    /// The targets of the handshakes that came, in their order.
    came: Board<Vec<String>>,
    /// How many of them may be answered.
    answered: Board<usize>,
}

impl Desk {
    fn new() -> Self {
        Self { came: Board::new(Vec::new()), answered: Board::new(0) }
    }

    fn backend(&self, stage: &Stage) -> crowd::Backend<()> {
        let desk = self.clone();
        stage.backend(async move |mut member: Member| {
            let Ok(request) = member.message().await else { return };
            let turn = desk.came.change(|came| {
                came.push(request.target().to_owned());
                came.len()
            });
            desk.answered.until(LIMIT, |answered| (*answered >= turn).then_some(())).await.expect("the test goes on");
            // A client that was given up is seen with the next read.
            let _ = member.send_bytes(&Message::switching(&request).bytes()).await;
            crowd::echo_on(member).await;
        })
    }

    /// Waits until so many came; all that came.
    async fn came(&self, count: usize) -> Vec<String> {
        let came = self.came.until(DEADLINE, |came| (came.len() >= count).then(|| came.clone())).await;
        came.unwrap_or_else(|| panic!("{count} handshakes never came: {:?}", self.came))
    }

    fn answer(&self, count: usize) {
        self.answered.change(|answered| *answered = count);
    }
}

fn targets(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("/{n}")).collect()
}

/// A backend that has two handshakes to answer gets no third; the others wait in tidegate, and get their turns in the order in
/// which they came.
#[test]
fn handshakes_wait_for_their_turn_in_order() {
    const COUNT: usize = 8;
    let stage = Stage::new();
    let desk = Desk::new();
    let backend = desk.backend(&stage);
    let t = stage.tidegate("upstream.max_pending = 2", backend.address);
    stage.clients(async || {
        let mut members = Vec::new();
        for count in 1..=COUNT {
            members.push(ask(&stage, &t, &format!("/{}", count - 1)).await);
            desk.came(count.min(2)).await;
        }
        for (index, member) in members.iter_mut().enumerate() {
            let came = desk.came((index + 2).min(COUNT)).await;
            assert_eq!(came, targets((index + 2).min(COUNT)), "with {index} answers");
            desk.answer(index + 1);
            assert_eq!(answer(member).await, 101);
        }
        leave_all(members).await;
    });
    assert_eq!(backend.results(COUNT).len(), COUNT);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Only so many may wait for the backend, a turn's or an answer's: the next one gets its 503 at once, and plain requests are served.
#[test]
fn only_so_many_wait_for_the_backend() {
    let stage = Stage::new();
    let desk = Desk::new();
    let backend = desk.backend(&stage);
    let t = stage.tidegate("upstream = { max_pending = 2, max_waiting = 3 }", backend.address);
    stage.clients(async || {
        let mut members = Vec::new();
        for count in 1..=3_usize {
            members.push(ask(&stage, &t, &format!("/{}", count - 1)).await);
            desk.came(count.min(2)).await;
        }
        assert_eq!(arrive(t.address, DEADLINE).await.result.err(), Some(Outcome::Refused));
        assert_eq!(refused(&t, "max_waiting"), 1);
        assert_eq!(desk.came(2).await, targets(2));
        desk.answer(3);
        for member in &mut members {
            assert_eq!(answer(member).await, 101);
        }
        leave_all(members).await;
    });
    assert_eq!(backend.results(3).len(), 3);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Who waits too long for a turn gets a 503, and the backend never hears of it.
#[test]
fn the_wait_for_a_turn_has_an_end() {
    let stage = Stage::new();
    let desk = Desk::new();
    let backend = desk.backend(&stage);
    let t = stage.tidegate("upstream = { max_pending = 2, queue_timeout = '300ms' }", backend.address);
    stage.clients(async || {
        let mut members = vec![ask(&stage, &t, "/0").await];
        desk.came(1).await;
        members.push(ask(&stage, &t, "/1").await);
        desk.came(2).await;
        let (served, others) = crowd_of(t.address, 4).await;
        assert_eq!((served.len(), others), (0, [(Outcome::Refused, 4)].into()));
        assert_eq!(refused(&t, "queue_timeout"), 4);
        desk.answer(2);
        for member in &mut members {
            assert_eq!(answer(member).await, 101);
        }
        leave_all(members).await;
    });
    assert_eq!(backend.results(2).len(), 2);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Where the listeners are when the ports that the kernel gives away are few. The namespace is the test's own.
fn listeners(stage: &Stage) -> String {
    let front = SocketAddr::new(stage.lab().address(Side::Proxy, Side::Client), 8080);
    format!("listen.address = '{front}'\nadmin.address = '127.0.0.1:9090'\n")
}

/// With 20 ports toward the backend there are 20 sessions. The next client gets a 503, and the log says what there is too little
/// of and what helps; a second source address does, and doubles it. A port that is given back is used again.
#[test]
fn ports_toward_the_backend_run_out() {
    for addresses in [1, 2] {
        let stage = Stage::new();
        let backend = stage.backend(crowd::anything);
        let lab = stage.lab();
        let settings = if addresses == 2 {
            let Some(second) = lab.second_address() else { return };
            let first = lab.address(Side::Proxy, Side::Backend);
            format!("upstream.source_addresses = ['{first}', '{second}']")
        } else {
            String::new()
        };
        let t = stage.tidegate(&settings, backend.address);
        // Only now: tidegate itself would plan with it, and stay below.
        if !lab.set(Side::Proxy, "ipv4/ip_local_port_range", "30000 30019") {
            return;
        }
        let count = 20 * addresses;
        stage.clients(async || {
            let mut members = connect(t.address, count).await;
            let sources =
                lab.sockets(Side::Backend).into_iter().filter(|s| s.state == "ESTABLISHED").map(|s| s.remote.ip());
            let sources = tally(sources);
            assert_eq!((sources.len(), sources.values().max()), (addresses, Some(&20)), "{sources:?}");
            assert_eq!(arrive(t.address, DEADLINE).await.result.err(), Some(Outcome::Refused));
            assert_eq!(visit(t.address, Errand::Get).await.outcome, Outcome::Refused);
            let line = t
                .has_logged("what there is too little of", |line| line.to_string().contains("ip_local_port_range"))
                .await;
            let line = line.to_string();
            assert!(line.contains("upstream.source_addresses"), "{line}");
            assert_eq!(refused(&t, "ports"), 2);
            assert_all_echo(&mut members).await;
            leave_all(members.split_off(count - 1)).await;
            members.push(until_served(t.address).await.0);
            leave_all(members).await;
        });
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// Few ports from the beginning are planned with: what is started says so, warns when four fifths of them are in use, and turns
/// the client away for whom there is none.
#[test]
fn few_ports_are_planned_with() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    if !stage.lab().set(Side::Proxy, "ipv4/ip_local_port_range", "30000 30019") {
        return;
    }
    let t = stage.tidegate(&listeners(&stage), backend.address);
    let budget = t.log_where("its budget", |line| line["message"] == "budget");
    assert_eq!(
        (budget["max_connections"].as_u64(), budget["limited_by"].as_str()),
        (Some(20), Some("ports")),
        "{budget}"
    );
    stage.clients(async || {
        let mut members = connect(t.address, 15).await;
        let is_warning = |line: &serde_json::Value| line["level"] == "WARN" && line.to_string().contains("scarce");
        assert_eq!(t.log().into_iter().find(is_warning), None);
        members.extend(connect(t.address, 5).await);
        t.has_logged("that ports become scarce", is_warning).await;
        assert_eq!(arrive(t.address, DEADLINE).await.result.err(), Some(Outcome::Refused));
        leave_all(members).await;
    });
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Sessions that share connections are not limited by ports; as soon as those of one route do not, they are.
#[test]
fn ports_limit_only_those_that_take_one() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    if !stage.lab().set(Side::Proxy, "ipv4/ip_local_port_range", "30000 30019") {
        return;
    }
    let dedicated = "route = [{ path = '/chat', pool.mode = 'dedicated' }]";
    for (routes, limited_by) in [("", "descriptors"), (dedicated, "ports")] {
        let settings = format!("{}\nlimits.memory = 'off'\npool.mode = 'multiplexed'\n{routes}", listeners(&stage));
        let t = stage.tidegate(&settings, backend.address);
        let budget = t.log_where("its budget", |line| line["message"] == "budget");
        assert_eq!(budget["limited_by"], limited_by, "{budget}");
    }
}

/// With nobody listening on the backend's port and that port the only one that the kernel gives away, a connection to it is one to
/// itself: the client gets a 502, nothing of what it sent comes back, and the log says what happened and what helps.
#[test]
fn a_connection_to_itself_is_no_backend() {
    let stage = Stage::new();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 30_000));
    let t = stage.tidegate("", nobody);
    if !stage.lab().set(Side::Proxy, "ipv4/ip_local_port_range", "30000 30000") {
        return;
    }
    stage.clients(async || {
        assert_eq!(arrive(t.address, DEADLINE).await.result.err(), Some(Outcome::Status(502)));
        let line = t
            .has_logged("a connection to itself", |line| line.to_string().contains("connected to itself"))
            .await
            .to_string();
        assert!(line.contains("ip_local_port_range") || line.contains("ip_local_reserved_ports"), "{line}");
        for errand in [Errand::Get, Errand::Echo, Errand::Get, Errand::Echo] {
            // The port may be in TIME_WAIT, and then there is none.
            let outcome = visit(t.address, errand).await.outcome;
            assert!(matches!(outcome, Outcome::Status(502) | Outcome::Refused), "{outcome:?}");
        }
    });
    t.assert_nothing_left();
    t.assert_no_rst();
}
