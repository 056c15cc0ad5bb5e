//! The pool as others use it, over connections that are nothing but numbers. Time is paused, since no socket is in it.

use std::{
    collections::HashMap,
    io,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::{FutureExt as _, future::join_all};
use tokio::{runtime::Handle, sync::Semaphore, time::sleep};
use tokio_util::task::TaskTracker;

use super::{sync::lock, *};

/// A backend: what is open at it, and how its next opens go.
#[derive(Debug)]
struct Backend {
    opens: AtomicUsize,
    capacity: usize,
    /// Opens end when they get one of these.
    gate: Semaphore,
    plan: Mutex<Plan>,
    open: Mutex<HashMap<usize, Reports>>,
    closed: Mutex<Vec<usize>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Work,
    Fail,
    Panic,
    /// Connects, and says at once that it is over.
    GoAway,
    Vanish,
}

#[derive(Debug, Clone)]
struct To(Arc<Backend>);

impl Connector<&'static str> for To {
    type Connection = usize;
    type Error = io::Error;

    async fn open(&self, _: &&'static str, reports: Reports) -> Result<Opened<usize>, io::Error> {
        let Self(backend) = self;
        let number = backend.opens.fetch_add(1, Ordering::SeqCst);
        backend.gate.acquire().await.expect("never closed").forget();
        let plan = *lock(&backend.plan);
        match plan {
            Plan::Work => {}
            Plan::Fail => return Err(io::Error::other(format!("open {number}"))),
            Plan::Panic => panic!("as planned"),
            Plan::GoAway => reports.go_away(),
            Plan::Vanish => return Ok(Opened { connection: number, capacity: backend.capacity }),
        }
        lock(&backend.open).insert(number, reports);
        Ok(Opened { connection: number, capacity: backend.capacity })
    }

    fn close(&self, _: &&'static str, connection: &usize) {
        lock(&self.0.closed).push(*connection);
        let reports = lock(&self.0.open).remove(connection);
        // As a driver does that ends.
        drop(reports);
    }
}

struct Stage {
    pool: Pool<&'static str, To>,
    backend: Arc<Backend>,
    stats: Arc<Stats>,
    tracker: TaskTracker,
}

const IDLE: Duration = Duration::from_mins(1);
const BACKOFF: Duration = Duration::from_secs(1);

fn config() -> Config {
    Config {
        limits: Limits {
            max_connections: 2,
            max_waiters: 20_000,
            idle_timeout: IDLE,
            keeps_unasked: true,
            backoff: BACKOFF,
            max_backoff: 8 * BACKOFF,
        },
        open_timeout: Duration::from_secs(5),
        max_wait: Duration::from_secs(10),
    }
}

impl Stage {
    /// Opens are held up until the gate lets them through.
    fn held(config: Config, capacity: usize) -> Self {
        let backend = Arc::new(Backend {
            opens: AtomicUsize::new(0),
            capacity,
            gate: Semaphore::new(0),
            plan: Mutex::new(Plan::Work),
            open: Mutex::default(),
            closed: Mutex::default(),
        });
        let (stats, tracker) = (Arc::new(Stats::default()), TaskTracker::new());
        let connector = To(Arc::clone(&backend));
        let pool = Pool::new(config, connector, Arc::clone(&stats), &tracker, &Handle::current());
        Self { pool, backend, stats, tracker }
    }

    fn open(config: Config, capacity: usize) -> Self {
        let stage = Self::held(config, capacity);
        stage.backend.gate.add_permits(1_000);
        stage
    }

    fn opens(&self) -> usize {
        self.backend.opens.load(Ordering::SeqCst)
    }

    fn closed(&self) -> Vec<usize> {
        lock(&self.backend.closed).clone()
    }

    fn plan(&self, plan: Plan) {
        *lock(&self.backend.plan) = plan;
    }

    /// Closed, with nothing left of it: no key, timer, task or open connection, and no rule was ever broken.
    async fn end(self) {
        self.pool.close();
        self.pool.closed().await;
        self.tracker.close();
        self.tracker.wait().await;
        assert_eq!(self.stats.census(), stats::Census::default());
        assert_eq!(self.stats.violations(), 0);
        assert_eq!(self.pool.shared.timers.len(), 0);
        assert_eq!(self.pool.snapshot(), []);
        assert!(lock(&self.backend.open).is_empty());
        assert_eq!(Arc::strong_count(&self.pool.shared), 1, "somebody holds the pool");
    }
}

/// Other tasks have their turn until it is so.
async fn until(is_so: impl Fn() -> bool) {
    for _ in 0..1_000 {
        if is_so() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("it never came to that");
}

const COLD: usize = 10_000;

/// Ten thousand callers at a cold key: one open, one connection, and nothing left of it after the idle timeout.
#[tokio::test(start_paused = true)]
async fn ten_thousand_callers_open_one_connection() {
    let stage = Stage::held(config(), usize::MAX);
    let mut all = Box::pin(join_all((0..COLD).map(|_| stage.pool.acquire(&"a"))));
    assert!(all.as_mut().now_or_never().is_none());
    assert_eq!(usize::try_from(stage.stats.census().waiters), Ok(COLD));
    stage.backend.gate.add_permits(10);
    let leases: Vec<_> = all.await.into_iter().map(|lease| lease.expect("a lease")).collect();
    assert_eq!((stage.opens(), leases.len()), (1, COLD));
    assert!(leases.iter().all(|lease| **lease == 0 && !lease.is_closed()));
    drop(leases);
    assert_eq!(stage.closed(), Vec::<usize>::new());
    sleep(IDLE.mul_f64(0.999)).await;
    assert_eq!(stage.closed(), Vec::<usize>::new());
    sleep(IDLE.mul_f64(0.002)).await;
    assert_eq!((stage.closed(), stage.opens()), (vec![0], 1));
    assert_eq!(stage.pool.snapshot(), []);
    stage.end().await;
}

/// The open fails: ten thousand get the same error at once, those who come before the backoff is over too, and only then is
/// another one tried.
#[tokio::test(start_paused = true)]
async fn a_failed_open_is_everybodys_and_is_not_repeated_at_once() {
    let stage = Stage::open(config(), usize::MAX);
    stage.plan(Plan::Fail);
    let begun = tokio::time::Instant::now();
    let all = join_all((0..COLD).map(|_| stage.pool.acquire(&"a"))).await;
    let errors = all.into_iter().map(|refused| match refused {
        Err(AcquireError::Open(OpenError::Failed(error))) => error,
        other => panic!("{other:?}"),
    });
    let errors: Vec<_> = errors.collect();
    assert!(errors.iter().all(|error| Arc::ptr_eq(error, &errors[0])));
    assert_eq!((stage.opens(), begun.elapsed()), (1, Duration::ZERO));
    // At the shortest it lasts for half of it.
    sleep(BACKOFF.mul_f64(0.49)).await;
    stage.plan(Plan::Work);
    match stage.pool.acquire(&"a").await {
        Err(AcquireError::Open(OpenError::Failed(error))) => assert!(Arc::ptr_eq(&error, &errors[0])),
        other => panic!("{other:?}"),
    }
    assert!(stage.pool.snapshot()[0].fails_until.is_some());
    sleep(BACKOFF.mul_f64(0.52)).await;
    let lease = stage.pool.acquire(&"a").await.expect("a lease");
    assert_eq!((*lease, stage.opens()), (1, 2));
    assert_eq!(stage.stats.opens(), [1, 1, 0, 0, 0]);
    assert_eq!(stage.stats.refusals()[..2], [COLD as u64 + 1, 0]);
    drop(lease);
    stage.end().await;
}

/// A failure is forgotten some time after its backoff: nothing is remembered of keys that never worked.
#[tokio::test(start_paused = true)]
async fn failures_are_forgotten() {
    let stage = Stage::open(config(), 1);
    stage.plan(Plan::Fail);
    for key in ["a", "b", "c"] {
        assert!(matches!(stage.pool.acquire(&key).await, Err(AcquireError::Open(_))));
    }
    assert_eq!((stage.stats.census().keys, stage.pool.shared.timers.len()), (3, 3));
    sleep(10 * BACKOFF).await;
    assert_eq!((stage.stats.census().keys, stage.pool.shared.timers.len()), (0, 0));
    stage.end().await;
}

/// Half of ten thousand leave while the open is under way: the others get their lease, and nothing is left of anybody.
#[tokio::test(start_paused = true)]
async fn those_who_leave_leave_nothing() {
    let stage = Stage::held(config(), usize::MAX);
    let mut all: Vec<_> = (0..COLD).map(|_| Box::pin(stage.pool.acquire(&"a"))).collect();
    for one in &mut all {
        assert!(one.now_or_never().is_none());
    }
    tokio::task::yield_now().await;
    let stays = all.split_off(COLD / 2);
    drop(all);
    assert_eq!(usize::try_from(stage.stats.census().waiters), Ok(COLD / 2));
    stage.backend.gate.add_permits(1);
    // Some leave when their lease is on its way already.
    until(|| stage.stats.census().references > 0).await;
    let mut stays = stays;
    drop(stays.split_off(COLD / 4));
    assert_eq!(usize::try_from(stage.stats.census().references), Ok(COLD / 4));
    let leases = join_all(stays).await;
    assert!(leases.iter().all(Result::is_ok) && stage.opens() == 1);
    assert_eq!(stage.stats.refusals()[4], 3 * COLD as u64 / 4);
    drop(leases);
    assert_eq!(stage.stats.census().references, 0);
    // All leave: the open goes on, and what it opened is there for the next one.
    let mut alone = Box::pin(stage.pool.acquire(&"b"));
    assert!(alone.as_mut().now_or_never().is_none());
    drop(alone);
    stage.backend.gate.add_permits(1);
    until(|| stage.stats.census().connections[2] >= 2).await;
    assert_eq!(*stage.pool.acquire(&"b").await.expect("a lease"), 1);
    stage.end().await;
}

/// A connector that panics has failed for those who waited for it, and for nobody else.
#[tokio::test(start_paused = true)]
async fn a_panic_is_that_of_its_own_waiters() {
    let stage = Stage::open(config(), 10);
    let other = stage.pool.acquire(&"works").await.expect("a lease");
    stage.plan(Plan::Panic);
    let (one, two, hit) =
        tokio::join!(stage.pool.acquire(&"a"), stage.pool.acquire(&"a"), stage.pool.acquire(&"works"));
    for refused in [one, two] {
        assert!(matches!(refused, Err(AcquireError::Open(OpenError::Panicked))), "{refused:?}");
    }
    assert_eq!(*hit.expect("a lease"), *other);
    assert_eq!(stage.stats.opens(), [1, 0, 0, 1, 0]);
    stage.plan(Plan::Work);
    sleep(BACKOFF).await;
    assert!(stage.pool.acquire(&"a").await.is_ok());
    drop(other);
    stage.end().await;
}

/// An open that never ends is given up, and is then a failed one.
#[tokio::test(start_paused = true)]
async fn an_open_has_a_deadline() {
    let stage = Stage::held(config(), 1);
    let begun = tokio::time::Instant::now();
    let refused = stage.pool.acquire(&"a").await;
    assert!(matches!(refused, Err(AcquireError::Open(OpenError::TimedOut))), "{refused:?}");
    assert_eq!(begun.elapsed(), config().open_timeout);
    stage.end().await;
}

/// Within the idle timeout a connection is revived, as often as somebody comes; the timers of before don't close it.
#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_revived() {
    let stage = Stage::open(config(), 10);
    for _ in 0..5 {
        let lease = stage.pool.acquire(&"a").await.expect("a lease");
        sleep(IDLE / 2).await;
        drop(lease);
        assert_eq!(stage.pool.shared.timers.len(), 1);
        sleep(IDLE.mul_f64(0.9)).await;
    }
    assert_eq!((stage.opens(), stage.closed()), (1, vec![]));
    let hows = stage.stats.acquires().map(|took| took.buckets.iter().sum::<u64>());
    assert_eq!(hows, [0, 4, 1, 0]);
    sleep(IDLE).await;
    assert_eq!((stage.closed(), stage.stats.idle_closes()), (vec![0], 1));
    stage.end().await;
}

/// Without an idle timeout the last lease closes it.
#[tokio::test(start_paused = true)]
async fn without_an_idle_timeout_the_last_lease_closes() {
    let mut config = config();
    config.limits.idle_timeout = Duration::ZERO;
    let stage = Stage::open(config, 10);
    let one = stage.pool.acquire(&"a").await.expect("a lease");
    let two = stage.pool.acquire(&"a").await.expect("a lease");
    drop(one);
    assert_eq!(stage.closed(), Vec::<usize>::new());
    drop(two);
    assert_eq!((stage.closed(), stage.pool.shared.timers.len()), (vec![0], 0));
    stage.end().await;
}

/// When all connections are full, one waits for a reference that is given back, for so long and with so many others.
#[tokio::test(start_paused = true)]
async fn who_finds_all_full_waits_within_bounds() {
    let mut config = config();
    config.limits.max_waiters = 2;
    let stage = Stage::open(config, 2);
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(stage.pool.acquire(&"a").await.expect("a lease"));
    }
    assert_eq!((stage.opens(), leases.iter().map(|lease| **lease).collect::<Vec<_>>()), (2, vec![0, 0, 1, 1]));
    let mut first = Box::pin(stage.pool.acquire(&"a"));
    let mut second = Box::pin(stage.pool.acquire(&"a"));
    assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
    assert!(matches!(stage.pool.acquire(&"a").await, Err(AcquireError::Full)));
    drop(leases.remove(1));
    assert_eq!(*first.await.expect("the first in turn"), 0);
    // It was not kept, so the second has it next.
    let second = second.await.expect("the second in turn");
    let begun = tokio::time::Instant::now();
    let refused = stage.pool.acquire(&"a").await;
    assert!(matches!(refused, Err(AcquireError::Timeout)), "{refused:?}");
    assert_eq!(begun.elapsed(), config.max_wait);
    assert_eq!(stage.stats.refusals(), [0, 1, 1, 0, 0]);
    drop((second, leases));
    stage.end().await;
}

/// What a connection reports: more room, nobody else, and its end, which its leases see.
#[tokio::test(start_paused = true)]
async fn connections_say_what_becomes_of_them() {
    let stage = Stage::open(config(), 1);
    let report = |number: usize, tell: &dyn Fn(&Reports)| tell(&lock(&stage.backend.open)[&number]);
    let one = stage.pool.acquire(&"a").await.expect("a lease");
    report(0, &|reports| reports.capacity(2));
    let two = stage.pool.acquire(&"a").await.expect("a lease");
    report(0, &Reports::go_away);
    let three = stage.pool.acquire(&"a").await.expect("a lease");
    assert_eq!((*one, *two, *three), (0, 0, 1));
    assert_eq!(stage.pool.snapshot()[0].connections[0].state, "draining");
    // Those on it stay until they go, then it is closed.
    drop(one);
    assert!(!two.is_closed() && stage.closed().is_empty());
    drop(two);
    assert_eq!((stage.closed(), stage.stats.goaways()), (vec![0], 1));
    // The peer of the other one goes.
    let reports = lock(&stage.backend.open).remove(&1);
    assert!(!three.is_closed() && three.closed().now_or_never().is_none());
    drop(reports);
    three.closed().await;
    assert!(three.is_closed());
    assert_eq!(*stage.pool.acquire(&"a").await.expect("a lease"), 2);
    drop(three);
    assert_eq!(stage.closed(), [0], "nothing is to be done about what has ended");
    stage.end().await;
}

/// What ends or drains before anybody could use it counts as a failed open: else it would be opened again and again.
#[tokio::test(start_paused = true)]
async fn a_connection_of_no_use_is_a_failed_open() {
    for (plan, closed) in [(Plan::GoAway, vec![0]), (Plan::Vanish, vec![])] {
        let stage = Stage::open(config(), 1);
        stage.plan(plan);
        for _ in 0..3 {
            let refused = stage.pool.acquire(&"a").await;
            assert!(matches!(refused, Err(AcquireError::Open(OpenError::Stillborn))), "{refused:?}");
        }
        assert_eq!((stage.opens(), stage.closed()), (1, closed));
        stage.end().await;
    }
}

/// A pool that is closed calls its opens off, refuses those who wait and who come, closes what is idle, and is at its end
/// when the last lease is given back.
#[tokio::test(start_paused = true)]
async fn a_closed_pool_ends_with_its_last_lease() {
    let stage = Stage::held(config(), 1);
    stage.backend.gate.add_permits(2);
    let used = stage.pool.acquire(&"a").await.expect("a lease");
    drop(stage.pool.acquire(&"b").await.expect("a lease"));
    let (refused, closed) = tokio::join!(stage.pool.acquire(&"a"), async {
        stage.pool.close();
        stage.pool.closed().now_or_never()
    });
    assert!(matches!(refused, Err(AcquireError::Closing)), "{refused:?}");
    assert!(matches!(stage.pool.acquire(&"c").await, Err(AcquireError::Closing)));
    assert_eq!((closed, stage.closed(), used.is_closed()), (None, vec![1], false));
    until(|| stage.stats.opens()[4] > 0).await;
    assert!(stage.pool.closed().now_or_never().is_none(), "it is in use");
    drop(used);
    assert!(stage.pool.closed().now_or_never().is_some());
    assert_eq!(stage.closed(), [1, 0]);
    stage.end().await;
}

/// Many threads and keys at once, over a pool whose tasks run on a runtime of one thread: nothing leaks, and no rule is
/// broken. The leases are given back on other threads than the pool's.
#[test]
fn many_threads_may_use_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut config = config();
    config.limits.idle_timeout = Duration::from_micros(50);
    let stage = runtime.block_on(async { Stage::open(config, 3) });
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            runtime.block_on(async {
                while !done.load(Ordering::SeqCst) {
                    sleep(Duration::from_micros(100)).await;
                    stage.backend.gate.add_permits(10);
                }
            });
        });
        let users: Vec<_> = (0..4)
            .map(|user| {
                let stage = &stage;
                scope.spawn(move || {
                    let runtime =
                        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
                    runtime.block_on(async {
                        for round in 0..300 {
                            let key = ["a", "b", "c"][(user + round) % 3];
                            // Nobody waits for one with another in the hand.
                            let use_one = async || {
                                let lease = stage.pool.acquire(&key).await?;
                                tokio::task::yield_now().await;
                                drop(lease);
                                Ok::<_, AcquireError<io::Error>>(())
                            };
                            let left = Box::pin(stage.pool.acquire(&key)).now_or_never();
                            drop(left);
                            let used = join_all((0..5).map(|_| use_one())).await;
                            assert!(used.iter().all(Result::is_ok), "{used:?}");
                        }
                    });
                })
            })
            .collect();
        let ends: Vec<_> = users.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::SeqCst);
        assert!(ends.iter().all(Result::is_ok));
    });
    assert_eq!(stage.stats.census().references, 0);
    runtime.block_on(stage.end());
}

/// Of failures that are remembered the one that would be forgotten first can be forgotten before, and no other; whoever asks for that key again
/// is not refused for it. Method: two keys that fail one after the other.
#[tokio::test(start_paused = true)]
async fn a_failure_can_be_forgotten() {
    let stage = Stage::held(config(), 1);
    *lock(&stage.backend.plan) = Plan::Fail;
    stage.backend.gate.add_permits(9);
    for key in ["a", "b"] {
        assert!(stage.pool.acquire(&key).await.is_err());
        sleep(Duration::from_millis(1)).await;
    }
    let known = || ["a", "b"].map(|key| stage.pool.knows(&key));
    let snapshot = stage.pool.snapshot();
    let first = snapshot.iter().min_by_key(|one| one.fails_until).map_or("", |one| &one.key);
    let first = usize::from(first == "b");
    stage.pool.forget_failure();
    assert_eq!((known()[first], known()[1 - first], stage.pool.keys()), (false, true, 1));
    let opens = stage.backend.opens.load(Ordering::SeqCst);
    assert!(stage.pool.acquire(&["a", "b"][first]).await.is_err());
    assert_eq!(stage.backend.opens.load(Ordering::SeqCst), opens + 1);
    stage.pool.forget_failure();
    stage.pool.forget_failure();
    stage.pool.forget_failure();
    assert_eq!((stage.pool.keys(), stage.pool.shared.timers.len()), (0, 0));
}
