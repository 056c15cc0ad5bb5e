//! The process; everything is in [`tidegate::cli`].

/// Sessions come and go by the thousand, on whichever worker: docs/benchmarks.md has what that is worth.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tidegate::cli::main()
}
