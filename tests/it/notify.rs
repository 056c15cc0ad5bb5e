//! What a service manager is told again and again: what the process is doing, that it is alive, and that its end takes longer.
//! Who serves: `restart::the_service_manager_knows_who_serves`.

use crate::harness::{
    DEADLINE, Side,
    crowd::{self, Member, Stage},
    left_out,
    proxy::Surroundings,
    visit,
    ws::{Frame, PING, SeenFrame},
};
use std::{
    os::unix::net::{SocketAddr as UnixAddress, UnixDatagram},
    time::Duration,
};
use tempfile::TempDir;

/// By which a worker is made to stand still.
const FAULT: &str = "stand still, please";

/// A service manager, as far as it is told something.
struct Manager {
    socket: UnixDatagram,
    folder: TempDir,
}

impl Manager {
    fn new(stage: &Stage) -> Self {
        let folder = tempfile::tempdir().expect("a folder for a socket");
        let address = UnixAddress::from_pathname(folder.path().join("notify")).expect("a short path");
        let socket = stage.lab().place(Side::Proxy).run(|| UnixDatagram::bind_addr(&address)).expect("a new name");
        socket.set_read_timeout(Some(DEADLINE)).expect("a socket");
        Self { socket, folder }
    }

    fn place(&self) -> String {
        self.folder.path().join("notify").to_str().expect("UTF-8").to_owned()
    }

    #[track_caller]
    fn told(&self) -> String {
        let mut bytes = [0; 512];
        let count = self.socket.recv(&mut bytes).expect("a word in time");
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    /// Waits for a word with this line; gives all that came before it, and itself.
    #[track_caller]
    fn until(&self, line: &str) -> Vec<String> {
        let mut words = Vec::new();
        loop {
            let word = self.told();
            let is_it = word.lines().any(|found| found.starts_with(line));
            words.push(word);
            if is_it {
                return words;
            }
            assert!(words.len() < 1000, "{line:?} is never told: {words:?}");
        }
    }
}

/// One session, then a drain with a signal: the status follows, each phase at once, and the time for the end is extended as long
/// as the end lasts. Without `WATCHDOG_USEC` nothing is said of a watchdog.
#[test]
fn the_status_follows_what_is_done() {
    let stage = Stage::new();
    let manager = Manager::new(&stage);
    let backend = stage.backend(crowd::anything);
    let surroundings = Surroundings { notify: Some(manager.place()), ..Surroundings::default() };
    let t = stage.tidegate_in(surroundings, "drain = { delay = '30s', window = '0s' }", backend.address);
    let mut words = manager.until("STATUS=");
    assert_eq!(words[0], format!("READY=1\nMAINPID={}\n", t.pid()));
    assert_eq!(words[1], format!("STATUS=serving on {}, sessions: 0\n", t.address));
    let rest = stage.clients(async || {
        let mut member = Member::connect(t.address).await;
        member.handshake().await;
        visit::echo(&mut member, "hello").await.expect("it is served");
        words.extend(manager.until(&format!("STATUS=serving on {}, sessions: 1", t.address)));
        t.sigterm();
        words.extend(manager.until("STATUS=draining, still accepting on "));
        let stopping = words.iter().position(|word| word == "STOPPING=1\nEXTEND_TIMEOUT_USEC=20000000\n");
        assert!(stopping.is_some_and(|at| at + 2 == words.len()), "before the phase that it begins: {words:?}");
        for _ in 0..2 {
            words.extend(manager.until("EXTEND_TIMEOUT_USEC=20000000"));
        }
        t.sigterm();
        words.extend(manager.until("STATUS=draining, sessions left: 1"));
        member.rest().await
    });
    assert_eq!(rest.closes.iter().map(SeenFrame::code).collect::<Vec<_>>(), [1001]);
    assert!(words.iter().all(|word| !word.contains("WATCHDOG")), "{words:?}");
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
}

/// The watchdog is told that all is well as long as each worker comes to its turn. One of two is made to stand still: from then on
/// it is told nothing of the kind, though the main thread and the other worker go on.
#[test]
fn a_worker_that_stands_still_stops_the_watchdog() {
    if !cfg!(debug_assertions) {
        left_out("a worker that stands still", "a release build can't be made to");
        return;
    }
    let stage = Stage::new();
    let manager = Manager::new(&stage);
    let backend = stage.backend(crowd::anything);
    let surroundings = Surroundings {
        notify: Some(manager.place()),
        // A quarter of it is how often it is looked, and no worker of a slow machine may be without a turn for so long.
        watchdog: Some(Duration::from_secs(8)),
        stuck: Some(FAULT),
        ..Surroundings::default()
    };
    let t = stage.tidegate_in(surroundings, "listen.workers = 2", backend.address);
    for _ in 0..2 {
        manager.until("WATCHDOG=1");
    }
    let session = stage.clients(async || {
        let mut member = Member::connect(t.address).await;
        member.handshake().await;
        member.send(&Frame::new(PING, FAULT)).await.expect("it is served");
        member
    });
    let line = t.log_where("the worker", |line| {
        line["message"].as_str().is_some_and(|message| message.starts_with("workers do not come to their turn"))
    });
    assert!(["[0]", "[1]"].contains(&line["workers"].as_str().unwrap_or_default()), "{line}");
    // All that was sent before comes before this; behind it, what the looks come to is told together with the extension.
    t.sigterm();
    manager.until("STOPPING=1");
    for _ in 0..3 {
        let words = manager.until("EXTEND_TIMEOUT_USEC=");
        assert!(words.iter().all(|word| !word.contains("WATCHDOG")), "{words:?}");
    }
    t.sigkill();
    drop(session);
}
