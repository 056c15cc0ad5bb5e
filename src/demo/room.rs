//! The room of `/broadcast`: what one says all hear, in one order, and nobody waits for a slow listener.
//!
//! No sockets here: a watcher is a bounded queue and a token that says "you are too slow".

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::MissedTickBehavior;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

/// Everybody who watches.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Held for one pass over the watchers, never across an await: it makes the order of messages the same for all.
    watchers: Mutex<Vec<Watcher>>,
}

#[derive(Debug)]
struct Watcher {
    queue: mpsc::Sender<Message>,
    slow: CancellationToken,
}

/// One client's place in the room. Dropping it is leaving.
#[derive(Debug)]
pub(super) struct Seat {
    /// What was said since the client came, and not yet taken.
    pub(super) queue: mpsc::Receiver<Message>,
    /// Cancelled when the queue overflowed; nothing is put in it from then on.
    pub(super) slow: CancellationToken,
}

impl Room {
    /// Joins, with room for `capacity` messages that were not yet taken.
    pub(super) fn join(&self, capacity: usize) -> Seat {
        let (sender, queue) = mpsc::channel(capacity);
        let slow = CancellationToken::new();
        self.lock().push(Watcher { queue: sender, slow: slow.clone() });
        Seat { queue, slow }
    }

    /// Puts `message` in every queue; who has no place for it is out.
    pub(super) fn say(&self, message: &Message) {
        self.lock().retain(|watcher| match watcher.queue.try_send(message.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                watcher.slow.cancel();
                false
            }
            Err(TrySendError::Closed(_)) => false,
        });
    }

    /// Says the time and the number of watchers, for ever.
    pub(super) async fn tick(&self, every: Duration) {
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval.tick().await; // the first is immediate
        loop {
            interval.tick().await;
            let watchers = self.count();
            self.say(&Message::text(format!("{} UTC, {watchers} watching", time_of_day(SystemTime::now()))));
        }
    }

    fn count(&self) -> usize {
        let mut watchers = self.lock();
        watchers.retain(|watcher| !watcher.queue.is_closed());
        watchers.len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Watcher>> {
        // A list of watchers is whole at every moment, also when a panic interrupted a pass over it.
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// "12:34:56", in UTC.
fn time_of_day(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() % 86_400);
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_is_utc_with_two_digits_each() {
        assert_eq!(time_of_day(UNIX_EPOCH), "00:00:00");
        assert_eq!(time_of_day(UNIX_EPOCH + Duration::from_secs(86_400 * 20_000 + 3600 * 9 + 60 * 5 + 7)), "09:05:07");
    }

    // Goal: a full queue costs its owner the seat and nobody else anything. Method: one of two takes nothing.
    #[test]
    fn who_does_not_listen_is_out_and_the_others_miss_nothing() {
        let room = Room::default();
        let (mut good, bad) = (room.join(1), room.join(1));
        for text in ["one", "two", "three"] {
            room.say(&Message::text(text));
            assert_eq!(good.queue.try_recv().unwrap(), Message::text(text));
        }
        assert!(bad.slow.is_cancelled());
        assert!(!good.slow.is_cancelled());
        assert_eq!(room.count(), 1);
        drop(good);
        assert_eq!(room.count(), 0);
    }
}
