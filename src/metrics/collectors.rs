//! What is not kept as a metric but looked up whenever somebody asks: the counters of workers, queues, the log, the pools, the kernel and the process.

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use super::{
    OPCODES, Traffic,
    totals::{Close, Closes, Durations},
};
use crate::{
    admission::Reason,
    pool::stats::{self, Stats},
    side::Side,
    system::System,
};

#[derive(Debug)]
pub(super) struct TrafficCollector(pub(super) Arc<Mutex<Vec<Arc<Traffic>>>>);

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |read: &dyn Fn(&Traffic) -> &AtomicU64| {
            ConstCounter::new(workers.iter().map(|worker| read(worker).load(Ordering::Relaxed)).sum::<u64>())
        };
        let directions = [(Side::Client, "client_to_backend"), (Side::Backend, "backend_to_client")];

        let mut bytes =
            encoder.encode_descriptor("bytes", "Bytes of frames that were read", None, MetricType::Counter)?;
        for (side, direction) in directions {
            let value = sum(&|worker| &worker.bytes[side as usize]);
            value.encode(bytes.encode_family(&[("direction", direction)])?)?;
        }
        let help = "Messages and control frames that were read, by the opcode of their first frame";
        let mut messages = encoder.encode_descriptor("messages", help, None, MetricType::Counter)?;
        for (side, direction) in directions {
            for (index, opcode) in OPCODES.into_iter().enumerate() {
                let value = sum(&|worker| &worker.messages[side as usize][index]);
                value.encode(messages.encode_family(&[("direction", direction), ("opcode", opcode)])?)?;
            }
        }
        let help = "Messages of backends on WebSockets that clients share, counted for each client";
        let delivered = encoder.encode_descriptor("shared_deliveries", help, None, MetricType::Counter)?;
        sum(&|worker| &worker.delivered).encode(delivered)?;
        let help = "Client connections that were accepted";
        let mut accepted = encoder.encode_descriptor("accepted", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            let value = ConstCounter::new(worker.accepted.load(Ordering::Relaxed));
            value.encode(accepted.encode_family(&[("worker", index.to_string())])?)?;
        }
        let help =
            "Of them, those that the worker gave to a less busy one at once; what waits goes to whichever has room";
        let mut handed_off = encoder.encode_descriptor("handed_off", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            let value = ConstCounter::new(worker.handed_off.load(Ordering::Relaxed));
            value.encode(handed_off.encode_family(&[("worker", index.to_string())])?)?;
        }
        let help = "Clients that were turned away with a 503, by reason";
        let mut refused = encoder.encode_descriptor("refused", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            for reason in Reason::ALL {
                let value = ConstCounter::new(worker.refused[reason as usize].load(Ordering::Relaxed));
                let labels = [("worker", index.to_string()), ("reason", reason.as_str().to_owned())];
                value.encode(refused.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// An accept queue at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Connections that wait in it.
    pub length: u32,
    /// As many as may.
    pub limit: u32,
}

pub(super) type LookAtQueues = dyn Fn() -> Vec<Queue> + Send + Sync;

pub(super) struct QueueCollector(pub(super) Arc<OnceLock<Box<LookAtQueues>>>);

impl fmt::Debug for QueueCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueCollector").finish_non_exhaustive()
    }
}

impl Collector for QueueCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let queues = self.0.get().map(|look| look()).unwrap_or_default();
        let help = "Connections that wait to be accepted, by accept queue";
        let mut length = encoder.encode_descriptor("accept_queue_length", help, None, MetricType::Gauge)?;
        for (index, queue) in queues.iter().enumerate() {
            ConstGauge::new(i64::from(queue.length)).encode(length.encode_family(&[("queue", index.to_string())])?)?;
        }
        let help = "Connections that may wait, by accept queue, as the kernel granted it";
        let mut limit = encoder.encode_descriptor("accept_queue_limit", help, None, MetricType::Gauge)?;
        for (index, queue) in queues.iter().enumerate() {
            ConstGauge::new(i64::from(queue.limit)).encode(limit.encode_family(&[("queue", index.to_string())])?)?;
        }
        Ok(())
    }
}

/// The log's own count of what it has lost.
pub(super) struct LogCollector(pub(super) Arc<OnceLock<Box<CountDrops>>>);

pub(super) type CountDrops = dyn Fn() -> u64 + Send + Sync;

impl fmt::Debug for LogCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogCollector").finish_non_exhaustive()
    }
}

impl Collector for LogCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let dropped = self.0.get().map_or(0, |count| count());
        let help = "Log lines that were dropped since whoever reads them was too slow, or gone";
        let metric = encoder.encode_descriptor("log_lines_dropped", help, None, MetricType::Counter)?;
        ConstCounter::new(dropped).encode(metric)
    }
}

/// How sessions begin and end.
#[derive(Debug, Clone, Default)]
pub(super) struct Ends {
    pub(super) handshakes: Arc<Durations>,
    pub(super) closes: Arc<Closes>,
    pub(super) took: Arc<Durations>,
}

impl Collector for Ends {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Sessions that ended, by who began it, the code, and whether both Close handshakes were completed";
        let mut closes = encoder.encode_descriptor("closes", help, None, MetricType::Counter)?;
        // All of them, so that none begins at 1.
        for (Close { initiator, clean, code }, count) in self.closes.all() {
            let labels =
                [("initiator", initiator), ("code_class", code), ("clean", if clean { "true" } else { "false" })];
            ConstCounter::new(count).encode(closes.encode_family(&labels)?)?;
        }
        let unit = Unit::Seconds;
        for (name, help, durations) in [
            (
                "handshake_duration",
                "From the beginning of a handshake to the backend's 101; the wait of connections_queued comes before it",
                &self.handshakes,
            ),
            ("close_duration", "From the first sign of a session's end to the FINs on both legs", &self.took),
        ] {
            let mut encoder = encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
            let buckets = durations.coarse();
            let count = buckets.iter().map(|(_, count)| count).sum();
            encoder.encode_histogram::<NoLabelSet>(durations.seconds(), count, &buckets, None)?;
        }
        Ok(())
    }
}

/// What the pools of upstream connections count.
#[derive(Debug)]
pub(super) struct PoolCollector(pub(super) Arc<Stats>);

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(pools) = self;
        let census = pools.census();
        let help = "Upstream connections that are shared, by state; closed: ended, with references that are not given back yet";
        let mut connections = encoder.encode_descriptor("pool_connections", help, None, MetricType::Gauge)?;
        for (state, count) in stats::STATES.into_iter().zip(census.connections) {
            ConstGauge::new(count).encode(connections.encode_family(&[("state", state)])?)?;
        }
        for (name, help, count) in [
            ("pool_references", "References that are held on shared upstream connections", census.references),
            ("pool_waiters", "Those that wait for a reference", census.waiters),
            ("pool_keys", "Keys of which the pools remember anything", census.keys),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(count).encode(gauge)?;
        }
        let help = "Opens of shared upstream connections that ended, by result";
        let mut opens = encoder.encode_descriptor("pool_opens", help, None, MetricType::Counter)?;
        for (result, count) in stats::OPENS.into_iter().zip(pools.opens()) {
            ConstCounter::new(count).encode(opens.encode_family(&[("result", result)])?)?;
        }
        let help = "What it took to come by a reference, by how: at once (hit, or revive of an idle connection), or after a wait for a new \
                    connection (open) or another one (wait)";
        let unit = Unit::Seconds;
        let mut acquires =
            encoder.encode_descriptor("pool_acquire_duration", help, Some(&unit), MetricType::Histogram)?;
        let bounds = stats::ACQUIRE_BOUNDS_SECONDS.into_iter().chain([f64::INFINITY]);
        for (how, took) in stats::HOWS.into_iter().zip(pools.acquires()) {
            let buckets: Vec<_> = bounds.clone().zip(took.buckets).collect();
            let labels = [("how", how)];
            let mut family = acquires.encode_family(&labels)?;
            family.encode_histogram::<NoLabelSet>(took.seconds, took.buckets.iter().sum(), &buckets, None)?;
        }
        let help = "Those that got no reference, by reason";
        let mut refusals = encoder.encode_descriptor("pool_refusals", help, None, MetricType::Counter)?;
        for (reason, count) in stats::REFUSALS.into_iter().zip(pools.refusals()) {
            ConstCounter::new(count).encode(refusals.encode_family(&[("reason", reason)])?)?;
        }
        for (name, help, count) in [
            (
                "pool_idle_closes",
                "Shared upstream connections that were closed since nobody used them",
                pools.idle_closes(),
            ),
            (
                "pool_goaways",
                "Shared upstream connections that take nobody else, by GOAWAY or pool.max_uses",
                pools.goaways(),
            ),
            (
                "pool_invariant_violations",
                "Mistakes in the pool itself; anything but 0 is an alert",
                pools.violations(),
            ),
        ] {
            let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(count).encode(counter)?;
        }
        Ok(())
    }
}

/// What the kernel counts for the network namespace as a whole: in a pod, for the backend and everybody else too.
#[derive(Debug)]
pub(super) struct NamespaceCollector(pub(super) System);

/// Metric, help, and where the kernel has it: a group and a field of /proc/net/netstat or /proc/net/snmp
/// (net/ipv4/proc.c).
const NAMESPACE_COUNTERS: [(&str, &str, &str, &str); 7] = [
    ("listen_overflows", "Connections that found an accept queue full", "TcpExt", "ListenOverflows"),
    ("listen_drops", "Connections that a listening socket dropped, for whatever reason", "TcpExt", "ListenDrops"),
    (
        "tcp_out_rsts",
        "RST that were sent, also as the answer to a SYN for a port where nobody listens",
        "Tcp",
        "OutRsts",
    ),
    ("tcp_estab_resets", "Connections that ended by a RST, sent or received", "Tcp", "EstabResets"),
    ("tcp_timeouts", "Retransmission timers that fired", "TcpExt", "TCPTimeouts"),
    ("tcp_delayed_acks", "ACKs that were sent late", "TcpExt", "DelayedACKs"),
    ("tcp_delayed_acks_lost", "ACKs that were sent again, since the peer had sent again", "TcpExt", "DelayedACKLost"),
];

/// `tcp_aborts_total{kind}`: the kind, and the field of "`TcpExt`".
const ABORTS: [(&str, &str); 6] = [
    ("on_data", "TCPAbortOnData"),
    ("on_close", "TCPAbortOnClose"),
    ("on_memory", "TCPAbortOnMemory"),
    ("on_timeout", "TCPAbortOnTimeout"),
    ("on_linger", "TCPAbortOnLinger"),
    ("failed", "TCPAbortFailed"),
];

impl Collector for NamespaceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Some(counters) = self.0.net_counters() {
            for (name, help, group, field) in NAMESPACE_COUNTERS {
                if let Some(value) = counters.get(group, field) {
                    let help = format!("{help}; of the whole network namespace");
                    let metric = encoder.encode_descriptor(name, &help, None, MetricType::Counter)?;
                    ConstCounter::new(value).encode(metric)?;
                }
            }
            let help = "Connections that the kernel ended abortively, by kind; of the whole network namespace";
            let mut aborts = encoder.encode_descriptor("tcp_aborts", help, None, MetricType::Counter)?;
            for (kind, field) in ABORTS {
                if let Some(value) = counters.get("TcpExt", field) {
                    ConstCounter::new(value).encode(aborts.encode_family(&[("kind", kind)])?)?;
                }
            }
        }
        if let Some(sockets) = self.0.tcp_sockets() {
            let help = "Sockets in TIME_WAIT; of the whole network namespace";
            let metric = encoder.encode_descriptor("tcp_time_wait", help, None, MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(sockets.time_wait).unwrap_or(i64::MAX)).encode(metric)?;
        }
        Ok(())
    }
}

/// What every process tells of itself, under the names that Prometheus' own libraries have for it.
#[derive(Debug)]
pub(super) struct ProcessCollector(pub(super) System);

impl Collector for ProcessCollector {
    #[expect(clippy::cast_precision_loss, reason = "a count of descriptors")]
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut tell = |name, help, unit: Option<&Unit>, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?)
        };
        if let Some(memory) = self.0.process_memory() {
            let [resident, size] = [memory.resident, memory.virtual_size].map(|bytes| bytes as f64);
            tell("process_resident_memory", "Memory that the process has in use", Some(&Unit::Bytes), resident)?;
            tell("process_virtual_memory", "Address space of the process", Some(&Unit::Bytes), size)?;
        }
        if let Some(open) = self.0.open_descriptors() {
            tell("process_open_fds", "Descriptors that the process has open", None, open as f64)?;
        }
        if let Some(most) = crate::system::descriptor_limit().soft {
            tell("process_max_fds", "Descriptors that it may have open", None, most as f64)?;
        }
        if let Some(process) = self.0.process() {
            tell("process_threads", "Threads of the process", None, process.threads as f64)?;
            let help = "When the process was started, since 1970";
            tell("process_start_time", help, Some(&Unit::Seconds), process.started_seconds)?;
            let help = "Processor time that the process has used, user and system";
            let cpu = encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
            ConstCounter::new(process.cpu_seconds).encode(cpu)?;
        }
        Ok(())
    }
}
