//! Who may use a route, and how many at once.
//!
//! Not here: who a client is (`session/` asks by an address).

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use ipnet::IpNet;

/// Of one route. Without any all may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Only clients in these; empty: all.
    pub allow: Vec<IpNet>,
    /// None of these, whoever is allowed.
    pub deny: Vec<IpNet>,
    /// Sessions at once, handshakes that are under way included; `None`: any number.
    pub max_sessions: Option<usize>,
}

impl Rules {
    /// A client may use the route. `None`: it is not known who it is; then it may only if everybody may.
    pub fn admit(&self, client: Option<IpAddr>) -> bool {
        let Self { allow, deny, .. } = self;
        let Some(client) = client.map(|client| client.to_canonical()) else {
            return allow.is_empty() && deny.is_empty();
        };
        let is_in = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&client));
        !is_in(deny) && (allow.is_empty() || is_in(allow))
    }
}

/// The sessions of a route; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Seats(Arc<AtomicUsize>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Seat(Arc<AtomicUsize>);

impl Seats {
    /// One more, if there may be. They are counted without a limit too: a reload may set one.
    pub fn take(&self, most: Option<usize>) -> Option<Seat> {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        let seat = Seat(Arc::clone(&self.0));
        // Otherwise it is given back here.
        most.is_none_or(|most| before < most).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may() {
        let networks = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        for (allow, deny, client, may) in [
            (&[][..], &[][..], "203.0.113.7", true),
            (&["10.0.0.0/8"], &[], "10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "::ffff:10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "203.0.113.7", false),
            (&["10.0.0.0/8"], &[], "2001:db8::1", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.1.2.3", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.2.2.3", true),
            (&[], &["2001:db8::/32"], "2001:db8::1", false),
            (&[], &["0.0.0.0/0", "::/0"], "203.0.113.7", false),
            (&[], &["0.0.0.0/0", "::/0"], "2001:db8::1", false),
            (&["0.0.0.0/0"], &["0.0.0.0/0"], "203.0.113.7", false),
        ] {
            let rules = Rules { allow: networks(allow), deny: networks(deny), max_sessions: None };
            assert_eq!(rules.admit(Some(client.parse().unwrap())), may, "{client} {rules:?}");
            assert_eq!(rules.admit(None), allow.is_empty() && deny.is_empty());
        }
    }

    #[test]
    fn so_many_at_once() {
        let seats = Seats::default();
        let first = seats.take(None).unwrap();
        let second = seats.clone().take(Some(2)).unwrap();
        assert!(seats.take(Some(2)).is_none() && seats.take(Some(1)).is_none());
        drop(first);
        let third = seats.take(Some(2)).unwrap();
        drop((second, third));
        assert!(seats.take(Some(0)).is_none() && seats.take(Some(1)).is_some());
    }
}
