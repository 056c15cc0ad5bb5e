//! How long sessions last, and how long the Close of a client is held for its FIN.

use super::*;
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
        let (config, traffic) = (Arc::new(settings.relay), crate::metrics::Metrics::new().traffic());
        let (drain, delays) = (Drain::new(settings.drain), Arc::default());
        let (of_client, of_backend) = (leg(of_client), leg(of_backend));
        let mut relay = Relay::new(config, traffic, drain, delays, Rsv::None, of_client, of_backend);
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
