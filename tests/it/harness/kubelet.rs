//! A Pod of a manifest as it is shipped, as plain processes in one network namespace: started, probed and ended as the kubelet does it.
//!
//! ```text
//! start   sidecars in their order, each until its startupProbe has passed; then the main containers
//! end     all preStop hooks at once; a main container gets SIGTERM when its own hook has ended, a sidecar when all main
//!         containers have exited as well; SIGKILL for whoever is left when the grace period is over
//! ```
//!
//! What the manifest says is parsed and done: hooks, probes, arguments, the `ConfigMap` and where it is mounted, the grace period. Not
//! here: images (the backend is an echo of ours), resources, security contexts, and restarts for any other reason than a test's.

use super::{Board, DEADLINE, Lab, Side, crowd::EchoProcess, lab::Counters, proxy::Proxy};
use serde_json::Value;
use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What the kubelet itself says in its requests.
const AGENT: &str = "kube-probe/1.33";

#[derive(Debug)]
enum Hook {
    Exec(Vec<String>),
    Get { port: u16, path: String },
    Sleep(Duration),
}

#[derive(Debug)]
struct Probe {
    port: u16,
    path: String,
    period: Duration,
    timeout: Duration,
    failures: u64,
}

/// A container's part of the manifest.
#[derive(Debug)]
struct Container {
    name: String,
    is_tidegate: bool,
    is_sidecar: bool,
    arguments: Vec<String>,
    /// Of a container with the configuration, where that is.
    config_mount: Option<String>,
    startup: Option<Probe>,
    readiness: Option<Probe>,
    pre_stop: Option<Hook>,
}

/// What a file of `k8s/rendered` says of the Pod of its Deployment.
#[derive(Debug)]
pub struct Manifest {
    /// Sidecars first, each kind in its order.
    containers: Vec<Container>,
    /// The keys of the `ConfigMap`.
    config: Vec<(String, String)>,
    pub grace: Duration,
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
            is_tidegate: text(container, "/image").starts_with("tidegate:"),
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
        let pod = &of_kind("Deployment")["spec"]["template"]["spec"];
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
            client_port: service_port["targetPort"].as_u64().and_then(|port| port.try_into().ok()).expect("a port"),
        }
    }
}

/// What runs in a container.
#[derive(Debug)]
enum Process {
    Tidegate(Arc<Proxy>),
    Backend(EchoProcess),
}

impl Process {
    fn sigterm(&mut self) {
        match self {
            Self::Tidegate(proxy) => proxy.sigterm(),
            Self::Backend(backend) => backend.sigterm(),
        }
    }

    fn sigkill(&mut self) {
        match self {
            Self::Tidegate(proxy) => proxy.sigkill(),
            Self::Backend(backend) => backend.kill(),
        }
    }

    fn has_exited(&mut self) -> bool {
        match self {
            Self::Tidegate(proxy) => proxy.exit_status().is_some(),
            Self::Backend(backend) => backend.has_exited(),
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
        let ip = lab.address(Side::Proxy, Side::Client);
        let processes = manifest.containers.iter().map(|_| Mutex::new(None)).collect();
        let address = SocketAddr::new(ip, manifest.client_port);
        let baseline = lab.counters(Side::Proxy);
        let pod = Self { lab, manifest, processes, events: Board::new(Vec::new()), baseline, address };
        for index in 0..pod.manifest.containers.len() {
            pod.start_container(index);
        }
        pod
    }

    fn start_container(&self, index: usize) {
        let container = &self.manifest.containers[index];
        let process = if container.is_tidegate {
            let folder = self.mount();
            let mount = container.config_mount.as_deref().expect("a mounted configuration");
            let at = |text: &String| text.replace(mount, &folder.path().display().to_string());
            let arguments: Vec<_> = container.arguments.iter().map(at).collect();
            Process::Tidegate(Arc::new(Proxy::start_as(self.lab, &arguments, folder, Instant::now())))
        } else {
            Process::Backend(EchoProcess::start_at(self.lab, Side::Proxy, self.listen_address(container)))
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
    fn mount(&self) -> tempfile::TempDir {
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
        let index = self.manifest.containers.iter().position(|container| container.is_tidegate).expect("a tidegate");
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
        self.note(name, "SIGTERM");
        with(Process::sigterm);
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
