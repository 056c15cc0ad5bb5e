//! What a report shows of each measurement: columns, what is compared, pictures.

use std::time::Duration;

use crate::{ending::GRACE, peers::Peer};

/// Of one measurement.
pub struct Table {
    pub measure: &'static str,
    pub title: &'static str,
    /// The column that is compared, and with whose; None: nothing is.
    pub compared: Option<&'static str>,
    pub with: Peer,
    /// In groups, since many tables have the same.
    pub columns: &'static [&'static [Column]],
    pub plots: &'static [Plot],
}

/// What it is called in a table, and in [`crate::report::Row::values`].
pub type Column = (&'static str, &'static str);

/// A picture of a measurement, with the name of its file.
pub struct Plot {
    pub file: &'static str,
    pub title: &'static str,
    pub kind: Kind,
}

/// Of a bar: its name, its column, its colour.
pub type Part = (&'static str, &'static str, &'static str);

/// From what should be to what should not.
const GOOD: &str = "#009e73";
const FAIR: &str = "#f0e442";
const POOR: &str = "#e69f00";
const BAD: &str = "#b3362b";
const NONE: &str = "#8a8a8a";

/// Axes are labelled with their units.
pub enum Kind {
    /// A bar for each peer, with its spread.
    Bars { column: &'static str, axis: &'static str },
    /// A bar for each peer, of several parts with their names.
    Parts { parts: &'static [Part], axis: &'static str },
    /// Quantiles of a histogram.
    Quantiles { histogram: &'static str, axis: &'static str, of: &'static str },
    /// Timelines, with where the proxy's time ends.
    Times { end: Option<Duration> },
}

/// Of the CPU time of the proxy, by what; how kernels split it is mostly sampled.
const CPU_PARTS: &[Column] = &[("of it user", "user_us"), ("of it the kernel's", "system_us")];
const PER_MESSAGE: &[Column] = &[("proxy CPU us per message", "cpu_us")];
const PER_SESSION: &[Column] = &[("proxy CPU us per session", "cpu_us")];
const PER_CLIENT: &[Column] = &[("proxy CPU us per client", "cpu_us")];
const OTHERS: &[Column] = &[("load + backend CPU us", "others_us")];
const FAILURES: &[Column] = &[("failures", "failures")];
const STRANGERS: &[Column] = &[("CPU of other programs, %", "strangers_percent")];

/// Of clients that come at once.
const SUCCESS: &[Column] = &[("success %", "success_percent")];
const ADMITTED: &[Column] =
    &[("connect to 101, ms: p50", "admitted_p50_ms"), ("p99", "admitted_p99_ms"), ("max", "admitted_max_ms")];
const QUEUES: &[Column] = &[
    ("ListenOverflows", "front_overflows"),
    ("ListenDrops", "front_drops"),
    ("of the backend: ListenOverflows", "back_overflows"),
    ("ListenDrops", "back_drops"),
    ("OutRsts", "front_rsts"),
];

/// Of `drain` and `kill`.
const ENDINGS: &[&[Column]] = &[
    &[
        ("clients saw: Close, FIN", "close_fin"),
        ("Close, RST", "close_rst"),
        ("FIN alone", "bare_fin"),
        ("RST alone", "bare_rst"),
        ("still there", "still_there"),
        ("messages lost", "lost"),
        ("ms to the Close: p50", "close_p50_ms"),
        ("max", "close_max_ms"),
        ("ms to the end: first", "first_end_ms"),
        ("p50", "end_p50_ms"),
        ("last", "last_end_ms"),
        ("ms to the process's end", "gone_ms"),
        ("messages per second before", "messages_per_second"),
    ],
    FAILURES,
];

/// How a session may end, from the best to the worst.
const ENDS: &[Part] = &[
    ("Close, FIN", "close_fin", GOOD),
    ("FIN alone", "bare_fin", FAIR),
    ("Close, RST", "close_rst", POOR),
    ("RST alone", "bare_rst", BAD),
    ("still there", "still_there", NONE),
];

pub const TABLES: [Table; 12] = [
    Table {
        measure: "echo",
        title: "Echo, closed loop: a message is one there and one back",
        compared: Some("cpu_us"),
        with: Peer::Nginx,
        columns: &[PER_MESSAGE, CPU_PARTS, &[("messages per second", "per_second")], OTHERS, FAILURES],
        plots: &[Plot {
            file: "echo-cpu",
            title: "Echo: CPU time of the proxy per message",
            kind: Kind::Bars { column: "cpu_us", axis: "microseconds per message (there and back)" },
        }],
    },
    Table {
        measure: "idle",
        title: "Idle sessions, after an echo or none: memory of the proxy's processes, KiB per session",
        compared: Some("rss_growth_kib"),
        with: Peer::Nginx,
        columns: &[
            &[
                ("RSS growth", "rss_growth_kib"),
                ("PSS growth", "pss_growth_kib"),
                ("RSS", "rss_kib"),
                ("PSS", "pss_kib"),
                ("sessions", "count"),
            ],
            FAILURES,
        ],
        plots: &[
            Plot {
                file: "idle-rss",
                title: "Idle sessions: memory of the proxy (RSS)",
                kind: Kind::Bars { column: "rss_growth_kib", axis: "KiB more per session" },
            },
            Plot {
                file: "idle-pss",
                title: "Idle sessions: memory of the proxy (PSS)",
                kind: Kind::Bars { column: "pss_growth_kib", axis: "KiB more per session" },
            },
        ],
    },
    Table {
        measure: "churn",
        title: "Churn: connect, upgrade, one echo, Close handshake, FIN",
        compared: Some("cpu_us"),
        with: Peer::Nginx,
        columns: &[
            PER_SESSION,
            CPU_PARTS,
            &[
                ("sessions", "count"),
                ("sessions per second", "per_second"),
                ("Close to FIN, us: p50", "close_to_fin_p50_us"),
                ("p99", "close_to_fin_p99_us"),
                ("max", "close_to_fin_max_us"),
                ("answering Close to FIN, us: p50", "answer_to_fin_p50_us"),
                ("p99", "answer_to_fin_p99_us"),
                ("max", "answer_to_fin_max_us"),
            ],
            OTHERS,
            FAILURES,
        ],
        plots: &[
            Plot {
                file: "churn-cpu",
                title: "Short sessions: CPU time of the proxy per session",
                kind: Kind::Bars { column: "cpu_us", axis: "microseconds per session" },
            },
            Plot {
                file: "churn-close",
                title: "Short sessions: from the client's Close to FIN",
                kind: Kind::Quantiles { histogram: "close_to_fin", axis: "microseconds", of: "sessions" },
            },
            Plot {
                file: "churn-answer",
                title: "Short sessions: from the answering Close to FIN",
                kind: Kind::Quantiles { histogram: "answer_to_fin", axis: "microseconds", of: "sessions" },
            },
        ],
    },
    Table {
        measure: "spike",
        title: "Spike: all connect at once; upgrade, one echo, Close handshake, FIN",
        compared: Some("admitted_max_ms"),
        with: Peer::Nginx,
        columns: &[SUCCESS, ADMITTED, &[("last echo, ms", "last_echo_ms")], QUEUES, PER_CLIENT, CPU_PARTS, STRANGERS],
        plots: &[
            Plot {
                file: "spike-admitted",
                title: "Spike: from connect to 101, 99th percentile",
                kind: Kind::Bars { column: "admitted_p99_ms", axis: "milliseconds" },
            },
            Plot {
                file: "spike-success",
                title: "Spike: clients that were served",
                kind: Kind::Bars { column: "success_percent", axis: "percent" },
            },
        ],
    },
    Table {
        measure: "waves",
        title: "Waves: all of a wave connect at once, one wave each second; upgrade, one echo, Close handshake, FIN",
        compared: Some("admitted_max_ms"),
        with: Peer::Nginx,
        columns: &[SUCCESS, ADMITTED, &[("a wave late by, ms", "late_ms")], QUEUES, PER_CLIENT, CPU_PARTS, STRANGERS],
        plots: &[Plot {
            file: "waves-admitted",
            title: "Waves: from connect to 101, 99th percentile",
            kind: Kind::Bars { column: "admitted_p99_ms", axis: "milliseconds" },
        }],
    },
    Table {
        measure: "held",
        title: "Held: all of those that come connect at once, while others are there, each with an echo every 5 s",
        compared: Some("admitted_max_ms"),
        with: Peer::Nginx,
        columns: &[
            SUCCESS,
            &[("of the held lost", "held_lost")],
            ADMITTED,
            &[("slowest echo of the held, ms", "held_slowest_echo_ms")],
            QUEUES,
            PER_CLIENT,
            CPU_PARTS,
            STRANGERS,
        ],
        plots: &[Plot {
            file: "held-admitted",
            title: "Others are there already: from connect to 101, 99th percentile",
            kind: Kind::Bars { column: "admitted_p99_ms", axis: "milliseconds" },
        }],
    },
    Table {
        measure: "ramp",
        title: "Ramp: ever more clients; connect, wait, send, result, Close handshake",
        compared: Some("close_max_ms"),
        with: Peer::Tidegate1,
        columns: &[
            &[
                ("max connect, ms", "connect_max_ms"),
                ("deviation", "connect_deviation_ms"),
                ("max result, ms", "result_max_ms"),
                ("deviation", "result_deviation_ms"),
                ("max close, ms", "close_max_ms"),
                ("deviation", "close_deviation_ms"),
                ("clients", "count"),
            ],
            FAILURES,
            &[("OutRsts", "front_rsts")],
            PER_CLIENT,
            CPU_PARTS,
            STRANGERS,
        ],
        plots: &[Plot {
            file: "ramp-close",
            title: "Ramp: from Close to FIN, the longest",
            kind: Kind::Bars { column: "close_max_ms", axis: "milliseconds" },
        }],
    },
    Table {
        measure: "fanout",
        title: "Fan-out: one feed, and many who watch it",
        compared: Some("cpu_us"),
        with: Peer::Tidegate,
        columns: &[
            &[("proxy CPU us per delivered message", "cpu_us")],
            CPU_PARTS,
            &[
                ("delivered %", "delivered_percent"),
                ("under way, ms: p50", "delay_p50_ms"),
                ("p99", "delay_p99_ms"),
                ("max", "delay_max_ms"),
            ],
            &[("the kernel's receiving threads, CPU us", "receive_us")],
            OTHERS,
            &[("RSS growth, KiB per watcher", "watcher_kib"), ("connections of the backend", "upstreams")],
            FAILURES,
        ],
        plots: &[Plot {
            file: "fanout-cpu",
            title: "A feed: CPU time of the proxy per delivered message",
            kind: Kind::Bars { column: "cpu_us", axis: "microseconds per delivered message" },
        }],
    },
    Table {
        measure: "open",
        title: "Open loop: messages at a fixed rate, timed from when they were due",
        compared: Some("cpu_us"),
        with: Peer::Nginx,
        columns: &[
            &[
                ("under way, us: p50", "latency_p50_us"),
                ("p90", "latency_p90_us"),
                ("p99", "latency_p99_us"),
                ("p99.9", "latency_p999_us"),
                ("max", "latency_max_us"),
            ],
            PER_MESSAGE,
            CPU_PARTS,
            &[("sent late by, us: p99", "sent_late_p99_us"), ("messages per second", "per_second")],
            FAILURES,
            STRANGERS,
        ],
        plots: &[
            Plot {
                file: "open-latency",
                title: "How long messages are under way, from when they were due",
                kind: Kind::Quantiles { histogram: "latency", axis: "microseconds, there and back", of: "messages" },
            },
            Plot {
                file: "open-cpu",
                title: "At a fixed rate: CPU time of the proxy per message",
                kind: Kind::Bars { column: "cpu_us", axis: "microseconds per message (there and back)" },
            },
        ],
    },
    Table {
        measure: "audit",
        title: "Who leaves in the middle: the backend sends three frames, 10 ms apart; the client sends Close at the first",
        compared: None,
        with: Peer::Nginx,
        columns: &[
            &[
                ("the backend saw: Close and FIN", "backend_clean"),
                ("FIN without Close", "backend_fin"),
                ("EPIPE or RST", "backend_rst"),
                ("no end within 15 s", "backend_open"),
                ("nothing", "backend_missing"),
                ("TCPAbortOnClose", "front_aborts_on_close"),
                ("TCPAbortOnData", "front_aborts_on_data"),
                ("OutRsts", "front_rsts"),
                ("of the clients: OutRsts", "client_rsts"),
                ("Close to FIN, ms: p50", "close_p50_ms"),
                ("p99", "close_p99_ms"),
                ("max", "close_max_ms"),
            ],
            PER_SESSION,
            CPU_PARTS,
            FAILURES,
            STRANGERS,
        ],
        plots: &[Plot {
            file: "audit",
            title: "Clients that leave in the middle of a result: what the backend sees",
            kind: Kind::Parts {
                parts: &[
                    ("Close and FIN", "backend_clean", GOOD),
                    ("FIN without Close", "backend_fin", FAIR),
                    ("EPIPE or RST", "backend_rst", BAD),
                    ("no end", "backend_open", NONE),
                ],
                axis: "sessions",
            },
        }],
    },
    Table {
        measure: "drain",
        title: "An orderly stop of the proxy under talking sessions",
        compared: None,
        with: Peer::Nginx,
        columns: ENDINGS,
        plots: &[
            Plot {
                file: "drain-ends",
                title: "An orderly stop of the proxy: how it ends for clients",
                kind: Kind::Parts { parts: ENDS, axis: "sessions" },
            },
            Plot {
                file: "drain-timeline",
                title: "An orderly stop of the proxy: when it ends for clients",
                kind: Kind::Times { end: Some(GRACE) },
            },
        ],
    },
    Table {
        measure: "kill",
        title: "The backend is killed under talking sessions",
        compared: None,
        with: Peer::Nginx,
        columns: ENDINGS,
        plots: &[
            Plot {
                file: "kill-ends",
                title: "The backend is killed: how it ends for clients",
                kind: Kind::Parts { parts: ENDS, axis: "sessions" },
            },
            Plot {
                file: "kill-timeline",
                title: "The backend is killed: when it ends for clients",
                kind: Kind::Times { end: None },
            },
        ],
    },
];
