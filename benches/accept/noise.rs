//! What other programs and other machines on the same host took of the CPU time while a leg ran: tails of a few milliseconds are
//! easily theirs.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

/// How long others must have been silent.
const SILENCE: Duration = Duration::from_secs(2);

/// Percentages of the time of all cores together.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    pub others_percent: f64,
    pub stolen_percent: f64,
}

/// Ticks since the machine and this program were started.
#[derive(Debug, Clone, Copy)]
pub struct Begun {
    all: f64,
    used: f64,
    stolen: f64,
    /// By this program and those of its children that have ended.
    ours: f64,
}

impl Begun {
    pub fn now() -> anyhow::Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let cpu = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("no cpu in /proc/stat")?;
        let ticks = cpu.split_ascii_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        // proc_stat(5). Interrupts are left out: they are mostly ours, and are nobody's in the times of processes.
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
            anyhow::bail!("eight times in /proc/stat");
        };
        let this = fs::read_to_string("/proc/self/stat")?;
        let (_, fields) = this.rsplit_once(')').context("no name in stat")?;
        // utime, stime, cutime and cstime are fields 14 to 17 of proc_pid_stat(5); this starts with the third.
        let ours = fields.split_ascii_whitespace().skip(11).take(4).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        Ok(Self {
            all: user + nice + system + idle + iowait + irq + softirq + steal,
            used: user + nice + system,
            stolen: steal,
            ours,
        })
    }

    /// Since then.
    pub fn noise(self) -> anyhow::Result<Noise> {
        let now = Self::now()?;
        let all = (now.all - self.all).max(1.0);
        let others = (now.used - self.used) - (now.ours - self.ours);
        Ok(Noise {
            // Below zero by what is counted in the one time and not yet in the other.
            others_percent: others.max(0.0) * 100.0 / all,
            stolen_percent: (now.stolen - self.stolen) * 100.0 / all,
        })
    }
}

/// Returns when others use little, or after `patience`.
pub fn wait_for_quiet(percent: f64, patience: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + patience;
    while Instant::now() < until {
        let begun = Begun::now()?;
        thread::sleep(SILENCE);
        let Noise { others_percent, stolen_percent } = begun.noise()?;
        if others_percent + stolen_percent <= percent {
            break;
        }
    }
    Ok(())
}
