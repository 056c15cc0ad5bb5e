//! Memory and CPU that a cgroup grants, version 1 and 2, the whole way up; and what is used of it.
//!
//! The folder is found as the kernel tells it: the path from `/proc/self/cgroup`, the mount and the part of the hierarchy that
//! it shows from `/proc/self/mountinfo`. A container often sees its own cgroup alone, at the root of the mount.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::{ProcessMemory, System, address_space_limit, statm};

/// What bounds a [`Memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// `memory.max`, or `memory.limit_in_bytes` of version 1: beyond it the OOM killer comes.
    CgroupMax,
    /// `memory.high`: beyond it every allocation waits for the kernel to find something to reclaim.
    CgroupHigh,
    /// `RLIMIT_AS`: beyond it allocations fail.
    AddressSpace,
}

/// A bound, and what is used of it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// How much there may be.
    pub limit: u64,
    /// How much there is. In a cgroup that is everybody's in it and below it, the kernel's buffers of their sockets included,
    /// but not what the kernel gives back by itself (`inactive_file`).
    pub used: u64,
    /// Which bound it is.
    pub bound: Bound,
}

impl Memory {
    /// Bytes until the limit.
    pub const fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// The CPU time that a cgroup may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Thousandths of a core.
    pub millicores: u64,
    /// Periods in which something ran, and those of them in which it had to stop, since the cgroup began.
    pub throttled: Option<(u64, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A folder of the hierarchy that limits memory.
#[derive(Debug)]
struct Level {
    limit: u64,
    bound: Bound,
    used: Used,
}

/// The files that say what is used, kept open: at the moment of need there may be no descriptor to be had.
#[derive(Debug)]
enum Used {
    Cgroup { version: Version, current: File, stat: Option<File> },
    AddressSpace { statm: File },
}

impl System {
    /// All that bounds the memory of this process, as far as it can be seen, the lowest limit first.
    ///
    /// Version 2: the lower one of `memory.max` and `memory.high`, less `inactive_file` of `memory.stat` in what is used
    /// (`mm/memcontrol.c`). Version 1: `memory.limit_in_bytes` and `total_inactive_file` (`mm/memcontrol-v1.c`). And `RLIMIT_AS`.
    pub fn memory(&self) -> Vec<Memory> {
        let levels = levels(self, address_space_limit().soft).unwrap_or_default();
        let mut bounds: Vec<Memory> = levels.iter().filter_map(Level::now).collect();
        bounds.sort_by_key(|memory| memory.limit);
        bounds
    }

    /// The lowest CPU quota on the way up; `None` where there is none (`cpu.max` in `kernel/sched/core.c`, `cpu.cfs_quota_us` in
    /// version 1). What the scheduler lets us run on besides is told by `std::thread::available_parallelism`.
    pub fn cpu(&self) -> Option<Cpu> {
        let quotas = folders(self, "cpu").into_iter().filter_map(|(version, folder)| {
            let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
            let (quota, period) = match version {
                Version::V2 => {
                    let text = read("cpu.max")?;
                    let (quota, period) = text.trim().split_once(' ')?;
                    (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?)
                }
                // No quota is -1 here.
                Version::V1 => (number(&read("cpu.cfs_quota_us")?)?, number(&read("cpu.cfs_period_us")?)?),
            };
            let stat = read("cpu.stat").unwrap_or_default();
            let throttled = field(&stat, "nr_periods").zip(field(&stat, "nr_throttled"));
            Some(Cpu { millicores: quota.saturating_mul(1000).checked_div(period)?, throttled })
        });
        quotas.min_by_key(|cpu| cpu.millicores)
    }
}

/// The memory of this process against its limits, for whoever wants to know it many times a second.
///
/// It keeps two files open for each limit (one for `RLIMIT_AS`), and looks for changed limits now and then: a pod can be resized
/// while it runs.
#[derive(Debug)]
pub struct MemoryWatch {
    system: System,
    levels: Vec<Level>,
    /// When limits were looked for last.
    looked: Instant,
}

/// A look opens a dozen files, and limits hardly ever change.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

impl MemoryWatch {
    /// Finds the limits; `None` from [`Self::now`] means that there are none.
    ///
    /// # Errors
    ///
    /// There is no descriptor, or no memory, to look for them.
    pub fn new(system: System) -> io::Result<Self> {
        let levels = levels(&system, address_space_limit().soft)?;
        Ok(Self { system, levels, looked: Instant::now() })
    }

    /// What is used now of the limit that has the least room left. That need not be the lowest: what other containers of the pod
    /// use counts toward a limit of the pod.
    pub fn now(&mut self) -> Option<Memory> {
        if self.looked.elapsed() >= LOOK_INTERVAL {
            self.look();
        }
        self.levels.iter().filter_map(Level::now).min_by_key(Memory::room)
    }

    fn look(&mut self) {
        self.looked = Instant::now();
        // Without a descriptor to look with, what was found before is better than nothing.
        if let Ok(levels) = levels(&self.system, address_space_limit().soft) {
            self.levels = levels;
        }
    }
}

impl Level {
    fn now(&self) -> Option<Memory> {
        let used = match &self.used {
            Used::Cgroup { version, current, stat } => {
                let current = number(&whole(current)?)?;
                let name = match version {
                    Version::V1 => "total_inactive_file",
                    Version::V2 => "inactive_file",
                };
                let stat = stat.as_ref().and_then(whole).unwrap_or_default();
                current.saturating_sub(field(&stat, name).unwrap_or(0))
            }
            Used::AddressSpace { statm: file } => {
                let ProcessMemory { virtual_size, .. } = statm(&whole(file)?)?;
                virtual_size
            }
        };
        Some(Memory { limit: self.limit, used, bound: self.bound })
    }
}

/// Everything that limits memory. An error means that we could not look, not that there is nothing.
fn levels(system: &System, address_space: Option<u64>) -> io::Result<Vec<Level>> {
    let mut levels: Vec<Level> = Vec::new();
    for (version, folder) in folders(system, "memory") {
        let limit = |name: &str| -> io::Result<Option<u64>> {
            let text = there(File::open(folder.join(name)))?.as_ref().and_then(whole);
            // "max" is no number, and no limit. Neither is what version 1 says: all the pages that a counter can count.
            Ok(text.as_deref().and_then(number).filter(|limit| *limit < 1 << 62))
        };
        let (max, high, current) = match version {
            Version::V1 => {
                let mut max = limit("memory.limit_in_bytes")?;
                // The folders above may be hidden, but this line tells of them.
                if levels.is_empty()
                    && let Some(stat) = there(File::open(folder.join("memory.stat")))?.as_ref().and_then(whole)
                    && let Some(above) = field(&stat, "hierarchical_memory_limit").filter(|limit| *limit < 1 << 62)
                {
                    max = Some(max.map_or(above, |max| max.min(above)));
                }
                (max, None, "memory.usage_in_bytes")
            }
            Version::V2 => (limit("memory.max")?, limit("memory.high")?, "memory.current"),
        };
        let (limit, bound) = match (max, high) {
            (None, None) => continue,
            (Some(max), high) if high.is_none_or(|high| high >= max) => (max, Bound::CgroupMax),
            (_, Some(high)) => (high, Bound::CgroupHigh),
            (Some(max), None) => (max, Bound::CgroupMax),
        };
        let Some(current) = there(File::open(folder.join(current)))? else {
            continue;
        };
        let stat = there(File::open(folder.join("memory.stat")))?;
        levels.push(Level { limit, bound, used: Used::Cgroup { version, current, stat } });
    }
    if let Some(limit) = address_space
        && let Some(statm) = there(File::open(system.root.join("proc/self/statm")))?
    {
        levels.push(Level { limit, bound: Bound::AddressSpace, used: Used::AddressSpace { statm } });
    }
    Ok(levels)
}

/// The folders of this process's cgroup that has `controller`, from its own up to the highest that is visible.
fn folders(system: &System, controller: &str) -> Vec<(Version, PathBuf)> {
    let cgroups = system.read("proc/self/cgroup").unwrap_or_default();
    let mounts = system.read("proc/self/mountinfo").unwrap_or_default();
    let mut folders = Vec::new();
    // "4:memory:/a/b", "1:cpu,cpuacct:/a/b", and "0::/a/b" for version 2: cgroups(7). Of several hierarchies one has it.
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let version = match controllers {
            "" => Version::V2,
            _ if controllers.split(',').any(|name| name == controller) => Version::V1,
            _ => continue,
        };
        let Some(mount) = mounts.lines().find_map(|line| Mount::read(line, version, controller)) else {
            continue;
        };
        let top = system.root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        let own = Path::new(path)
            .strip_prefix(&mount.shown)
            .map(|below| top.join(below))
            .ok()
            .filter(|own| own.is_dir())
            // Its own cgroup, or one above it: either way one whose limits hold.
            .unwrap_or_else(|| top.clone());
        let up = own.ancestors().take_while(|folder| folder.starts_with(&top));
        folders.extend(up.map(|folder| (version, folder.to_owned())));
    }
    folders
}

/// A mounted hierarchy.
struct Mount {
    /// Where it is mounted.
    point: PathBuf,
    /// Which cgroup is seen there.
    shown: PathBuf,
}

impl Mount {
    /// From a line of mountinfo, which proc(5) explains: "36 35 98:0 /shown /point rw,noatime - type source options".
    fn read(line: &str, version: Version, controller: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let is_it = match (file_system.next()?, version) {
            ("cgroup2", Version::V2) => true,
            ("cgroup", Version::V1) => file_system.nth(1)?.split(',').any(|option| option == controller),
            _ => false,
        };
        let mut fields = mount.split(' ').skip(3);
        let shown = unescape(fields.next()?);
        let point = unescape(fields.next()?);
        is_it.then_some(Self { point, shown })
    }
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(path: &str) -> PathBuf {
    let mut plain = path.to_owned();
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(escape, character);
    }
    PathBuf::from(plain)
}

/// Tells "it is not there" from "there is no descriptor to open it with".
fn there(file: io::Result<File>) -> io::Result<Option<File>> {
    match file {
        Ok(file) => Ok(Some(file)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => Err(error),
            _ => Ok(None),
        },
    }
}

/// The text of a small file, from its beginning, whatever was read of it before.
fn whole(file: &File) -> Option<String> {
    // The largest is memory.stat, with some 2 KiB. The kernel gives all of it at once.
    let mut buffer = [0; 8192];
    let count = file.read_at(&mut buffer, 0).ok()?;
    Some(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind `name` in lines of "name number".
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).and_then(number)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::fixture, *};

    const MIB: u64 = 1 << 20;
    const V2_MOUNT: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn cgroups(system: &System, address_space: Option<u64>) -> Vec<Memory> {
        levels(system, address_space).unwrap().iter().filter_map(Level::now).collect()
    }

    fn bound(limit: u64, used: u64, bound: Bound) -> Memory {
        Memory { limit: limit * MIB, used: used * MIB, bound }
    }

    /// Version 2 as a container sees it: its own cgroup is the root. The lower one of two limits holds; what can be reclaimed is
    /// not used.
    #[test]
    fn v2_in_a_container() {
        let files = |max: &'static str, high: &'static str| {
            [
                ("proc/self/cgroup", "0::/\n"),
                ("proc/self/mountinfo", V2_MOUNT),
                ("sys/fs/cgroup/memory.max", max),
                ("sys/fs/cgroup/memory.high", high),
                ("sys/fs/cgroup/memory.current", "104857600\n"),
                ("sys/fs/cgroup/memory.stat", "anon 1\nfile 52428800\ninactive_anon 7\ninactive_file 41943040\n"),
                ("sys/fs/cgroup/cpu.max", "50000 100000\n"),
                ("sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_periods 40\nnr_throttled 7\n"),
            ]
        };
        let of = |max, high| {
            let (_folder, system) = fixture(&files(max, high));
            cgroups(&system, None)
        };
        assert_eq!(of("268435456\n", "max\n"), [bound(256, 60, Bound::CgroupMax)]);
        assert_eq!(of("268435456\n", "209715200\n"), [bound(200, 60, Bound::CgroupHigh)]);
        assert_eq!(of("268435456\n", "314572800\n"), [bound(256, 60, Bound::CgroupMax)]);
        assert_eq!(of("max\n", "209715200\n"), [bound(200, 60, Bound::CgroupHigh)]);
        assert_eq!(of("max\n", "max\n"), []);

        let (_folder, system) = fixture(&files("max\n", "max\n"));
        assert_eq!(system.cpu(), Some(Cpu { millicores: 500, throttled: Some((40, 7)) }));
    }

    /// Version 2 with the whole hierarchy in sight: every level is found, and what is outside of our own path is not.
    #[test]
    fn v2_nested() {
        let (_folder, system) = fixture(&[
            ("proc/self/cgroup", "0::/kubepods/pod1/own\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/kubepods/memory.max", "max\n"),
            ("sys/fs/cgroup/kubepods/memory.current", "9999999999\n"),
            ("sys/fs/cgroup/kubepods/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "134217728\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.current", "104857600\n"),
            ("sys/fs/cgroup/kubepods/pod1/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/kubepods/pod1/own/memory.max", "104857600\n"),
            ("sys/fs/cgroup/kubepods/pod1/own/memory.current", "10485760\n"),
            ("sys/fs/cgroup/kubepods/pod1/own/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/kubepods/pod1/other/memory.max", "1048576\n"),
            ("sys/fs/cgroup/kubepods/pod1/other/memory.current", "1048576\n"),
        ]);
        let (own, pod) = (bound(100, 10, Bound::CgroupMax), bound(128, 100, Bound::CgroupMax));
        assert_eq!(cgroups(&system, None), [own, pod]);
        assert_eq!(system.memory()[..2], [own, pod], "the lowest first");
        // The lowest limit has plenty of room; the pod's is what will be reached first.
        assert_eq!(MemoryWatch::new(system.clone()).unwrap().now(), Some(pod));
        assert_eq!(system.cpu(), Some(Cpu { millicores: 1500, throttled: None }));
    }

    /// Version 1, mounted by controller, with the path in sight; no limit is a number there.
    #[test]
    fn v1_nested() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let none = "9223372036854771712\n";
        let (_folder, system) = fixture(&[
            ("proc/self/cgroup", "4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n"),
            ("proc/self/mountinfo", mounts),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", none),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "9999999999\n"),
            ("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", none),
            ("sys/fs/cgroup/memory/docker/memory.usage_in_bytes", "9999999999\n"),
            ("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", "134217728\n"),
            ("sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes", "104857600\n"),
            (
                "sys/fs/cgroup/memory/docker/a/memory.stat",
                "inactive_file 1\nhierarchical_memory_limit 134217728\ntotal_inactive_file 41943040\n",
            ),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us", "250000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.stat", "nr_periods 3\nnr_throttled 0\nthrottled_time 0\n"),
        ]);
        assert_eq!(cgroups(&system, None), [bound(128, 60, Bound::CgroupMax)]);
        assert_eq!(system.cpu(), Some(Cpu { millicores: 2500, throttled: Some((3, 0)) }));
    }

    /// Version 1 as a container sees it: the path is the host's, the mount shows only what is at its end. The pod's lower limit
    /// is out of sight and known all the same.
    #[test]
    fn v1_in_a_container() {
        let mounts = "35 31 0:32 /docker/a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let own = [
            ("proc/self/mountinfo", mounts),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "134217728\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "104857600\n"),
            ("sys/fs/cgroup/memory/memory.stat", "hierarchical_memory_limit 67108864\n"),
        ];
        // The last of them: a path that has nothing to do with what the mount shows.
        for cgroup in ["4:memory:/docker/a\n", "4:memory:/docker/a/gone\n", "4:memory:/../b\n", "4:memory:/\n"] {
            let mut files = own.to_vec();
            files.push(("proc/self/cgroup", cgroup));
            let (_folder, system) = fixture(&files);
            assert_eq!(cgroups(&system, None), [bound(64, 100, Bound::CgroupMax)], "{cgroup}");
        }
    }

    /// No cgroup at all, a controller that is not there, files that are not there, a mount point with a blank.
    #[test]
    fn what_is_missing_limits_nothing() {
        for files in [
            &[][..],
            &[("proc/self/cgroup", "0::/\n")],
            &[("proc/self/cgroup", "0::/\n"), ("proc/self/mountinfo", V2_MOUNT)],
            &[("proc/self/cgroup", "nonsense"), ("proc/self/mountinfo", "nonsense")],
            &[
                ("proc/self/cgroup", "0::/\n"),
                ("proc/self/mountinfo", V2_MOUNT),
                ("sys/fs/cgroup/memory.max", "1048576\n"),
                ("sys/fs/cgroup/cpu.max", "50000 0\n"),
            ],
        ] {
            let (_folder, system) = fixture(files);
            assert_eq!(cgroups(&system, None), [], "{files:?}");
            assert_eq!(system.cpu(), None, "{files:?}");
        }
        let (_folder, system) = fixture(&[
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n"),
            ("my groups/memory.max", "1048576\n"),
            ("my groups/memory.current", "1048576\n"),
        ]);
        assert_eq!(cgroups(&system, None), [bound(1, 1, Bound::CgroupMax)]);
    }

    /// An rlimit is one more bound, against which the virtual size counts.
    #[test]
    fn address_space() {
        let (_folder, system) = fixture(&[("proc/self/statm", "1000 250 100 10 0 500 0\n")]);
        let used = super::super::pages(1000);
        let expected = Memory { limit: 64 * MIB, used, bound: Bound::AddressSpace };
        assert_eq!(cgroups(&system, Some(64 * MIB)), [expected]);
        assert_eq!(expected.room(), 64 * MIB - used);
        assert_eq!(Memory { used: 65 * MIB, ..expected }.room(), 0);
    }

    /// What is used is read anew each time from the files that are open; a limit that was changed is found at the next look.
    #[test]
    fn a_watch_sees_changes() {
        let (folder, system) = fixture(&[
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/memory.max", "104857600\n"),
            ("sys/fs/cgroup/memory.current", "10485760\n"),
            ("sys/fs/cgroup/memory.stat", "inactive_file 0\n"),
        ]);
        let write = |name: &str, text: &str| fs::write(folder.path().join("sys/fs/cgroup").join(name), text).unwrap();
        let mut watch = MemoryWatch { levels: levels(&system, None).unwrap(), system, looked: Instant::now() };
        assert_eq!(watch.now(), Some(bound(100, 10, Bound::CgroupMax)));
        write("memory.current", "52428800\n");
        write("memory.stat", "inactive_file 5242880\n");
        assert_eq!(watch.now(), Some(bound(100, 45, Bound::CgroupMax)));
        write("memory.max", "73400320\n");
        watch.look();
        assert_eq!(watch.levels.first().and_then(Level::now), Some(bound(70, 45, Bound::CgroupMax)));
    }
}
