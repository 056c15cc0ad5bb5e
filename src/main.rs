//! The process; everything is in [`tidegate::cli`].

fn main() -> std::process::ExitCode {
    tidegate::cli::main()
}
