//! The five reports: what each of them says, its own figures and doubts, and the legs that repeat it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{clients::Manner, figures::number};

/// Sessions at once: with two descriptors each tidegate stays below the 20,000 that it may have.
const AT_MOST: usize = 9_500;

/// What the backend asks of `listen()`, as Tomcat does.
const BACKLOG: u16 = 100;

/// Of a new network namespace.
pub const SOMAXCONN: u32 = 4096;

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Through {
    /// From the report itself.
    Report,
    Direct,
    Tidegate,
}

impl fmt::Display for Through {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Report => "the report",
            Self::Direct => "direct",
            Self::Tidegate => "tidegate",
        })
    }
}

/// One way to repeat a report.
#[derive(Debug, Clone)]
pub struct Leg {
    pub through: Through,
    pub label: String,
    /// Of the namespace that clients connect to.
    pub somaxconn: u32,
    pub backlog: u16,
    pub pollers: usize,
    pub close_delay_ms: u64,
    /// Of tidegate.
    pub workers: usize,
    /// Of tidegate, as TOML.
    pub settings: &'static str,
    pub load: Load,
}

/// What clients do.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub manner: Manner,
    pub sessions: usize,
    pub burst: usize,
    pub every_ms: u64,
    pub at_most: usize,
}

/// A line of the report's own figures: columns by name.
#[derive(Debug)]
pub struct Reported {
    pub label: &'static str,
    pub values: &'static [(&'static str, f64)],
}

/// A column's heading, and its name in the outcomes.
pub type Column = (&'static str, &'static str);

#[derive(Debug)]
pub struct Story {
    pub number: usize,
    pub title: &'static str,
    pub says: &'static str,
    pub doubts: &'static str,
    pub here: &'static str,
    pub reported: &'static [Reported],
    pub columns: &'static [Column],
    /// What the plot shows, of the columns.
    pub panels: &'static [Column],
    pub legs: Vec<Leg>,
}

impl Leg {
    fn new(through: Through, label: impl Into<String>, load: Load) -> Self {
        let label = label.into();
        let (somaxconn, backlog) = (SOMAXCONN, BACKLOG);
        Self { through, label, somaxconn, backlog, pollers: 1, close_delay_ms: 0, workers: 2, settings: "", load }
    }
}

/// All of them; small ones, to see that they work.
pub fn all(quick: bool) -> Vec<Story> {
    let scaled = |count: usize| if quick { count.div_ceil(10) } else { count };
    vec![pollers(&scaled), close_delay(&scaled), spike(&scaled), counted(&scaled), connects(&scaled)]
}

fn pollers(scaled: &dyn Fn(usize) -> usize) -> Story {
    let burst = scaled(700);
    let load = Load { manner: Manner::Waits, sessions: burst * 5, burst, every_ms: 1_000, at_most: AT_MOST };
    let legs = [Through::Direct, Through::Tidegate].into_iter().flat_map(|through| {
        [1, 2].map(|count| {
            let plural = if count == 1 { "" } else { "s" };
            match through {
                Through::Tidegate => {
                    Leg { workers: count, ..Leg::new(through, format!("{count} worker{plural}"), load) }
                }
                _ => Leg { pollers: count, ..Leg::new(through, format!("{count} poller{plural}"), load) },
            }
        })
    });
    // Is it the poller, or its queue?
    let deep = Leg { backlog: 1_000, ..Leg::new(Through::Direct, "1 poller, backlog 1,000", load) };
    Story {
        number: 1,
        title: "A second poller",
        says: "A second poller of a Tomcat cut the worst connect from 1,220 to 296 ms, and raised the worst close from 207 to 296 ms.",
        doubts: "Its first figures could not be repeated later.",
        here: "700 clients at once, five times, a second apart. Each waits for its result and closes. A poller is a thread that \
               accepts and serves; two share one accept queue. Through tidegate its workers are counted, and the backend has one \
               poller.",
        reported: &[
            Reported { label: "1 poller", values: &[("connect_max", 1220.0), ("close_max", 207.0)] },
            Reported { label: "2 pollers", values: &[("connect_max", 296.0), ("close_max", 296.0)] },
        ],
        columns: &[
            ("failed", "failed"),
            ("lost results", "lost"),
            ("connect, ms: p50", "connect_p50"),
            ("max", "connect_max"),
            ("deviation", "connect_deviation"),
            ("connects over 1 s", "late"),
            ("close, ms: p50", "close_p50"),
            ("max", "close_max"),
            ("ListenOverflows", "front_overflows"),
            ("RSTs at the backend", "backend_rsts"),
        ],
        panels: &[("worst connect, ms", "connect_max"), ("worst close, ms", "close_max")],
        legs: legs.chain([deep]).collect(),
    }
}

fn close_delay(scaled: &dyn Fn(usize) -> usize) -> Story {
    let load = Load { manner: Manner::Mixed, sessions: scaled(2_000), burst: 5, every_ms: 10, at_most: AT_MOST };
    let delays = [
        (0, "0", "close.delay = '0ms'"),
        (100, "100 ms", "close.delay = '100ms'"),
        (1_000, "1 s", "close.delay = '1s'"),
    ];
    let legs = [Through::Direct, Through::Tidegate].into_iter().flat_map(|through| {
        delays.map(|(delay, text, settings)| match through {
            Through::Tidegate => Leg { settings, ..Leg::new(through, format!("close.delay {text}"), load) },
            _ => Leg { close_delay_ms: delay, ..Leg::new(through, format!("close() after {text}"), load) },
        })
    });
    let both = Leg {
        settings: delays[1].2,
        close_delay_ms: delays[1].0,
        ..Leg::new(Through::Tidegate, "close.delay 100 ms, close() after 100 ms", load)
    };
    Story {
        number: 2,
        title: "A delay before close()",
        says: "100 ms before each close() of a server cut TCPAbortOnData from 1,600 to 135 and TCPAbortOnLinger from 89 to 0, for a \
               slightly higher latency and a deviation of 18 instead of 16 ms. With 1 s the latency spikes were back, and 1,477 \
               aborts. A minute made 500 errors.",
        doubts: "SO_LINGER only traded latency for lost data, and a longer delay made it worse: a close that waits must not cost much.",
        here: "500 clients a second for 4 s. Half of them get Close behind the result from a backend that then calls close() after \
               the delay, without waiting for the answer; the other half send Close at the first of three parts, and close their \
               sockets at once. Through tidegate the delay is its own (close.delay), and the backend closes at once, but for the last \
               line. Counters are those of the backend's namespace; since the aborts miss cases, OutRsts and EstabResets stand beside \
               them.",
        reported: &[
            Reported {
                label: "close() after 0",
                values: &[("abort_on_data", 1600.0), ("abort_on_linger", 89.0), ("result_deviation", 16.0)],
            },
            Reported {
                label: "close() after 100 ms",
                values: &[("abort_on_data", 135.0), ("abort_on_linger", 0.0), ("result_deviation", 18.0)],
            },
            Reported { label: "close() after 1 s", values: &[("abort_on_data", 1477.0)] },
        ],
        columns: &[
            ("failed", "failed"),
            ("lost results", "lost"),
            ("TCPAbortOnData", "abort_on_data"),
            ("TCPAbortOnClose", "abort_on_close"),
            ("TCPAbortOnLinger", "abort_on_linger"),
            ("OutRsts", "backend_out_rsts"),
            ("EstabResets", "backend_estab_resets"),
            ("failed writes of the backend", "failed_writes"),
            ("OutRsts where clients connect", "front_out_rsts"),
            ("clients that saw a RST", "unclean"),
            ("result, ms: max", "result_max"),
            ("deviation", "result_deviation"),
            ("close, ms: p50", "close_p50"),
            ("max", "close_max"),
        ],
        panels: &[
            ("TCPAbortOnData", "abort_on_data"),
            ("RSTs at the backend", "backend_rsts"),
            ("worst close, ms", "close_max"),
        ],
        legs: legs.chain([both]).collect(),
    }
}

fn spike(scaled: &dyn Fn(usize) -> usize) -> Story {
    let of = |clients: usize| format!("{} clients", grouped(u32::try_from(clients).unwrap_or(u32::MAX)));
    let mut legs = Vec::new();
    for clients in [3_000, AT_MOST].map(scaled) {
        let load = Load { manner: Manner::Waits, sessions: clients, burst: clients, every_ms: 0, at_most: clients };
        for (backlog, somaxconn) in [(BACKLOG, SOMAXCONN), (10_000, 128), (10_000, 65_535)] {
            let label = format!("{}, backlog {}, somaxconn {}", of(clients), grouped(backlog), grouped(somaxconn));
            legs.push(Leg { somaxconn, backlog, ..Leg::new(Through::Direct, label, load) });
        }
        for somaxconn in [128, 65_535] {
            let label = format!("{}, somaxconn {}", of(clients), grouped(somaxconn));
            legs.push(Leg { somaxconn, ..Leg::new(Through::Tidegate, label, load) });
        }
    }
    Story {
        number: 3,
        title: "A spike, a backlog, and somaxconn",
        says: "46 % of 3,000 clients at once failed: net.core.somaxconn (128) silently clamped a backlog of 10,000.",
        doubts: "These were plain HTTP health checks, and how long they waited is not known. A server whose front was then opened wide \
               was overrun itself.",
        here: "So many clients connect in one go, get their result and close; each may take 30 s. Who needs more than a second for \
               the connect had it sent again by the kernel, or waited for a CPU: a health check that waits for a second would have \
               failed. Behind tidegate the backend has its backlog of 100 in any case, and a somaxconn of its own.",
        reported: &[Reported {
            label: "3,000 clients, backlog 10,000, somaxconn 128",
            values: &[("missed_percent", 46.0)],
        }],
        columns: &[
            ("failed", "failed"),
            ("lost results", "lost"),
            ("connect, ms: p50", "connect_p50"),
            ("p99", "connect_p99"),
            ("max", "connect_max"),
            ("failed or over 1 s, %", "missed_percent"),
            ("close, ms: max", "close_max"),
            ("ListenOverflows", "front_overflows"),
            ("the backend's", "backend_overflows"),
            ("RSTs at the backend", "backend_rsts"),
        ],
        panels: &[
            ("failed or over 1 s, %", "missed_percent"),
            ("worst connect, ms", "connect_max"),
            ("ListenOverflows", "front_overflows"),
        ],
        legs,
    }
}

fn counted(scaled: &dyn Fn(usize) -> usize) -> Story {
    let burst = scaled(500);
    let load = Load { manner: Manner::Call, sessions: burst * 8, burst, every_ms: 500, at_most: AT_MOST };
    let at_once = "route = [{ path = '/rpc', pool = { mode = 'shared', shared = 'rpc', idle_timeout = '0s' } }]";
    let later = "route = [{ path = '/rpc', pool = { mode = 'shared', shared = 'rpc', idle_timeout = '50ms' } }]";
    let legs = vec![
        Leg::new(Through::Direct, "one per request", load),
        Leg::new(Through::Direct, "counted by the clients", Load { manner: Manner::Counted, ..load }),
        Leg::new(Through::Tidegate, "one per request (dedicated)", load),
        Leg { settings: at_once, ..Leg::new(Through::Tidegate, "counted (rpc), closes at once", load) },
        Leg { settings: later, ..Leg::new(Through::Tidegate, "counted (rpc), closes after 50 ms", load) },
    ];
    Story {
        number: 4,
        title: "Open and close per request, or counted",
        says: "Opening and closing one upstream socket per request broke under load. One shared socket and a counter of waiting \
               requests (open at 0 to 1, close at 1 to 0, under one lock, released on errors) fixed it.",
        doubts: "It has no figures, and does not say what broke.",
        here: "500 JSON-RPC calls at once, eight times, half a second apart, each from a client of its own that then closes. Counted \
               means one connection to the backend for all that wait: within the clients' program, or within tidegate (pool.shared = \
               \"rpc\"), with pool.idle_timeout = \"0s\", which is the report's rule, and with \"50ms\".",
        reported: &[],
        columns: &[
            ("failed", "failed"),
            ("lost results", "lost"),
            ("connections at the backend", "backend_sessions"),
            ("request, ms: p50", "result_p50"),
            ("p99", "result_p99"),
            ("max", "result_max"),
            ("connects over 1 s", "late"),
            ("close, ms: max", "close_max"),
            ("ListenOverflows of the backend", "backend_overflows"),
            ("RSTs at the backend", "backend_rsts"),
            ("CPU of the backend, ms", "backend_cpu_ms"),
        ],
        panels: &[
            ("connections at the backend", "backend_sessions"),
            ("request, p99, ms", "result_p99"),
            ("CPU of the backend, ms", "backend_cpu_ms"),
        ],
        legs,
    }
}

fn connects(scaled: &dyn Fn(usize) -> usize) -> Story {
    let mut legs = Vec::new();
    for (sessions, name) in [(1_000, "1,000 in 1 s"), (10_000, "10,000 in 1 s"), (50_000, "50,000, 10,000 each s")] {
        let sessions = scaled(sessions);
        let burst = if sessions <= 1_000 { 10 } else { 100 };
        let load = Load { manner: Manner::Waits, sessions, burst, every_ms: 10, at_most: AT_MOST };
        legs.extend([Through::Direct, Through::Tidegate].map(|through| Leg::new(through, name, load)));
    }
    Story {
        number: 5,
        title: "1,000, 10,000, 50,000 connects",
        says: "A third of 10,000 WebSocket connects in one second failed.",
        doubts: "Descriptors, memory and threads were suspected; which of them it was is not known.",
        here: "Connects at an even pace, each followed by a result and a close. At most 9,500 are under way at once, which is what \
               20,000 descriptors allow a proxy: where it takes longer, the next ones connect later.",
        reported: &[Reported { label: "10,000 in 1 s", values: &[("missed_percent", 33.3)] }],
        columns: &[
            ("failed", "failed"),
            ("lost results", "lost"),
            ("connect, ms: p50", "connect_p50"),
            ("p99", "connect_p99"),
            ("max", "connect_max"),
            ("failed or over 1 s, %", "missed_percent"),
            ("close, ms: max", "close_max"),
            ("all over after, ms", "all_ms"),
            ("ListenOverflows", "front_overflows"),
            ("RSTs at the backend", "backend_rsts"),
        ],
        panels: &[
            ("failed or over 1 s, %", "missed_percent"),
            ("worst connect, ms", "connect_max"),
            ("ListenOverflows", "front_overflows"),
        ],
        legs,
    }
}

/// As "12,345".
fn grouped(value: impl Into<f64>) -> String {
    number(value.into())
}
