//! The backend of `tidegate demo` as a program of its own: an ordinary WebSocket server, for a tidegate in front of it.
//!
//! It is the image `tidegate-demo-backend` of k8s/. Deliberately not in it: any option but where it listens.

use std::{net::SocketAddr, process::ExitCode};

use clap::Parser;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

/// The backend of `tidegate demo`: /, /echo, /broadcast, /healthz
#[derive(Debug, Parser)]
struct Cli {
    /// Where it listens
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(&Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Until SIGTERM or SIGINT; then everybody gets Close 1001.
async fn run(cli: &Cli) -> anyhow::Result<()> {
    // Before it listens: as process 1 it would not hear one that comes earlier at all.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = TcpListener::bind(cli.listen).await?;
    println!("the demo backend listens on {}", listener.local_addr()?);
    let shutdown = CancellationToken::new();
    let mut serving = std::pin::pin!(tidegate::demo::serve(listener, shutdown.clone()));
    tokio::select! {
        served = &mut serving => return Ok(served?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shutdown.cancel();
    Ok(serving.await?)
}
