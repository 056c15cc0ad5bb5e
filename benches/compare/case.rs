//! What is measured: the kinds, and the cases of each that the options ask for.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use crate::{Options, fanout, peers::Peer, report::size, transport::Transport};

/// The payload that idle sessions have echoed once in the second of their two cases, and that of a short session.
const IDLE_BYTES: usize = 16 * 1024;
const SHORT_BYTES: usize = 64;

/// Sessions of `echo` that more of them are compared with.
pub const FEW: u32 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Measure {
    /// Closed loop of messages: CPU time per message
    Echo,
    /// Sessions that do nothing: memory per session
    Idle,
    /// Connect, upgrade, one echo, Close handshake: CPU time per session
    Churn,
    /// Thousands that connect at once, upgrade, one echo, Close handshake: who gets through, and when
    Spike,
    /// A spike each second
    Waves,
    /// Sessions that are held while others come all at once
    Held,
    /// A feed with many who watch it: CPU time per delivered message, and how long it is under way
    Fanout,
    /// A few clients more per second, up to hundreds: connect, wait, send, get the result, close
    Ramp,
    /// Messages at a fixed rate, over hundreds of sessions: how long they are under way, and CPU time per message
    Open,
    /// Clients that leave in the middle of a result: what the backend sees, and who resets whom
    Audit,
    /// An orderly stop of the proxy under talking sessions: what clients see, and when
    Drain,
    /// The backend is killed under talking sessions: what clients see, and when
    Kill,
}

impl Measure {
    /// Whether its legs are to have network namespaces. The others are on loopback, as they always were.
    pub fn in_namespaces(self) -> bool {
        match self {
            Self::Echo | Self::Idle | Self::Churn | Self::Fanout | Self::Open | Self::Drain | Self::Kill => false,
            Self::Spike | Self::Waves | Self::Held | Self::Ramp | Self::Audit => true,
        }
    }
}

/// A row of a table, for every peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "measure", rename_all = "lowercase")]
pub enum Case {
    Echo {
        bytes: usize,
        sessions: u32,
        /// Messages under way at once; as many as sessions: each always has one.
        under_way: u32,
        transport: Transport,
    },
    Idle {
        /// That each has echoed once; 0: nothing.
        bytes: usize,
        sessions: u32,
        transport: Transport,
    },
    Churn {
        bytes: usize,
        transport: Transport,
    },
    Spike {
        clients: u32,
        /// None: what the host has.
        somaxconn: Option<u32>,
        plain: bool,
    },
    Waves {
        waves: u32,
        /// Of each wave.
        clients: u32,
        somaxconn: Option<u32>,
    },
    Held {
        sessions: u32,
        /// That come meanwhile.
        clients: u32,
        somaxconn: Option<u32>,
    },
    Ramp {
        /// At once, in the end.
        clients: u32,
        somaxconn: Option<u32>,
    },
    Fanout {
        watchers: u32,
        /// By threads of the kernel, and not by who sends.
        received_apart: bool,
    },
    Open {
        sessions: u32,
        /// Messages in a second, of all of them.
        rate: u32,
        bytes: usize,
    },
    Audit {
        /// For the answering Close and the FIN.
        waits: bool,
        sessions: u32,
        somaxconn: Option<u32>,
    },
    Drain {
        sessions: u32,
    },
    Kill {
        sessions: u32,
    },
}

/// In the order in which they are measured.
pub fn all(options: &Options, in_namespaces: bool) -> Vec<Case> {
    let somaxconns: Vec<Option<u32>> =
        if in_namespaces { options.somaxconn.iter().copied().map(Some).collect() } else { vec![None] };
    let deepest = somaxconns.iter().copied().max().flatten();
    // How a session began makes no difference to one that lasts.
    let lasting = options.transport.iter().copied().filter(|transport| *transport != Transport::Resumed);
    let mut cases = Vec::new();
    for measure in &options.only {
        match measure {
            Measure::Echo => {
                for &bytes in &options.sizes {
                    for &sessions in &options.connections {
                        let under_way = options.under_way.unwrap_or(sessions).min(sessions);
                        let case = |transport| Case::Echo { bytes, sessions, under_way, transport };
                        cases.extend(lasting.clone().map(case));
                    }
                }
            }
            Measure::Idle => {
                let sessions = options.sessions;
                for bytes in [0, IDLE_BYTES] {
                    cases.extend(lasting.clone().map(|transport| Case::Idle { bytes, sessions, transport }));
                }
            }
            Measure::Churn => {
                let transports = options.transport.iter().copied();
                cases.extend(transports.map(|transport| Case::Churn { bytes: SHORT_BYTES, transport }));
            }
            Measure::Spike => {
                for &clients in &options.spike {
                    for &somaxconn in &somaxconns {
                        cases.push(Case::Spike { clients, somaxconn, plain: options.plain });
                    }
                }
            }
            Measure::Waves => {
                let (waves, clients) = (options.waves, options.wave_clients);
                cases.extend(somaxconns.iter().map(|&somaxconn| Case::Waves { waves, clients, somaxconn }));
            }
            Measure::Held => {
                let (sessions, clients) = (options.held, options.held_clients);
                cases.extend(somaxconns.iter().map(|&somaxconn| Case::Held { sessions, clients, somaxconn }));
            }
            Measure::Fanout => {
                let received_apart = options.receive_apart;
                cases.extend(options.watchers.iter().map(|&watchers| Case::Fanout { watchers, received_apart }));
            }
            // So few at a time that no queue is ever filled: one is enough.
            Measure::Ramp => {
                cases.push(Case::Ramp { clients: options.ramp_clients, somaxconn: deepest });
            }
            Measure::Open => {
                let (sessions, rate, bytes) = (options.open_sessions, options.open_rate, options.open_bytes);
                cases.push(Case::Open { sessions, rate, bytes });
            }
            Measure::Audit => {
                let sessions = options.audit_sessions;
                cases.extend([false, true].map(|waits| Case::Audit { waits, sessions, somaxconn: deepest }));
            }
            Measure::Drain => cases.push(Case::Drain { sessions: options.ending_sessions }),
            Measure::Kill => cases.push(Case::Kill { sessions: options.ending_sessions }),
        }
    }
    cases
}

impl Case {
    pub fn measure(self) -> &'static str {
        match self {
            Self::Echo { .. } => "echo",
            Self::Idle { .. } => "idle",
            Self::Churn { .. } => "churn",
            Self::Spike { .. } => "spike",
            Self::Waves { .. } => "waves",
            Self::Held { .. } => "held",
            Self::Ramp { .. } => "ramp",
            Self::Fanout { .. } => "fanout",
            Self::Open { .. } => "open",
            Self::Audit { .. } => "audit",
            Self::Drain { .. } => "drain",
            Self::Kill { .. } => "kill",
        }
    }

    /// Payload of a message.
    pub fn bytes(self) -> usize {
        match self {
            Self::Echo { bytes, .. }
            | Self::Idle { bytes, .. }
            | Self::Churn { bytes, .. }
            | Self::Open { bytes, .. } => bytes,
            Self::Spike { .. }
            | Self::Waves { .. }
            | Self::Held { .. }
            | Self::Ramp { .. }
            | Self::Audit { .. }
            | Self::Drain { .. }
            | Self::Kill { .. } => SHORT_BYTES,
            Self::Fanout { .. } => fanout::BYTES,
        }
    }

    pub fn transport(self) -> Transport {
        match self {
            Self::Echo { transport, .. } | Self::Idle { transport, .. } | Self::Churn { transport, .. } => transport,
            _ => Transport::Plain,
        }
    }

    /// The same over TCP.
    pub fn plain(self) -> Self {
        let mut plain = self;
        if let Self::Echo { transport, .. } | Self::Idle { transport, .. } | Self::Churn { transport, .. } = &mut plain
        {
            *transport = Transport::Plain;
        }
        plain
    }

    /// The same with [`FEW`] sessions, where as many messages are under way.
    pub fn with_few(self) -> Option<Self> {
        match self {
            Self::Echo { bytes, sessions, under_way, transport } if sessions != FEW => {
                Some(Self::Echo { bytes, sessions: FEW, under_way: under_way.min(FEW), transport })
            }
            _ => None,
        }
    }

    /// At once, at most; 0: few.
    pub fn sessions(self) -> u64 {
        match self {
            Self::Churn { .. } => 0,
            Self::Echo { sessions: count, .. }
            | Self::Idle { sessions: count, .. }
            | Self::Open { sessions: count, .. }
            | Self::Audit { sessions: count, .. }
            | Self::Drain { sessions: count }
            | Self::Kill { sessions: count }
            | Self::Spike { clients: count, .. }
            | Self::Waves { clients: count, .. }
            | Self::Ramp { clients: count, .. }
            | Self::Fanout { watchers: count, .. } => count.into(),
            Self::Held { sessions, clients, .. } => u64::from(sessions) + u64::from(clients),
        }
    }

    /// Whether those that failed have cost as much as those that count.
    pub fn counts_failures(self) -> bool {
        !matches!(self, Self::Echo { .. } | Self::Churn { .. } | Self::Open { .. })
    }

    /// Of the proxy's namespace. None: no namespace.
    pub fn somaxconn(self) -> Option<u32> {
        match self {
            Self::Echo { .. }
            | Self::Idle { .. }
            | Self::Churn { .. }
            | Self::Fanout { .. }
            | Self::Open { .. }
            | Self::Drain { .. }
            | Self::Kill { .. } => None,
            Self::Spike { somaxconn, .. }
            | Self::Audit { somaxconn, .. }
            | Self::Waves { somaxconn, .. }
            | Self::Held { somaxconn, .. }
            | Self::Ramp { somaxconn, .. } => somaxconn,
        }
    }

    /// Whether it is measured through `peer`; `asked`: whether the user has said what is to be measured.
    pub fn is_for(self, peer: Peer, asked: bool) -> bool {
        let speaks = match self.transport() {
            Transport::Plain => true,
            // The backend is as it always was.
            Transport::Tls | Transport::Resumed => {
                !matches!(peer, Peer::Direct | Peer::Null | Peer::Envoy | Peer::Caddy)
            }
            // nginx has no RFC 8441.
            Transport::H2 => !matches!(peer, Peer::Direct | Peer::Null | Peer::Nginx | Peer::Envoy | Peer::Caddy),
        };
        let is_variant = matches!(peer, Peer::Tidegate1 | Peer::Tidegate2 | Peer::Broadcast | Peer::Batched);
        speaks
            && match self {
                Self::Ramp { .. } => match peer {
                    Peer::Direct | Peer::Tidegate1 | Peer::Tidegate2 | Peer::Other => true,
                    Peer::Null | Peer::Nginx | Peer::Haproxy | Peer::Envoy | Peer::Caddy => asked,
                    Peer::Tidegate | Peer::Broadcast | Peer::Batched => false,
                },
                // Without a proxy there is no memory of a proxy.
                Self::Idle { .. } => peer != Peer::Direct && !is_variant,
                Self::Fanout { .. } => matches!(peer, Peer::Broadcast | Peer::Batched) || !is_variant,
                // How little a proxy may cost says nothing of how a session should end.
                Self::Audit { .. } | Self::Kill { .. } => peer != Peer::Null && !is_variant,
                Self::Drain { .. } => !matches!(peer, Peer::Direct | Peer::Null) && !is_variant,
                _ => !is_variant,
            }
    }
}

/// Without what is in the title of its table.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Churn { bytes, transport: Transport::Tls } => write!(f, "{}, TLS, full handshake", size(*bytes)),
            Self::Echo { bytes, sessions: 1, transport, .. } => write!(f, "{}, 1 session{transport}", size(*bytes)),
            Self::Echo { bytes, sessions, under_way, transport } => {
                write!(f, "{}, {sessions} sessions{transport}", size(*bytes))?;
                if under_way < sessions { write!(f, ", {under_way} under way") } else { Ok(()) }
            }
            Self::Idle { bytes: 0, transport, .. } => write!(f, "no message{transport}"),
            Self::Idle { bytes, transport, .. } | Self::Churn { bytes, transport } => {
                write!(f, "{}{transport}", size(*bytes))
            }
            Self::Spike { clients, plain: false, .. } => write!(f, "{clients} sessions"),
            Self::Spike { clients, plain: true, .. } => write!(f, "{clients} plain GETs"),
            Self::Waves { waves, clients, .. } => write!(f, "{waves} waves of {clients} sessions"),
            Self::Held { sessions, clients, .. } => write!(f, "{clients} come to {sessions}"),
            Self::Ramp { clients, .. } => write!(f, "{clients} at once"),
            Self::Fanout { watchers, received_apart: false } => write!(f, "{watchers} watchers"),
            Self::Fanout { watchers, received_apart: true } => write!(f, "{watchers} watchers, received apart"),
            Self::Open { sessions, rate, bytes } => {
                write!(f, "{rate} messages/s of {}, {sessions} sessions", size(*bytes))
            }
            Self::Audit { waits: false, sessions, .. } => write!(f, "{sessions} leave at once"),
            Self::Audit { waits: true, sessions, .. } => write!(f, "{sessions} wait for Close and FIN"),
            Self::Drain { sessions } | Self::Kill { sessions } => write!(f, "{sessions} sessions"),
        }?;
        self.somaxconn().map_or(Ok(()), |somaxconn| write!(f, ", somaxconn {somaxconn}"))
    }
}
