//! What a leg cost and what the kernel counted meanwhile, on both sides of the proxy.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::{
    load::{Order, Outcome},
    procfs::{Counters, Cpu, Strangers, packets_dropped},
};

/// Between the last end that a client sees and the look at the counters: the proxy has its other leg to end.
const SETTLE: Duration = Duration::from_millis(200);

/// What the kernel had counted when the clients came.
pub struct Watch {
    cpu: Cpu,
    others: Cpu,
    strangers: Strangers,
    client: Counters,
    front: Counters,
    back: Option<Counters>,
    packets_dropped: u64,
    begun: Instant,
}

impl Watch {
    pub fn begin(order: &Order) -> anyhow::Result<Self> {
        Ok(Self {
            cpu: Cpu::of(&order.proxy)?,
            others: Cpu::of(&[order.backend, std::process::id()])?,
            strangers: Strangers::begin()?,
            client: Counters::of(std::process::id())?,
            front: Counters::of(front(order))?,
            back: back(order).map(Counters::of).transpose()?,
            packets_dropped: packets_dropped()?,
            begun: Instant::now(),
        })
    }

    /// What came since.
    pub async fn end(self, order: &Order) -> anyhow::Result<Outcome> {
        let seconds = self.begun.elapsed().as_secs_f64();
        sleep(SETTLE).await;
        let mut outcome = Outcome {
            seconds,
            proxy: Cpu::of(&order.proxy)? - self.cpu,
            others: Cpu::of(&[order.backend, std::process::id()])? - self.others,
            ..Outcome::default()
        };
        let ours = outcome.proxy.us() + outcome.others.us();
        outcome.insert("strangers_percent", self.strangers.percent(ours)?);
        let client = Counters::of(std::process::id())? - self.client;
        outcome.insert("client_rsts", client.out_rsts as f64);
        let front = Counters::of(front(order))? - self.front;
        outcome.insert("front_overflows", front.listen_overflows as f64);
        outcome.insert("front_drops", front.listen_drops as f64);
        outcome.insert("front_rsts", front.out_rsts as f64);
        outcome.insert("front_aborts_on_close", front.aborts_on_close as f64);
        outcome.insert("front_aborts_on_data", front.aborts_on_data as f64);
        if let (Some(pid), Some(before)) = (back(order), self.back) {
            let back = Counters::of(pid)? - before;
            outcome.insert("back_overflows", back.listen_overflows as f64);
            outcome.insert("back_drops", back.listen_drops as f64);
        }
        outcome.insert("packets_dropped", (packets_dropped()? - self.packets_dropped) as f64);
        Ok(outcome)
    }
}

/// Who accepts the clients.
fn front(order: &Order) -> u32 {
    order.proxy.first().copied().unwrap_or(order.backend)
}

/// Who accepts the proxy.
fn back(order: &Order) -> Option<u32> {
    (!order.proxy.is_empty()).then_some(order.backend)
}
