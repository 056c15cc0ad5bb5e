//! A cgroup with little memory, in either version of the kernel's interface; made where this process may make one.

use super::{DEADLINE, left_out};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Removed on drop, when its last process has ended.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
    version: Version,
}

impl MemoryGroup {
    /// A group of so many bytes for its processes together; None where none can be made.
    pub fn new(bytes: u64) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // A process is put into it by a shell that then enters the lab's network and keeps sight of the cgroups.
        let can_enter = Command::new("nsenter").arg("--version").output().is_ok();
        if !can_enter {
            left_out("a memory cgroup", "no nsenter");
            return None;
        }
        let name = format!("tidegate-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut why = "no cgroups here".to_owned();
        for (version, parent) in parents() {
            let group = Self { path: parent.join(&name), version };
            match group.make(bytes) {
                Ok(()) => return Some(group),
                Err(error) => why = format!("{}: {error}", group.path.display()),
            }
        }
        left_out("a memory cgroup", &why);
        None
    }

    fn make(&self, bytes: u64) -> io::Result<()> {
        let limit = match self.version {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        };
        fs::create_dir(&self.path)?;
        fs::write(self.path.join(limit), bytes.to_string())?;
        if self.version == Version::V2 {
            // Where there is swap, the limit alone would be none. Absent where swap is not accounted.
            let _ = fs::write(self.path.join("memory.swap.max"), "0");
        }
        Ok(())
    }

    /// Who writes its pid there is in.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// The most that was in use until now, of the kernel's memory also what is charged to it; 0 where that is not told.
    pub fn peak(&self) -> u64 {
        let file = match self.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        };
        fs::read_to_string(self.path.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// How many processes of it the OOM killer has taken.
    pub fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let text = fs::read_to_string(self.path.join(file)).expect("a cgroup");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).and_then(|count| count.parse().ok());
        count.expect("the kernel's format")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let begun = Instant::now();
        // Its process has been waited for, and yet may be a moment in leaving.
        while fs::remove_dir(&self.path).is_err() && self.path.exists() && begun.elapsed() < DEADLINE {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where a group could be made: below our own, and at the top.
fn parents() -> Vec<(Version, PathBuf)> {
    let ours = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = |controller: &str| {
        let mut lines = ours.lines().filter_map(|line| line.splitn(3, ':').skip(1).collect::<Vec<_>>().try_into().ok());
        lines.find_map(|[controllers, path]: [&str; 2]| {
            controllers.split(',').any(|of| of == controller).then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let mut parents = Vec::new();
    for (version, mount, controller) in
        [(Version::V1, "/sys/fs/cgroup/memory", "memory"), (Version::V2, "/sys/fs/cgroup", "")]
    {
        let (mount, own) = (Path::new(mount), own(controller));
        let told = match version {
            Version::V1 => mount.join("memory.limit_in_bytes"),
            Version::V2 => mount.join("cgroup.controllers"),
        };
        if told.exists() {
            parents.extend(own.map(|own| (version, mount.join(own))));
            parents.push((version, mount.to_owned()));
        }
    }
    parents
}
