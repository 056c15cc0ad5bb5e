//! tidegate: a reverse-proxy sidecar for WebSocket backends that ends every connection in an orderly way.
//!
//! # Layout
//!
//! A module uses only modules on floors below its own (`ARCHITECTURE.md` has the invariants):
//!
//! ```text
//! 5  main.rs  cli/  demo/                              process, subcommands, exit codes
//! 4  server.rs  admin/  config/                        assembly, signals, phases, TOML
//! 3  session.rs                                        the one place that knows the order of a session
//! 2  listen/  downstream/  upstream/  relay/  close.rs rooms that do not import one another
//! 1  drain.rs  metrics.rs  net.rs                      mechanisms that everybody shares
//! 0  ws/                                               RFC 6455 on bytes: no tokio, no clock, no log
//! ```

pub mod admin;
pub mod cli;
pub mod close;
pub mod config;
pub mod demo;
pub mod downstream;
pub mod drain;
pub mod listen;
pub mod metrics;
pub mod net;
pub mod relay;
pub mod server;
pub mod session;
pub mod upstream;
pub mod ws;
