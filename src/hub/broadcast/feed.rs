//! The task behind a hub: what comes of the backend goes into the ring, and when the backend is lost it is looked for again.

use std::{
    future::{Future as _, poll_fn},
    pin::pin,
    sync::{Arc, PoisonError},
    task::Poll,
};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info, warn};

use super::{
    super::{
        Opener,
        key::Key,
        line::{Fault, Heard, Line, Lines, OTHER_PROTOCOL, for_all, for_all_who_speak},
        roll::{State, given_up},
    },
    Hub,
    delay::Delay,
};
use crate::{
    hub::{
        End,
        encode::encode,
        search::{STEADY, Search},
    },
    metrics::{Gap, Reconnect},
    pool::Reports,
    sparse::Sparse,
    upstream::Home,
    ws::Code,
};

/// Messages, and bytes of them, that are taken before clients are woken, and others have their turn.
const BATCH: (usize, usize) = (256, 256 << 10);

/// See the module.
pub(super) struct Feed {
    hub: Arc<Hub>,
    lines: Lines,
    route: Arc<str>,
    key: Key,
    home: Home,
}

/// Why a line is not served any longer.
enum Over {
    /// Nobody needs it.
    Asked,
    /// The backend's Close, for all.
    Close(Bytes),
    /// It may come back.
    Lost,
}

impl Feed {
    pub(super) fn new(hub: &Arc<Hub>, opener: &Opener, key: &Key, home: &Home) -> Self {
        Self {
            hub: Arc::clone(hub),
            lines: opener.lines.clone(),
            route: Arc::clone(&opener.route),
            key: key.clone(),
            home: home.clone(),
        }
    }

    /// Serves until nobody needs it, or the backend has ended for good. `reports` are dropped as soon as it is of no use to those who come.
    pub(super) async fn run(self, mut line: Line, reports: Reports) {
        let Self { hub, route, key, home, .. } = &self;
        debug!(%route, %key, endpoint = %line.endpoint, "a shared WebSocket is open");
        let mut before: Option<Search> = None;
        loop {
            let since = Instant::now();
            let over = self.serve(&mut line).await;
            let (endpoint, how) = (Arc::clone(&line.endpoint), line.how());
            let is_over_message = line.is_over_message();
            match over {
                Over::Asked => {
                    let code = if home.drain.has_begun() { Code::GOING_AWAY } else { Code::NORMAL };
                    line.end(code).await;
                    debug!(%route, %key, %endpoint, "a shared WebSocket is closed: nobody uses it");
                    return;
                }
                Over::Close(frame) => {
                    drop(reports);
                    hub.finish(End::Close(frame));
                    line.end(Code::NORMAL).await;
                    debug!(%route, %key, %endpoint, how, "a shared WebSocket is closed by the backend");
                    return;
                }
                Over::Lost => {
                    // The backend's Close is owed an answer.
                    home.spawn(line.end(Code::NORMAL));
                }
            }
            if since.elapsed() >= STEADY {
                before = None;
            }
            let grace = hub.sharing.reconnect_grace;
            let search = match before.take() {
                None => Search::new(grace),
                // One client must not use up what there is for all.
                Some(before) if is_over_message => before.later(grace),
                Some(before) => before.again(),
            };
            let Some((found, search)) = self.reconnect(&endpoint, &how, search).await else { return };
            (line, before) = (found, Some(search));
        }
    }

    /// Passes on what comes, in both directions.
    async fn serve(&self, line: &mut Line) -> Over {
        let hub = &self.hub;
        let judge = if hub.inbound.is_some() { for_all_who_speak } else { for_all };
        let mut asked = pin!(hub.end.cancelled());
        let mut delay = Delay::new(hub.sharing.batch_delay);
        // For the message that goes out.
        let mut memory = None;
        poll_fn(|cx| {
            if asked.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Over::Asked);
            }
            if let Some(inbound) = &hub.inbound {
                while line.poll_ready(cx) == Poll::Ready(true) {
                    memory = None;
                    let Poll::Ready(((is_text, payload), its_memory)) = inbound.poll_pop(cx) else { break };
                    memory = its_memory;
                    line.send(is_text, payload);
                }
                line.poll_flush(cx);
            }
            let (mut frames, mut bytes, mut over) = (Vec::new(), 0, None);
            while frames.len() < BATCH.0
                && bytes < BATCH.1
                && over.is_none()
                && let Poll::Ready(heard) = line.poll_heard(cx)
            {
                match heard {
                    Heard::Message(is_text, payload) => {
                        let frame = encode(is_text, &payload, hub.max_frame);
                        bytes += frame.len();
                        frames.push(frame);
                    }
                    Heard::Close(close) => over = Some(judge(close).map_or(Over::Lost, Over::Close)),
                    Heard::Lost => over = Some(Over::Lost),
                }
            }
            let is_full = frames.len() >= BATCH.0 || bytes >= BATCH.1;
            if !frames.is_empty() {
                delay.came(hub.push(frames));
            }
            // The next message may be long in coming. With a Close of the backend's all goes out anyway.
            let is_lost = matches!(over, Some(Over::Lost));
            if (is_lost && delay.stop()) || delay.poll(cx).is_ready() {
                hub.go_out();
            }
            if let Some(over) = over {
                return Poll::Ready(over);
            }
            if is_full {
                // Behind those who have just been woken.
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await
    }

    /// Looks for the backend as long as somebody waits for it. What was said meanwhile is lost. `how`: it ended.
    async fn reconnect(&self, endpoint: &str, how: &str, mut search: Search) -> Option<(Line, Search)> {
        static SAID: Sparse = Sparse::new();
        static GIVEN_UP: Sparse = Sparse::new();
        static FOUND: Sparse = Sparse::new();
        let Self { hub, lines, route, key, home, .. } = self;
        if hub.is_alone() {
            hub.metrics.reconnect(Reconnect::Unused);
            return None;
        }
        hub.metrics.gap(Gap::Lost);
        hub.known.gap();
        hub.known.is(State::Searching);
        let clients = hub.known.clients.load(std::sync::atomic::Ordering::Relaxed);
        if let Some(unsaid) = SAID.is_due() {
            warn!(%route, %key, endpoint, how, clients, unsaid, "the backend of a shared WebSocket is lost: its clients wait");
        }
        let mut asked = pin!(hub.end.cancelled());
        let mut error = String::new();
        let result = loop {
            let Some(wait) = search.next() else { break Err(Reconnect::Expired) };
            let open = async {
                sleep(wait).await;
                timeout_at(search.until(), lines.open(key.request(), home)).await
            };
            let opened = tokio::select! {
                biased;
                () = &mut asked => break Err(Reconnect::Unused),
                opened = open => opened,
            };
            match opened {
                Err(_) => break Err(Reconnect::Expired),
                Ok(Ok(line)) if line.protocol == hub.protocol => break Ok(line),
                Ok(Ok(line)) => {
                    // Its clients were told another subprotocol.
                    home.spawn(line.end(Code::GOING_AWAY));
                    OTHER_PROTOCOL.clone_into(&mut error);
                    break Err(Reconnect::Refused);
                }
                Ok(Err(fault)) => {
                    error = fault.to_string();
                    debug!(%route, %key, error, "the backend of a shared WebSocket is not back");
                    if matches!(&fault, Fault::Refused(refused) if refused.is_final()) {
                        break Err(Reconnect::Refused);
                    }
                }
            }
            if hub.is_alone() {
                break Err(Reconnect::Unused);
            }
        };
        let lost_ms = search.lost_ms();
        match result {
            Ok(line) => {
                hub.metrics.reconnect(Reconnect::Connected);
                hub.known.is_found_at(&line.endpoint);
                *hub.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&line.endpoint);
                if let Some(unsaid) = FOUND.is_due() {
                    info!(%route, %key, endpoint = %line.endpoint, lost_ms, unsaid, "a shared WebSocket is open again");
                }
                Some((line, search))
            }
            Err(result) => {
                hub.metrics.reconnect(result);
                hub.known.give_up(given_up(result));
                let why = result.as_str();
                if matches!(result, Reconnect::Unused) {
                    debug!(%route, %key, endpoint, how, lost_ms, why, error, "a shared WebSocket is given up");
                } else if let Some(unsaid) = GIVEN_UP.is_due() {
                    warn!(%route, %key, endpoint, how, clients, lost_ms, why, error, unsaid, "a shared WebSocket is given up: its clients get their end");
                }
                None
            }
        }
    }
}

impl Drop for Feed {
    /// Whatever came of it, a panic too, its clients hear of it.
    fn drop(&mut self) {
        self.hub.finish(End::Lost);
    }
}
