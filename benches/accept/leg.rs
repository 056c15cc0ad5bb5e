//! One leg: one workload through one assembly, in a network namespace of its own, with new processes.
//!
//! Nothing is pinned: client, proxy and backend share all cores, as they do in a pod.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    Options, Workload,
    backend::Handshakes,
    client::{Connected, Connects, Flood, Sample, Talk, Talked},
    process::{Process, say},
    procfs::{Counters, Cpu, only_listener},
    proxy::{Assembly, Opened, Told, WORKERS},
    report::quantile,
};

/// Between the start of what runs meanwhile and the first connect.
const SETTLE: Duration = Duration::from_secs(1);
/// Connects of this first while are made, and not counted: pages, caches and buffers come up.
const WARMUP: Duration = Duration::from_millis(500);
/// How long the talking sessions are watched before the spike.
const QUIET: Duration = Duration::from_secs(2);
/// And after it: who waited is answered.
const AFTER: Duration = Duration::from_millis(500);
/// Payload of the messages of `echo` and of sessions that talk.
const ECHO_BYTES: usize = 64;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    pub assembly: Assembly,
    pub workload: Workload,
    pub seed: u64,
    pub options: Options,
}

/// A connect, and what the others say of it. Microseconds since it was to begin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub begun: u64,
    pub connected: u64,
    /// The proxy's dial was accepted by the backend.
    pub dialled: Option<i64>,
    /// The backend had the request, and answered.
    pub requested: Option<i64>,
    pub answered: Option<i64>,
    pub upgraded: u64,
    /// The session was relayed, on this thread.
    pub opened: Option<i64>,
    pub thread: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// By the names of the columns.
    pub values: BTreeMap<String, f64>,
    pub first_error: Option<String>,
    pub rows: Vec<Row>,
    pub metrics: HashMap<String, f64>,
}

/// Alone in a namespace: it is made ready, and what runs in it is started and ended here.
pub fn main(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order)?;
    let mut ip = Command::new("ip");
    ensure!(ip.args(["link", "set", "lo", "up"]).status().context("ip")?.success(), "no loopback in the namespace");
    fs::write("/proc/sys/net/core/somaxconn", order.options.somaxconn.to_string()).context("net.core.somaxconn")?;
    say(&run(&order)?)
}

/// What is there for the length of a leg.
struct Stage {
    assembly: Assembly,
    backend: Process,
    backend_address: SocketAddr,
    proxy: Process,
    address: SocketAddr,
}

impl Stage {
    fn new(assembly: Assembly) -> anyhow::Result<Self> {
        let mut backend = Process::start("backend", &[], &[])?;
        let backend_address: SocketAddr = backend.hear()?;
        let arguments = [assembly.to_string(), backend_address.to_string()];
        let mut proxy = Process::start("proxy", &[], &arguments.each_ref().map(String::as_str))?;
        let address = proxy.hear()?;
        let stage = Self { assembly, backend, backend_address, proxy, address };
        stage.only_listeners()?;
        Ok(stage)
    }

    fn only_listeners(&self) -> anyhow::Result<()> {
        only_listener(self.address.port(), &[self.proxy.pid()])?;
        only_listener(self.backend_address.port(), &[self.backend.pid()])
    }

    fn start(&self, name: &'static str, argument: &impl Serialize) -> anyhow::Result<Process> {
        let argument = serde_json::to_string(argument)?;
        Process::start(name, &[], &[&self.address.to_string(), &argument])
    }

    fn connects(&self, connects: Connects) -> anyhow::Result<(Process, Connected)> {
        let mut client = self.start("connects", &connects)?;
        client.hear::<String>()?;
        let connected = client.ask()?;
        // Those who hold their sessions go on.
        Ok((client, connected))
    }
}

fn run(order: &Order) -> anyhow::Result<Outcome> {
    let mut stage = Stage::new(order.assembly)?;
    let counters = Counters::of(stage.proxy.pid())?;
    let mut outcome = match order.workload {
        Workload::Spike => spike(&mut stage, &order.options),
        Workload::Busy => busy(&mut stage, &order.options),
        Workload::Alone => steady(&mut stage, order, None),
        Workload::Saturated => {
            let Options { flood_bytes, flood_buffer, .. } = order.options;
            let flood = stage.start("flood", &Flood { bytes: flood_bytes, send_buffer: flood_buffer })?;
            steady(&mut stage, order, Some(flood))
        }
        Workload::Echo => echo(&mut stage, &order.options),
    }?;
    let counters = Counters::of(stage.proxy.pid())? - counters;
    outcome.values.insert("overflows".to_owned(), per(counters.listen_overflows, 1));
    outcome.values.insert("resets".to_owned(), per(counters.out_rsts, 1));
    stage.only_listeners()?;
    Ok(outcome)
}

fn spike(stage: &mut Stage, options: &Options) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let cpu = Cpu::of(&[stage.proxy.pid()])?;
    let (client, connected) = stage.connects(Connects::AtOnce { count: options.spike })?;
    let cpu = Cpu::of(&[stage.proxy.pid()])? - cpu;
    outcome.connected(connected, stage, cpu)?;
    drop(client);
    Ok(outcome)
}

fn busy(stage: &mut Stage, options: &Options) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let talk = Talk { sessions: options.talkers, per_second: options.talk_rate, bytes: ECHO_BYTES };
    let mut talkers = stage.start("talk", &talk)?;
    talkers.hear::<String>()?;
    thread::sleep(SETTLE);
    talkers.ask::<Talked>()?;
    let cpu = Cpu::of(&[stage.proxy.pid()])?;
    thread::sleep(QUIET);
    let (cpu, quiet) = (Cpu::of(&[stage.proxy.pid()])? - cpu, talkers.ask::<Talked>()?);
    ensure!(!quiet.latencies.is_empty(), "nobody talks: {:?}", quiet.first_error);
    outcome.values.insert("quiet_cpu_us".to_owned(), per(cpu.us(), quiet.latencies.len()));
    outcome.quantiles("quiet_", quiet.latencies);

    let cpu = Cpu::of(&[stage.proxy.pid()])?;
    let (client, connected) = stage.connects(Connects::AtOnce { count: options.busy_spike })?;
    let cpu = Cpu::of(&[stage.proxy.pid()])? - cpu;
    thread::sleep(AFTER);
    let talked = talkers.ask::<Talked>()?;
    outcome.connected(connected, stage, cpu)?;
    outcome.fail(quiet.failures + talked.failures, quiet.first_error.or(talked.first_error));
    outcome.quantiles("message_", talked.latencies);
    drop(client);
    Ok(outcome)
}

/// Connects at a steady rate, beside `flood` or beside nothing.
fn steady(stage: &mut Stage, order: &Order, mut flood: Option<Process>) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let flood_port: Option<u16> = flood.as_mut().map(Process::hear).transpose()?;
    thread::sleep(SETTLE);
    let (threads_before, cpu) = (threads(stage.proxy.pid())?, Cpu::of(&[stage.proxy.pid()])?);
    let sent: Option<u64> = flood.as_mut().map(Process::ask).transpose()?;
    let begun = Instant::now();
    let seconds = WARMUP.as_secs_f64() + order.options.seconds;
    let connects = Connects::Steady { per_second: order.options.rate, seconds, seed: order.seed };
    let (_, mut connected) = stage.connects(connects)?;
    let took = begun.elapsed();
    let cpu = Cpu::of(&[stage.proxy.pid()])? - cpu;
    let shares = shares(&threads_before, &threads(stage.proxy.pid())?, took);
    let sent_after: Option<u64> = flood.as_mut().map(Process::ask).transpose()?;

    let first = connected.samples.iter().map(|sample| sample.at).min().unwrap_or(0);
    let counted = first + u64::try_from(WARMUP.as_micros())?;
    connected.samples.retain(|sample| sample.at >= counted);
    let opened = outcome.connected(connected, stage, cpu)?;
    let busiest = shares.values().copied().fold(0.0, f64::max);
    outcome.values.insert("busiest_share".to_owned(), busiest);
    if let (Some(port), Some(before), Some(after)) = (flood_port, sent, sent_after) {
        let mb_per_second = per(after - before, 1_000_000) / took.as_secs_f64();
        outcome.values.insert("flood_mb_per_second".to_owned(), mb_per_second);
        // With work stealing it is at home on no thread.
        if matches!(order.assembly, Assembly::PerCore | Assembly::HandOff | Assembly::Shared) {
            let there = opened.iter().find(|opened| opened.port == port).context("the flood has no thread")?;
            outcome.split(&there.thread);
        }
    }
    Ok(outcome)
}

/// A closed loop: how much CPU time a message takes.
fn echo(stage: &mut Stage, options: &Options) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut client = stage.start("echo", &ECHO_BYTES)?;
    client.hear::<String>()?;
    thread::sleep(SETTLE);
    let others = [client.pid(), stage.backend.pid()];
    let (cpu, others_cpu, begun) = (Cpu::of(&[stage.proxy.pid()])?, Cpu::of(&others)?, Instant::now());
    let before: u64 = client.ask()?;
    thread::sleep(Duration::from_secs_f64(options.echo_seconds));
    let count = usize::try_from(client.ask::<u64>()? - before)?;
    let (took, cpu) = (begun.elapsed(), Cpu::of(&[stage.proxy.pid()])? - cpu);
    let others_cpu = Cpu::of(&others)? - others_cpu;
    ensure!(count > 0, "no echo");
    outcome.values.extend([
        ("cpu_us".to_owned(), per(cpu.us(), count)),
        ("user_us".to_owned(), per(cpu.user_us, count)),
        ("others_us".to_owned(), per(others_cpu.us(), count)),
        ("per_second".to_owned(), per(u64::try_from(count)?, 1) / took.as_secs_f64()),
    ]);
    let told: Told = stage.proxy.ask()?;
    outcome.spread(stage.assembly, &told.opened);
    outcome.metrics = told.metrics;
    Ok(outcome)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per(sum: u64, count: usize) -> f64 {
    sum as f64 / count.max(1) as f64
}

#[expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]
impl Outcome {
    /// Times in milliseconds.
    fn quantiles(&mut self, prefix: &str, mut micros: Vec<u64>) {
        micros.sort_unstable();
        for (name, per_mille) in [("p50", 500), ("p99", 990), ("p999", 999), ("max", 1000)] {
            self.values.extend(quantile(&micros, per_mille).map(|value| (format!("{prefix}{name}"), value)));
        }
    }

    fn fail(&mut self, failures: u64, error: Option<String>) {
        *self.values.entry("failures".to_owned()).or_default() += failures as f64;
        if self.first_error.is_none() {
            self.first_error = error;
        }
    }

    /// Sessions per thread: how many the one with the most has, in percent of all. With work stealing they have none.
    fn spread(&mut self, assembly: Assembly, opened: &[Opened]) {
        if matches!(assembly, Assembly::Multi1 | Assembly::MultiN) {
            return;
        }
        let mut threads = HashMap::<&str, u64>::new();
        for opened in opened {
            *threads.entry(&opened.thread).or_default() += 1;
        }
        let most = threads.values().max().copied().unwrap_or(0) as f64;
        self.values.insert("most_percent".to_owned(), most * 100.0 / (opened.len().max(1) as f64));
    }

    fn connected(&mut self, connected: Connected, stage: &mut Stage, cpu: Cpu) -> anyhow::Result<Vec<Opened>> {
        let Told { opened, metrics } = stage.proxy.ask()?;
        let handshakes: Handshakes = stage.backend.ask()?;
        let by_port: HashMap<u16, &Opened> = opened.iter().map(|opened| (opened.port, opened)).collect();
        let Connected { samples, failures, first_error } = connected;
        if samples.is_empty() {
            bail!("nobody was connected: {first_error:?}");
        }
        self.quantiles("", samples.iter().map(|sample| sample.upgraded).collect());
        self.quantiles("late_", samples.iter().map(|sample| sample.begun).collect());
        self.values.insert("count".to_owned(), samples.len() as f64);
        self.values.insert("cpu_per_connect_us".to_owned(), cpu.us() as f64 / samples.len() as f64);
        self.fail(failures, first_error);
        let ours: Vec<Opened> =
            samples.iter().filter_map(|sample| by_port.get(&sample.port)).map(|opened| (*opened).clone()).collect();
        self.spread(stage.assembly, &ours);
        self.rows = samples.iter().map(|sample| row(sample, &by_port, &handshakes)).collect();
        self.metrics = metrics;
        Ok(opened)
    }

    /// Those who were served by the thread of the saturating session, and all others.
    fn split(&mut self, there: &str) {
        let (same, other): (Vec<&Row>, Vec<&Row>) = self.rows.iter().partition(|row| row.thread == there);
        let [same, other] = [same, other].map(|rows| rows.iter().map(|row| row.upgraded).collect::<Vec<_>>());
        self.values.insert("same_percent".to_owned(), same.len() as f64 * 100.0 / self.rows.len().max(1) as f64);
        self.quantiles("same_", same);
        self.quantiles("other_", other);
    }
}

fn row(sample: &Sample, opened: &HashMap<u16, &Opened>, handshakes: &Handshakes) -> Row {
    let since = |at: u64| at.checked_signed_diff(sample.at);
    let opened = opened.get(&sample.port);
    let handshake = handshakes.get(&sample.id);
    Row {
        begun: sample.begun,
        connected: sample.connected,
        dialled: handshake.and_then(|handshake| since(handshake.accepted)),
        requested: handshake.and_then(|handshake| since(handshake.read)),
        answered: handshake.and_then(|handshake| since(handshake.answered)),
        upgraded: sample.upgraded,
        opened: opened.and_then(|opened| since(opened.at)),
        thread: opened.map(|opened| opened.thread.clone()).unwrap_or_default(),
    }
}

/// CPU time of the worker threads by their names, in ticks of 10 ms.
fn threads(pid: u32) -> anyhow::Result<HashMap<String, u64>> {
    let mut threads = HashMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        // proc_pid_stat(5): the name in parentheses, and utime and stime are fields 14 and 15.
        let (name, fields) = stat.rsplit_once(')').context("no name in stat")?;
        let (_, name) = name.split_once('(').context("no name in stat")?;
        let mut fields = fields.split_ascii_whitespace().skip(11);
        let mut ticks = || -> anyhow::Result<u64> { Ok(fields.next().context("no time")?.parse()?) };
        threads.insert(name.to_owned(), ticks()? + ticks()?);
    }
    let workers = threads.keys().filter(|name| name.starts_with("worker-")).count();
    ensure!(workers == WORKERS, "{WORKERS} workers, and not {workers}: {threads:?}");
    Ok(threads)
}

/// The part of a core that each thread had, in percent.
#[expect(clippy::cast_precision_loss, reason = "ticks")]
fn shares(before: &HashMap<String, u64>, after: &HashMap<String, u64>, took: Duration) -> HashMap<String, f64> {
    let share = |(name, ticks): (&String, &u64)| {
        let ticks = ticks - before.get(name).unwrap_or(ticks);
        (name.clone(), ticks as f64 / took.as_secs_f64())
    };
    after.iter().map(share).collect()
}
