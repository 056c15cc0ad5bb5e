//! `tidegate doctor` against real namespaces and limits: it finds what was set, says how to undo that, and does nothing else.

use crate::harness::{DEADLINE, Lab, Side, left_out};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A network namespace to set things in.
struct Host {
    lab: Lab,
    folder: TempDir,
}

impl Host {
    /// None where namespaces are not permitted: nobody wants these values on the machine that he works on.
    fn new(what: &str) -> Option<Self> {
        let lab = Lab::new();
        if !lab.counts_are_exact() {
            left_out(what, "no namespaces");
            return None;
        }
        Some(Self { lab, folder: tempfile::tempdir().expect("a folder") })
    }

    fn set(&self, sysctl: &str, value: &str) {
        let file = format!("/proc/sys/{}", sysctl.replace('.', "/"));
        self.lab.place(Side::Proxy).run(|| fs::write(&file, value)).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.folder.path().join(file), text).expect("room for a file");
    }

    /// tidegate there, with at most so many descriptors; in a folder without a configuration, unless one was written.
    fn tidegate(&self, descriptors: u32, arguments: &[&str]) -> Command {
        let mut command = self.lab.command_in(Side::Proxy, "sh");
        let script = format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_tidegate")]).args(arguments);
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TIDEGATE_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        // What the machine's cgroup has to do with it is for the unit tests.
        command.env("TIDEGATE_LIMITS__MEMORY", "off");
        command
    }

    fn doctor(&self, descriptors: u32, arguments: &[&str]) -> Ended {
        let arguments = [&["doctor"], arguments].concat();
        Ended::new(&self.tidegate(descriptors, &arguments).output().expect("the binary that was just built"))
    }

    fn json(&self, descriptors: u32, arguments: &[&str]) -> (Ended, Value) {
        let ended = self.doctor(descriptors, &[arguments, &["--format", "json"]].concat());
        let json = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        (ended, json)
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn new(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// The finding with this name.
fn finding<'a>(json: &'a Value, name: &str) -> &'a Value {
    let findings = json["findings"].as_array().expect("a list");
    findings.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("no {name} in {json:#}"))
}

fn severity<'a>(json: &'a Value, name: &str) -> &'a str {
    finding(json, name)["severity"].as_str().expect("a text")
}

/// Goal: whatever was set is found and bites, the exit code says so, and doing what the finding says is enough. Method: a namespace
/// with everything wrong that can be set in one; the names and values of the fields for a pod are then written to it.
#[test]
fn what_is_wrong_is_found_and_the_fix_fixes_it() {
    let Some(host) = Host::new("what doctor says about sysctls") else { return };
    host.set("net.core.somaxconn", "128");
    host.set("net.ipv4.tcp_abort_on_overflow", "1");
    host.set("net.ipv4.tcp_syncookies", "0");
    host.set("net.ipv4.tcp_max_syn_backlog", "128");
    host.set("net.ipv4.ip_local_port_range", "40000 40099");
    host.set("net.ipv4.ip_local_reserved_ports", "40050");
    host.write(
        "proxy.toml",
        "[listen]\naddress = \"127.0.0.1:40002\"\nmax_sockets = 4\n[upstream]\naddress = \"127.0.0.1:40001\"\n[limits]\nmax_connections = 100\n",
    );
    let wrong = [
        ("somaxconn", "will_bite"),
        ("tcp_abort_on_overflow", "will_bite"),
        ("port_range", "will_bite"),
        ("backend_port", "warning"),
        ("tcp_syncookies", "warning"),
        ("tcp_max_syn_backlog", "warning"),
        ("listen_port", "warning"),
    ];
    let (ended, json) = host.json(1024, &[]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(1), ""), "{json:#}");
    for (name, expected) in wrong {
        assert_eq!(severity(&json, name), expected, "{json:#}");
    }
    assert_eq!(json["configuration"], "proxy.toml");
    assert_eq!(json["facts"]["somaxconn"], 128);
    assert_eq!(json["facts"]["reserved_ports"], serde_json::json!([{ "start": 40050, "end": 40050 }]));
    assert_eq!(json["counts"]["will_bite"], 3);
    assert_eq!(finding(&json, "somaxconn")["fix"]["sysctl"]["kubernetes"], "unsafe");
    assert_eq!(finding(&json, "port_range")["fix"]["sysctl"]["kubernetes"], "safe");
    // 99 ports: one is reserved.
    assert!(finding(&json, "port_range")["value"].as_str().is_some_and(|value| value.contains("99 ports")), "{json:#}");

    // The last ones first: the fix of port_range alone would put right what the others say about ports.
    for (name, _) in wrong.iter().rev() {
        let (_, json) = host.json(1024, &[]);
        let Some(pod) = finding(&json, name)["fix"]["pod"].as_str() else {
            // Put right by another one's fix.
            assert_eq!(severity(&json, name), "ok");
            continue;
        };
        let fields = pod.lines().filter_map(|line| line.strip_prefix("- {name: ")?.strip_suffix("\"}"));
        let fields: Vec<_> = fields.filter_map(|field| field.split_once(", value: \"")).collect();
        assert!(!fields.is_empty(), "no field in {pod}");
        for (sysctl, value) in fields {
            host.set(sysctl, value);
        }
        let (_, json) = host.json(1024, &[]);
        assert_eq!(severity(&json, name), "ok", "after {pod}: {json:#}");
    }
    let (ended, json) = host.json(1024, &[]);
    assert_eq!(ended.code, Some(0), "{json:#}");
    assert_eq!(json["counts"]["will_bite"], 0);
    assert_eq!(json["facts"]["reserved_ports"].as_array().map(Vec::len), Some(2), "40050 and 40001-40002: {json:#}");
}

/// Goal: a fresh namespace with the defaults is good, and the text says the same as the JSON. So is a few descriptors for few
/// clients, and not for many.
#[test]
fn text_and_json_agree() {
    let Some(host) = Host::new("what doctor says about a fresh namespace") else { return };
    let (ended, json) = host.json(1024, &[]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{json:#}");
    assert_eq!((&json["configuration"], severity(&json, "somaxconn")), (&Value::Null, "ok"));
    let text = host.doctor(1024, &[]);
    assert_eq!((text.code, text.stderr.as_str()), (Some(0), ""));
    let counts = &json["counts"];
    let summary = format!("{} will bite, {} warning", counts["will_bite"], counts["warning"]);
    let last = text.stdout.lines().last().expect("a line");
    assert!(last.starts_with(&summary), "{last} {counts}");
    assert_eq!(text.stdout.lines().find(|line| line.chars().count() > 100), None);
    for finding in json["findings"].as_array().expect("a list") {
        let label = finding["severity"].as_str().expect("a text").replace('_', " ");
        let name = finding["name"].as_str().expect("a text");
        let line = format!("{label:11}{name}: ");
        assert!(text.stdout.lines().any(|found| found.starts_with(&line)), "no {line} in {}", text.stdout);
    }

    let few = host.doctor(64, &[]);
    assert_eq!(few.code, Some(1), "{}", few.stdout);
    assert!(few.stdout.contains("\nwill bite  nofile: soft 64, hard 64; wanted:"), "{}", few.stdout);
    host.write("few.toml", "[limits]\nmax_connections = 10\n");
    let (ended, json) = host.json(64, &["-c", "few.toml"]);
    assert_eq!((ended.code, severity(&json, "nofile")), (Some(0), "ok"), "{json:#}");
}

/// Goal: the configuration is read as by `run`; one that cannot be used gives 78 and no diagnosis, and what is dubious about a good
/// one goes to stderr.
#[test]
fn configurations() {
    let Some(host) = Host::new("doctor with configurations") else { return };
    host.write("bad.toml", "[listen]\nbacklog = \"many\"\n");
    host.write("warns.toml", "[websocket]\nping_interval = \"2m\"\n");
    for arguments in [&["-c", "bad.toml"][..], &["-c", "missing.toml"], &["--upstream", "app"]] {
        let ended = host.doctor(1024, arguments);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(78), ""), "{arguments:?} {ended:?}");
        assert!(ended.stderr.starts_with("error: "), "{ended:?}");
    }
    assert_eq!(host.doctor(1024, &["--format", "yaml"]).code, Some(2));
    let ended = host.doctor(1024, &["-c", "warns.toml"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.starts_with("warning: "), "{ended:?}");

    // Flags, for those who run without a file.
    let (_, json) = host.json(1024, &["--listen", "127.0.0.1:40000", "--upstream", "unix:/run/app.sock"]);
    assert_eq!(finding(&json, "port_range")["value"], "not needed");
    assert_eq!(finding(&json, "listen_port")["value"], "40000, 9090");
}

/// Goal: what it says that `run` will do is what `run` does. Method: its accept queues and its number of connections next to
/// what the process logs at its start, with many descriptors, few, and accept queues limited by either.
#[test]
fn it_foretells_what_run_does() {
    let Some(host) = Host::new("that doctor foretells what run does") else { return };
    for (somaxconn, descriptors, settings) in [
        (128, 4096, ""),
        (128, 256, ""),
        (4096, 1024, "[listen]\nworkers = 4\n"),
        (65_535, 64, "[listen]\naccept_loops = 3\nworkers = 1\n"),
        (1000, 2048, "[listen]\nmax_sockets = 5\n[limits]\nmax_connections = 700\n"),
    ] {
        host.set("net.core.somaxconn", &somaxconn.to_string());
        host.write("proxy.toml", &format!("{settings}[admin]\naddress = \"127.0.0.1:0\"\n"));
        let (_, json) = host.json(descriptors, &[]);
        let foretold = finding(&json, "somaxconn")["why"].as_str().expect("a text").to_owned();
        let connections = finding(&json, "max_connections")["value"].as_str().expect("a text").to_owned();

        let lines = Running::start(&host, descriptors).lines_until("budget");
        let queues = line(&lines, "accept queues");
        let (sockets, effective) = (&queues["sockets"], &queues["effective"]);
        let all = format!("{effective} clients");
        let each = if sockets == 1 { "opens one queue of ".to_owned() } else { format!("opens {sockets} queues of ") };
        assert!(foretold.contains(&each) && foretold.contains(&all), "{queues}, but: {foretold}");
        let budget = line(&lines, "budget");
        let expected =
            format!("{}, set by {}", budget["max_connections"], budget["limited_by"].as_str().expect("a text"));
        assert_eq!(connections, expected, "{budget}");
    }
}

fn line<'a>(lines: &'a [Value], message: &str) -> &'a Value {
    lines.iter().find(|line| line["message"] == message).unwrap_or_else(|| panic!("no {message} in {lines:?}"))
}

/// `tidegate run`, killed on drop.
struct Running(Child);

impl Running {
    fn start(host: &Host, descriptors: u32) -> Self {
        let arguments = ["run", "--listen", "127.0.0.1:0"];
        let mut command = host.tidegate(descriptors, &arguments);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary that was just built"))
    }

    /// Its log up to this message.
    fn lines_until(mut self, message: &str) -> Vec<Value> {
        let mut lines = Vec::new();
        for line in BufReader::new(self.0.stdout.take().expect("asked for")).lines() {
            let line: Value = serde_json::from_str(&line.expect("text")).unwrap_or_default();
            let is_last = line["message"] == message;
            lines.push(line);
            if is_last {
                return lines;
            }
        }
        panic!("it ended without {message}: {lines:?}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Goal: it can run beside a tidegate in service, and the backend does not hear of it. Method: both ports are taken, and the
/// backend's queue stays empty.
#[test]
fn it_binds_nothing_and_calls_nobody() {
    let Some(host) = Host::new("that doctor touches nothing") else { return };
    let (backend, proxy) = host.lab.place(Side::Proxy).run(|| {
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        (listen(), listen())
    });
    let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
    host.set("net.ipv4.ip_local_port_range", "10240 20000");
    let (ended, json) = host.json(1024, &["--listen", &address(&proxy), "--upstream", &address(&backend)]);
    assert_eq!(ended.code, Some(0), "{json:#}");
    for listener in [backend, proxy] {
        listener.set_nonblocking(true).expect("a socket");
        assert_eq!(listener.accept().expect_err("nobody called").kind(), ErrorKind::WouldBlock);
    }
}

/// Goal: clients that were dropped here, by whomever, are told of. Method: a listener of somebody else whose queue overflows.
#[test]
fn overflows_of_anybody_are_told() {
    let Some(host) = Host::new("that doctor sees overflows") else { return };
    let (_, json) = host.json(1024, &[]);
    assert_eq!(severity(&json, "listen_overflows"), "ok");
    let _sockets = host.lab.place(Side::Proxy).run(|| {
        let socket = |address: &SocketAddr| {
            let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None).expect("a socket");
            socket.set_nonblocking(true).expect("a socket");
            socket
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = socket(&any);
        listener.bind(&any.into()).expect("a free port");
        listener.listen(0).expect("a bound socket");
        let address = listener.local_addr().expect("bound");
        // One fits.
        let clients: Vec<Socket> = (0..4).map(|_| socket(&any)).collect();
        for client in &clients {
            let _ = client.connect(&address);
        }
        (listener, clients)
    });
    let begun = Instant::now();
    while host.lab.counters(Side::Proxy).get("ListenOverflows") == 0 {
        assert!(begun.elapsed() < DEADLINE, "the queue did not overflow");
        thread::sleep(Duration::from_millis(10));
    }
    let (ended, json) = host.json(1024, &[]);
    assert_eq!((ended.code, severity(&json, "listen_overflows")), (Some(0), "warning"), "{json:#}");
}
