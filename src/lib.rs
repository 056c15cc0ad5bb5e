//! tidegate: a reverse-proxy sidecar for WebSocket backends that ends every connection in an orderly way.
//!
//! # Layout
//!
//! A module uses only modules on floors below its own (`ARCHITECTURE.md` has the invariants):
//!
//! ```text
//! 6  main.rs  cli/                                     process, subcommands, exit codes
//! 5  server.rs  reload.rs                              assembly, signals, phases; the configuration, read again
//! 4  admin/  config/  demo/  doctor/  notify.rs        probes, metrics, live page, TOML, the demo's backend, diagnosis, what a service
//!    restart.rs                                       manager is told, succession
//! 3  session/  hub/                                    the one place that knows the order of a session; WebSockets that clients share
//! 2  listen/  downstream/  upstream/  relay/  close/     rooms that do not import one another
//! 1  admission/  alarms.rs  budget.rs  drain/
//!    gate.rs  log_lines.rs  metrics.rs  net/  pool/
//!    slots.rs  stamp.rs  system.rs  token.rs           mechanisms that everybody shares
//! 0  ws/  side.rs  fields.rs  sparse.rs                RFC 6455 on bytes: no tokio, no clock, no log; small words
//! ```

pub mod admin;
pub mod admission;
pub mod alarms;
pub mod budget;
pub mod cli;
pub mod close;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod downstream;
pub mod drain;
pub mod fields;
pub mod gate;
pub mod hub;
pub mod listen;
mod log_lines;
mod log_queue;
pub mod metrics;
pub mod net;
pub mod notify;
pub mod pool;
pub mod relay;
pub mod reload;
pub mod restart;
pub mod server;
pub mod session;
pub mod side;
pub mod slots;
pub mod sparse;
pub mod stamp;
pub mod system;
pub mod token;
pub mod upstream;
pub mod ws;
