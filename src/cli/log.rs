//! Where log lines go: stdout, as JSON or text, through a bounded queue.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt,
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    os::fd::AsFd as _,
    panic,
    str::FromStr as _,
    sync::Arc,
};

use anyhow::Context as _;
use tracing::error;
use tracing_subscriber::{
    filter::Targets, fmt::layer as fmt_layer, layer::SubscriberExt as _, registry, reload, util::SubscriberInitExt as _,
};

use crate::{
    config::{self, LogFormat},
    log_lines::JsonLines,
    log_queue::{LastLines, LogQueue},
    reload::Log,
};

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

/// The log of this process.
struct Running {
    set_filter: Box<SetFilter>,
    queue: LogQueue,
}

type SetFilter = dyn Fn(Targets) -> Result<(), reload::Error> + Send + Sync;

impl Log for Running {
    fn set_filter(&self, filter: &str) -> Result<(), String> {
        let filter = Targets::from_str(filter).map_err(|error| error.to_string())?;
        (self.set_filter)(filter).map_err(|error| error.to_string())
    }

    fn dropped(&self) -> u64 {
        self.queue.dropped()
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

/// Sets the process's log up. The filter can be replaced.
pub(super) fn init(config: &config::Log) -> anyhow::Result<(LastLines, Arc<dyn Log>)> {
    let (filter, handle) = reload::Layer::new(Targets::from_str(&config.filter).context("log.filter")?);
    // Without the buffer of `io::stdout()`, and without its lock, which others would wait for while the reader does not read.
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned().context("stdout")?);
    let (queue, last) = LogQueue::start(stdout).context("the log's thread")?;
    let json = match config.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stdout().is_terminal(),
    };
    let subscriber = registry().with(filter);
    let result = if json {
        subscriber.with(JsonLines::new(queue.clone())).try_init()
    } else {
        let lines = fmt_layer().with_writer(queue.clone()).with_target(false).with_ansi(io::stdout().is_terminal());
        subscriber.with(lines).try_init()
    };
    result.map_err(|error| anyhow::anyhow!("the log is set up already: {error}"))?;
    log_panics();
    Ok((last, Arc::new(Running { set_filter: Box::new(move |filter| handle.reload(filter)), queue })))
}
