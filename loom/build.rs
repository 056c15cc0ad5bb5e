//! Sets `cfg(loom)` for this crate alone: with RUSTFLAGS it would hold for tokio too, which then lacks what the main crate
//! needs of it, and everything would be built again.

fn main() {
    println!("cargo::rustc-cfg=loom");
    println!("cargo::rerun-if-changed=build.rs");
}
