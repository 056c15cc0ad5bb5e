//! Every finding in both directions, over facts that are made up.

use super::{report::Report, rules::judge, wishes::Wishes, *};
use crate::{
    admission::Memory as MemorySetting,
    config::Settings,
    net::Address,
    system::{Bound, Conntrack, Cpu, HostFiles, HostMemory, Limit, Memory, Surroundings},
};

const MIB: u64 = 1 << 20;

/// A host on which nothing is to be said.
fn facts() -> Facts {
    Facts {
        surroundings: Surroundings::Host,
        somaxconn: Some(65_535),
        tcp_max_syn_backlog: Some(4096),
        tcp_syncookies: Some(1),
        tcp_abort_on_overflow: Some(false),
        netdev_max_backlog: Some(1000),
        netdev_drops: Some(0),
        port_range: Some(32_768..=60_999),
        reserved_ports: Vec::new(),
        descriptors: Limit { soft: Some(1024), hard: Some(20_000) },
        inherited: Some(3),
        nr_open: Some(1_048_576),
        host_files: Some(HostFiles { open: 1000, max: 1_000_000 }),
        cpu: None,
        memory: Vec::new(),
        host_memory: Some(HostMemory { total: 8 << 30, available: 6 << 30 }),
        conntrack: None,
        listen_overflows: Some(0),
        listen_drops: Some(0),
    }
}

/// The defaults, on any machine.
fn wishes() -> Wishes {
    Wishes { workers: 2, idle: 0, ..Wishes::from(&Settings::default()) }
}

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.to_owned(), port }
}

fn cgroup(limit: u64, used: u64) -> Memory {
    Memory { limit: limit * MIB, used: used * MIB, bound: Bound::CgroupMax }
}

/// What is said under `name` after a change.
fn found(name: &str, change: impl FnOnce(&mut Facts, &mut Wishes)) -> Finding {
    let (mut facts, mut wishes) = (facts(), wishes());
    change(&mut facts, &mut wishes);
    let mut findings = judge(&facts, &wishes);
    findings.retain(|finding| finding.name == name);
    assert_eq!(findings.len(), 1, "{name}");
    findings.remove(0)
}

/// What is as it should be gives no fix and a sentence, every name is used once, and nothing more is said.
#[test]
fn a_good_host() {
    let findings = judge(&facts(), &wishes());
    let mut names: Vec<_> = findings.iter().map(|finding| finding.name).collect();
    for finding in &findings {
        assert_eq!((finding.severity, &finding.fix), (Severity::Ok, &None), "{finding:?}");
        assert!(!finding.why.is_empty() && !finding.value.is_empty() && !finding.wanted.is_empty(), "{finding:?}");
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), findings.len());
    assert!(!Report::new(facts(), findings, None).bites());
}

/// Where nothing at all is shown, nothing bites, and nothing is called good that was not seen.
#[test]
fn a_host_that_shows_nothing() {
    let blind = Facts {
        somaxconn: None,
        tcp_max_syn_backlog: None,
        tcp_syncookies: None,
        tcp_abort_on_overflow: None,
        netdev_max_backlog: None,
        netdev_drops: None,
        port_range: None,
        inherited: None,
        nr_open: None,
        host_files: None,
        host_memory: None,
        listen_overflows: None,
        listen_drops: None,
        ..facts()
    };
    for finding in judge(&blind, &wishes()) {
        let seen = ["max_connections", "nofile", "netdev_max_backlog", "memory", "cpu_quota"];
        let expected = if seen.contains(&finding.name) { Severity::Ok } else { Severity::Note };
        assert_eq!(finding.severity, expected, "{finding:?}");
    }
}

type Change = fn(&mut Facts, &mut Wishes);

/// The severity of each finding in each case, and what must stand in it.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn findings() {
    use Severity::{Note, Ok, Warning, WillBite};
    let cases: &[(&str, Change, Severity, &[&str])] = &[
        // Accept queues: the wish is met by more of them, missed by less than three quarters, missed by more.
        ("somaxconn", |f, _| f.somaxconn = Some(4096), Ok, &["opens 16 queues of 4096: 65536 clients"]),
        (
            "somaxconn",
            |f, _| f.somaxconn = Some(128),
            Warning,
            &["128 queues of 128: 16384", "listen.max_sockets = 512"],
        ),
        ("somaxconn", |f, w| (f.somaxconn, w.backlog) = (Some(128), 16_384), Ok, &["128 queues of 128"]),
        ("somaxconn", |f, w| (f.somaxconn, w.max_sockets) = (Some(128), 64), WillBite, &["64 queues of 128: 8192"]),
        ("somaxconn", |f, w| (f.somaxconn, w.max_sockets) = (Some(128), 512), Ok, &["512 queues of 128"]),
        ("somaxconn", |_, w| w.accept_loops = 7, Ok, &["7 queues of 65535"]),
        ("somaxconn", |_, w| w.workers = 1, Ok, &["one queue of 65535"]),
        (
            "somaxconn",
            |f, _| (f.somaxconn, f.descriptors.hard) = (Some(128), Some(256)),
            WillBite,
            &[
                "32 queues of 128: 4096",
                "an eighth of the descriptors, which are 256; see nofile",
                "listen.backlog = 4096",
            ],
        ),
        // Half-open connections: of no interest while there are cookies.
        ("tcp_max_syn_backlog", |f, _| f.tcp_max_syn_backlog = Some(16), Ok, &["does not look at it"]),
        ("tcp_max_syn_backlog", |f, _| f.tcp_syncookies = Some(0), Warning, &["6144 in 2 queues", "=43691"]),
        (
            "tcp_max_syn_backlog",
            |f, _| (f.tcp_syncookies, f.tcp_max_syn_backlog) = (Some(0), Some(43_691)),
            Ok,
            &["65538 in 2 queues"],
        ),
        ("tcp_syncookies", |f, _| f.tcp_syncookies = Some(0), Warning, &["net.ipv4.tcp_syncookies=1"]),
        ("tcp_syncookies", |f, _| f.tcp_syncookies = Some(2), Note, &["window scaling"]),
        (
            "tcp_abort_on_overflow",
            |f, _| f.tcp_abort_on_overflow = Some(true),
            WillBite,
            &["is reset", "sysctl -w net.ipv4.tcp_abort_on_overflow=0"],
        ),
        ("netdev_max_backlog", |f, _| f.netdev_drops = Some(7), Warning, &["7 packets", "=8192"]),
        ("netdev_max_backlog", |f, _| f.netdev_max_backlog = Some(300), Warning, &["none was dropped"]),
        ("netdev_max_backlog", |f, _| f.netdev_max_backlog = Some(5000), Ok, &["none was dropped"]),
        ("netdev_max_backlog", |f, _| f.netdev_max_backlog = None, Ok, &["not shown here"]),
        (
            "netdev_max_backlog",
            |f, _| (f.netdev_max_backlog, f.netdev_drops) = (None, Some(7)),
            Note,
            &["the node has one value for all"],
        ),
        ("listen_overflows", |f, _| f.listen_overflows = Some(3), Warning, &["ListenOverflows 3, ListenDrops 0"]),
        ("listen_overflows", |f, _| f.listen_drops = Some(4), Warning, &["ListenOverflows 0, ListenDrops 4"]),
        // How many sessions, by what is short.
        ("max_connections", |_, _| {}, Ok, &["set by descriptors", "ports 28232"]),
        ("max_connections", |_, w| w.max_connections = Some(500), Ok, &["500, set by limits.max_connections"]),
        ("max_connections", |_, w| w.max_connections = Some(15_000), Note, &["set by descriptors", "See nofile."]),
        (
            "max_connections",
            |f, w| (f.port_range, w.max_connections) = (Some(40_000..=40_099), Some(500)),
            Note,
            &["100, set by ports", "See port_range."],
        ),
        (
            "max_connections",
            |f, w| (f.memory, w.max_connections) = (vec![cgroup(64, 4)], Some(6000)),
            Note,
            &["set by memory", "See memory."],
        ),
        ("max_connections", |f, _| f.descriptors.hard = Some(16), Ok, &["0, set by descriptors"]),
        // Descriptors.
        ("nofile", |f, _| f.descriptors.hard = Some(64), WillBite, &["soft 1024, hard 64", "LimitNOFILE=524288"]),
        ("nofile", |f, _| f.descriptors.hard = Some(16), WillBite, &[": 0 sessions"]),
        ("nofile", |f, _| f.descriptors.hard = Some(4096), Warning, &["sessions"]),
        ("nofile", |f, w| (f.descriptors.hard, w.max_connections) = (Some(4096), Some(1500)), Ok, &[]),
        (
            "nofile",
            |f, w| (f.descriptors.hard, w.max_connections) = (Some(4096), Some(2000)),
            WillBite,
            &["room for 2000"],
        ),
        ("nofile", |_, w| w.max_connections = Some(600_000), WillBite, &["LimitNOFILE=2097152", "fs.nr_open=2097152"]),
        ("nofile", |f, _| f.descriptors.hard = None, Ok, &["hard unlimited"]),
        (
            "host_files",
            |f, _| f.host_files = Some(HostFiles { open: 9000, max: 10_000 }),
            Warning,
            &["1000 are left", "ENFILE"],
        ),
        // Ports.
        ("port_range", |f, _| f.port_range = Some(40_000..=40_099), WillBite, &["40000-40099 (100 ports)"]),
        ("port_range", |f, _| f.port_range = Some(40_000..=40_999), Warning, &["\"10240 65535\""]),
        (
            "port_range",
            |f, _| (f.port_range, f.descriptors.hard) = (Some(40_000..=45_999), Some(65_536)),
            Note,
            &["\"10240 65535\"", "127.0.0.2"],
        ),
        ("port_range", |f, w| (f.port_range, w.max_connections) = (Some(40_000..=40_099), Some(80)), Ok, &[]),
        (
            "port_range",
            |f, w| (f.port_range, w.max_connections) = (Some(40_000..=40_099), Some(81)),
            Warning,
            &["for 81"],
        ),
        ("port_range", |f, w| (f.port_range, w.max_connections) = (Some(40_000..=40_099), Some(100)), Warning, &[]),
        ("port_range", |f, w| (f.port_range, w.max_connections) = (Some(40_000..=40_099), Some(101)), WillBite, &[]),
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                (w.max_connections, w.source_addresses) = (Some(150), 2);
            },
            Ok,
            &["200 ports over 2 addresses"],
        ),
        ("port_range", |f, _| f.reserved_ports = vec![32_768..=60_899], WillBite, &["(100 ports)"]),
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                w.backend = Address::Unix("/run/app.sock".into());
            },
            Ok,
            &["not needed"],
        ),
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                w.backend = tcp("localhost", 50_051);
            },
            WillBite,
            &["net.ipv4.ip_local_reserved_ports=50051"],
        ),
        (
            "port_range",
            |f, w| (f.port_range, w.max_connections) = (Some(1024..=65_535), Some(64_000)),
            Warning,
            &["as wide as it can be", "upstream.source_addresses"],
        ),
        // Toward each backend there are all of them; toward a Unix socket none is taken.
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                w.other_backends = vec![tcp("10.0.0.2", 9000)];
            },
            WillBite,
            &["(200 ports toward 2 backends)"],
        ),
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                w.other_backends = vec![Address::Unix("/run/app.sock".into())];
            },
            Ok,
            &["not the limit"],
        ),
        (
            "port_range",
            |f, w| {
                f.port_range = Some(40_000..=40_099);
                w.all_share = true;
            },
            Ok,
            &["not the limit", "share connections"],
        ),
        // Ports that are given away.
        (
            "backend_port",
            |_, w| w.backend = tcp("127.0.0.1", 50_051),
            Warning,
            &["connect to itself", "sysctl -w net.ipv4.ip_local_reserved_ports=50051", "below 32768"],
        ),
        ("backend_port", |_, w| w.backend = tcp("::1", 50_051), Warning, &[]),
        ("backend_port", |_, w| w.backend = tcp("localhost", 50_051), Warning, &[]),
        ("backend_port", |_, w| w.backend = tcp("10.0.0.1", 50_051), Ok, &["on another host"]),
        ("backend_port", |_, w| w.backend = tcp("127.0.0.1", 32_767), Ok, &[]),
        ("backend_port", |_, w| w.backend = Address::Unix("/run/app.sock".into()), Ok, &["none"]),
        ("backend_port", |_, w| w.other_backends = vec![tcp("127.0.0.1", 50_051)], Warning, &["50051"]),
        (
            "backend_port",
            |f, w| {
                w.backend = tcp("127.0.0.1", 50_051);
                f.reserved_ports = vec![50_000..=50_100];
            },
            Ok,
            &[],
        ),
        (
            "backend_port",
            |f, w| {
                w.backend = tcp("127.0.0.1", 50_051);
                f.reserved_ports = vec![60_000..=60_010, 8080..=8080];
            },
            Warning,
            &["ip_local_reserved_ports=8080,50051,60000-60010"],
        ),
        (
            "listen_port",
            |_, w| w.listen = ([127, 0, 0, 1], 40_000).into(),
            Warning,
            &["40000, 9090", "ip_local_reserved_ports=40000"],
        ),
        ("listen_port", |_, w| w.admin = Some(([127, 0, 0, 1], 40_000).into()), Warning, &["8080, 40000"]),
        ("listen_port", |_, w| (w.listen, w.admin) = (([127, 0, 0, 1], 0).into(), None), Ok, &["any"]),
        // Memory.
        ("memory", |f, _| f.memory = vec![cgroup(256, 10)], Ok, &["256 MiB (cgroup), 10 MiB used now", "connections"]),
        ("memory", |f, _| f.memory = vec![cgroup(32, 4)], Warning, &["MemoryMax=", "resources.limits.memory: "]),
        ("memory", |f, _| f.memory = vec![cgroup(8, 4)], WillBite, &["enough for 0 connections"]),
        ("memory", |f, w| (f.memory, w.max_connections) = (vec![cgroup(32, 4)], Some(500)), Ok, &[]),
        ("memory", |f, w| (f.memory, w.max_connections) = (vec![cgroup(32, 4)], Some(3000)), WillBite, &["for 3000"]),
        ("memory", |f, _| f.memory = vec![cgroup(256, 240)], Warning, &["Only 16 MiB are left", "MemoryMax=320M"]),
        ("memory", |f, w| (f.memory, w.memory) = (vec![cgroup(256, 4)], MemorySetting::Off), Warning, &["\"auto\""]),
        (
            "memory",
            |f, w| (f.memory, w.memory) = (vec![cgroup(256, 4)], MemorySetting::Limit(512 * MIB)),
            Note,
            &["512 MiB (limits.memory)", "limits.memory is 512 MiB", "the lower one"],
        ),
        ("memory", |f, w| (f.memory, w.memory) = (vec![cgroup(256, 4)], MemorySetting::Limit(192 * MIB)), Ok, &[]),
        ("memory", |_, w| w.memory = MemorySetting::Limit(24 * MIB), Warning, &["no limit"]),
        ("memory", |_, w| w.max_connections = Some(9000), Ok, &["9000 connections take some "]),
        ("memory", |_, w| w.max_connections = Some(900_000), WillBite, &["GiB"]),
        // CPU.
        ("cpu_quota", |f, _| f.cpu = Some(Cpu { millicores: 2000, throttled: Some((100, 1)) }), Ok, &["2000m"]),
        ("cpu_quota", |f, _| f.cpu = Some(Cpu { millicores: 500, throttled: None }), Warning, &["listen.workers = 1"]),
        ("cpu_quota", |f, _| f.cpu = Some(Cpu { millicores: 1500, throttled: None }), Note, &["2 workers use it up"]),
        (
            "cpu_quota",
            |f, w| (f.cpu, w.workers) = (Some(Cpu { millicores: 1000, throttled: None }), 1),
            Ok,
            &["a core for each of 1 workers"],
        ),
        (
            "cpu_quota",
            |f, _| f.cpu = Some(Cpu { millicores: 4000, throttled: Some((100, 2)) }),
            Warning,
            &["2 of 100 periods", "no resources.limits.cpu"],
        ),
        // Connection tracking.
        ("conntrack", |f, _| f.conntrack = Some(Conntrack { count: 5, max: 65_536 }), Ok, &["5 of 65536"]),
        ("conntrack", |f, _| f.conntrack = Some(Conntrack { count: 5, max: 1024 }), Note, &["room for 509"]),
        ("conntrack", |f, _| f.conntrack = Some(Conntrack { count: 800, max: 1024 }), Warning, &[]),
        (
            "conntrack",
            |f, _| f.conntrack = Some(Conntrack { count: 1000, max: 1024 }),
            WillBite,
            &["nf_conntrack_max="],
        ),
        (
            "conntrack",
            |f, w| (f.conntrack, w.max_connections) = (Some(Conntrack { count: 24, max: 1024 }), Some(500)),
            Ok,
            &[],
        ),
        (
            "conntrack",
            |f, w| (f.conntrack, w.max_connections) = (Some(Conntrack { count: 24, max: 1024 }), Some(501)),
            WillBite,
            &["nf_conntrack_max=2048"],
        ),
        (
            "conntrack",
            |f, w| {
                (f.conntrack, w.max_connections) = (Some(Conntrack { count: 24, max: 1024 }), Some(1000));
                w.backend = Address::Unix("/run/app.sock".into());
            },
            Ok,
            &["up to 1 entries"],
        ),
    ];
    let mut wrong = Vec::new();
    for (index, (name, change, severity, says)) in cases.iter().enumerate() {
        let finding = found(name, change);
        let Finding { value, wanted, why, fix, .. } = &finding;
        let all = format!("{value} {wanted} {why} {fix:?}").replace("\\\"", "\"");
        let is_fixed = fix.is_some() || finding.severity == Ok || *name == "max_connections";
        if finding.severity != *severity || !is_fixed || !says.iter().all(|words| all.contains(words)) {
            wrong.push(format!("case {index}, {severity:?} {says:?}: {finding:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The memory that a fix asks for is enough, and not much more than that.
#[test]
fn memory_that_is_asked_for() {
    for connections in [10, 5000, 100_000, 1_000_000] {
        let of = |limit| {
            let (mut facts, wishes) = (facts(), wishes());
            facts.memory = vec![Memory { limit, used: 0, bound: Bound::CgroupMax }];
            facts.descriptors.hard = None;
            facts.nr_open = None;
            wishes::Plan::new(&facts, &wishes).by_memory.expect("a limit")
        };
        let limit = wishes::memory_for(connections, &wishes());
        assert!(of(limit) >= connections, "{connections} in {limit}");
        assert!(of(limit - 2 * MIB) < connections || limit <= 16 * MIB, "{connections} in {limit}");
    }
}

/// The command is the one that works where we are: /proc/sys of a container is read-only.
#[test]
fn commands_by_surroundings() {
    let fix = |surroundings, name, change: fn(&mut Facts)| {
        let finding = found(name, |facts, wishes| {
            facts.surroundings = surroundings;
            wishes.backend = tcp("127.0.0.1", 50_051);
            change(facts);
        });
        finding.fix.expect("something to fix")
    };
    let narrow: fn(&mut Facts) = |facts| facts.port_range = Some(50_000..=50_099);
    let host = fix(Surroundings::Host, "port_range", narrow);
    assert_eq!(
        host.command,
        "sysctl -w net.ipv4.ip_local_port_range=\"10240 65535\"\nsysctl -w net.ipv4.ip_local_reserved_ports=50051"
    );
    let pod = "spec.securityContext.sysctls:\n\
               - {name: net.ipv4.ip_local_port_range, value: \"10240 65535\"}\n\
               - {name: net.ipv4.ip_local_reserved_ports, value: \"50051\"}";
    assert_eq!(host.pod, pod);
    let sysctl = Sysctl { name: "net.ipv4.ip_local_port_range", kubernetes: Scope::Safe };
    assert_eq!(host.sysctl, Some(sysctl));
    assert_eq!(fix(Surroundings::Pod, "port_range", narrow), host);
    let container = fix(Surroundings::Container, "port_range", narrow);
    assert_eq!(
        container.command,
        "docker run --sysctl net.ipv4.ip_local_port_range=\"10240 65535\" \\\n  \
         --sysctl net.ipv4.ip_local_reserved_ports=50051"
    );
    assert_eq!(container.pod, pod);

    let few: fn(&mut Facts) = |facts| facts.descriptors.hard = Some(64);
    assert!(fix(Surroundings::Host, "nofile", few).command.starts_with("LimitNOFILE=524288"));
    assert_eq!(fix(Surroundings::Container, "nofile", few).command, "docker run --ulimit nofile=524288:524288");
    let node: fn(&mut Facts) = |facts| facts.netdev_drops = Some(1);
    let kubernetes = fix(Surroundings::Pod, "netdev_max_backlog", node).sysctl.map(|sysctl| sysctl.kubernetes);
    assert_eq!(kubernetes, Some(Scope::Node));
    let unsafe_one = fix(Surroundings::Pod, "somaxconn", |facts| facts.somaxconn = Some(128)).sysctl;
    assert_eq!(unsafe_one.map(|sysctl| sysctl.kubernetes), Some(Scope::Unsafe));
}

/// Facts with something to say at each severity.
fn bad_host(surroundings: Surroundings) -> Report {
    let facts = Facts {
        surroundings,
        somaxconn: Some(128),
        tcp_abort_on_overflow: Some(true),
        netdev_max_backlog: None,
        port_range: Some(50_000..=50_099),
        descriptors: Limit { soft: Some(1024), hard: Some(4096) },
        memory: vec![cgroup(64, 12)],
        cpu: Some(Cpu { millicores: 500, throttled: Some((100, 40)) }),
        conntrack: Some(Conntrack { count: 12, max: 3000 }),
        listen_overflows: Some(21_483),
        listen_drops: Some(21_483),
        ..facts()
    };
    let wishes = Wishes { max_connections: Some(1000), backend: tcp("127.0.0.1", 50_051), ..wishes() };
    let findings = judge(&facts, &wishes);
    Report::new(facts, findings, Some("proxy.toml".to_owned()))
}

/// The text: the worst first, a summary at the end, nothing wider than the terminal. The JSON: the same findings.
#[test]
fn how_it_is_told() {
    for surroundings in [Surroundings::Host, Surroundings::Container, Surroundings::Pod] {
        let text = bad_host(surroundings).to_string();
        assert_eq!(text.lines().find(|line| line.chars().count() > 100), None);
        assert_eq!(text.lines().find(|line| line.ends_with(' ')), None);
    }
    let report = bad_host(Surroundings::Pod);
    assert!(report.bites());
    insta::assert_snapshot!("text", report);
    insta::assert_snapshot!("json", serde_json::to_string_pretty(&report).unwrap());
}

/// What a file is called cannot move the cursor of whoever looks.
#[test]
fn no_control_characters() {
    let text = Report::new(facts(), Vec::new(), Some("a\u{1b}[2J.toml".to_owned())).to_string();
    assert!(text.contains("a\u{fffd}[2J.toml"), "{text:?}");
}
