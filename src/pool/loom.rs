//! Models of lock, lease and timer: every order in which the threads can get at the pool's locks is gone through. Opens are
//! threads of the model too; timers fire when a model says so.
//!
//! Run with `cargo test --locked --manifest-path loom/Cargo.toml`.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    task::{Context, Waker},
};

use ::loom::{future::block_on, model::Builder, thread};

use super::*;

/// Counts, and has what is open: whoever uses a connection looks there whether it was closed under them.
#[derive(Debug, Default)]
struct Backend {
    opens: AtomicUsize,
    is_open: [AtomicBool; 4],
    reports: std::sync::Mutex<Vec<Reports>>,
    fails: bool,
}

#[derive(Debug, Clone)]
struct To(Arc<Backend>);

impl Connector<u8> for To {
    type Connection = usize;
    type Error = io::Error;

    async fn open(&self, _: &u8, reports: Reports) -> Result<Opened<usize>, io::Error> {
        let number = self.0.opens.fetch_add(1, Ordering::SeqCst);
        if self.0.fails {
            return Err(io::Error::other("as planned"));
        }
        self.0.is_open[number].store(true, Ordering::SeqCst);
        self.0.reports.lock().expect("no panic").push(reports);
        Ok(Opened { connection: number, capacity: 2 })
    }

    fn close(&self, _: &u8, number: &usize) {
        assert!(self.0.is_open[*number].swap(false, Ordering::SeqCst), "closed twice");
    }
}

type TestPool = Pool<u8, To>;

/// A pool that could have two connections, and keeps what is idle.
fn pool(fails: bool) -> (TestPool, Arc<Backend>) {
    let backend = Arc::new(Backend { fails, ..Backend::default() });
    let limits = Limits {
        max_connections: 2,
        max_waiters: 9,
        idle_timeout: Duration::from_secs(1),
        keeps_unasked: true,
        backoff: Duration::from_hours(1),
        max_backoff: Duration::from_hours(1),
    };
    let config = Config { limits, open_timeout: Duration::MAX, max_wait: Duration::MAX };
    let shared = Shared::new(config, To(Arc::clone(&backend)), Arc::default(), Tasks);
    (Pool { shared }, backend)
}

/// One acquire and one release, with a look at the connection as somebody would have who uses it.
fn use_one(pool: &TestPool, backend: &Backend) {
    let lease = block_on(pool.acquire(&1)).expect("a lease");
    assert!(backend.is_open[*lease].load(Ordering::SeqCst), "closed in use");
    // Others have their turn while it is held.
    thread::yield_now();
    assert!(backend.is_open[*lease].load(Ordering::SeqCst) || lease.is_closed(), "closed in use");
}

/// Everything that is armed fires, as it would after a long time.
fn fire_all(pool: &TestPool) {
    pool.shared.fire(Instant::now() + Duration::from_hours(9));
}

/// Nobody uses it: what is there goes with its timers, and nothing is left.
fn end(pool: &TestPool, backend: &Backend) {
    while pool.stats().census().keys > 0 {
        fire_all(pool);
        thread::yield_now();
    }
    assert_eq!(pool.stats().census(), stats::Census::default());
    assert_eq!(pool.stats().violations(), 0);
    assert!(backend.is_open.iter().all(|open| !open.load(Ordering::SeqCst)), "left open");
    // They hold nothing of the pool, but say something to it when they go.
    drop(std::mem::take(&mut *backend.reports.lock().expect("no panic")));
}

impl TestPool {
    fn stats(&self) -> &Stats {
        &self.shared.stats
    }
}

/// All orders in which a thread is stopped in favour of another at most three times, where it need not wait: all orders of
/// more would take days, and mistakes of this kind show with two or three.
fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// Two come to a cold key: there is one open, and both get what it opened.
#[test]
fn two_callers_open_once() {
    model(|| {
        let (pool, backend) = pool(false);
        let other = {
            let (pool, backend) = (pool.clone(), Arc::clone(&backend));
            thread::spawn(move || use_one(&pool, &backend))
        };
        use_one(&pool, &backend);
        other.join().expect("no panic");
        assert_eq!(backend.opens.load(Ordering::SeqCst), 1);
        end(&pool, &backend);
    });
}

/// The last lease goes and arms the timer, somebody comes again, and timers fire whenever they like, in time or too late:
/// nobody's connection is closed under them, and none is left open.
#[test]
fn a_timer_never_closes_what_is_used() {
    model(|| {
        let (pool, backend) = pool(false);
        let lease = block_on(pool.acquire(&1)).expect("a lease");
        let user = {
            let (pool, backend) = (pool.clone(), Arc::clone(&backend));
            thread::spawn(move || use_one(&pool, &backend))
        };
        let clock = {
            let pool = pool.clone();
            thread::spawn(move || fire_all(&pool))
        };
        drop(lease);
        user.join().expect("no panic");
        clock.join().expect("no panic");
        end(&pool, &backend);
    });
}

/// Somebody leaves while what they waited for is opened and sent to them: it is given back, whichever comes first.
#[test]
fn a_grant_that_meets_a_cancel_is_given_back() {
    model(|| {
        let (pool, backend) = pool(false);
        let mut asked = Box::pin(pool.acquire(&1));
        let answer = asked.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        thread::yield_now();
        drop((asked, answer));
        while pool.stats().census().connections[0] > 0 {
            thread::yield_now();
        }
        end(&pool, &backend);
    });
}

/// The peer goes while one lease is given back and another is asked for: who has one on what is gone sees it, and nobody is
/// left waiting.
#[test]
fn the_peer_goes_at_any_time() {
    model(|| {
        let (pool, backend) = pool(false);
        let lease = block_on(pool.acquire(&1)).expect("a lease");
        let peer = {
            let backend = Arc::clone(&backend);
            thread::spawn(move || {
                let reports = backend.reports.lock().expect("no panic").remove(0);
                backend.is_open[0].store(false, Ordering::SeqCst);
                drop(reports);
            })
        };
        drop(lease);
        let lease = block_on(pool.acquire(&1)).expect("a lease");
        peer.join().expect("no panic");
        assert!(backend.is_open[*lease].load(Ordering::SeqCst) || lease.is_closed());
        drop(lease);
        end(&pool, &backend);
    });
}

/// Two wait for an open that fails: both are told so, and nothing is opened for them again.
#[test]
fn a_failure_is_told_to_all() {
    model(|| {
        let (pool, backend) = pool(true);
        let ask = |pool: &TestPool| assert!(matches!(block_on(pool.acquire(&1)), Err(AcquireError::Open(_))));
        let other = {
            let pool = pool.clone();
            thread::spawn(move || ask(&pool))
        };
        ask(&pool);
        other.join().expect("no panic");
        assert_eq!(backend.opens.load(Ordering::SeqCst), 1);
        end(&pool, &backend);
    });
}

/// A pool is closed while somebody asks and its first connection is opened: all are answered, and it comes to its end.
#[test]
fn a_pool_is_closed_at_any_time() {
    model(|| {
        let (pool, backend) = pool(false);
        let user = {
            let (pool, backend) = (pool.clone(), Arc::clone(&backend));
            thread::spawn(move || match block_on(pool.acquire(&1)) {
                Ok(lease) => assert!(backend.is_open[*lease].load(Ordering::SeqCst), "closed in use"),
                Err(error) => assert!(matches!(error, AcquireError::Closing), "{error}"),
            })
        };
        pool.close();
        user.join().expect("no panic");
        block_on(pool.closed());
        end(&pool, &backend);
    });
}
