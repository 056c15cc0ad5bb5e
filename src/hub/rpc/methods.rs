//! Which methods begin and end a subscription, and by which its notifications come.

use std::{fmt, str::FromStr};

/// Subscribe, unsubscribe, notification: three names of methods. In each a `*` may stand for what is the same in all three, as in
/// `*Subscribe *Unsubscribe *Notification`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Triple {
    subscribe: Pattern,
    unsubscribe: Pattern,
    notification: Pattern,
}

/// A name; or what stands before and behind its `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    before: Box<str>,
    behind: Option<Box<str>>,
}

/// Why it is no [`Triple`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TripleError {
    /// Fewer words, or more.
    #[error("not three methods: one that subscribes, one that unsubscribes, one of the notifications")]
    Count,
    /// In one word.
    #[error("more than one * in {0:?}")]
    Stars(String),
    /// What it stands for is found in the first one.
    #[error("a * in {0:?} and none in the method that subscribes")]
    Unbound(String),
}

impl FromStr for Triple {
    type Err = TripleError;

    fn from_str(text: &str) -> Result<Self, TripleError> {
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        let [subscribe, unsubscribe, notification] = words[..] else { return Err(TripleError::Count) };
        let has_star = subscribe.contains('*');
        if let Some(word) = [unsubscribe, notification].into_iter().find(|word| word.contains('*') && !has_star) {
            return Err(TripleError::Unbound(word.to_owned()));
        }
        let [subscribe, unsubscribe, notification] = [subscribe, unsubscribe, notification].map(Pattern::read);
        Ok(Self { subscribe: subscribe?, unsubscribe: unsubscribe?, notification: notification? })
    }
}

impl fmt::Display for Triple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.subscribe, self.unsubscribe, self.notification)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.before)?;
        self.behind.as_ref().map_or(Ok(()), |behind| write!(f, "*{behind}"))
    }
}

impl Pattern {
    fn read(word: &str) -> Result<Self, TripleError> {
        match word.split_once('*') {
            Some((_, behind)) if behind.contains('*') => Err(TripleError::Stars(word.to_owned())),
            Some((before, behind)) => Ok(Self { before: before.into(), behind: Some(behind.into()) }),
            None => Ok(Self { before: word.into(), behind: None }),
        }
    }

    /// What its `*` stands for in this method, which is never nothing; without one it is.
    fn stem<'m>(&self, method: &'m str) -> Option<&'m str> {
        let rest = method.strip_prefix(&*self.before)?;
        match &self.behind {
            Some(behind) => rest.strip_suffix(&**behind).filter(|stem| !stem.is_empty()),
            None => Some(rest).filter(|rest| rest.is_empty()),
        }
    }

    fn with(&self, stem: &str) -> Box<str> {
        self.behind.as_ref().map_or_else(|| self.before.clone(), |behind| [&self.before, stem, behind].concat().into())
    }
}

/// What a method is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    Subscribe(Names),
    Unsubscribe,
    Other,
}

/// What goes with a method that subscribes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    pub unsubscribe: Box<str>,
    pub notification: Box<str>,
}

/// Those of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Methods {
    triples: Vec<Triple>,
    /// Of notifications for all; a `*` may stand at the end.
    for_all: Vec<String>,
}

impl Methods {
    /// No notification is for all.
    pub fn new(triples: Vec<Triple>) -> Self {
        Self { triples, for_all: Vec::new() }
    }

    /// Notifications by these methods are for all clients; a `*` at the end stands for any rest.
    #[must_use]
    pub fn for_all(self, names: &[String]) -> Self {
        Self { for_all: names.to_vec(), ..self }
    }

    /// Of a client's request.
    pub fn role(&self, method: &str) -> Role {
        // These first: `*subscribe` is also how `unsubscribe` ends.
        if self.triples.iter().any(|triple| triple.unsubscribe.stem(method).is_some()) {
            return Role::Unsubscribe;
        }
        let begun = self.triples.iter().find_map(|triple| {
            let stem = triple.subscribe.stem(method)?;
            Some(Names { unsubscribe: triple.unsubscribe.with(stem), notification: triple.notification.with(stem) })
        });
        begun.map_or(Role::Other, Role::Subscribe)
    }

    /// The backend's notifications by this method are of subscriptions.
    pub fn is_notification(&self, method: &str) -> bool {
        self.triples.iter().any(|triple| triple.notification.stem(method).is_some())
    }

    /// Whoever set it up says that the backend's notifications by this method are nobody's own.
    pub fn is_for_all(&self, method: &str) -> bool {
        self.for_all.iter().any(|name| match name.strip_suffix('*') {
            Some(before) => method.starts_with(before),
            None => method == name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn methods(triples: &[&str]) -> Methods {
        Methods::new(triples.iter().map(|triple| triple.parse().unwrap()).collect())
    }

    /// The shapes that are in use: each triple is asked for the three methods of a real interface, and for one that is none of them.
    #[test]
    fn triples_name_what_is_common() {
        for (triple, subscribe, unsubscribe, notification) in [
            ("eth_subscribe eth_unsubscribe eth_subscription", "eth_subscribe", "eth_unsubscribe", "eth_subscription"),
            ("*_subscribe *_unsubscribe *_subscription", "net_subscribe", "net_unsubscribe", "net_subscription"),
            (
                "*Subscribe *Unsubscribe *Notification",
                "slotsUpdatesSubscribe",
                "slotsUpdatesUnsubscribe",
                "slotsUpdatesNotification",
            ),
            (
                "chain_subscribeNewHeads chain_unsubscribeNewHeads chain_newHead",
                "chain_subscribeNewHeads",
                "chain_unsubscribeNewHeads",
                "chain_newHead",
            ),
            ("*_subscribe *_unsubscribe update", "a_subscribe", "a_unsubscribe", "update"),
        ] {
            assert_eq!(triple.parse::<Triple>().unwrap().to_string(), triple);
            let methods = methods(&[triple]);
            let names = Names { unsubscribe: unsubscribe.into(), notification: notification.into() };
            assert_eq!(methods.role(subscribe), Role::Subscribe(names), "{triple}");
            assert_eq!(methods.role(unsubscribe), Role::Unsubscribe, "{triple}");
            assert!(methods.is_notification(notification), "{triple}");
            for other in
                ["eth_call", "Subscribe", "_subscribe", "", &format!("{subscribe}s"), &format!("x {notification}")]
            {
                assert_eq!(methods.role(other), Role::Other, "{triple}: {other}");
            }
            assert!(!methods.is_notification(subscribe), "{triple}");
        }
        assert_eq!(methods(&["*subscribe *unsubscribe *event"]).role("x_unsubscribe"), Role::Unsubscribe);
    }

    /// What is no triple says why: one of each kind.
    #[test]
    fn what_is_no_triple_says_why() {
        let error = |text: &str| text.parse::<Triple>().unwrap_err();
        assert_eq!(error("a b"), TripleError::Count);
        assert_eq!(error("a b c d"), TripleError::Count);
        assert_eq!(error("a* b** c"), TripleError::Stars("b**".to_owned()));
        assert_eq!(error("a b* c"), TripleError::Unbound("b*".to_owned()));
        assert_eq!(error("a b c*"), TripleError::Unbound("c*".to_owned()));
    }
}
