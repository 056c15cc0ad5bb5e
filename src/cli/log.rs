//! Where log lines go: stdout, as JSON or text, from a thread of their own.
//!
//! A reader of the log that stops reading must not stop the proxy: lines wait in a bounded queue, and beyond it they
//! are dropped.

use std::io::{self, IsTerminal as _};

use anyhow::Context as _;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::{
    config::{Log, LogFormat},
    reload::SetFilter,
};

/// Lines that may wait for the reader.
const QUEUE: usize = 16 * 1024;

/// Sets the process's log up; what waits is written when the guard is dropped. The filter can be replaced.
pub(super) fn init(config: &Log) -> anyhow::Result<(WorkerGuard, SetFilter)> {
    let filter = EnvFilter::try_new(&config.filter).context("log.filter")?;
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE).thread_name("log").finish(io::stdout());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    let json = match config.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stdout().is_terminal(),
    };
    let (result, set_filter) = if json {
        let subscriber = subscriber.json().flatten_event(true).with_current_span(false).with_span_list(false);
        let subscriber = subscriber.with_filter_reloading();
        let filter = subscriber.reload_handle();
        (subscriber.try_init(), replacing(move |new| filter.reload(new).map_err(Into::into)))
    } else {
        let subscriber = subscriber.with_ansi(io::stdout().is_terminal()).with_filter_reloading();
        let filter = subscriber.reload_handle();
        (subscriber.try_init(), replacing(move |new| filter.reload(new).map_err(Into::into)))
    };
    result.map_err(|error| anyhow::anyhow!("the log is set up already: {error}"))?;
    Ok((guard, set_filter))
}

fn replacing(replace: impl Fn(EnvFilter) -> anyhow::Result<()> + Send + 'static) -> SetFilter {
    SetFilter::new(move |text| {
        let filter = EnvFilter::try_new(text).map_err(anyhow::Error::from);
        filter.and_then(&replace).map_err(|error| error.to_string())
    })
}
