//! What is thought of the facts: one rule for each finding. Pure, so that every case has a line in a test.
//!
//! Numbers that tidegate computes at its start come from [`Plan`], which asks the same functions.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use super::{
    Facts, Finding, Fix, Scope, Severity, Sysctl,
    wishes::{Plan, Wishes, memory_for, wide},
};
use crate::{
    admission::Memory,
    budget::LimitedBy,
    net::Address,
    system::{Bound, HostFiles, Surroundings},
};

/// All findings, in the order in which a connection meets them.
pub(super) fn judge(facts: &Facts, wishes: &Wishes) -> Vec<Finding> {
    let plan = Plan::new(facts, wishes);
    let findings = [
        somaxconn(facts, wishes, &plan),
        tcp_max_syn_backlog(facts, wishes, &plan),
        tcp_syncookies(facts),
        tcp_abort_on_overflow(facts),
        netdev_max_backlog(facts),
        listen_overflows(facts),
        max_connections(wishes, &plan),
        nofile(facts, wishes, &plan),
        host_files(facts, &plan),
        port_range(facts, wishes, &plan),
        backend_port(facts, wishes),
        listen_port(facts, wishes),
        memory(facts, wishes, &plan),
        cpu(facts, wishes),
    ];
    findings.into_iter().chain(conntrack(facts, wishes, &plan)).collect()
}

/// Where nobody said how many clients there will be: a host with room for fewer sessions is hardly meant to be one, or is worth
/// a word.
const HARDLY_ANY: u64 = 250;
const FEW: u64 = 5000;

/// Whether there is room for enough sessions.
fn enough(sessions: u64, wishes: &Wishes) -> Severity {
    match wishes.max_connections.map(wide) {
        Some(wanted) if sessions < wanted => Severity::WillBite,
        None if sessions < HARDLY_ANY => Severity::WillBite,
        None if sessions < FEW => Severity::Warning,
        _ => Severity::Ok,
    }
}

fn for_connections(wishes: &Wishes) -> String {
    match wishes.max_connections {
        Some(count) => format!("room for {count} (limits.max_connections)"),
        None => format!("room for {FEW}, as long as limits.max_connections says nothing"),
    }
}

impl Finding {
    fn new(name: &'static str, severity: Severity, value: impl Into<String>, wanted: impl Into<String>) -> Self {
        Self { name, severity, value: value.into(), wanted: wanted.into(), why: String::new(), fix: None }
    }

    /// What cannot be seen from here.
    fn hidden(name: &'static str, wanted: impl Into<String>) -> Self {
        let why = "This kernel, or this container, does not show it, so nothing can be said about it.";
        Self::new(name, Severity::Note, "not shown here", wanted).because(why)
    }

    fn because(self, why: impl Into<String>) -> Self {
        Self { why: why.into(), ..self }
    }

    /// What is as it should be needs no fix.
    fn fixed_by(self, fix: Fix) -> Self {
        let fix = (self.severity != Severity::Ok).then_some(fix);
        Self { fix, ..self }
    }
}

impl Fix {
    /// `host` is what is done where there is neither a container nor a pod.
    fn new(facts: &Facts, host: impl Into<String>, container: impl Into<String>, pod: impl Into<String>) -> Self {
        let command = match facts.surroundings {
            Surroundings::Container => container.into(),
            Surroundings::Host | Surroundings::Pod => host.into(),
        };
        Self { command, pod: pod.into(), ..Self::default() }
    }

    fn sysctl(facts: &Facts, name: &'static str, value: &str, scope: Scope) -> Self {
        Self::sysctls(facts, &[(name, value)], scope)
    }

    /// The first of them is the one that it is about.
    fn sysctls(facts: &Facts, all: &[(&'static str, &str)], scope: Scope) -> Self {
        let assignments: Vec<_> = all
            .iter()
            .map(|(name, value)| {
                let quote = if value.contains(' ') { "\"" } else { "" };
                format!("{name}={quote}{value}{quote}")
            })
            .collect();
        let fields: Vec<_> =
            all.iter().map(|(name, value)| format!("\n- {{name: {name}, value: \"{value}\"}}")).collect();
        let on_host = format!("sysctl -w {}", assignments.join("\nsysctl -w "));
        let (in_container, in_pod) = match scope {
            // /proc/sys is read-only in a container.
            Scope::Safe | Scope::Unsafe => (
                format!("docker run --sysctl {}", assignments.join(" \\\n  --sysctl ")),
                format!("spec.securityContext.sysctls:{}", fields.concat()),
            ),
            Scope::Node => (on_host.clone(), "no field: the node has one value for all".to_owned()),
        };
        let sysctl = all.first().map(|(name, _)| Sysctl { name, kubernetes: scope });
        Self { sysctl, ..Self::new(facts, on_host, in_container, in_pod) }
    }

    fn or_setting(self, setting: impl Into<String>) -> Self {
        Self { setting: Some(setting.into()), ..self }
    }
}

/// The most accept queues that can be configured.
const MOST_SOCKETS: u64 = 4096;

fn somaxconn(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Finding {
    let backlog = u64::from(wishes.backlog);
    let wanted = format!("{backlog} clients waiting (listen.backlog)");
    let (Some(somaxconn), Some(granted), Some(effective)) = (facts.somaxconn, plan.granted, plan.effective()) else {
        return Finding::hidden("somaxconn", wanted);
    };
    let sockets = plan.sockets;
    // At a quarter it still takes a spike that most never see.
    let severity = if effective >= backlog {
        Severity::Ok
    } else if effective.saturating_mul(4) >= backlog {
        Severity::Warning
    } else {
        Severity::WillBite
    };
    let queues = if sockets == 1 { "one queue".to_owned() } else { format!("{sockets} queues") };
    let mut why = format!(
        "The kernel clamps every accept queue to it, without a word, when it is opened. tidegate opens {queues} of {granted}: {effective} \
         clients can wait to be accepted. Those beyond are dropped and come again a second later, at the earliest."
    );
    let mut fix = Fix::sysctl(facts, "net.core.somaxconn", &backlog.to_string(), Scope::Unsafe);
    let needed = backlog.div_ceil(granted.max(1));
    if severity != Severity::Ok {
        if needed > plan.descriptors / 8 {
            why = format!(
                "{why} There are no more queues than an eighth of the descriptors, which are {}; see nofile.",
                plan.descriptors
            );
        }
        let fewer = format!("listen.backlog = {effective}, if that is enough");
        fix = fix.or_setting(if wide(wishes.max_sockets) < needed && needed <= MOST_SOCKETS {
            format!("listen.max_sockets = {needed}\nor {fewer}")
        } else {
            fewer
        });
    }
    Finding::new("somaxconn", severity, somaxconn.to_string(), wanted).because(why).fixed_by(fix)
}

fn tcp_max_syn_backlog(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Finding {
    let name = "tcp_max_syn_backlog";
    let backlog = u64::from(wishes.backlog);
    let Some(value) = facts.tcp_max_syn_backlog else {
        return Finding::hidden(name, "nothing, as long as tcp_syncookies is on");
    };
    if facts.tcp_syncookies != Some(0) {
        let why = "With SYN cookies on, the kernel does not look at it.";
        return Finding::new(name, Severity::Ok, value.to_string(), "anything: tcp_syncookies is on").because(why);
    }
    // tcp_conn_request leaves the last quarter to peers that it knows.
    let half_open = (value - value / 4).saturating_mul(plan.sockets);
    let severity = if half_open >= backlog { Severity::Ok } else { Severity::Warning };
    let why = format!(
        "With SYN cookies off, a queue takes three quarters of it as half-open connections from clients it does not know: {half_open} in \
         {} queues. The SYNs beyond are dropped and come again a second later.",
        plan.sockets
    );
    let needed = backlog.div_ceil(plan.sockets.max(1)).saturating_mul(4).div_ceil(3);
    let fix = Fix::sysctl(facts, "net.ipv4.tcp_max_syn_backlog", &needed.to_string(), Scope::Unsafe);
    Finding::new(name, severity, value.to_string(), format!("{needed} in each of {} queues", plan.sockets))
        .because(why)
        .fixed_by(fix)
}

fn tcp_syncookies(facts: &Facts) -> Finding {
    let (name, wanted) = ("tcp_syncookies", "1");
    let Some(value) = facts.tcp_syncookies else {
        return Finding::hidden(name, wanted);
    };
    let (severity, why) = match value {
        0 => (
            Severity::Warning,
            "Off: when too many connections are half open, by a spike or a SYN flood, new clients are dropped.",
        ),
        1 => (Severity::Ok, "When too many connections are half open, clients get a cookie instead of being dropped."),
        _ => (
            Severity::Note,
            "Every connection is made by a cookie, as if under attack: clients without TCP timestamps lose window scaling \
             and selective acknowledgements.",
        ),
    };
    let fix = Fix::sysctl(facts, "net.ipv4.tcp_syncookies", wanted, Scope::Safe);
    Finding::new(name, severity, value.to_string(), wanted).because(why).fixed_by(fix)
}

fn tcp_abort_on_overflow(facts: &Facts) -> Finding {
    let (name, wanted) = ("tcp_abort_on_overflow", "0");
    let Some(aborts) = facts.tcp_abort_on_overflow else {
        return Finding::hidden(name, wanted);
    };
    let (severity, value, why) = if aborts {
        let why = "A client that finds an accept queue full, tidegate's or the backend's, is reset: it sees an error where it \
                   would have come again a second later and been served.";
        (Severity::WillBite, "1", why)
    } else {
        (Severity::Ok, "0", "A client that finds an accept queue full tries again and is not reset.")
    };
    let fix = Fix::sysctl(facts, "net.ipv4.tcp_abort_on_overflow", wanted, Scope::Unsafe);
    Finding::new(name, severity, value, wanted).because(why).fixed_by(fix)
}

/// The kernel's default (`netdev_max_backlog` in `net/core/hotdata.c`).
const NETDEV_MAX_BACKLOG: u64 = 1000;

fn netdev_max_backlog(facts: &Facts) -> Finding {
    let drops = facts.netdev_drops.unwrap_or(0);
    let value = facts.netdev_max_backlog.map_or("not shown here".to_owned(), |value| value.to_string());
    let severity = match facts.netdev_max_backlog {
        Some(value) if value < NETDEV_MAX_BACKLOG || drops > 0 => Severity::Warning,
        // It can be seen only where the node's network is.
        None if drops > 0 => Severity::Note,
        _ => Severity::Ok,
    };
    let why = match drops {
        0 => "Packets that wait for a CPU; none was dropped since the host's start.".to_owned(),
        _ => format!(
            "{drops} packets were dropped since the host's start because too many waited for a CPU, on all of its networks \
             together. A client whose SYN or ACK is lost waits a second, at the least."
        ),
    };
    let needed = (facts.netdev_max_backlog.unwrap_or(NETDEV_MAX_BACKLOG).saturating_mul(4)).max(8192);
    let fix = Fix::sysctl(facts, "net.core.netdev_max_backlog", &needed.to_string(), Scope::Node);
    let wanted = format!("{NETDEV_MAX_BACKLOG} or more, and no drops");
    Finding::new("netdev_max_backlog", severity, value, wanted).because(why).fixed_by(fix)
}

fn listen_overflows(facts: &Facts) -> Finding {
    let name = "listen_overflows";
    let (Some(overflows), Some(drops)) = (facts.listen_overflows, facts.listen_drops) else {
        return Finding::hidden(name, "0");
    };
    if overflows == 0 && drops == 0 {
        let why = "Nobody in this network namespace, the backend included, has dropped a client since it began.";
        return Finding::new(name, Severity::Ok, "0", "0").because(why);
    }
    let why = "Somebody in this network namespace, tidegate, the backend or another, has found an accept queue full since \
               it began, and dropped clients.";
    let fix = Fix::new(
        facts,
        "ss -ltn: the listener whose Recv-Q reaches its Send-Q needs a larger backlog",
        "ss -ltn: the listener whose Recv-Q reaches its Send-Q needs a larger backlog",
        "compare tidegate_accept_queue_length of /metrics; if it is low, it is the backend's own backlog",
    );
    let value = format!("ListenOverflows {overflows}, ListenDrops {drops}");
    Finding::new(name, Severity::Warning, value, "0").because(why).fixed_by(fix)
}

fn max_connections(wishes: &Wishes, plan: &Plan) -> Finding {
    let wanted = wishes.max_connections.map_or("as many as the host allows".to_owned(), |count| count.to_string());
    let mut allowed = vec![format!("descriptors allow {}", plan.by_descriptors)];
    allowed.extend(plan.by_memory.map(|count| format!("memory {count}")));
    allowed.extend(plan.by_ports.map(|count| format!("ports {count}")));
    let why = format!("{}. Clients beyond the number get 503 with Retry-After.", capitalised(&allowed.join(", ")));
    let short = match plan.limited_by {
        LimitedBy::Descriptors => Some("nofile"),
        LimitedBy::Memory => Some("memory"),
        LimitedBy::Ports => Some("port_range"),
        LimitedBy::Setting => None,
    };
    let is_short = wishes.max_connections.is_some_and(|wanted| plan.connections < wide(wanted));
    let (severity, why) = match short {
        // The one that is short says how to fix it.
        Some(name) if is_short => (Severity::Note, format!("{why} See {name}.")),
        _ => (Severity::Ok, why),
    };
    let value = format!("{}, set by {}", plan.connections, plan.limited_by);
    Finding::new("max_connections", severity, value, wanted).because(why)
}

/// What service managers and container runtimes that mean well give.
const MANY_DESCRIPTORS: u64 = 524_288;

fn nofile(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Finding {
    let shown = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    let value = format!("soft {}, hard {}", shown(facts.descriptors.soft), shown(facts.descriptors.hard));
    let why = format!(
        "tidegate raises its soft limit to the hard one. A session takes two, each of {} accept queues one: {} sessions.",
        plan.sockets, plan.by_descriptors
    );
    let wanted = wishes.max_connections.map_or(0, wide).saturating_mul(2).saturating_add(1024);
    let limit = wanted.next_power_of_two().max(MANY_DESCRIPTORS);
    let mut fix = Fix::new(
        facts,
        format!("LimitNOFILE={limit} in the unit's [Service]; or ulimit -n {limit}, as root"),
        format!("docker run --ulimit nofile={limit}:{limit}"),
        format!("no field: it is the node's, LimitNOFILE={limit} of containerd.service"),
    );
    if facts.nr_open.is_some_and(|most| limit > most) {
        fix.command = format!("{}\nbefore that: sysctl -w fs.nr_open={limit}", fix.command);
    }
    Finding::new("nofile", enough(plan.by_descriptors, wishes), value, for_connections(wishes))
        .because(why)
        .fixed_by(fix)
}

fn host_files(facts: &Facts, plan: &Plan) -> Finding {
    let (name, wanted) = ("host_files", "room for the descriptors of all sessions");
    let Some(HostFiles { open, max: most }) = facts.host_files else {
        return Finding::hidden(name, wanted);
    };
    let left = most.saturating_sub(open);
    let needed = plan.connections.saturating_mul(2);
    let severity = if left < needed { Severity::Warning } else { Severity::Ok };
    // Nobody needs to see that it is half of what a number can hold.
    let value = if most > 1 << 40 { format!("{open} open, no limit") } else { format!("{open} open of {most}") };
    let why = match severity {
        Severity::Ok => "Open files of the whole host.".to_owned(),
        _ => format!(
            "Open files of the whole host: {left} are left for {} sessions with two each. Beyond it accept() fails with ENFILE, \
             whatever ulimit says.",
            plan.connections
        ),
    };
    let enough = open.saturating_add(needed).saturating_mul(2).to_string();
    let fix = Fix::sysctl(facts, "fs.file-max", &enough, Scope::Node);
    Finding::new(name, severity, value, wanted).because(why).fixed_by(fix)
}

/// A range that is as wide as is reasonable: it keeps clear of the ports that services like.
const WIDE_RANGE: RangeInclusive<u16> = 10_240..=65_535;

fn port_range(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Finding {
    let (name, wanted) = ("port_range", for_connections(wishes));
    let Some((backend, host)) = wishes.backends().find_map(|backend| match backend {
        Address::Tcp { host, .. } => Some((backend, host)),
        Address::Unix(_) => None,
    }) else {
        let why = "A connection to a Unix socket takes no port.";
        return Finding::new(name, Severity::Ok, "not needed", wanted).because(why);
    };
    if wishes.all_share {
        let why = "WebSockets share connections (pool.mode), which take few ports; a backend that can't share them takes one for each.";
        return Finding::new(name, Severity::Ok, "not the limit", wanted).because(why);
    }
    if plan.by_ports.is_none() && facts.port_range.is_some() {
        let why = "There is a backend to which connections take no port.";
        return Finding::new(name, Severity::Ok, "not the limit", wanted).because(why);
    }
    let (Some(range), Some(ports)) = (&facts.port_range, plan.by_ports) else {
        return Finding::hidden(name, wanted);
    };
    let severity = match enough(ports, wishes) {
        Severity::Ok if wishes.max_connections.is_some_and(|wanted| wide(wanted) > ports / 10 * 8) => Severity::Warning,
        Severity::Ok if plan.limited_by == LimitedBy::Ports => Severity::Note,
        severity => severity,
    };
    let sources = match wishes.source_addresses {
        1 => String::new(),
        count => format!(" over {count} addresses"),
    };
    let toward = match wishes.backends().count() {
        1 => String::new(),
        count => format!(" toward {count} backends"),
    };
    let value = format!("{} ({ports} ports{sources}{toward})", shown(range));
    let why = format!(
        "A session takes a port toward {backend}, and TIME_WAIT may keep it for a minute more. Without one, clients get 503."
    );
    // What is opened up must not be the port of a listener.
    let inside: Vec<u16> = own_ports(wishes).into_iter().filter(|port| WIDE_RANGE.contains(port)).collect();
    let wide_range = format!("{} {}", WIDE_RANGE.start(), WIDE_RANGE.end());
    let reserved = reserved_with(facts, &inside);
    let mut sysctls = vec![("net.ipv4.ip_local_port_range", wide_range.as_str())];
    if !inside.is_empty() {
        sysctls.push(("net.ipv4.ip_local_reserved_ports", &reserved));
    }
    let example = match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) if ip.is_loopback() => "[\"127.0.0.2\", \"127.0.0.3\"]",
        _ if host == "localhost" => "[\"127.0.0.2\", \"127.0.0.3\"]",
        _ => "more addresses of this host",
    };
    let setting = format!("upstream.address = \"unix:/run/app.sock\"\nor upstream.source_addresses = {example}");
    let fix = if range.len() >= WIDE_RANGE.len() {
        let none = "the range is as wide as it can be: see the setting";
        Fix::new(facts, none, none, none)
    } else {
        Fix::sysctls(facts, &sysctls, Scope::Safe)
    };
    Finding::new(name, severity, value, wanted).because(why).fixed_by(fix.or_setting(setting))
}

fn backend_port(facts: &Facts, wishes: &Wishes) -> Finding {
    let (name, wanted) = ("backend_port", "outside of ip_local_port_range, or reserved");
    let mut all: Vec<_> = wishes
        .backends()
        .filter_map(|backend| match backend {
            Address::Tcp { host, port } => Some((host, port)),
            Address::Unix(_) => None,
        })
        .collect();
    // The one for which there is most to say.
    all.sort_by_key(|(host, port)| std::cmp::Reverse((is_local(host) && is_given_away(facts, **port), is_local(host))));
    let Some((host, port)) = all.into_iter().next() else {
        let why = "A Unix socket has none.";
        return Finding::new(name, Severity::Ok, "none", wanted).because(why);
    };
    let Some(range) = &facts.port_range else {
        return Finding::hidden(name, wanted);
    };
    if !is_local(host) {
        let why = "The backend is on another host, as far as its name tells.";
        return Finding::new(name, Severity::Ok, port.to_string(), wanted).because(why);
    }
    if !is_given_away(facts, *port) {
        let why = "Nobody is given it by chance.";
        return Finding::new(name, Severity::Ok, port.to_string(), wanted).because(why);
    }
    let why = format!(
        "It is inside of {}. While the backend is down, a dial can be given this very port and so connect to itself. tidegate \
         refuses that, others may not; and whoever has the port keeps the backend from listening there again.",
        shown(range)
    );
    let reserved = reserved_with(facts, &[*port]);
    let fix = Fix::sysctl(facts, "net.ipv4.ip_local_reserved_ports", &reserved, Scope::Safe)
        .or_setting(format!("upstream.address with a port below {}", range.start()));
    Finding::new(name, Severity::Warning, port.to_string(), wanted).because(why).fixed_by(fix)
}

fn listen_port(facts: &Facts, wishes: &Wishes) -> Finding {
    let (name, wanted) = ("listen_port", "outside of ip_local_port_range, or reserved");
    let Some(range) = &facts.port_range else {
        return Finding::hidden(name, wanted);
    };
    let given_away: Vec<u16> = listen_ports(wishes).into_iter().filter(|port| is_given_away(facts, *port)).collect();
    let ports: Vec<String> = listen_ports(wishes).iter().map(ToString::to_string).collect();
    let value = if ports.is_empty() { "any".to_owned() } else { ports.join(", ") };
    if given_away.is_empty() {
        return Finding::new(name, Severity::Ok, value, wanted).because("Nobody is given it by chance.");
    }
    let why = format!(
        "It is inside of {}. A connection of anybody here may be given it while tidegate does not run, which then cannot listen \
         there.",
        shown(range)
    );
    let reserved = reserved_with(facts, &given_away);
    let fix = Fix::sysctl(facts, "net.ipv4.ip_local_reserved_ports", &reserved, Scope::Safe)
        .or_setting(format!("listen.address and admin.address with ports below {}", range.start()));
    Finding::new(name, Severity::Warning, value, wanted).because(why).fixed_by(fix)
}

fn memory(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Finding {
    let lowest = facts.memory.first();
    let value = match (lowest, &facts.host_memory) {
        (Some(memory), _) => {
            let source = match memory.bound {
                Bound::CgroupMax => "cgroup",
                Bound::CgroupHigh => "cgroup, memory.high",
                Bound::AddressSpace => "RLIMIT_AS",
            };
            format!("{} ({source}), {} used now", mib(memory.limit), mib(memory.used))
        }
        (None, Some(host)) => format!("no limit, {} of the host's {} available", mib(host.available), mib(host.total)),
        (None, None) => "no limit".to_owned(),
    };
    let value = match wishes.memory {
        Memory::Limit(bytes) => format!("{} (limits.memory); {value}", mib(bytes)),
        Memory::Auto | Memory::Off => value,
    };
    // All that matter, the worst first.
    let mut words: Vec<(Severity, String)> = Vec::new();
    let mut say = |severity, sentence: String| words.push((severity, sentence));
    if let Some(connections) = plan.by_memory {
        let sentence = format!("It is enough for {connections} connections. Clients beyond that get 503.");
        say(enough(connections, wishes), sentence);
    }
    match (wishes.memory, lowest) {
        (Memory::Limit(bytes), Some(memory)) if bytes > memory.limit => {
            say(Severity::Note, format!("limits.memory is {}, more than there is: the lower one counts.", mib(bytes)));
        }
        (Memory::Off, Some(_)) => {
            say(
                Severity::Warning,
                "limits.memory is \"off\": nobody is refused before the OOM killer comes.".to_owned(),
            );
        }
        (Memory::Off | Memory::Auto, None) => {
            if let (Some(host), Some(wanted)) = (&facts.host_memory, wishes.max_connections) {
                let needed = memory_for(wide(wanted), wishes);
                let severity = if needed > host.total { Severity::WillBite } else { Severity::Ok };
                say(severity, format!("{wanted} connections take some {}.", mib(needed)));
            }
        }
        _ => {}
    }
    if let Some(memory) = lowest.filter(|memory| memory.used > memory.limit / 10 * 9) {
        say(Severity::Warning, format!("Only {} are left.", mib(memory.room())));
    }
    words.sort_by_key(|(severity, _)| *severity);
    let severity = words.first().map_or(Severity::Ok, |(severity, _)| *severity);
    let mut why = words.into_iter().map(|(_, sentence)| sentence).collect::<Vec<_>>().join(" ");
    if why.is_empty() {
        "Nothing keeps tidegate and its neighbours from taking all of it.".clone_into(&mut why);
    }

    let sessions = wishes.max_connections.map_or(2 * FEW, wide);
    let limit =
        memory_for(sessions, wishes).max(lowest.map_or(0, |memory| memory.used * 5 / 4)).next_multiple_of(64 << 20)
            >> 20;
    let setting = match wishes.memory {
        Memory::Auto => None,
        Memory::Off | Memory::Limit(_) => Some("limits.memory = \"auto\"".to_owned()),
    };
    let fix = Fix::new(
        facts,
        format!("MemoryMax={limit}M in the unit's [Service]"),
        format!("docker run --memory={limit}m"),
        format!("resources.limits.memory: {limit}Mi of the container tidegate"),
    );
    Finding::new("memory", severity, value, for_connections(wishes)).because(why).fixed_by(Fix { setting, ..fix })
}

fn cpu(facts: &Facts, wishes: &Wishes) -> Finding {
    let wanted = format!("none, or a core for each of {} workers", wishes.workers);
    let Some(cpu) = facts.cpu else {
        let why = "Without a quota nobody is stopped in the middle of a message.";
        return Finding::new("cpu_quota", Severity::Ok, "none", wanted).because(why);
    };
    let (periods, throttled) = cpu.throttled.unwrap_or_default();
    let workers_fit = cpu.millicores >= wide(wishes.workers).saturating_mul(1000);
    let severity = if cpu.millicores < 1000 || throttled > periods / 100 {
        Severity::Warning
    } else if workers_fit {
        Severity::Ok
    } else {
        Severity::Note
    };
    let mut why = "When it is used up, every session stands still until the next period of 100 ms begins.".to_owned();
    if throttled > 0 {
        why = format!("{why} That was so in {throttled} of {periods} periods.");
    }
    if !workers_fit {
        why = format!("{why} {} workers use it up before the period ends.", wishes.workers);
    }
    let fix = Fix::new(
        facts,
        "CPUQuota= in the unit's [Service], empty",
        "docker run without --cpus",
        "no resources.limits.cpu for the container tidegate; resources.requests.cpu instead",
    );
    let workers = (cpu.millicores / 1000).max(1);
    let fix = if workers_fit || workers >= wide(wishes.workers) {
        fix
    } else {
        fix.or_setting(format!("listen.workers = {workers}"))
    };
    Finding::new("cpu_quota", severity, format!("{}m", cpu.millicores), wanted).because(why).fixed_by(fix)
}

/// Only where connections are tracked.
fn conntrack(facts: &Facts, wishes: &Wishes, plan: &Plan) -> Option<Finding> {
    let table = facts.conntrack?;
    let legs = if wishes.backends().any(|backend| matches!(backend, Address::Tcp { .. })) { 2 } else { 1 };
    let left = table.max.saturating_sub(table.count);
    let sessions = left / legs;
    let severity = if table.count > table.max / 20 * 19 {
        Severity::WillBite
    } else if table.count > table.max / 4 * 3 {
        Severity::Warning
    } else {
        match wishes.max_connections.map(wide) {
            Some(wanted) if sessions < wanted => Severity::WillBite,
            None if sessions < plan.connections => Severity::Note,
            _ => Severity::Ok,
        }
    };
    let why = format!(
        "If connections are tracked here, a session takes up to {legs} entries: there is room for {sessions}. With the table full, packets of \
         new connections are dropped. It is the whole host's, and shows only what this namespace has in it."
    );
    let expected = wishes.max_connections.map_or(plan.connections, wide);
    let needed = table.count.saturating_add(expected.saturating_mul(legs)).saturating_mul(5) / 4;
    let fix =
        Fix::sysctl(facts, "net.netfilter.nf_conntrack_max", &needed.next_power_of_two().to_string(), Scope::Node);
    let value = format!("{} of {} in use", table.count, table.max);
    Some(Finding::new("conntrack", severity, value, for_connections(wishes)).because(why).fixed_by(fix))
}

/// Whether dialling `host` ends on this host. Names other than localhost are not looked up.
fn is_local(host: &str) -> bool {
    host.parse::<IpAddr>().map_or_else(
        |_| host.eq_ignore_ascii_case("localhost"),
        |ip| ip.to_canonical().is_loopback() || ip.is_unspecified(),
    )
}

/// Ports that tidegate listens on.
fn listen_ports(wishes: &Wishes) -> Vec<u16> {
    let both = [Some(wishes.listen), wishes.admin].into_iter().flatten();
    both.map(|address: SocketAddr| address.port()).filter(|port| *port != 0).collect()
}

/// Those, and the backends' that are on this host.
fn own_ports(wishes: &Wishes) -> Vec<u16> {
    let mut ports = listen_ports(wishes);
    ports.extend(wishes.backends().filter_map(|backend| match backend {
        Address::Tcp { host, port } if is_local(host) => Some(*port),
        _ => None,
    }));
    ports
}

/// Whether the kernel may choose this port for a connection.
fn is_given_away(facts: &Facts, port: u16) -> bool {
    facts.port_range.as_ref().is_some_and(|range| range.contains(&port))
        && !facts.reserved_ports.iter().any(|reserved| reserved.contains(&port))
}

/// What `ip_local_reserved_ports` is with these as well.
fn reserved_with(facts: &Facts, ports: &[u16]) -> String {
    let mut all = facts.reserved_ports.clone();
    all.extend(
        ports.iter().filter(|port| !facts.reserved_ports.iter().any(|r| r.contains(port))).map(|port| *port..=*port),
    );
    all.sort_by_key(|range| *range.start());
    all.iter().map(shown).collect::<Vec<_>>().join(",")
}

fn shown(range: &RangeInclusive<u16>) -> String {
    if range.start() == range.end() { range.start().to_string() } else { format!("{}-{}", range.start(), range.end()) }
}

fn mib(bytes: u64) -> String {
    if bytes >= 10 << 30 { format!("{} GiB", bytes >> 30) } else { format!("{} MiB", bytes >> 20) }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}
