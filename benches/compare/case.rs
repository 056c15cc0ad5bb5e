//! What is measured: the kinds, and the cases of each that the options ask for.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use crate::{Options, peers::Peer, report::size};

/// The payload that every idle session has echoed once, and that of a short session.
const IDLE_BYTES: usize = 16 * 1024;
const SHORT_BYTES: usize = 64;

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
}

impl Measure {
    /// Whether its legs are to have network namespaces. The others are on loopback, as they always were.
    pub fn in_namespaces(self) -> bool {
        match self {
            Self::Echo | Self::Idle | Self::Churn => false,
            Self::Spike => true,
        }
    }
}

/// A row of a table, for every peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "measure", rename_all = "lowercase")]
pub enum Case {
    Echo {
        bytes: usize,
    },
    Idle {
        bytes: usize,
        sessions: u32,
    },
    Churn {
        bytes: usize,
    },
    Spike {
        clients: u32,
        /// None: what the host has.
        somaxconn: Option<u32>,
        plain: bool,
    },
}

/// In the order in which they are measured.
pub fn all(options: &Options, in_namespaces: bool) -> Vec<Case> {
    let somaxconns: Vec<Option<u32>> =
        if in_namespaces { options.somaxconn.iter().copied().map(Some).collect() } else { vec![None] };
    let mut cases = Vec::new();
    for measure in &options.only {
        match measure {
            Measure::Echo => cases.extend(options.sizes.iter().map(|&bytes| Case::Echo { bytes })),
            Measure::Idle => cases.push(Case::Idle { bytes: IDLE_BYTES, sessions: options.sessions }),
            Measure::Churn => cases.push(Case::Churn { bytes: SHORT_BYTES }),
            Measure::Spike => {
                for &clients in &options.spike {
                    for &somaxconn in &somaxconns {
                        cases.push(Case::Spike { clients, somaxconn, plain: options.plain });
                    }
                }
            }
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
        }
    }

    /// Payload of a message.
    pub fn bytes(self) -> usize {
        match self {
            Self::Echo { bytes } | Self::Idle { bytes, .. } | Self::Churn { bytes } => bytes,
            Self::Spike { .. } => SHORT_BYTES,
        }
    }

    /// At once, at most; 0: few.
    pub fn sessions(self) -> u64 {
        match self {
            Self::Echo { .. } | Self::Churn { .. } => 0,
            Self::Idle { sessions: count, .. } | Self::Spike { clients: count, .. } => count.into(),
        }
    }

    /// Of the proxy's namespace. None: no namespace.
    pub fn somaxconn(self) -> Option<u32> {
        match self {
            Self::Echo { .. } | Self::Idle { .. } | Self::Churn { .. } => None,
            Self::Spike { somaxconn, .. } => somaxconn,
        }
    }

    pub fn is_for(self, peer: Peer) -> bool {
        match self {
            // Without a proxy there is no memory of a proxy.
            Self::Idle { .. } => peer != Peer::Direct,
            Self::Echo { .. } | Self::Churn { .. } | Self::Spike { .. } => true,
        }
    }
}

/// Without what is in the title of its table.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Echo { bytes } | Self::Idle { bytes, .. } | Self::Churn { bytes } => f.write_str(&size(*bytes)),
            Self::Spike { clients, somaxconn, plain } => {
                write!(f, "{clients} {}", if *plain { "plain GETs" } else { "sessions" })?;
                somaxconn.map_or(Ok(()), |somaxconn| write!(f, ", somaxconn {somaxconn}"))
            }
        }
    }
}
