//! The command line: subcommands, what they print, how the process ends.
//!
//! Data on stdout, everything else on stderr. Exit codes: 0; 1 when running failed; 2 for a command line that cannot be
//! understood; 78 (`EX_CONFIG` of sysexits.h) for a configuration that cannot be used.

mod connections;
mod log;
#[cfg(feature = "manual")]
mod manual;
mod operate;
mod status;
mod table;

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
#[cfg(feature = "manual")]
use clap::CommandFactory as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio_util::sync::CancellationToken;

use self::{
    connections::Wanted,
    operate::{Admin, Way},
};
use crate::{
    config::{self, FileSource, Finding, Findings, Level, Loaded, Place, Route, Settings, Sources},
    demo,
    doctor::{Facts, Report, diagnose},
    net::Address,
    reload, server,
    system::System,
    token::Token,
};

const RUNTIME: u8 = 1;
const CONFIGURATION: u8 = 78;

/// A reverse-proxy sidecar for WebSocket backends that ends every connection in an orderly way
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 success, 1 runtime error, 2 usage, 78 configuration")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy
    #[command(after_help = "--listen and --upstream together need no file; a file that is found is used underneath.")]
    Run {
        #[command(flatten)]
        file: File,
        /// Where clients connect, over listen.address: "0.0.0.0:8080"
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
        #[arg(long, value_name = "ADDR")]
        #[arg(help = "The backend, over upstream.address: \"127.0.0.1:9000\" or \"unix:/run/app.sock\"")]
        upstream: Option<String>,
    },
    /// Run the proxy in front of a built-in backend, to try it out
    Demo {
        /// The configuration file [default: the one built in]; its upstream.address and routes are not used
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Where clients connect, over listen.address: "127.0.0.1:8080"
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
    },
    /// Check a configuration file and the environment, without running anything
    Check {
        #[command(flatten)]
        file: File,
    },
    /// Say what this host, container or pod will do to the proxy, and how to fix it
    #[command(
        after_help = "It reads and changes nothing. Run it where the proxy runs: it sees its own limits and namespaces.\n\
                            Exit codes: 0 nothing will bite, 1 something will, 78 configuration"
    )]
    Doctor {
        #[command(flatten)]
        file: File,
        /// Where clients connect, over listen.address: "0.0.0.0:8080"
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
        #[arg(long, value_name = "ADDR")]
        #[arg(help = "The backend, over upstream.address: \"127.0.0.1:9000\" or \"unix:/run/app.sock\"")]
        upstream: Option<String>,
        /// In which format
        #[arg(long, value_enum, default_value_t = Form::Text)]
        format: Form,
    },
    /// Drain the proxy that runs here: clients are sent away one by one, with a Close
    #[command(
        after_help = "It asks the admin listener (POST /drain). The drained process stays until SIGTERM ends it.\n\
                            Exit codes: 0 done, 1 it can't be reached, or it is too late to undo"
    )]
    Drain {
        #[command(flatten)]
        admin: AdminAt,
        /// Wait until it is drained [the default]
        #[arg(long)]
        wait: bool,
        /// Only begin it
        #[arg(long, conflicts_with = "wait")]
        no_wait: bool,
        /// Go on as if nothing had been: until the listeners are closed (drain.delay)
        #[arg(long, conflicts_with_all = ["wait", "no_wait"])]
        undo: bool,
    },
    /// Have the proxy that runs here read its configuration again: what was applied, what takes a restart, as JSON
    #[command(after_help = "It asks the admin listener (POST /reload), as SIGHUP would.\n\
                            Exit codes: 0 done, 1 rejected: nothing has changed; or it can't be reached, or does not answer")]
    Reload {
        #[command(flatten)]
        admin: AdminAt,
    },
    /// Give the log of the proxy that runs here another filter, until log.filter is changed, or a restart: "info,tidegate=debug"
    #[command(after_help = "It asks the admin listener (POST /log).\n\
                            Exit codes: 0 done, 1 it is no filter, or the proxy can't be reached")]
    Log {
        /// A level, and levels of modules, as in log.filter
        filter: String,
        #[command(flatten)]
        admin: AdminAt,
    },
    /// List the sessions of the proxy that runs here, the oldest first
    #[command(after_help = "It asks the admin listener (GET /connections).\n\
                            Exit codes: 0 done, 1 it can't be reached, or does not understand the question")]
    Connections {
        #[command(flatten)]
        wanted: Wanted,
        /// In which format; as JSON also the connections that they share
        #[arg(long, value_enum, default_value_t = Form::Text)]
        format: Form,
        #[command(flatten)]
        admin: AdminAt,
    },
    /// Show what the proxy that runs here is doing, on one screen: what is wrong, who ended how, what is full
    #[command(after_help = "It asks the admin listener (GET /live.json).\n\
                            Exit codes: 0 done, 1 it can't be reached")]
    Status {
        /// Once in a second, until Ctrl-C
        #[arg(long, conflicts_with = "format")]
        watch: bool,
        /// In which format; JSON is one line
        #[arg(long, value_enum, default_value_t = Form::Text)]
        format: Form,
        #[command(flatten)]
        admin: AdminAt,
    },
    /// Print settings
    Config {
        #[command(flatten)]
        file: File,
        /// Print the built-in proxy.toml: every key, its default, what it does
        #[arg(long, conflicts_with_all = ["effective", "config"])]
        default: bool,
        /// Print what `run` would use, and where each value comes from [the default]
        #[arg(long)]
        effective: bool,
        /// Print a JSON schema of proxy.toml, for editors
        #[cfg(feature = "manual")]
        #[arg(long, conflicts_with_all = ["default", "effective", "config", "format"])]
        schema: bool,
        /// In which format
        #[arg(long, value_enum, default_value_t = Format::Toml)]
        format: Format,
    },
    /// Print what a shell needs to complete this command
    #[cfg(feature = "manual")]
    Completions {
        /// For which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the manual page, for `man -l -`
    #[cfg(feature = "manual")]
    Man {
        /// That of a subcommand
        command: Option<String>,
        /// Write all pages into this folder instead
        #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
        to: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
struct File {
    #[arg(short, long, value_name = "FILE")]
    #[arg(help = "The configuration file [default: $TIDEGATE_CONFIG, ./proxy.toml, /etc/tidegate/proxy.toml]")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AdminAt {
    #[command(flatten)]
    file: File,
    /// The admin listener, over admin.address: "127.0.0.1:9090"
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    #[arg(long, value_name = "FILE")]
    #[arg(help = "A file with its token, over admin.token_file: for a proxy that runs elsewhere")]
    token_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// As in proxy.toml
    Toml,
    /// The same sections, keys and values
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Runs the command line of this process to its end.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Also --help and --version, which exit with 0. Nobody is left to hear that stdout is closed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(RUNTIME));
        }
    };
    let result = match cli.command {
        Command::Run { file, listen, upstream } => {
            let sources = Sources::from_process(file.config, listen, upstream);
            let source = reload::Source::new(sources.clone());
            load(&sources).map(|loaded| serve(&loaded, source))
        }
        Command::Demo { config, listen } => {
            let file = config.map_or(FileSource::Shipped, |path| FileSource::Named { path, by: "--config" });
            load(&Sources { file, ..Sources::from_process(None, listen, None) }).map(|loaded| demo(loaded.settings))
        }
        Command::Check { file } => check(&Sources::from_process(file.config, None, None)),
        Command::Doctor { file, listen, upstream, format } => {
            match doctor(&Sources::from_process(file.config, listen, upstream), format) {
                // Said already, and no error of this program.
                Ok(Ok(true)) => return ExitCode::from(RUNTIME),
                other => other.map(|printed| printed.map(drop)),
            }
        }
        Command::Drain { admin, wait: _, no_wait, undo } => Ok(admin.find().and_then(|admin| {
            let way = match (no_wait, undo) {
                (_, true) => Way::Undo,
                (true, false) => Way::NoWait,
                (false, false) => Way::Wait,
            };
            print(&operate::drain(&admin, way)?)
        })),
        Command::Reload { admin } => Ok(admin.find().and_then(|admin| print(&operate::reload(&admin)?))),
        Command::Log { filter, admin } => Ok(admin.find().and_then(|admin| print(&operate::log(&admin, &filter)?))),
        Command::Connections { wanted, format, admin } => Ok(admin.find().and_then(|admin| match format {
            Form::Json => print(&connections::json(&admin, &wanted)?),
            Form::Text => {
                let (table, count) = connections::table(&admin, &wanted)?;
                print(&table)?;
                complain(&count);
                Ok(())
            }
        })),
        Command::Status { watch, format, admin } => Ok(admin.find().and_then(|admin| match format {
            _ if watch => status::watch(&admin),
            Form::Text => print(&status::screen(&admin)?),
            Form::Json => print(&status::json(&admin)?),
        })),
        #[cfg(feature = "manual")]
        Command::Config { schema: true, .. } => Ok(print(&json(&config::schema()))),
        Command::Config { default: true, format, .. } => Ok(print(&match format {
            Format::Toml => config::SHIPPED.to_owned(),
            Format::Json => json(&Settings::shipped()),
        })),
        Command::Config { file, format, .. } => load(&Sources::from_process(file.config, None, None)).map(|loaded| {
            print(&match format {
                Format::Toml => loaded.to_toml(),
                Format::Json => json(&loaded.settings),
            })
        }),
        #[cfg(feature = "manual")]
        Command::Completions { shell } => {
            Ok(manual::completions(Cli::command(), shell).and_then(|script| print(&script)))
        }
        #[cfg(feature = "manual")]
        Command::Man { to: Some(folder), .. } => Ok(manual::pages(Cli::command(), &folder)),
        #[cfg(feature = "manual")]
        Command::Man { command, .. } => {
            Ok(manual::page(Cli::command(), command.as_deref()).and_then(|page| print(&page)))
        }
    };
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            complain(&format!("error: {error:#}"));
            ExitCode::from(RUNTIME)
        }
        Err(findings) => {
            complain(&findings);
            ExitCode::from(CONFIGURATION)
        }
    }
}

impl AdminAt {
    /// A file that is broken by now does not keep the process from being drained: it runs on what it read before.
    fn find(self) -> anyhow::Result<Admin> {
        let token = self.token_file.as_deref().map(Token::read).transpose();
        let token = token.map_err(|error| anyhow::anyhow!("--token-file {error}"))?;
        if let Some(address) = self.admin {
            return Ok(Admin { address, token });
        }
        let sources = Sources::from_process(self.file.config, None, None);
        let settings = match config::load(&sources) {
            Ok(loaded) => loaded.settings,
            Err(findings) => {
                complain(&findings);
                let settings = config::as_far_as_it_is_good(&sources);
                let address = settings.admin.address.map_or("off".to_owned(), |address| address.to_string());
                complain(&format!("warning: going on with admin.address = {address:?}; --admin ADDR names another"));
                settings
            }
        };
        let address = settings.admin.address.context("admin.address is \"off\": there is nobody to ask")?;
        Ok(Admin { address, token: token.or(settings.admin.token) })
    }
}

fn serve(loaded: &Loaded, mut source: reload::Source) -> anyhow::Result<()> {
    let settings = &loaded.settings;
    let (_flushed_at_the_end, log) = log::init(&settings.log)?;
    tracing::info!(settings = settings.summary(), "effective");
    source.was_read(loaded);
    server::run(settings, Some(source), log, |_| {})
}

/// The proxy in front of the demo backend, which runs on a thread of its own like the separate program it stands for.
fn demo(mut settings: Settings) -> anyhow::Result<()> {
    let (_flushed_at_the_end, log) = log::init(&settings.log)?;
    let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    settings.upstream.address = Address::Tcp { host: address.ip().to_string(), port: address.port() }.into();
    // What is to be seen of it: one connection for all who watch.
    settings.routes = vec![Route::broadcast(demo::FEED, &settings)];
    let shutdown = CancellationToken::new();
    let backend = {
        let shutdown = shutdown.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("demo-backend".to_owned()).spawn(move || {
            runtime.block_on(async { demo::serve(tokio::net::TcpListener::from_std(listener)?, shutdown).await })
        })?
    };
    // A backend that echoes for everybody has no place on all addresses unless somebody asks for it.
    if settings.listen.address == Settings::default().listen.address {
        settings.listen.address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    // People try a demo with Ctrl-C: it need not wait for endpoints to propagate.
    settings.drain.delay = std::time::Duration::ZERO;
    settings.drain.window = settings.drain.window.min(std::time::Duration::from_secs(1));
    let result = server::run(&settings, None, log, |server| {
        // Data, and so on stdout: what the user came for.
        let _ = print(&demo::instructions(server.address, server.admin));
    });
    shutdown.cancel();
    match backend.join() {
        Ok(served) => served?,
        Err(_) => anyhow::bail!("the demo backend panicked"),
    }
    result
}

/// Loads, and says what is to be said about it even though it is good.
fn load(sources: &Sources) -> Result<Loaded, Findings> {
    let loaded = config::load(sources)?;
    if !loaded.findings.is_empty() {
        complain(&Findings(loaded.findings.clone()));
    }
    Ok(loaded)
}

/// Unlike `run`, finds that there is nothing to check an error: a pipeline must not be green because it found no file.
fn check(sources: &Sources) -> Result<anyhow::Result<()>, Findings> {
    let mut loaded = config::load(sources)?;
    let Some(file) = loaded.file else {
        return Err(Findings(vec![Finding {
            level: Level::Error,
            what: "no configuration file found".to_owned(),
            place: Place::Default,
            fix: "name one: tidegate check --config FILE".to_owned(),
        }]));
    };
    loaded.findings.retain(|finding| finding.level < Level::Note);
    if !loaded.findings.is_empty() {
        complain(&Findings(loaded.findings));
    }
    Ok(print(&format!("ok: {file}\n")))
}

/// Whether something will bite. Without a file, the defaults are compared with, as `run` would use them.
fn doctor(sources: &Sources, format: Form) -> Result<anyhow::Result<bool>, Findings> {
    let mut loaded = config::load(sources)?;
    loaded.findings.retain(|finding| finding.level < Level::Note);
    if !loaded.findings.is_empty() {
        complain(&Findings(loaded.findings));
    }
    let facts = Facts::gather(&System::default());
    let findings = diagnose(&facts, &loaded.settings);
    let report = Report::new(facts, findings, loaded.file);
    let printed = print(&match format {
        Form::Text => report.to_string(),
        Form::Json => json(&report),
    });
    Ok(printed.map(|()| report.bites()))
}

fn json(data: &impl serde::Serialize) -> String {
    let mut text =
        serde_json::to_string_pretty(data).expect("strings, numbers and lists in maps with string keys are JSON");
    text.push('\n');
    text
}

/// Writes data to stdout. A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes to stderr. Nobody may be listening there, which must not change what the process does, or its exit code.
fn complain(text: &impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}
