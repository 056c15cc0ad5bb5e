//! When the backend is not there: what becomes of clients and of what they asked, how it is looked for, and when that is given up.

use bytes::Bytes;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{
    super::{
        super::{
            End,
            line::Fault,
            roll::given_up,
            search::{STEADY, Search},
        },
        core::Client,
    },
    Open, Server,
};
use crate::{
    metrics::{Gap, Reconnect},
    pool::{AcquireError, OpenError},
    sparse::Sparse,
    ws::{CloseFrame, Code},
};

/// WebSockets in a row that the backend ends because of a message, each after one of the same client's.
const OFFENCES: u32 = 3;

impl Server {
    /// The backend has ended the WebSocket, by a Close that is for all, or otherwise.
    pub(super) fn lose(&mut self, close: Option<Bytes>) {
        static SAID: Sparse = Sparse::new();
        let Some(Open { line, endpoint, since, speakers, .. }) = self.open.take() else { return };
        let (how, is_over_message) = (line.how(), line.is_over_message());
        // The backend's Close is owed an answer.
        self.home.tracker.spawn(line.end(Code::NORMAL));
        let is_used = self.is_needed();
        if since.elapsed() >= STEADY {
            self.before = None;
        }
        self.lease = None;
        self.acquiring = None;
        let (route, key, clients) = (&self.callers.route, &self.key, self.clients.len());
        // Nobody wants anything of it: the next request opens another one.
        if !is_used {
            debug!(%route, %key, %endpoint, how, "a shared WebSocket is closed by the backend, and nobody uses it");
            self.core.closed_unused();
            self.blame(speakers.only().filter(|_| is_over_message));
            // One that does so again and again is not asked at once.
            let grace = self.callers.sharing.reconnect_grace;
            self.before = Some(match self.before.take() {
                Some(before) => {
                    let mut search = before.later(grace);
                    self.sleep = search.next().map(|wait| Box::pin(sleep(wait)));
                    search
                }
                None => Search::new(grace),
            });
            return;
        }
        self.told.metrics.gap(Gap::Lost);
        self.hub.known.gap();
        if let Some(unsaid) = SAID.is_due() {
            warn!(%route, %key, %endpoint, how, clients, unsaid, "the backend of a shared WebSocket is lost: what was asked is not answered");
        }
        self.forget_all();
        self.blame(speakers.only().filter(|_| is_over_message));
        match close {
            Some(frame) => self.finish_all(&End::Close(frame)),
            None if self.clients.is_empty() => {}
            None => {
                let grace = self.callers.sharing.reconnect_grace;
                self.search = self.before.take().map(|before| {
                    // One client must not use up what there is for all.
                    if is_over_message { before.later(grace) } else { before.again() }
                });
                if !self.wait() {
                    self.give_up(Reconnect::Expired);
                }
            }
        }
    }

    /// Ends a client who alone has spoken on each of several WebSockets in a row that the backend ended because of a message.
    fn blame(&mut self, speaker: Option<Client>) {
        static SAID: Sparse = Sparse::new();
        self.blamed = speaker.map(|speaker| match self.blamed {
            Some((client, times)) if client == speaker => (client, times + 1),
            _ => (speaker, 1),
        });
        let Some((client, _)) = self.blamed.take_if(|(_, times)| *times >= OFFENCES) else { return };
        let Some(mailbox) = self.clients.get(&client) else { return };
        if let Some(unsaid) = SAID.is_due() {
            let (route, key) = (&self.callers.route, &self.key);
            warn!(%route, %key, unsaid, "a client is ended: the backend ends its WebSocket each time because of what that client says");
        }
        let frame = CloseFrame::new(Code::POLICY, "").to_frame(None);
        mailbox.finish(End::Close(Bytes::copy_from_slice(frame.as_bytes())));
    }

    /// What was asked gets no answer, and nothing is asked again.
    pub(super) fn forget_all(&mut self) {
        let mut actions = Vec::new();
        self.core.backend_lost(Instant::now().into_std(), &mut actions);
        self.actions.extend(actions);
        // Before anybody is ended.
        self.carry_on(usize::MAX);
        self.unsent.clear();
        self.unsent_bytes = 0;
        self.fit_unsent();
    }

    pub(super) fn finish_all(&self, end: &End) {
        self.clients.values().for_each(|mailbox| mailbox.finish(end.clone()));
    }

    /// The search goes on after a pause. Whether there is still grace.
    fn wait(&mut self) -> bool {
        let grace = self.callers.sharing.reconnect_grace;
        let wait = self.search.get_or_insert_with(|| Search::new(grace)).next();
        self.sleep = wait.map(|wait| Box::pin(sleep(wait)));
        wait.is_some()
    }

    /// The backend is there.
    pub(super) fn find(&mut self) {
        static FOUND: Sparse = Sparse::new();
        let (Some(search), Some(open)) = (self.search.take(), &self.open) else { return };
        self.told.metrics.reconnect(Reconnect::Connected);
        self.error.clear();
        self.hub.known.is_found_at(&open.endpoint);
        let (route, key, endpoint, lost_ms) = (&self.callers.route, &self.key, &open.endpoint, search.lost_ms());
        if let Some(unsaid) = FOUND.is_due() {
            info!(%route, %key, %endpoint, lost_ms, unsaid, "a shared WebSocket is open again");
        }
        self.before = Some(search);
    }

    /// The backend is not there. It is looked for as long as there are clients, and grace.
    pub(super) fn miss(&mut self, error: &AcquireError<Fault>) {
        let is_closing = matches!(error, AcquireError::Closing | AcquireError::Open(OpenError::Aborted));
        let is_final = match error {
            AcquireError::Open(OpenError::Failed(fault)) => {
                matches!(&**fault, Fault::Refused(refused) if refused.is_final())
            }
            _ => false,
        };
        debug!(route = %self.callers.route, key = %self.key, %error, "the backend of a shared WebSocket is not there");
        self.error = error.to_string();
        if is_closing || self.clients.is_empty() {
            // Its clients are ended by the drain, each in its turn.
            self.told.metrics.reconnect(Reconnect::Unused);
            self.search = None;
            self.error.clear();
            return self.forget_all();
        }
        let has_grace = self.wait();
        if is_final {
            self.give_up(Reconnect::Refused);
        } else if !has_grace {
            self.give_up(Reconnect::Expired);
        }
    }

    /// There is no backend for those who are here.
    pub(super) fn give_up(&mut self, result: Reconnect) {
        static GIVEN_UP: Sparse = Sparse::new();
        self.told.metrics.reconnect(result);
        self.hub.known.give_up(given_up(result));
        let (route, key, why) = (&self.callers.route, &self.key, result.as_str());
        let lost_ms = self.search.take().map_or(0, |search| search.lost_ms());
        let error = std::mem::take(&mut self.error);
        if let Some(unsaid) = GIVEN_UP.is_due() {
            let clients = self.clients.len();
            warn!(%route, %key, clients, lost_ms, why, error, unsaid, "a shared WebSocket is given up: its clients get their end");
        }
        self.forget_all();
        self.finish_all(&End::Lost);
    }
}
