//! A Pod of a manifest as it is shipped, as plain processes in one network namespace: started, probed and ended as the kubelet does it.
//!
//! ```text
//! start   sidecars in their order, each until its startupProbe has passed; then the main containers
//! end     all preStop hooks at once; a main container gets SIGTERM when its own hook has ended, a sidecar when all main
//!         containers have exited as well; SIGKILL for whoever is left when the grace period is over
//! ```
//!
//! What the manifest says is parsed and done: hooks, probes, arguments, the `ConfigMap` and where it is mounted, the grace period. Several
//! Pods are several labs. Not here: images (the backend is an echo of ours), resources, security contexts, and restarts for any other
//! reason than a test's.

use super::{Board, DEADLINE, Lab, Side, crowd::EchoProcess, lab::Counters, proxy::Proxy};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use toml::Table;

/// What the kubelet itself says in its requests.
const AGENT: &str = "kube-probe/1.33";

#[derive(Clone, Debug)]
enum Hook {
    Exec(Vec<String>),
    Get { port: u16, path: String },
    Sleep(Duration),
}

#[derive(Clone, Debug)]
struct Probe {
    port: u16,
    path: String,
    period: Duration,
    timeout: Duration,
    failures: u64,
}

/// What is in a container's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Tidegate,
    Backend,
    Nginx,
}

/// A container's part of the manifest.
#[derive(Clone, Debug)]
struct Container {
    name: String,
    program: Program,
    is_sidecar: bool,
    arguments: Vec<String>,
    /// Of a container with the configuration, where that is.
    config_mount: Option<String>,
    startup: Option<Probe>,
    readiness: Option<Probe>,
    pre_stop: Option<Hook>,
}

/// What a file of `k8s/rendered` says of the Pod of its Deployment.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Sidecars first, each kind in its order.
    containers: Vec<Container>,
    /// The keys of the `ConfigMap`.
    config: Vec<(String, String)>,
    pub grace: Duration,
    /// `minReadySeconds`: a new Pod that has been ready for so long makes room for the end of an old one.
    pub available_after: Duration,
    /// Of the Pod, where the Service sends its clients.
    client_port: u16,
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer} in {value:#}"))
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn texts(value: &Value, pointer: &str) -> Vec<String> {
    list(value, pointer).map(|text| text.as_str().expect("a text").to_owned()).collect()
}

impl Probe {
    fn of(container: &Value, kind: &str) -> Option<Self> {
        let probe = container.get(kind)?;
        let number = |key: &str, default| probe.get(key).map_or(default, |value| value.as_u64().expect("a number"));
        let get = probe.get("httpGet").unwrap_or_else(|| panic!("a {kind} of another kind: {probe:#}"));
        Some(Self {
            port: port(container, &get["port"]),
            path: text(get, "/path").to_owned(),
            // The defaults are Kubernetes' own.
            period: Duration::from_secs(number("periodSeconds", 10)),
            timeout: Duration::from_secs(number("timeoutSeconds", 1)),
            failures: number("failureThreshold", 3),
        })
    }
}

/// A port by its number, or by its name in the container itself.
fn port(container: &Value, port: &Value) -> u16 {
    let number = port.as_u64().or_else(|| {
        let named = list(container, "/ports").find(|own| own.get("name") == Some(port))?;
        named["containerPort"].as_u64()
    });
    number.and_then(|number| number.try_into().ok()).unwrap_or_else(|| panic!("port {port} of {container:#}"))
}

impl Hook {
    fn of(container: &Value) -> Option<Self> {
        let hook = container.pointer("/lifecycle/preStop")?;
        let kinds = hook.as_object().expect("a mapping");
        assert_eq!(kinds.len(), 1, "the API server takes one kind of hook: {hook:#}");
        Some(match kinds.keys().next().map(String::as_str) {
            Some("exec") => Self::Exec(texts(hook, "/exec/command")),
            Some("httpGet") => Self::Get {
                port: port(container, &hook["httpGet"]["port"]),
                path: text(hook, "/httpGet/path").to_owned(),
            },
            Some("sleep") => Self::Sleep(Duration::from_secs(hook["sleep"]["seconds"].as_u64().expect("a number"))),
            kind => panic!("a hook of another kind: {kind:?}"),
        })
    }
}

impl Container {
    fn of(container: &Value, is_sidecar: bool) -> Self {
        let mounts = list(container, "/volumeMounts").map(|mount| text(mount, "/mountPath").to_owned());
        Self {
            name: text(container, "/name").to_owned(),
            program: if text(container, "/image").starts_with("tidegate:") {
                Program::Tidegate
            } else {
                Program::Backend
            },
            is_sidecar,
            arguments: texts(container, "/args"),
            config_mount: mounts.last(),
            startup: Probe::of(container, "startupProbe"),
            readiness: Probe::of(container, "readinessProbe"),
            pre_stop: Hook::of(container),
        }
    }
}

impl Manifest {
    /// Of a file that `.ci/manifests` compares with what Kustomize makes of the sources.
    pub fn rendered(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s/rendered").join(name);
        let yaml = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let objects: Vec<Value> = serde_saphyr::from_multiple(&yaml).expect("YAML");
        let of_kind = |kind: &str| {
            let mut found = objects.iter().filter(|object| object["kind"] == kind);
            found.next().unwrap_or_else(|| panic!("no {kind} in {}", path.display()))
        };
        let deployment = &of_kind("Deployment")["spec"];
        let pod = &deployment["template"]["spec"];
        let (sidecars, others): (Vec<_>, Vec<_>) =
            list(pod, "/initContainers").partition(|container| container["restartPolicy"] == "Always");
        assert!(others.is_empty(), "init containers that end are not started here: {others:#?}");
        let sidecars = sidecars.into_iter().map(|container| Container::of(container, true));
        let mains = list(pod, "/containers").map(|container| Container::of(container, false));
        let config = of_kind("ConfigMap")["data"].as_object().expect("a mapping");
        let service_port = list(of_kind("Service"), "/spec/ports").next().expect("a port");
        Self {
            containers: sidecars.chain(mains).collect(),
            config: config
                .iter()
                .map(|(key, value)| (key.clone(), value.as_str().expect("a text").to_owned()))
                .collect(),
            grace: Duration::from_secs(pod["terminationGracePeriodSeconds"].as_u64().expect("a number")),
            available_after: Duration::from_secs(deployment["minReadySeconds"].as_u64().unwrap_or_default()),
            client_port: service_port["targetPort"].as_u64().and_then(|port| port.try_into().ok()).expect("a port"),
        }
    }

    /// Where clients will connect to a Pod in this lab.
    pub fn address_in(&self, lab: &Lab) -> SocketAddr {
        SocketAddr::new(lab.address(Side::Proxy, Side::Client), self.client_port)
    }

    fn proxy_toml(&mut self) -> &mut String {
        let mut keys = self.config.iter_mut();
        keys.find(|(name, _)| name == "proxy.toml").map(|(_, text)| text).expect("a proxy.toml")
    }

    /// A duration of `[drain]`.
    pub fn drain(&mut self, key: &str) -> Duration {
        let config: Table = self.proxy_toml().parse().expect("TOML");
        let seconds = config["drain"].get(key).and_then(|value| value.as_str()?.strip_suffix('s')?.parse().ok());
        Duration::from_secs(seconds.unwrap_or_else(|| panic!("drain.{key} in whole seconds: {config:#?}")))
    }

    /// Another one, for a test that has less time than a deployment.
    pub fn set_drain(&mut self, key: &str, value: Duration) {
        let text = self.proxy_toml();
        let mut config: Table = text.parse().expect("TOML");
        let drain = config["drain"].as_table_mut().expect("a section");
        drain.insert(key.to_owned(), format!("{}s", value.as_secs()).into());
        *text = config.to_string();
    }

    /// The same with nginx in tidegate's place, and the hooks that are best for it: it goes on accepting for `drain.delay`, then closes its
    /// listeners and leaves its sessions `drain.window`, and the backend serves for as long and `drain.timeout` more.
    #[must_use]
    pub fn with_nginx(mut self) -> Self {
        let [delay, window, timeout] = ["delay", "window", "timeout"].map(|key| self.drain(key));
        let backend = self.containers.iter().find(|container| container.program == Program::Backend);
        let path = backend.and_then(|backend| backend.readiness.as_ref()).expect("a probed backend").path.clone();
        for container in &mut self.containers {
            if container.program == Program::Backend {
                container.pre_stop = Some(Hook::Sleep(delay + window + timeout));
                continue;
            }
            "nginx".clone_into(&mut container.name);
            container.program = Program::Nginx;
            // Its end begins with its own hook's, and not with that of the backend's process.
            container.is_sidecar = false;
            container.startup = None;
            let probe = container.readiness.as_mut().expect("a probed proxy");
            (probe.port, probe.path) = (self.client_port, path.clone());
            container.pre_stop = Some(Hook::Sleep(delay));
        }
        let window = window.as_secs();
        let config: Table = self.proxy_toml().parse().expect("TOML");
        let upstream = config["upstream"]["address"].as_str().expect("an address");
        let text = format!(
            "daemon off;
user root;
worker_processes 2;
worker_rlimit_nofile 20000;
worker_shutdown_timeout {window}s;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 9000; }}
http {{
    access_log off;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        ''      close;
    }}
    server {{
        listen 0.0.0.0:{} backlog=65535;
        location / {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
",
            self.client_port
        );
        self.config.push(("nginx.conf".to_owned(), text));
        self
    }
}

/// nginx as it is on the host, with its workers in a process group of their own.
#[derive(Debug)]
struct Nginx {
    child: Child,
    _folder: TempDir,
}

impl Nginx {
    fn start(lab: &Lab, folder: TempDir) -> Self {
        let mut command = lab.command_in(Side::Proxy, "nginx");
        command.arg("-p").arg(folder.path()).args(["-e", "stderr", "-c"]).arg(folder.path().join("nginx.conf"));
        // On stderr it says of each session that it cuts that it was open.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: command.spawn().expect("nginx"), _folder: folder }
    }

    fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    fn kill(&mut self) {
        if !self.has_exited() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What runs in a container.
#[derive(Debug)]
enum Process {
    Tidegate(Arc<Proxy>),
    Backend(EchoProcess),
    Nginx(Nginx),
}

impl Process {
    /// By the signal that its image asks for: SIGTERM where that says nothing.
    fn stop(&mut self) {
        match self {
            Self::Tidegate(proxy) => proxy.sigterm(),
            Self::Backend(backend) => backend.sigterm(),
            Self::Nginx(nginx) => kill_process(Pid::from_child(&nginx.child), Signal::QUIT).expect("our own child"),
        }
    }

    fn sigkill(&mut self) {
        match self {
            Self::Tidegate(proxy) => proxy.sigkill(),
            Self::Backend(backend) => backend.kill(),
            Self::Nginx(nginx) => nginx.kill(),
        }
    }

    fn has_exited(&mut self) -> bool {
        match self {
            Self::Tidegate(proxy) => proxy.exit_status().is_some(),
            Self::Backend(backend) => backend.has_exited(),
            Self::Nginx(nginx) => nginx.has_exited(),
        }
    }
}

/// One that runs; its processes are killed when it is dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    lab: &'a Lab,
    manifest: Manifest,
    /// By the manifest's containers. None: not started yet.
    processes: Vec<Mutex<Option<Process>>>,
    events: Board<Vec<(Instant, String)>>,
    baseline: Counters,
    /// Where clients connect: the Pod's address, and the port that the Service names.
    pub address: SocketAddr,
}

impl<'a> Pod<'a> {
    /// Starts its containers. They are ready when [`Pod::becomes_ready`] says so.
    pub fn start(lab: &'a Lab, manifest: Manifest) -> Self {
        let address = manifest.address_in(lab);
        let processes = manifest.containers.iter().map(|_| Mutex::new(None)).collect();
        let baseline = lab.counters(Side::Proxy);
        let pod = Self { lab, manifest, processes, events: Board::new(Vec::new()), baseline, address };
        for index in 0..pod.manifest.containers.len() {
            pod.start_container(index);
        }
        pod
    }

    fn start_container(&self, index: usize) {
        let container = &self.manifest.containers[index];
        let process = match container.program {
            Program::Tidegate => {
                let folder = self.mount();
                let mount = container.config_mount.as_deref().expect("a mounted configuration");
                let at = |text: &String| text.replace(mount, &folder.path().display().to_string());
                let arguments: Vec<_> = container.arguments.iter().map(at).collect();
                Process::Tidegate(Arc::new(Proxy::start_as(self.lab, &arguments, folder, Instant::now())))
            }
            Program::Nginx => Process::Nginx(Nginx::start(self.lab, self.mount())),
            Program::Backend => {
                Process::Backend(EchoProcess::start_at(self.lab, Side::Proxy, self.listen_address(container)))
            }
        };
        *self.process(index) = Some(process);
        self.note(&container.name, "started");
        if let Some(probe) = &container.startup {
            let passed = (0..probe.failures).any(|_| {
                self.passes(probe) || {
                    thread::sleep(probe.period);
                    false
                }
            });
            assert!(passed, "{}: the startup probe fails: {:#?}", container.name, self.events());
            self.note(&container.name, "startup probe passed");
        }
    }

    /// A folder with the keys of the `ConfigMap` as files. Where all Pods of the host share one loopback, a Pod has an address of it for itself.
    fn mount(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a folder for the configuration");
        for (name, text) in &self.manifest.config {
            let text = if self.lab.counts_are_exact() {
                text.clone()
            } else {
                let own = format!("{}:", self.address.ip());
                text.replace("0.0.0.0:", &own).replace("127.0.0.1:", &own)
            };
            fs::write(folder.path().join(name), text).expect("room for the configuration");
        }
        folder
    }

    /// Where the manifest has the backend listen.
    fn listen_address(&self, backend: &Container) -> SocketAddr {
        let mut arguments = backend.arguments.iter().skip_while(|argument| *argument != "--listen");
        let address = arguments.nth(1).and_then(|text| text.parse().ok());
        let address: SocketAddr = address.unwrap_or_else(|| panic!("no --listen in {:?}", backend.arguments));
        let ip = if self.lab.counts_are_exact() { address.ip() } else { self.address.ip() };
        SocketAddr::new(ip, address.port())
    }

    fn process(&self, index: usize) -> MutexGuard<'_, Option<Process>> {
        self.processes[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self, name: &str) -> usize {
        let position = self.manifest.containers.iter().position(|container| container.name == name);
        position.unwrap_or_else(|| panic!("no container {name}"))
    }

    fn note(&self, container: &str, what: &str) {
        self.events.change(|events| events.push((Instant::now(), format!("{container}: {what}"))));
    }

    /// What the kubelet did, and saw, until now.
    pub fn events(&self) -> Vec<String> {
        self.events.read(|events| events.iter().map(|(_, event)| event.clone()).collect())
    }

    /// When that was, waiting for it.
    #[track_caller]
    pub fn when(&self, event: &str, within: Duration) -> Instant {
        let found = self.events.wait(within, |events| events.iter().find(|(_, e)| e == event).map(|(at, _)| *at));
        found.unwrap_or_else(|| panic!("not within {within:?}: {event}; but {:#?}", self.events()))
    }

    pub fn tidegate(&self) -> Arc<Proxy> {
        let containers = &self.manifest.containers;
        let index = containers.iter().position(|container| container.program == Program::Tidegate);
        let index = index.expect("a tidegate");
        match &*self.process(index) {
            Some(Process::Tidegate(proxy)) => Arc::clone(proxy),
            other => panic!("no tidegate, but {other:?}"),
        }
    }

    /// Waits until all readiness probes pass.
    #[track_caller]
    pub fn becomes_ready(&self) {
        let begun = Instant::now();
        let probes = || self.manifest.containers.iter().filter_map(|container| container.readiness.as_ref());
        while !probes().all(|probe| self.passes(probe)) {
            assert!(begun.elapsed() < DEADLINE, "not ready: {:#?}", self.events());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Goes on with the readiness probes until then, as the kubelet does also while the Pod ends; tells when it is ready no more, and
    /// when it is again.
    pub fn watch(&self, until: &Board<bool>, tell: impl Fn(bool)) {
        let containers = self.manifest.containers.iter();
        let mut probes: Vec<_> = containers.filter_map(|c| c.readiness.as_ref()).map(|probe| (probe, 0)).collect();
        let period = probes.iter().map(|(probe, _)| probe.period).min().expect("a readiness probe");
        let mut is_ready = true;
        while until.wait(period, |until| until.then_some(())).is_none() {
            for (probe, failures) in &mut probes {
                *failures = if self.passes(probe) { 0 } else { *failures + 1 };
            }
            // What was not ready is it with the first probe that passes.
            let is_ready_now = probes.iter().all(|(probe, n)| if is_ready { *n < probe.failures } else { *n == 0 });
            if is_ready_now != is_ready {
                tell(is_ready_now);
            }
            is_ready = is_ready_now;
        }
    }

    /// One request, as the kubelet makes it from the node.
    fn passes(&self, probe: &Probe) -> bool {
        let answer = self.get(probe.port, &probe.path, probe.timeout);
        // What counts as good is from 200 to below 400.
        matches!(answer, Ok(status) if status.starts_with('2') || status.starts_with('3'))
    }

    /// The status of the answer.
    fn get(&self, port: u16, path: &str, within: Duration) -> io::Result<String> {
        let address = SocketAddr::new(self.address.ip(), port);
        self.lab.place(Side::Client).run(|| {
            let mut stream = TcpStream::connect_timeout(&address, within)?;
            stream.set_read_timeout(Some(within))?;
            let head =
                format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: {AGENT}\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes())?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            let status = line.split(' ').nth(1).ok_or_else(|| io::Error::other(format!("no status line: {line:?}")))?;
            Ok(status.to_owned())
        })
    }

    fn run_hook(&self, hook: &Hook, end: Instant) -> String {
        let left = end.saturating_duration_since(Instant::now());
        match hook {
            Hook::Sleep(time) => {
                thread::sleep((*time).min(left));
                "slept".to_owned()
            }
            Hook::Get { port, path } => match self.get(*port, path, left) {
                Ok(status) => status,
                // The kubelet only writes an event of it.
                Err(error) => error.to_string(),
            },
            Hook::Exec(command) => {
                let [program, arguments @ ..] = command.as_slice() else { panic!("a hook without a command") };
                assert_eq!(program, "/tidegate", "what is in the image");
                let config = self.tidegate().config_file();
                let mut command = self.lab.command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
                // In the container it is in one of the places where it is looked for.
                command.args(arguments).env("TIDEGATE_CONFIG", config).stdin(Stdio::null());
                let output = command.output().expect("the binary that was just built");
                assert!(output.status.success(), "{output:?}");
                "0".to_owned()
            }
        }
    }

    /// SIGTERM for this container, and SIGKILL when it is still there at the `end`.
    fn stop(&self, index: usize, end: Instant) {
        let name = &self.manifest.containers[index].name;
        let with = |what: fn(&mut Process)| what(self.process(index).as_mut().expect("a process"));
        self.note(name, if self.manifest.containers[index].program == Program::Nginx { "SIGQUIT" } else { "SIGTERM" });
        with(Process::stop);
        let has_exited = || self.process(index).as_mut().is_none_or(Process::has_exited);
        while !has_exited() {
            if Instant::now() > end {
                self.note(name, "SIGKILL");
                with(Process::sigkill);
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.note(name, "exited");
    }

    /// The Pod is deleted; returns when all of its containers have exited.
    pub fn delete(&self) {
        let end = Instant::now() + self.manifest.grace;
        let containers = &self.manifest.containers;
        let mains_left = Board::new(containers.iter().filter(|container| !container.is_sidecar).count());
        thread::scope(|scope| {
            for (index, container) in containers.iter().enumerate() {
                let mains_left = mains_left.clone();
                scope.spawn(move || {
                    if let Some(hook) = &container.pre_stop {
                        self.note(&container.name, "hook begins");
                        let result = self.run_hook(hook, end);
                        self.note(&container.name, &format!("hook ends: {result}"));
                    }
                    if container.is_sidecar {
                        let left = end.saturating_duration_since(Instant::now());
                        let _ = mains_left.wait(left, |count| (*count == 0).then_some(()));
                    }
                    self.stop(index, end);
                    if !container.is_sidecar {
                        mains_left.change(|count| *count -= 1);
                    }
                });
            }
        });
    }

    /// The liveness probe of this container has failed for too long: it is ended alone, hook and all, and started again.
    pub fn liveness_fails(&self, name: &str) {
        let index = self.index(name);
        let end = Instant::now() + self.manifest.grace;
        if let Some(hook) = &self.manifest.containers[index].pre_stop {
            self.note(name, "hook begins");
            let result = self.run_hook(hook, end);
            self.note(name, &format!("hook ends: {result}"));
        }
        self.stop(index, end);
        self.start_container(index);
    }

    /// No socket of the Pod was reset, by whomever.
    #[track_caller]
    pub fn assert_no_rst(&self) {
        (&self.lab.counters(Side::Proxy) - &self.baseline).assert_no_rst();
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("---- what the kubelet did: {:#?}", self.events());
        }
    }
}
