//! The process; everything is in [`tidegate::cli`].

/// Sessions come and go by the thousand; docs/benchmarks.md has what it is worth.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tidegate::cli::main()
}
