//! Where log lines go: stdout, as JSON or text, from a thread of their own.
//!
//! A reader of the log that stops reading must not stop the proxy: lines wait in a bounded queue, and beyond it they
//! are dropped.

use std::io::{self, IsTerminal as _};

use anyhow::Context as _;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Lines that may wait for the reader.
const QUEUE: usize = 16 * 1024;

/// Sets the process's log up; what waits is written when the guard is dropped.
pub(super) fn init(config: &Log) -> anyhow::Result<WorkerGuard> {
    let filter = EnvFilter::try_new(&config.filter).context("log.filter")?;
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE).thread_name("log").finish(io::stdout());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    let json = match config.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stdout().is_terminal(),
    };
    let result = if json {
        subscriber.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
    } else {
        subscriber.with_ansi(io::stdout().is_terminal()).try_init()
    };
    result.map_err(|error| anyhow::anyhow!("the log is set up already: {error}"))?;
    Ok(guard)
}
