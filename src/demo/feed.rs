//! The feed of `/feed`: ten times a second where a vehicle is, the same to everybody who watches.
//!
//! It is what `pool.shared = "broadcast"` is for, so it counts its connections: through such a route there is one, however
//! many watch. Deliberately not in it: anything that a client could ask for.

use std::f64::consts::TAU;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tokio_tungstenite::tungstenite::Message;

use super::room::Room;

/// Each goes round a lake of its own size, one place behind the other.
const VEHICLES: u32 = 5;
/// The middle of the lake, in degrees of latitude and longitude.
const MIDDLE: [f64; 2] = [47.25, 8.65];
/// How far the first one is from there, in degrees.
const RADIUS: f64 = 0.01;
/// Messages of one vehicle for a whole turn: with ten in a second, and five vehicles, two minutes.
const TURN: u32 = 240;

#[derive(Debug, Default)]
pub(super) struct Feed {
    /// Everybody who watches.
    pub(super) room: Room,
    open: AtomicU64,
    opened: AtomicU64,
}

/// One `WebSocket` that is open, until it is dropped.
#[derive(Debug)]
pub(super) struct Counted<'a>(&'a Feed);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Feed {
    /// Counts a `WebSocket`.
    pub(super) fn count(&self) -> Counted<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.opened.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }

    /// What `/feed/connections` answers.
    pub(super) fn connections(&self) -> String {
        let [open, opened] = [&self.open, &self.opened].map(|count| count.load(Ordering::Relaxed));
        format!("{open} open, {opened} since the start\n")
    }

    /// Says where one vehicle after the other is, for ever.
    pub(super) async fn run(&self, every: Duration) {
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut number = 0;
        loop {
            interval.tick().await;
            self.room.say(&Message::text(position(number, self.open.load(Ordering::Relaxed))));
            number += 1;
        }
    }
}

/// One message. Numbers have no gap, so that whoever watches sees what it missed.
fn position(number: u64, connections: u64) -> String {
    let place = number % u64::from(TURN * VEHICLES);
    let place = u32::try_from(place).expect("less than a turn of all vehicles");
    let (step, vehicle) = (place / VEHICLES, place % VEHICLES);
    let angle = TAU * (f64::from(step) / f64::from(TURN) + f64::from(vehicle) / f64::from(VEHICLES));
    let radius = RADIUS * f64::from(vehicle + 1);
    let [latitude, longitude] = [MIDDLE[0] + radius * angle.sin(), MIDDLE[1] + radius * angle.cos()];
    format!(
        "{{\"number\":{number},\"vehicle\":{vehicle},\"at\":[{latitude:.5},{longitude:.5}],\"connections\":{connections}}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: what is said is JSON, and each vehicle comes back to where it began. Method: two turns, read again.
    #[test]
    fn a_vehicle_goes_round() {
        let read = |number| -> serde_json::Value { serde_json::from_str(&position(number, 3)).unwrap() };
        let turn = u64::from(VEHICLES * TURN);
        for number in 0..turn {
            let said = read(number);
            assert_eq!((&said["number"], &said["connections"]), (&number.into(), &3.into()), "{said}");
            assert_eq!(said["vehicle"], number % u64::from(VEHICLES), "{said}");
            assert_eq!(said["at"], read(number + turn)["at"], "{said}");
            assert_ne!(said["at"], read(number + u64::from(VEHICLES))["at"], "{said}");
        }
    }
}
