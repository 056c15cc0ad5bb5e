//! Large payloads, which go from socket to socket through a pipe: nothing is lost, changed or put in between, whoever is slow and whoever
//! dies, and no pipe is left.

use crate::harness::{
    DEADLINE, Gate, Peer, Scene, backend,
    lab::Running,
    scene::Dial,
    transcript::End,
    ws::{BINARY, CONTINUATION, Frame, PING, PONG},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

/// A payload that is as no other one is.
fn payload(seed: u64, size: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..size).map(|_| random.random()).collect()
}

/// A client that reads next to nothing until it wants to.
const SLOW: Dial = Dial { recv_buffer: Some(4096), to: None, is_plain: false, before: b"", name: None };

/// What the proxy has of pipes: their ends are descriptors, and the kernel says what is in them.
struct Pipes<'a> {
    t: &'a Scene,
    /// Those of its output.
    others: BTreeSet<PathBuf>,
}

impl<'a> Pipes<'a> {
    fn new(t: &'a Scene) -> Self {
        let others = ends(t).into_iter().map(|(_, pipe)| pipe).collect();
        Self { t, others }
    }

    fn own(&self) -> Vec<(PathBuf, PathBuf)> {
        ends(self.t).into_iter().filter(|(_, pipe)| !self.others.contains(pipe)).collect()
    }

    /// How many there are.
    fn count(&self) -> usize {
        self.own().into_iter().map(|(_, pipe)| pipe).collect::<BTreeSet<_>>().len()
    }

    /// Bytes that are in them.
    fn bytes(&self) -> u64 {
        let mut seen = BTreeSet::new();
        let ends = self.own().into_iter().filter(|(_, pipe)| seen.insert(pipe.clone()));
        // One that is closed meanwhile has none.
        ends.filter_map(|(end, _)| {
            let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
            let end = OpenOptions::new().read(true).custom_flags(nonblocking.cast_signed()).open(end).ok()?;
            rustix::io::ioctl_fionread(end).ok()
        })
        .sum()
    }

    /// Waits until something is in one of them, or nothing in any.
    #[track_caller]
    fn until(&self, are_used: bool) {
        let begun = Instant::now();
        while (self.bytes() > 0) != are_used {
            assert!(begun.elapsed() < DEADLINE, "{} bytes in {} pipes", self.bytes(), self.count());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// All ends of pipes that the proxy has, and which pipe it is.
fn ends(t: &Scene) -> Vec<(PathBuf, PathBuf)> {
    let all = fs::read_dir(format!("/proc/{}/fd", t.proxy().pid())).expect("our own child");
    let links = all.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let ends = links.filter_map(|path| fs::read_link(&path).ok().map(|pipe| (path, pipe)));
    ends.filter(|(_, pipe)| pipe.to_string_lossy().starts_with("pipe:")).collect()
}

/// Frames of a few bytes to half a megabyte in messages, with Pings between them.
fn frames(seed: u64, count: usize) -> Vec<Frame> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut in_message = false;
    let frames = (0..count).map(|number| {
        if random.random_ratio(1, 4) {
            return Frame::new(PING, payload(number as u64, random.random_range(0..=125)));
        }
        let size = match random.random_range(0..4) {
            0 => random.random_range(0..200),
            1 => random.random_range(15_000..18_000),
            2 => random.random_range(60_000..140_000),
            _ => random.random_range(140_000..500_000),
        };
        let fin = random.random() || number + 1 == count;
        let opcode = if std::mem::replace(&mut in_message, !fin) { CONTINUATION } else { BINARY };
        Frame::new(opcode, payload(number as u64, size)).fin(fin)
    });
    frames.collect()
}

/// Whatever a client sends it gets back from a backend that echoes each frame, in both directions byte for byte: by pipes, as many bytes as are worth it
/// or any, without them, and where there is none since the process has no descriptors left.
#[test]
fn large_frames_arrive_as_they_were_sent() {
    for (settings, is_short) in [("1KiB", false), ("64KiB", false), ("0", false), ("1KiB", true)] {
        let t = Scene::new(&format!("websocket.splice_from = '{settings}'")).start();
        let pipes = Pipes::new(&t);
        let sent = frames(t.seed(), 40);
        let received = t.client(async |c| {
            c.handshake("/").await;
            if is_short {
                t.proxy().limit_descriptors(t.proxy().descriptors() as u64);
            }
            let bytes: Vec<u8> = sent.iter().flat_map(|frame| c.frame_bytes(frame)).collect();
            assert!(c.pump(&bytes).await);
            let mut received = Vec::new();
            for _ in &sent {
                received.push(c.read_frame().await);
            }
            c.send_close(1000, "").await;
            c.until_end().await.assert_closed_with(1000);
            received
        });
        for (sent, received) in sent.iter().zip(received) {
            let opcode = if sent.opcode == PING { PONG } else { sent.opcode };
            assert_eq!((opcode, sent.fin), (received.opcode, received.fin));
            assert!(sent.payload == received.payload, "another payload of {} bytes", sent.payload.len());
        }
        if is_short {
            t.proxy().log_where("that there is no pipe", |line| {
                line["message"].as_str().is_some_and(|message| message.starts_with("no pipe can be opened"))
            });
        }
        assert_eq!(pipes.count() > 0, settings != "0" && !is_short);
        assert_eq!(pipes.bytes(), 0);
        t.no_rst();
    }
}

/// A client that is slow gets a large frame whole, and the Close behind it in its turn. Method: it reads nothing until a pipe is in use.
#[test]
fn a_slow_reader_gets_all_of_it() {
    let sent = payload(1, 1 << 20);
    let frame = Frame::binary(&sent);
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        c.send(&frame).await;
        c.send_close(1000, "").await;
        c.read_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    let pipes = Pipes::new(&t);
    let seen = t.client_with(SLOW, async |c| {
        c.handshake("/").await;
        pipes.until(true);
        for _ in 0..100 {
            c.sip(1000).await;
        }
        let received = c.read_frame().await;
        c.read_close().await;
        c.answer_close().await;
        assert!(received.payload == sent);
        c.until_end().await
    });
    seen.assert_closed_with(1000);
    pipes.until(false);
    t.no_rst();
}

/// A side that dies inside a large frame: the other one gets all that it sent, also what is still in a pipe, and then FIN. Method: who gets it reads nothing
/// until the other one is gone.
#[test]
fn what_is_in_a_pipe_is_delivered_before_the_end() {
    const SENT: usize = 400_000;
    let frame = Frame::binary(payload(2, 1 << 20));
    let gone = Gate::new("the backend has gone");
    let (bytes, has_gone) = (frame.bytes(None), gone.clone());
    let expected = bytes[10..SENT].to_vec();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        c.send_bytes(&bytes[..SENT]).await;
        c.fin().await;
        has_gone.open();
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    let pipes = Pipes::new(&t);
    let seen = t.client_with(SLOW, async |c| {
        c.handshake("/").await;
        pipes.until(true);
        // The rest of what was sent goes only as far as somebody reads.
        let mut is_gone = false;
        while !is_gone {
            c.sip(4096).await;
            is_gone = tokio::time::timeout(Duration::from_millis(1), gone.passed()).await.is_ok();
        }
        c.until_end().await
    });
    assert_eq!((seen.closes(), seen.end), (vec![], End::Fin), "{seen:?}");
    assert!(seen.leftover[10..] == expected, "{} bytes of {SENT}", seen.leftover.len());
    let cut = "tidegate_abnormal_closes_total{cause=\"cut_inside_frame\"}";
    t.proxy().metrics_when("a frame that was cut", |m| m.count(cut) == 1);
    assert_eq!(pipes.bytes(), 0);
    t.no_rst();

    // The same for a client.
    let open = Gate::new("the client has gone");
    let t =
        Scene::new("close.delay = '0ms'").backend(backend::zero_window(open.clone())).backend_recv_buffer(4096).start();
    let pipes = Pipes::new(&t);
    let bytes = t.client(async |c| {
        c.handshake("/").await;
        let bytes = c.frame_bytes(&frame);
        // So much is taken without the backend.
        c.send_bytes(&bytes[..200_000]).await;
        c.fin().await;
        pipes.until(true);
        open.open();
        c.until_end().await;
        bytes
    });
    let seen = t.connection(0).seen();
    assert_eq!((seen.closes(), seen.end), (vec![], End::Fin), "{seen:?}");
    assert!(seen.leftover == bytes[..200_000], "{} bytes of 200000", seen.leftover.len());
    assert_eq!(pipes.bytes(), 0);
    t.no_rst();
}

/// Clients that die while their pipes are full, by a RST or since they take nothing for `write_timeout`: the pipes go with them, and the backend is told.
#[test]
fn a_pipe_goes_with_its_reader() {
    const COUNT: usize = 40;
    let frame = Frame::binary(payload(3, 1 << 20));
    for is_reset in [true, false] {
        let (frame, all) = (frame.clone(), Gate::new("all pipes are full"));
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            c.pump(&frame.bytes(None)).await;
            c.until_end().await;
        };
        let timeout = if is_reset { "30s" } else { "300ms" };
        let t =
            Scene::new(&format!("close.delay = '0ms'\nwebsocket.write_timeout = '{timeout}'")).backend(script).start();
        let pipes = Pipes::new(&t);
        let before = t.proxy().descriptors();
        let clients: Vec<_> = (0..COUNT)
            .map(|_| {
                let all = all.clone();
                t.start_client(async move |c| {
                    c.set_recv_buffer(4096);
                    c.handshake("/").await;
                    all.passed().await;
                    if is_reset {
                        c.rst();
                    }
                    // Else what its kernel has, and then FIN.
                    c.until_end().await.end
                })
            })
            .collect();
        if is_reset {
            pipes.until(true);
            t.proxy().metrics_when("all sessions", |m| m.sum("tidegate_connections_active") > 39.5);
        } else {
            t.proxy().metrics_when("all ends", |m| m.sum("tidegate_closes_total") > 39.5);
        }
        all.open();
        let ends: Vec<_> = clients.into_iter().map(Running::join).collect();
        t.proxy().metrics_when("no session", |m| m.sum("tidegate_connections_active") < 0.5);
        t.settle();
        assert_eq!(pipes.bytes(), 0, "{ends:?}");
        // Those that were full are closed, and no worker has more than 32.
        assert!(pipes.count() <= 64, "{} pipes", pipes.count());
        assert!(t.proxy().descriptors() <= before + 2 * pipes.count(), "{} descriptors", t.proxy().descriptors());
        let cause = if is_reset { "client_reset" } else { "client_stalled" };
        let counter = format!("tidegate_abnormal_closes_total{{cause=\"{cause}\"}}");
        t.proxy().metrics_when("all of them in a counter", |m| m.count(&counter) == COUNT as u64);
    }
}

/// A drain finds a client that is slow, inside a frame whose rest is in a pipe: it gets the frame whole, and its Close behind that.
#[test]
fn a_drain_waits_for_a_pipe() {
    let sent = payload(4, 1 << 20);
    let frame = Frame::binary(&sent);
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        c.send(&frame).await;
        c.read_close().await;
        c.answer_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("drain = { delay = '0s', window = '100ms' }").backend(script).start();
    let pipes = Pipes::new(&t);
    let seen = t.client_with(SLOW, async |c| {
        c.handshake("/").await;
        pipes.until(true);
        t.proxy().sigterm();
        t.proxy().has_logged("the drain", |line| line["message"] == "draining").await;
        let received = c.read_frame().await;
        assert!(received.payload == sent);
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    seen.assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}
