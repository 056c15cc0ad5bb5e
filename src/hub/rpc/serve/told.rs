//! What a hub tells of its requests and subscriptions: to the metrics, and of what was for nobody to the log.

use std::sync::Arc;

use tracing::{debug, warn};

use super::super::{
    super::key::Key,
    core::{Core, Counts},
};
use crate::{
    metrics::{Metrics, RpcDrop, RpcResult},
    sparse::Sparse,
};

/// What the metrics know of the core.
pub(super) struct Told {
    pub(super) metrics: Arc<Metrics>,
    counts: Counts,
    /// What was for nobody, and is none of the core's.
    pub(super) binary: u64,
    pub(super) too_long: u64,
    /// Reasons for which anything was, which the log knows by now.
    said: [bool; RpcDrop::ALL.len()],
    outstanding: usize,
    subscriptions: usize,
}

impl Told {
    pub(super) fn new(metrics: &Arc<Metrics>) -> Self {
        Self {
            metrics: Arc::clone(metrics),
            counts: Counts::default(),
            binary: 0,
            too_long: 0,
            said: [false; RpcDrop::ALL.len()],
            outstanding: 0,
            subscriptions: 0,
        }
    }

    pub(super) fn tell(&mut self, core: &Core, route: &str, key: &Key) {
        let (new, old) = (core.counts(), std::mem::replace(&mut self.counts, core.counts()));
        for (result, count) in [
            (RpcResult::Answered, new.answered - old.answered),
            (RpcResult::Error, new.failed - old.failed),
            (RpcResult::Timeout, new.timed_out - old.timed_out),
            (RpcResult::Lost, new.lost - old.lost),
            (RpcResult::Left, new.left - old.left),
            (RpcResult::Refused, new.refused - old.refused),
        ] {
            self.metrics.rpc(result, count);
        }
        self.gauges(core.outstanding(), core.subscriptions());
        for (why, count) in [
            (RpcDrop::Malformed, new.malformed - old.malformed),
            (RpcDrop::Binary, std::mem::take(&mut self.binary)),
            (RpcDrop::WithoutId, new.without_id - old.without_id),
            (RpcDrop::Stray, new.strays - old.strays),
            (RpcDrop::Unheard, new.unheard - old.unheard),
            (RpcDrop::Unlisted, new.unlisted - old.unlisted),
            (RpcDrop::Overflow, new.overflowed - old.overflowed),
            (RpcDrop::TooLong, std::mem::take(&mut self.too_long)),
            (RpcDrop::ClientResponse, new.client_responses - old.client_responses),
        ] {
            if count > 0 {
                self.metrics.rpc_drop(why, count);
                self.say(why, count, core.unlisted(), route, key);
            }
        }
    }

    /// Once of each hub; what a backend ought not to do, or may be of a subscription that is not set up, now and then to all who look.
    fn say(&mut self, why: RpcDrop, count: u64, unlisted: &str, route: &str, key: &Key) {
        static UNLISTED: Sparse = Sparse::new();
        static ODD: Sparse = Sparse::new();
        let reason = why.as_str();
        if !std::mem::replace(&mut self.said[why as usize], true) {
            debug!(%route, %key, reason, count, "JSON-RPC messages of a shared WebSocket are for nobody");
        }
        match why {
            RpcDrop::Unlisted => {
                if let Some(unsaid) = UNLISTED.is_due() {
                    let method = unlisted.escape_debug();
                    warn!(%route, %key, %method, count, unsaid, "notifications that neither pool.subscriptions nor pool.notifications names are for nobody");
                }
            }
            RpcDrop::Malformed | RpcDrop::Binary | RpcDrop::WithoutId => {
                if let Some(unsaid) = ODD.is_due() {
                    warn!(%route, %key, reason, count, unsaid, "the backend of a shared WebSocket says what is no JSON-RPC, or does not understand it");
                }
            }
            _ => {}
        }
    }

    fn gauges(&mut self, outstanding: usize, subscriptions: usize) {
        let Self { metrics, outstanding: before, subscriptions: subscribed, .. } = self;
        let change = |old: usize, new: usize| new.cast_signed() as i64 - old.cast_signed() as i64;
        metrics.rpc_outstanding.inc_by(change(*before, outstanding));
        metrics.rpc_subscriptions.inc_by(change(*subscribed, subscriptions));
        (*before, *subscribed) = (outstanding, subscriptions);
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.gauges(0, 0);
    }
}
