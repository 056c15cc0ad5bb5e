//! Who gets a place, and what is said to whom does not.

use super::*;

const CONFIG: Config = Config {
    max_connections: None,
    max_connections_per_address: None,
    handshakes_per_second: None,
    handshakes_per_address: None,
    handshake_delay: Duration::from_secs(1),
    memory: Memory::Off,
};

fn admission(connections: usize, turned_away: usize, memory: Option<u64>) -> Admission {
    let (full, connection_bytes) = (Reason::MaxConnections, CONNECTION_BYTES);
    Admission::new(Capacity { connections, turned_away, memory, connection_bytes, full }, &CONFIG)
}

fn refused(admission: &Admission) -> Option<Reason> {
    admission.enter().expect("a place").refused
}

#[test]
fn places_first_then_answers_then_nothing() {
    let admission = admission(2, 1, None);
    let served: Vec<_> = (0..2).map(|_| admission.enter().expect("a place")).collect();
    assert!(served.iter().all(|place| place.refused.is_none()));
    let turned_away = admission.enter().expect("an answer");
    assert_eq!(turned_away.refused, Some(Reason::MaxConnections));
    assert!(admission.enter().is_none());
    drop(turned_away);
    assert_eq!(refused(&admission), Some(Reason::MaxConnections));
    drop(served);
    assert_eq!(refused(&admission), None);
}

#[tokio::test]
async fn room_is_awaited_and_found() {
    let admission = admission(1, 1, None);
    let places: Vec<_> = std::iter::from_fn(|| admission.enter()).collect();
    assert_eq!(places.len(), 2);
    let mut room = Box::pin(admission.room());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(room.as_mut().poll(&mut context).is_pending());
    drop(places);
    room.await;
    assert_eq!(refused(&admission), None);
}

/// Several wait, one place comes back: one of them is woken, and when it goes on waiting nobody else is.
#[tokio::test]
async fn a_place_wakes_one_of_those_who_wait() {
    let admission = admission(1, 1, None);
    let mut places: Vec<_> = std::iter::from_fn(|| admission.enter()).collect();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let mut rooms: Vec<_> = (0..3).map(|_| Box::pin(admission.room())).collect();
    for room in &mut rooms {
        assert!(room.as_mut().poll(&mut context).is_pending());
    }
    places.pop();
    let mut woken = || {
        let before = rooms.len();
        rooms.retain_mut(|room| room.as_mut().poll(&mut context).is_pending());
        before - rooms.len()
    };
    assert_eq!(woken(), 1);
    let place = admission.enter();
    assert!(place.is_some() && admission.enter().is_none());
    assert_eq!(woken(), 0);
    // It had no use for it.
    drop(place);
    assert_eq!(woken(), 1);
}

#[test]
fn memory_is_promised_and_given_back() {
    let admission = admission(100, 10, Some(CONNECTION_BYTES * 2));
    let one = admission.enter().expect("a place");
    let two = admission.enter().expect("a place");
    assert_eq!(refused(&admission), Some(Reason::Memory));
    drop(two);
    assert_eq!(refused(&admission), None);
    drop(one);
    assert_eq!(admission.memory().map(|(bytes, _)| bytes), Some(0));
}

#[test]
fn nobody_more_is_let_in_when_memory_is_nearly_used_up() {
    let admission = admission(100, 10, Some(CONNECTION_BYTES * 32));
    let mut places: Vec<_> = (0..8).map(|_| admission.enter().expect("a place")).collect();
    admission.observe_memory(95, 100);
    assert_eq!(refused(&admission), Some(Reason::Memory));
    // Who leaves makes room for another, as long as the use does not grow.
    let before = admission.memory().expect("a budget").1;
    admission.observe_memory(96, 100);
    assert_eq!(admission.memory().expect("a budget").1, before);
    admission.observe_memory(98, 100);
    let lower = admission.memory().expect("a budget").1;
    assert!(lower < before);
    // And little by little there is more again, although the allocator gives nothing back.
    for _ in 0..100 {
        admission.observe_memory(85, 100);
    }
    assert_eq!(admission.memory().expect("a budget").1, CONNECTION_BYTES * 32);
    admission.observe_memory(98, 100);
    places.truncate(4);
    assert_eq!(refused(&admission), None);
    // Easy again.
    admission.observe_memory(50, 100);
    assert_eq!(admission.memory().expect("a budget").1, CONNECTION_BYTES * 32);
}

#[test]
fn the_reserve_is_there_once_and_comes_back() {
    let admission = admission(1, 1, None);
    let place = admission.last_resort().expect("the reserve");
    assert_eq!(place.refused, Some(Reason::Descriptors));
    assert!(admission.last_resort().is_none());
    drop(place);
    assert!(admission.last_resort().is_some());
}

#[test]
fn a_reserve_that_could_not_be_taken_again_is_taken_later() {
    let admission = admission(1, 1, None);
    let place = admission.enter().expect("a place");
    // As if all descriptors had been in use when it was to be taken.
    *lock(&admission.inner.reserve) = Reserve { file: None, is_in_use: false };
    admission.inner.lacks_reserve.store(true, Ordering::Relaxed);
    drop(place);
    assert!(lock(&admission.inner.reserve).file.is_some());
    assert!(!admission.inner.lacks_reserve.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn handshakes_are_spread_and_the_wait_is_bounded() {
    let mut rate = Rate::new(10, Duration::from_millis(250));
    let now = Instant::now();
    let delays: Vec<_> = (0..5).map(|_| rate.next(now).map(|delay| delay.as_millis())).collect();
    assert_eq!(delays, [Some(0), Some(100), Some(200), None, None]);
    // Who was refused has taken no turn.
    tokio::time::advance(Duration::from_millis(100)).await;
    assert_eq!(rate.next(Instant::now()), Some(Duration::from_millis(200)));
    // And a pause gives one at once, not many.
    tokio::time::advance(Duration::from_secs(10)).await;
    let delays: Vec<_> = (0..2).map(|_| rate.next(Instant::now())).collect();
    assert_eq!(delays, [Some(Duration::ZERO), Some(Duration::from_millis(100))]);
}
