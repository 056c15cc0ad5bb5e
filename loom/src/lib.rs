//! The upstream pool alone, with loom's locks and threads in the place of its own: `cargo test` here goes through every
//! order in which threads can reach its locks. The models are in `src/pool/loom.rs`.

#[path = "../../src/pool/mod.rs"]
pub mod pool;
