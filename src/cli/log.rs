//! Where log lines go: stdout, as JSON or text, from a thread of their own.
//!
//! A reader of the log that stops reading must not stop the proxy: lines wait in a bounded queue, and beyond it they
//! are dropped.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::{self, IsTerminal as _, Write as _},
    panic,
    str::FromStr as _,
};

use anyhow::Context as _;
use tracing::error;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::Targets, fmt, layer::SubscriberExt as _, registry, reload, util::SubscriberInitExt as _,
};

use crate::{
    config::{Log, LogFormat},
    reload::SetFilter,
};

/// Lines that may wait for the reader.
const QUEUE: usize = 16 * 1024;

/// What panics say goes to the log, except for what was formatted: that may be of a client's bytes.
fn log_panics() {
    panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        let what = info.payload().downcast_ref::<&'static str>();
        // With RUST_BACKTRACE=1.
        let trace = Backtrace::capture();
        let trace = (trace.status() == BacktraceStatus::Captured).then(|| trace.to_string());
        // The log may be off, or too full.
        let _ = writeln!(io::stderr(), "panic at {at}");
        error!(at, what, trace, "panic: this is a bug in tidegate, please report it");
    }));
}

/// Sets the process's log up; what waits is written when the guard is dropped. The filter can be replaced.
pub(super) fn init(config: &Log) -> anyhow::Result<(WorkerGuard, SetFilter)> {
    let (filter, handle) = reload::Layer::new(Targets::from_str(&config.filter).context("log.filter")?);
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE).thread_name("log").finish(io::stdout());
    let lines = fmt::layer().with_writer(writer).with_target(false);
    let json = match config.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stdout().is_terminal(),
    };
    let subscriber = registry().with(filter);
    let result = if json {
        let lines = lines.json().flatten_event(true).with_current_span(false).with_span_list(false);
        subscriber.with(lines).try_init()
    } else {
        subscriber.with(lines.with_ansi(io::stdout().is_terminal())).try_init()
    };
    result.map_err(|error| anyhow::anyhow!("the log is set up already: {error}"))?;
    log_panics();
    let set_filter = SetFilter::new(move |text| {
        let filter = Targets::from_str(text).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    });
    Ok((guard, set_filter))
}
