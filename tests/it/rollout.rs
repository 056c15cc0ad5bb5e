//! A rolling update under sessions: what clients notice of it, with the manifest as it is shipped, and with nginx in tidegate's place.
//!
//! ```text
//! Deployment   three Pods; one more starts, is ready, and has been for minReadySeconds: then an old one is deleted, and the next one
//!              starts, whether or not that has ended (maxUnavailable 0, maxSurge 1)
//! Service      a new connection goes to any Pod that it knows of; it learns of each change 1 to 3 s late, of each at a time of its own,
//!              and leaves connections that there are where they are, as kube-proxy does
//! clients      a message a second; after an end they come back by themselves
//! ```
//!
//! Each test prints its figures, second by second (`cargo test --test it rollout -- --nocapture`). Asserted is what became of each
//! client; how Closes are spread only where `TIDEGATE_STRICT=1` asks for it, which also has all sizes and times of a real deployment.
//! Not here: a Service without a ready Pod (kube-proxy then takes one that ends and still serves), and Pods on nodes that fail.

use crate::harness::{
    Board, DEADLINE, Frame, LIMIT, Lab, Side, block,
    crowd::{self, Member, is_strict, tally},
    kubelet::{Manifest, Pod},
    lab::Place,
    left_out,
    visit::{Arrival, arrive},
    ws::{CLOSE, PING, PONG, TEXT},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    pin::pin,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::time::{MissedTickBehavior, interval, sleep};

const REPLICAS: usize = 3;

/// Of each client, from one message to the next.
const PACE: Duration = Duration::from_secs(1);

/// How late the Service learns of a change, in milliseconds.
const LAG: std::ops::RangeInclusive<u64> = 1000..=3000;

/// What differs between a test that everybody runs and a deployment.
#[derive(Clone, Copy, Debug)]
struct Size {
    sessions: u32,
    /// None: as it is shipped.
    hurry: Option<Hurry>,
}

#[derive(Clone, Copy, Debug)]
struct Hurry {
    /// Longer than the longest lag, as it has to be.
    delay: Duration,
    window: Duration,
    available_after: Duration,
}

impl Size {
    fn of_this_run() -> Self {
        let seconds = Duration::from_secs;
        let hurry = Hurry { delay: seconds(4), window: seconds(3), available_after: seconds(2) };
        if is_strict() { Self { sessions: 1500, hurry: None } } else { Self { sessions: 150, hurry: Some(hurry) } }
    }

    fn manifest(self) -> Manifest {
        let mut manifest = Manifest::rendered("demo.yaml");
        if let Some(Hurry { delay, window, available_after }) = self.hurry {
            manifest.set_drain("delay", delay);
            manifest.set_drain("window", window);
            manifest.available_after = available_after;
        }
        manifest
    }
}

/// What the Service is told of a Pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Ready,
    NotReady,
    /// It is deleted: whatever its probes say from then on is not asked for.
    Ends,
}

/// Where a Pod's clients connect, and from where.
#[derive(Debug)]
struct Endpoint {
    address: SocketAddr,
    place: Place,
    /// What the Service knows, from when on.
    news: Mutex<Vec<(Instant, News)>>,
}

impl Endpoint {
    fn news(&self) -> MutexGuard<'_, Vec<(Instant, News)>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All Pods that there will be, the old ones first.
#[derive(Debug)]
struct Service(Vec<Endpoint>);

impl Service {
    fn new(labs: &[Lab], manifest: &Manifest) -> Self {
        let endpoint = |lab: &Lab| Endpoint {
            address: manifest.address_in(lab),
            place: lab.place(Side::Client),
            news: Mutex::new(Vec::new()),
        };
        Self(labs.iter().map(endpoint).collect())
    }

    /// It hears of this some time later, but of one Pod all in its order.
    fn tell(&self, pod: usize, what: News) {
        let mut news = self.0[pod].news();
        let at = Instant::now() + Duration::from_millis(rand::random_range(LAG));
        match news.last() {
            Some((_, News::Ends)) => {}
            Some((last, _)) => {
                let at = at.max(*last);
                news.push((at, what));
            }
            None => news.push((at, what)),
        }
    }

    /// It knows of this Pod already.
    fn knows(&self, pod: usize) {
        self.0[pod].news().push((Instant::now(), News::Ready));
    }

    /// Where the next connection goes.
    fn pick(&self) -> Option<usize> {
        let now = Instant::now();
        let is_known = |endpoint: &Endpoint| {
            endpoint.news().iter().rev().find(|(at, _)| *at <= now).is_some_and(|(_, news)| *news == News::Ready)
        };
        let known: Vec<_> = (0..self.0.len()).filter(|pod| is_known(&self.0[*pod])).collect();
        (!known.is_empty()).then(|| known[rand::random_range(0..known.len())])
    }
}

/// How long a client waits before it tries again: the rule of centrifuge-js 5 with its defaults (`minReconnectDelay` 500 ms,
/// `maxReconnectDelay` 20 s), exponential backoff with full jitter. After an end it is 0.5 to 1 s, and each failure doubles what is random.
fn backoff(failures: u32) -> Duration {
    let (min, max) = (500, 20_000);
    let random = rand::random_range(0..=max.min(min << failures.min(10)));
    Duration::from_millis(max.min(min + random))
}

/// A session from its 101 to its end.
#[derive(Debug)]
struct Session {
    pod: usize,
    client: SocketAddr,
    since: Instant,
    /// Its Close, or the end that came without.
    over: Instant,
    sent: u64,
    echoed: u64,
    end: String,
}

/// What a client has to tell.
#[derive(Debug, Default)]
struct Story {
    sessions: Vec<Session>,
    failed: Vec<(Instant, String)>,
}

/// What a client's own Close comes to, when all is over.
const LEFT: &str = "Close 1000, Fin";

/// Talks until the session ends, or until `leave`: then it waits for what it has sent to come back, and closes.
async fn talk(mut member: Member, pod: usize, leave: &Board<bool>, begun: impl FnOnce()) -> Session {
    let client = member.local();
    let since = Instant::now();
    let (mut sent, mut echoed, mut begun, mut leaves) = (0, 0, Some(begun), false);
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = pin!(leave.until(LIMIT, |leave| leave.then_some(())));
    let mut heard = Instant::now();
    let (over, end) = loop {
        if leaves && echoed > 0 && echoed == sent {
            let _ = member.send(&Frame::close(1000, "")).await;
            break (Instant::now(), member.rest().await.summary());
        }
        tokio::select! {
            frame = member.frame() => {
                heard = Instant::now();
                match frame {
                    Ok(frame) if frame.opcode == TEXT => {
                        // In order, and none left out.
                        assert_eq!(frame.text(), echoed.to_string());
                        echoed += 1;
                        begun.take().into_iter().for_each(|begun| begun());
                    }
                    Ok(frame) if frame.opcode == PING => _ = member.send(&Frame::new(PONG, &frame.payload)).await,
                    Ok(close) => {
                        assert_eq!(close.opcode, CLOSE, "{close:?}");
                        let code = close.code();
                        let payload = &close.payload[..close.payload.len().min(2)];
                        let _ = member.send(&Frame::new(CLOSE, payload)).await;
                        break (heard, format!("Close {code}, {}", member.rest().await.summary()));
                    }
                    Err(end) => break (heard, format!("{end:?} without a Close")),
                }
            }
            _ = pace.tick() => {
                if heard.elapsed() > DEADLINE {
                    break (Instant::now(), "silence".to_owned());
                }
                // What was not taken was not sent; why is seen with the end. Who is to leave at once is served first all the same.
                if (!leaves || sent == 0) && member.send(&Frame::text(&sent.to_string())).await.is_ok() {
                    sent += 1;
                }
            }
            _ = &mut told, if !leaves => leaves = true,
        }
    };
    Session { pod, client, since, over, sent, echoed, end }
}

/// Comes back until it has left by itself, or can't for [`LIMIT`].
async fn client(service: &Service, leave: &Board<bool>, begun: &Board<u32>) -> Story {
    let mut story = Story::default();
    let mut failures = 0;
    let begun_at = Instant::now();
    while begun_at.elapsed() < LIMIT {
        let arrived = match service.pick() {
            Some(pod) => {
                let Endpoint { address, place, .. } = &service.0[pod];
                // The socket is made before anybody else has a turn on this thread.
                place.enter().expect("a thread of ours");
                let Arrival { result, .. } = arrive(*address, DEADLINE).await;
                result.map(|member| (pod, member)).map_err(|outcome| format!("{outcome:?}"))
            }
            None => Err("no endpoint".to_owned()),
        };
        match arrived {
            Ok((pod, member)) => {
                failures = 0;
                let is_first = story.sessions.is_empty();
                let has_begun = || begun.change(|begun| *begun += u32::from(is_first));
                let session = talk(member, pod, leave, has_begun).await;
                let has_left = session.end == LEFT;
                story.sessions.push(session);
                if has_left {
                    break;
                }
            }
            Err(why) => {
                story.failed.push((Instant::now(), why));
                failures += 1;
            }
        }
        sleep(backoff(failures)).await;
    }
    story
}

/// Ends what waits for it, also when the test fails.
struct Over(Board<bool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.change(|over| *over = true);
    }
}

/// What happened, and to whom.
struct Rollout<'a> {
    begun: Instant,
    stories: Vec<Story>,
    /// The old ones first.
    pods: Vec<Arc<Pod<'a>>>,
    /// What the Deployment did, and when.
    steps: Vec<(Instant, String)>,
}

/// Replaces all Pods while so many clients talk.
fn roll_out<'a>(labs: &'a [Lab], manifest: &Manifest, sessions: u32) -> Rollout<'a> {
    let service = Service::new(labs, manifest);
    let service = &service;
    let [leave, over] = [Board::new(false), Board::new(false)];
    let begun = Board::new(0);
    thread::scope(|scope| {
        let guards = [Over(leave.clone()), Over(over.clone())];
        let start = |index: usize| {
            let pod = Arc::new(Pod::start(&labs[index], manifest.clone()));
            pod.becomes_ready();
            pod
        };
        let watch = |index: usize, pod: &Arc<Pod<'a>>| {
            let (pod, over) = (Arc::clone(pod), over.clone());
            let tell = move |is_ready| service.tell(index, if is_ready { News::Ready } else { News::NotReady });
            scope.spawn(move || pod.watch(&over, tell));
        };
        let mut pods: Vec<_> = (0..REPLICAS).map(start).collect();
        for (index, pod) in pods.iter().enumerate() {
            service.knows(index);
            watch(index, pod);
        }
        let clients = scope.spawn(|| {
            block(join_all((0..sessions).map(async |index| {
                // Evenly spread, so that they do not speak in unison.
                sleep(PACE * index / sessions).await;
                client(service, &leave, &begun).await
            })))
        });
        let all_begun = begun.wait(DEADLINE, |begun| (*begun == sessions).then_some(()));
        assert!(all_begun.is_some(), "{begun:?} of {sessions} sessions have begun");

        let begun = Instant::now();
        let mut steps = Vec::new();
        let mut deletions = Vec::new();
        for old in 0..REPLICAS {
            let new = REPLICAS + old;
            let pod = start(new);
            steps.push((Instant::now(), format!("Pod {new} is ready")));
            service.tell(new, News::Ready);
            watch(new, &pod);
            pods.push(pod);
            thread::sleep(manifest.available_after);
            steps.push((Instant::now(), format!("Pod {old} is deleted")));
            // Who is to end is withdrawn in the moment in which the kubelet hears of it.
            service.tell(old, News::Ends);
            let pod = Arc::clone(&pods[old]);
            deletions.push(scope.spawn(move || {
                pod.delete();
                (Instant::now(), format!("Pod {old} has ended"))
            }));
        }
        steps.extend(deletions.into_iter().map(|deletion| deletion.join().expect("a kubelet")));
        steps.sort();
        drop(guards);
        let stories = clients.join().expect("clients");
        let has_left = |story: &&Story| story.sessions.last().is_some_and(|session| session.end == LEFT);
        let lost = stories.iter().filter(|story| !has_left(story)).count();
        assert_eq!(lost, 0, "clients that never came back");
        Rollout { begun, stories, pods, steps }
    })
}

impl Rollout<'_> {
    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.stories.iter().flat_map(|story| &story.sessions)
    }

    /// Those that a client did not end itself.
    fn ended(&self) -> impl Iterator<Item = &Session> {
        self.sessions().filter(|session| session.end != LEFT)
    }

    fn ends(&self) -> BTreeMap<&str, usize> {
        tally(self.ended().map(|session| session.end.as_str()))
    }

    fn failed(&self) -> BTreeMap<&str, usize> {
        tally(self.stories.iter().flat_map(|story| &story.failed).map(|(_, why)| why.as_str()))
    }

    /// In which second of the rollout, of those that last so long; what was before it is not in it.
    fn second(&self, at: Instant, step: u64) -> Option<u64> {
        Some(at.checked_duration_since(self.begun)?.as_secs() / step)
    }

    /// Of clients that come back.
    fn reconnects(&self, step: u64) -> BTreeMap<u64, usize> {
        let returns = self.stories.iter().flat_map(|story| story.sessions.iter().skip(1));
        tally(returns.filter_map(|session| self.second(session.since, step)))
    }

    /// The most in a second, and the mean from the first to the last second with any.
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    fn peak_and_mean(&self) -> (f64, f64) {
        let reconnects = self.reconnects(1);
        let [first, last] = [reconnects.keys().next(), reconnects.keys().next_back()].map(|s| *s.expect("reconnects"));
        let sum: usize = reconnects.values().sum();
        let peak = *reconnects.values().max().expect("reconnects");
        (peak as f64, sum as f64 / (last - first + 1) as f64)
    }

    /// Of each client the longest time from an end to the next 101, in ascending order.
    fn gaps(&self) -> Vec<Duration> {
        let longest = |story: &Story| {
            let pairs = story.sessions.windows(2);
            pairs.map(|pair| pair[1].since - pair[0].over).max().unwrap_or_default()
        };
        let mut gaps: Vec<_> = self.stories.iter().map(longest).collect();
        gaps.sort_unstable();
        gaps
    }

    /// Without an echo, of all that was sent.
    fn unanswered(&self) -> u64 {
        self.sessions().map(|session| session.sent - session.echoed).sum()
    }

    fn table(&self, step: u64) -> String {
        let closes = tally(self.ended().filter_map(|session| self.second(session.over, step)));
        let failures = self.stories.iter().flat_map(|story| &story.failed);
        let failures = tally(failures.filter_map(|(at, _)| self.second(*at, step)));
        let reconnects = self.reconnects(step);
        let steps = || self.steps.iter().filter_map(|(at, what)| Some((self.second(*at, step)?, what.as_str())));
        let counts = [&closes, &reconnects, &failures];
        let last = counts.into_iter().filter_map(|all| all.keys().next_back()).max().copied();
        let last = last.max(steps().map(|(second, _)| second).max()).unwrap_or_default();
        let mut table =
            "| second | ends | reconnects | failed connects | meanwhile |\n|---:|---:|---:|---:|---|\n".to_owned();
        for second in 0..=last {
            let [ends, reconnects, failed] = counts.map(|all| all.get(&second).copied().unwrap_or_default());
            let meanwhile: Vec<_> = steps().filter(|(at, _)| *at == second).map(|(_, what)| what).collect();
            let (from, meanwhile) = (second * step, meanwhile.join("; "));
            writeln!(table, "| {from} | {ends} | {reconnects} | {failed} | {meanwhile} |").expect("a String");
        }
        table
    }

    fn print(&self, who: &str, crossed: u64) {
        let gaps = self.gaps();
        let at = |percent: usize| gaps[(gaps.len() - 1) * percent / 100];
        let (peak, mean) = self.peak_and_mean();
        let sent: u64 = self.sessions().map(|session| session.sent).sum();
        let unanswered = self.unanswered();
        println!(
            "{who}: {} clients\n{}\n{}\nends: {:?}\nfailed connects: {:?}\nreconnects in a second: {peak} at most, {mean:.1} in the mean\n\
             messages: {sent} sent, {unanswered} unanswered, of which {crossed} crossed a Close, {} lost\n\
             longest gap of a client: p50 {:.2?}, p99 {:.2?}, max {:.2?}",
            self.stories.len(),
            self.table(1),
            self.table(5),
            self.ends(),
            self.failed(),
            unanswered - crossed,
            at(50),
            at(99),
            at(100),
        );
    }

    /// Of the messages without an echo, all that tidegate's Close crossed on the wire: to each session its own number.
    fn crossed(&self) -> u64 {
        let mut crossed = 0;
        for (index, pod) in self.pods.iter().enumerate().take(REPLICAS) {
            let tidegate = pod.tidegate();
            // Then it has printed all.
            let status = tidegate.wait_exit(DEADLINE);
            assert_eq!(status.code(), Some(0), "of Pod {index}");
            // A port may be used twice.
            let mut logged: BTreeMap<String, (u64, u64)> = BTreeMap::new();
            for line in tidegate.log().iter().filter(|line| line["message"] == "close") {
                let counts = logged.entry(line["client"].as_str().expect("an address").to_owned()).or_default();
                counts.0 += line["messages_from_client"].as_u64().expect("a count");
                counts.1 += line["crossed"].as_u64().expect("a count");
            }
            let mut counted: BTreeMap<String, (u64, u64)> = BTreeMap::new();
            for session in self.sessions().filter(|session| session.pod == index) {
                let counts = counted.entry(session.client.to_string()).or_default();
                counts.0 += session.echoed;
                counts.1 += session.sent - session.echoed;
            }
            let differing = counted.iter().find(|(client, counts)| logged.get(*client) != Some(counts));
            let differing = differing.map(|(client, counts)| (client, counts, logged.get(client)));
            assert_eq!(differing, None, "echoed and unanswered, and what Pod {index} has passed on and held back");
            crossed += counted.values().map(|(_, crossed)| crossed).sum::<u64>();
        }
        crossed
    }
}

/// Each client whose Pod is replaced is told so, comes back at once, and goes on; none finds a closed door or loses a message.
#[test]
fn nobody_is_cut_or_turned_away_by_a_rolling_update() {
    crowd::raise_descriptor_limit();
    let size = Size::of_this_run();
    let manifest = size.manifest();
    let labs: Vec<_> = (0..2 * REPLICAS).map(|_| Lab::new()).collect();
    let rollout = roll_out(&labs, &manifest, size.sessions);

    let failed = rollout.failed();
    assert!(failed.is_empty(), "failed connects: {failed:?}\n{}", rollout.table(1));
    let ends = rollout.ends();
    let told = ends.get("Close 1001, Fin").copied().unwrap_or_default();
    assert!(ends.len() == 1 && told >= size.sessions as usize, "{ends:?} of {} sessions", size.sessions);
    let crossed = rollout.crossed();
    assert_eq!(rollout.unanswered(), crossed, "messages that were not answered, and those that crossed a Close");
    for (index, pod) in rollout.pods.iter().enumerate() {
        let events = pod.events();
        assert!(!events.iter().any(|event| event.ends_with("SIGKILL")), "Pod {index}: {events:#?}");
        let served = rollout.sessions().filter(|session| session.pod == index).count();
        assert!(served > 0, "Pod {index} had no clients");
    }
    rollout.print("tidegate", crossed);
    let (peak, mean) = rollout.peak_and_mean();
    if is_strict() {
        assert!(peak <= 3.0 * mean, "{peak} reconnects in a second, {mean} in the mean");
    }
}

/// The same with nginx, for its figures (docs/rollout.md); of it only the end is asserted, that every client went on.
#[test]
#[ignore = "a comparison, run by .ci/long rollout"]
fn the_same_with_nginx() {
    let nginx = Command::new("nginx").arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !nginx.is_ok_and(|status| status.success()) {
        left_out("the rollout with nginx", "there is no nginx");
        return;
    }
    crowd::raise_descriptor_limit();
    let size = Size::of_this_run();
    let manifest = size.manifest().with_nginx();
    let labs: Vec<_> = (0..2 * REPLICAS).map(|_| Lab::new()).collect();
    let rollout = roll_out(&labs, &manifest, size.sessions);
    // Nothing tells its clients which of their messages came too late.
    rollout.print("nginx", 0);
}
