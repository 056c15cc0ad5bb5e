//! All integration tests, in one binary.

mod harness;

mod architecture;
mod close_table;
mod cold_pool;
mod config;
mod crowd;
mod delay_matrix;
mod doctor;
mod drain;
mod drain_pace;
mod endpoints;
mod fault;
mod floods;
mod handshake;
mod harness_self;
mod http;
mod idle;
mod injection;
mod lifetime;
mod linger;
mod listeners;
mod memory;
mod multiplexed;
mod pod;
mod pool_bursts;
mod proxied;
mod reload;
mod resources;
mod restart;
mod rollout;
mod routes;
mod secure;
mod shared_endpoints;
mod spike;
mod tls;
