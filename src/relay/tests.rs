//! How long sessions last, and how long the Close of a client is held for its FIN.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::net::Local;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{io::AsyncWriteExt as _, net::UnixStream};

/// What began together ends evenly spread over the jitter: chi-square over 20 parts, p > 0.001.
#[test]
fn lifetimes_are_spread_evenly() {
    const PARTS: u32 = 20;
    const COUNT: u32 = 1000;
    let (max, jitter) = (Duration::from_hours(1), 10);
    let mut random = StdRng::seed_from_u64(4);
    let mut counts = [0_u32; PARTS as usize];
    for _ in 0..COUNT {
        let lifetime = lifetime(max, jitter, random.random());
        assert!(lifetime <= max && lifetime >= max.mul_f64(0.9), "{lifetime:?}");
        let part = max.saturating_sub(lifetime).div_duration_f64(max.mul_f64(0.1));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 20")]
        let part = (part * f64::from(PARTS)) as usize;
        counts[part.min(counts.len() - 1)] += 1;
    }
    let expected = f64::from(COUNT) / f64::from(PARTS);
    let chi_square: f64 = counts.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
    // The 0.999 quantile for 19 degrees of freedom.
    assert!(chi_square < 43.82, "{chi_square}: {counts:?}");
    assert_eq!(lifetime(max, 0, 0.7), max);
    assert_eq!(lifetime(max, 100, 1.0), Duration::ZERO);
}

/// A session between two peers of this process.
struct Scene {
    client: UnixStream,
    backend: UnixStream,
    _relay: tokio::task::JoinHandle<()>,
}

/// A binary message of a client that says "ask", and its Close 1000.
const ASK: &[u8] = &[0x82, 0x83, 0, 0, 0, 0, b'a', b's', b'k'];
const CLOSE: &[u8] = &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8];

impl Scene {
    fn new() -> Self {
        let pair = || UnixStream::pair().expect("a descriptor");
        let ((client, of_client), (backend, of_backend)) = (pair(), pair());
        let settings = crate::config::Settings::default();
        let leg = |stream| Leg { stream: Some(Stream::Unix(stream)), early: Bytes::new() };
        let (config, traffic) = (settings.relay, crate::metrics::Metrics::new().traffic());
        let (drain, delays) = (Drain::new(settings.drain), Arc::default());
        let shared = Arc::new(Shared::new(config, traffic, drain, delays));
        let (of_client, of_backend) = (leg(of_client), leg(of_backend));
        let mut relay = Relay::new(shared, Rsv::None, of_client, of_backend);
        let relay = tokio::task::spawn_local(async move {
            let first = relay.next_ended().await;
            drop((relay.next_ended().await, first));
        });
        Self { client, backend, _relay: relay }
    }

    /// What the backend has by now. The clock stands still as long as somebody has something to do.
    async fn heard(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        for _ in 0..1000 {
            yield_now().await;
            let mut buffer = [0; 64];
            if let Ok(count) = self.backend.try_read(&mut buffer) {
                heard.extend_from_slice(&buffer[..count]);
            }
        }
        heard
    }

    async fn says(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.client.write_all(bytes).await.expect("an open session");
        self.heard().await
    }
}

async fn after(time: Duration) {
    tokio::time::advance(time).await;
}

fn alone<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    tokio::task::LocalSet::new().block_on(&runtime.expect("descriptors"), test)
}

/// A client that asks, and leaves without waiting: its Close is held back for `close.delay`, also when its FIN came a moment later.
#[test]
fn a_fin_may_follow_its_close() {
    alone(async {
        let mut scene = Scene::new();
        assert_eq!(scene.says(ASK).await, ASK);
        assert_eq!(scene.says(CLOSE).await, b"");
        scene.client.shutdown().await.expect("an open socket");
        assert_eq!(scene.heard().await, b"");
        after(Duration::from_millis(90)).await;
        assert_eq!(scene.heard().await, b"");
        after(Duration::from_millis(15)).await;
        assert_eq!(scene.heard().await, CLOSE);
    });
}

/// A client that asks, and waits after its Close: it is passed on after 2 ms.
#[test]
fn a_close_is_held_for_two_milliseconds() {
    alone(async {
        let mut scene = Scene::new();
        assert_eq!(scene.says(ASK).await, ASK);
        assert_eq!(scene.says(CLOSE).await, b"");
        after(APART + TICK).await;
        assert_eq!(scene.heard().await, CLOSE);
    });
}

/// A client that has its answer: it is passed on at once.
#[test]
fn who_has_its_answer_is_not_held() {
    alone(async {
        let mut scene = Scene::new();
        assert_eq!(scene.says(ASK).await, ASK);
        scene.backend.write_all(&[0x82, 1, b'!']).await.expect("an open session");
        assert_eq!(scene.heard().await, b"");
        assert_eq!(scene.says(CLOSE).await, CLOSE);
    });
}

/// A leg within this process, and what it is told to say.
#[derive(Debug, Default)]
struct Said {
    /// What it has to be read, each part or fault once; then nothing, or its end.
    reads: Mutex<VecDeque<Result<Vec<u8>, Fault>>>,
    has_ended: AtomicBool,
    /// What it says to the next bytes that it gets.
    refuses: Mutex<Option<Fault>>,
    got: Mutex<Vec<u8>>,
    waker: Mutex<Option<Waker>>,
}

#[derive(Debug, Clone)]
struct Within(Arc<Said>);

impl Within {
    fn says(&self, what: Result<Vec<u8>, Fault>) {
        self.0.reads.lock().expect("no panic").push_back(what);
        self.wake();
    }

    fn ends(&self) {
        self.0.has_ended.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.0.waker.lock().expect("no panic").take() {
            waker.wake();
        }
    }

    fn got(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.got.lock().expect("no panic"))
    }
}

impl Local for Within {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<std::io::Result<usize>> {
        match self.0.reads.lock().expect("no panic").pop_front() {
            Some(Ok(bytes)) => {
                buffer[..bytes.len()].copy_from_slice(&bytes);
                Poll::Ready(Ok(bytes.len()))
            }
            Some(Err(fault)) => Poll::Ready(Err(fault.into())),
            None if self.0.has_ended.load(Ordering::Relaxed) => Poll::Ready(Ok(0)),
            None => {
                *self.0.waker.lock().expect("no panic") = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn poll_write(&mut self, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        if let Some(fault) = self.0.refuses.lock().expect("no panic").take() {
            return Poll::Ready(Err(fault.into()));
        }
        self.0.got.lock().expect("no panic").extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn finish(&mut self) {}
}

/// A session whose backend's leg ends within this process.
struct Inside {
    client: UnixStream,
    within: Within,
    relay: tokio::task::JoinHandle<Report>,
}

impl Inside {
    fn new() -> Self {
        let (client, of_client) = UnixStream::pair().expect("descriptors");
        let within = Within(Arc::default());
        let settings = crate::config::Settings::default();
        let leg = |stream| Leg { stream: Some(stream), early: Bytes::new() };
        let (config, traffic) = (settings.relay, crate::metrics::Metrics::new().traffic());
        let (drain, delays) = (Drain::new(settings.drain), Arc::default());
        let shared = Arc::new(Shared::new(config, traffic, drain, delays));
        let backend = leg(Stream::Local(Box::new(within.clone())));
        let mut relay = Relay::new(shared, Rsv::None, leg(Stream::Unix(of_client)), backend);
        let relay = tokio::task::spawn_local(async move {
            let first = relay.next_ended().await;
            drop((relay.next_ended().await, first));
            relay.report()
        });
        Self { client, within, relay }
    }

    /// What the client gets, once everybody has had his turn.
    async fn heard(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        for _ in 0..1000 {
            yield_now().await;
            let mut buffer = [0; 256];
            if let Ok(count) = self.client.try_read(&mut buffer) {
                heard.extend_from_slice(&buffer[..count]);
            }
        }
        heard
    }
}

fn close(code: u16, reason: &str) -> Vec<u8> {
    CloseFrame::new(Code::new(code).expect("one that may be sent"), reason).to_frame(None).as_bytes().to_vec()
}

/// What a leg within this process has goes to the client as it is, and its end without a Close is a backend's.
#[test]
fn a_leg_within_this_process_is_a_backend() {
    alone(async {
        let mut scene = Inside::new();
        scene.within.says(Ok(vec![0x81, 2, b'h', b'i']));
        assert_eq!(scene.heard().await, [0x81, 2, b'h', b'i']);
        scene.client.write_all(ASK).await.expect("an open session");
        assert_eq!(scene.heard().await, b"");
        assert_eq!(scene.within.got(), ASK);
        scene.within.ends();
        assert_eq!(scene.heard().await, close(1012, ""));
        scene.client.write_all(CLOSE).await.expect("an open session");
        let report = scene.relay.await.expect("no panic");
        assert_eq!((report.initiator, report.cause), (Initiator::Backend, Cause::Gone(Side::Backend, Gone::Fin)));
    });
}

/// A client that is too slow for it gets 1013 at once, and the leg a Close; what it says after that is not heard.
#[test]
fn a_leg_may_find_its_client_too_slow() {
    alone(async {
        let mut scene = Inside::new();
        scene.within.says(Err(Fault::Slow));
        assert_eq!(scene.heard().await, close(1013, SLOW));
        assert_eq!(scene.within.got().first(), Some(&0x88));
        scene.within.says(Ok(vec![0x88, 0]));
        scene.within.ends();
        scene.client.write_all(CLOSE).await.expect("an open session");
        let report = scene.relay.await.expect("no panic");
        assert_eq!((report.initiator, report.cause), (Initiator::Tidegate, Cause::Slow));
    });
}

/// A client that says what it may not gets the code of that, behind the leg's answer to its Close; also in the middle of a frame
/// that is passed on as it comes.
#[test]
fn a_leg_may_refuse_what_its_client_says() {
    for said in [ASK.to_vec(), [&[0x82, 0xfe, 0x7f, 0xff, 0, 0, 0, 0][..], &[7; 5000]].concat()] {
        alone(async {
            let mut scene = Inside::new();
            *scene.within.0.refuses.lock().expect("no panic") = Some(Fault::Broke(Violation::Uninvited));
            scene.client.write_all(&said).await.expect("an open session");
            assert_eq!(scene.heard().await, b"");
            assert_eq!(scene.within.got().first(), Some(&0x88));
            scene.within.says(Ok(vec![0x81, 2, b'h', b'i', 0x88, 0]));
            scene.within.ends();
            let expected = [&[0x81, 2, b'h', b'i'][..], &close(1008, Violation::Uninvited.as_str())].concat();
            assert_eq!(scene.heard().await, expected);
            let report = scene.relay.await.expect("no panic");
            assert_eq!(report.cause, Cause::Gone(Side::Client, Gone::Broke(Violation::Uninvited)));
        });
    }
}

/// What its client says that it may not comes first, also when a Close is right behind it: that is how the session ended.
#[test]
fn what_is_refused_comes_before_a_close() {
    alone(async {
        let mut scene = Inside::new();
        *scene.within.0.refuses.lock().expect("no panic") = Some(Fault::Broke(Violation::Uninvited));
        scene.client.write_all(&[ASK, CLOSE].concat()).await.expect("an open session");
        assert_eq!(scene.heard().await, b"");
        scene.within.says(Ok(vec![0x88, 0]));
        scene.within.ends();
        assert_eq!(scene.heard().await, close(1008, Violation::Uninvited.as_str()));
        let report = scene.relay.await.expect("no panic");
        assert_eq!(report.cause, Cause::Gone(Side::Client, Gone::Broke(Violation::Uninvited)));
        assert_eq!((report.initiator, report.code), (Initiator::Tidegate, Some(1008)));
    });
}

/// Nobody is asked whether he is there who is a part of this process; the client still is.
#[test]
fn no_pings_go_to_a_leg_within_this_process() {
    alone(async {
        let mut scene = Inside::new();
        assert_eq!(scene.heard().await, b"");
        after(Duration::from_secs(26)).await;
        assert_eq!(scene.heard().await.first(), Some(&0x89));
        assert_eq!(scene.within.got(), b"");
    });
}
