//! The configuration as its users meet it: files, environment, flags, messages, exit codes.
//!
//! `tests/config/valid` and `tests/config/invalid` are the cases. What each invalid one says is a snapshot, to be read as the
//! person would who made the mistake.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, but not in their helpers

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use tidegate::{
    config::{self, FileSource, Findings, Level, Loaded, Settings, Sources},
    hub::Kind,
    upstream::Mode,
};

/// Relative, as cargo runs tests at the root of the package: so messages are the same on every machine.
const CASES: &str = "tests/config";

fn cases(kind: &str, at_least: usize) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(Path::new(CASES).join(kind))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    paths.sort();
    assert!(paths.len() >= at_least, "only {} {kind} cases were found", paths.len());
    paths
}

fn sources(file: FileSource, env: &[(&str, &str)]) -> Sources {
    let env = env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
    Sources { file, env, listen: None, upstream: None }
}

fn named(path: impl Into<PathBuf>) -> FileSource {
    FileSource::Named { path: path.into(), by: "--config" }
}

fn nothing() -> FileSource {
    FileSource::Search(Vec::new())
}

fn load_text(text: &str, env: &[(&str, &str)]) -> Result<Loaded, Findings> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy.toml");
    fs::write(&path, text).unwrap();
    config::load(&sources(named(path), env))
}

/// Goal: valid files load, and their effective settings, written and read again, are the same settings. Warnings are rare and
/// belong to the files that are named for them.
#[test]
fn valid_files() {
    for path in cases("valid", 15) {
        let loaded = config::load(&sources(named(&path), &[]))
            .unwrap_or_else(|findings| panic!("{}:\n{findings}", path.display()));
        let name = path.file_stem().unwrap().to_str().unwrap();
        for written in [loaded.settings.to_toml(), loaded.to_toml()] {
            let again = load_text(&written, &[])
                .unwrap_or_else(|findings| panic!("{}:\n{findings}\n{written}", path.display()));
            assert_eq!(again.settings, loaded.settings, "{}:\n{written}", path.display());
        }
        assert_eq!(name.starts_with("warns_"), !loaded.findings.is_empty(), "{name}: {:?}", loaded.findings);
        if !loaded.findings.is_empty() {
            insta::assert_snapshot!(format!("valid_{name}"), Findings(loaded.findings));
        }
    }
}

/// Goal: the files of `examples/` are valid, with nothing to warn of, and are told about. Method: whatever folder is there.
#[test]
fn example_files() {
    let folders: Vec<PathBuf> =
        fs::read_dir("examples").unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 5, "only {} examples were found", folders.len());
    let list = fs::read_to_string("examples/README.md").unwrap();
    for folder in folders {
        let path = folder.join("proxy.toml");
        let loaded = config::load(&sources(named(&path), &[]))
            .unwrap_or_else(|findings| panic!("{}:\n{findings}", path.display()));
        assert!(loaded.findings.is_empty(), "{}: {:?}", path.display(), loaded.findings);
        let readme = folder.join("README.md");
        assert!(readme.is_file(), "{} is not there", readme.display());
        let link = format!("({}/README.md)", folder.file_name().unwrap().to_str().unwrap());
        assert!(list.contains(&link), "examples/README.md does not list {}", folder.display());
    }
}

/// Goal: every mistake is found, at its place, with a fix. Method: the whole message of each file is a snapshot.
#[test]
fn invalid_files() {
    for path in cases("invalid", 46) {
        let findings = match config::load(&sources(named(&path), &[])) {
            Err(findings) => findings,
            Ok(loaded) => panic!("{} was accepted: {:?}", path.display(), loaded.settings),
        };
        assert!(
            findings.0.iter().all(|finding| !finding.fix.is_empty() && !finding.what.starts_with(char::is_uppercase))
        );
        insta::assert_snapshot!(format!("invalid_{}", path.file_stem().unwrap().to_str().unwrap()), findings);
    }
}

/// Goal: mistakes in the environment name the variable.
#[test]
fn invalid_environment() {
    let mut env = vec![
        ("TIDEGATE_CLOSE__DEALY", "100ms"),
        ("TIDEGATE_CLOES__DELAY", "100ms"),
        ("TIDEGATE_POOL__MODE", "shared"),
        ("TIDEGATE_ROUTE__PATH", "/chat"),
        ("TIDEGATE_DRAIN__LINGER", "1s"),
        ("TIDEGATE_close__linger", "1s"),
        ("TIDEGATE_UPSTREAM__TIMEOUT", "1s"),
        ("TIDEGATE_CLOSE__HANDSHAKE_TIMEOUT", "250"),
        ("TIDEGATE_LISTEN__WORKERS", "many"),
        ("TIDEGATE_LISTEN__BACKLOG", ""),
        ("TIDEGATE_DRAIN__CLOSE_CODE", "1005"),
        ("TIDEGATE_HTTP__TRUSTED_PROXIES", "10.0.0.0/8,10.1"),
        ("TIDEGATE_LISTEN__ADDRESS", "localhost:8080"),
        ("TIDEGATE_UPSTREAM__ADDRESS", "ws://app:9000/socket"),
        ("TIDEGATE_DRAIN__WINDOW__", "1s"),
        // A warning: it may be somebody else's, but this is unlikely.
        ("TIDEGATE_CLOSE_DELAY", "0ms"),
        // Kubernetes sets these for a service of this name.
        ("TIDEGATE_SERVICE_HOST", "10.96.0.7"),
        ("TIDEGATE_PORT", "tcp://10.96.0.7:8080"),
        ("TIDEGATE_PORT_8080_TCP_ADDR", "10.96.0.7"),
        // Not a key.
        ("TIDEGATE_CONFIG", "elsewhere.toml"),
        ("OTHER_CLOSE__DELAY", "soon"),
    ];
    let first = config::load(&sources(nothing(), &env)).unwrap_err();
    env.reverse();
    assert_eq!(
        config::load(&sources(nothing(), &env)).unwrap_err(),
        first,
        "the order of the environment does not matter"
    );
    insta::assert_snapshot!("environment", first);
}

/// Goal: each way to get an address wrong has its own answer.
#[test]
fn invalid_addresses() {
    let mut said = String::new();
    let mut say = |sources: &Sources| {
        said += &config::load(sources).unwrap_err().to_string();
        said += "\n\n";
    };
    for listen in [
        "",
        "8080",
        ":8080",
        "*:8080",
        "app:8080",
        "0.0.0.0",
        "::",
        "::1:8080",
        "0.0.0.0:80800",
        "http://0.0.0.0:8080",
        "unix:/a",
    ] {
        say(&Sources { listen: Some(listen.to_owned()), ..sources(nothing(), &[]) });
    }
    for upstream in [
        "",
        "9000",
        ":9000",
        "app",
        "app:http",
        "app:0",
        "::1",
        "::1:9000",
        "[localhost]:9000",
        "127.0.0.256:9000",
        "my app:9000",
        "wss://app",
        "http://app/",
        "a:1,b:2",
        "unix:app.sock",
        "/run/app.sock",
    ] {
        say(&Sources { upstream: Some(upstream.to_owned()), ..sources(nothing(), &[]) });
    }
    insta::assert_snapshot!("addresses", said);
}

/// Goal: later sources win, value by value; lists, numbers and texts can be given in the environment as one would expect.
#[test]
fn precedence_and_types() {
    let file = "[listen]\naddress = \"0.0.0.0:1\"\nworkers = 1\nbacklog = 7\n[upstream]\naddress = \"file:1\"\n";
    let env = [
        ("TIDEGATE_LISTEN__ADDRESS", "0.0.0.0:2"),
        ("TIDEGATE_UPSTREAM__ADDRESS", "env:2"),
        ("TIDEGATE_LISTEN__WORKERS", "0x2"),
        ("TIDEGATE_HTTP__TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1"),
        ("TIDEGATE_DRAIN__REASON", "1012"),
        ("TIDEGATE_CLOSE__DELAY", "\"0ms\""),
        ("TIDEGATE_WEBSOCKET__RECV_BUFFER", "65536"),
    ];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy.toml");
    fs::write(&path, file).unwrap();
    let sources = Sources { upstream: Some("flag:3".to_owned()), ..sources(named(path), &env) };
    let settings = config::load(&sources).unwrap().settings;

    assert_eq!(settings.upstream.address.to_string(), "flag:3");
    assert_eq!(settings.listen.address.to_string(), "0.0.0.0:2");
    assert_eq!(settings.listen.workers, 2);
    assert_eq!(settings.listen.backlog, 7);
    assert_eq!(
        settings.downstream.trusted_proxies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "192.0.2.1/32"]
    );
    assert_eq!(settings.drain.reason, "1012");
    assert_eq!(settings.relay.close_delay, Duration::ZERO);
    assert_eq!(settings.socket.recv_buffer, Some(65_536));

    let list = load_text("", &[("TIDEGATE_HTTP__TRUSTED_PROXIES", r#"["10.0.0.0/8"]"#)]).unwrap().settings;
    assert_eq!(list.downstream.trusted_proxies.len(), 1);
    let empty =
        load_text("", &[("TIDEGATE_HTTP__TRUSTED_PROXIES", ""), ("TIDEGATE_DRAIN__REASON", "")]).unwrap().settings;
    assert!(empty.downstream.trusted_proxies.is_empty() && empty.drain.reason.is_empty());
}

/// Goal: what follows from other settings follows from the effective ones.
#[test]
fn what_is_computed() {
    let settings = load_text(
        "[websocket]\nmax_message = \"1MiB\"\nwrite_timeout = \"1s\"\n[close]\nhandshake_timeout = \"2s\"\nlinger_max = \"4s\"\n[http]\nheader_bytes = \"64KiB\"\n",
        &[("TIDEGATE_LISTEN__KEEPALIVE", "0s")],
    )
    .unwrap()
    .settings;
    assert_eq!(settings.relay.max_frame, 1 << 20);
    assert_eq!(settings.upstream.header_bytes, 64 << 10);
    assert_eq!(settings.socket.user_timeout, Some(Duration::from_secs(1 + 2 + 4 + 15)));
    assert_eq!(settings.socket.keepalive, None);
    assert!((2..=4).contains(&settings.listen.workers));
}

/// Goal: what a route does not say of itself is as for all; routes are bounded.
#[test]
fn routes() {
    let loaded = config::load(&sources(named("tests/config/valid/routes.toml"), &[])).unwrap();
    let ways: Vec<_> = loaded.settings.ways().collect();
    let all = &loaded.settings.upstream;
    let pattern: Vec<_> = ways.iter().map(|(pattern, _)| pattern.to_string()).collect();
    assert_eq!(pattern, ["/chat/*", "/chat", "/caf%C3%A9/a.b", "/prices", "/*"]);
    let [(_, chat), (_, exact), (_, of_pool), (_, shared), (_, rest)] = &ways[..] else { panic!("{ways:?}") };
    assert_eq!(
        (chat.address.to_string().as_str(), chat.pool.mode, chat.pool.prewarm),
        ("127.0.0.1:9001", Mode::Multiplexed, 0)
    );
    assert_eq!((exact.address.to_string().as_str(), &exact.pool), ("127.0.0.1:9001, 127.0.0.1:9002", &all.pool));
    assert_eq!((of_pool.pool.keep_alive, of_pool.pool.prewarm, &of_pool.address), (0, 2, &all.address));
    assert_eq!(shared.pool.mode, Mode::Shared);
    let kinds: Vec<_> = loaded.settings.sharing().map(|(path, sharing)| (path, sharing.kind)).collect();
    assert_eq!(kinds, [("/prices".to_owned(), Some(Kind::Broadcast))]);
    assert_eq!(rest, all);

    let many = |count: usize| {
        let routes: Vec<_> = (0..count).map(|index| format!("[[route]]\npath = \"/{index}\"\n")).collect();
        load_text(&routes.concat(), &[])
    };
    assert_eq!(many(256).unwrap().settings.ways().count(), 256);
    assert!(many(257).unwrap_err().to_string().contains("at most 256"));
    let list = load_text("", &[("TIDEGATE_UPSTREAM__ADDRESS", r#"["a:1", "b:2"]"#)]).unwrap().settings;
    assert_eq!(list.upstream.address.to_string(), "a:1, b:2");
}

/// Goal: the shipped `proxy.toml` is the contract. It has exactly the known keys, in their order, each with its default and with
/// an explanation. Method: each line is read on its own, and the whole of it as a configuration.
#[test]
fn shipped_file() {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in config::SHIPPED.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if !line.is_empty() && !line.starts_with('#') {
            let (key, rest) = line.split_once(" = ").unwrap_or_else(|| panic!("not key = value: {line}"));
            let (value, explanation) = rest.split_once(" #").unwrap_or_else(|| panic!("no explanation: {line}"));
            assert!(explanation.trim().len() > 20, "hardly an explanation: {line}");
            found.push((section.clone(), key.to_owned()));

            // One key at a time: a value that is not its default would show.
            let only = load_text(&format!("[{section}]\n{key} = {value}\n"), &[])
                .unwrap_or_else(|findings| panic!("{findings}"))
                .settings;
            assert_eq!(only, Settings::default(), "{section}.{key}: {value} is not the default");
        }
    }
    let known: Vec<_> =
        Settings::default().entries().iter().map(|entry| (entry.section.to_owned(), entry.key.to_owned())).collect();
    assert_eq!(found, known);
    for file in [named("proxy.toml"), FileSource::Shipped] {
        let loaded = config::load(&sources(file, &[])).unwrap();
        assert_eq!(loaded.settings, Settings::default());
        assert_eq!(loaded.findings, []);
    }
}

/// Goal: which file is read. A named one must exist; of the others the first that exists is used, and none is worth a note.
#[test]
fn which_file() {
    let missing = config::load(&sources(named("no/such/proxy.toml"), &[])).unwrap_err();
    insta::assert_snapshot!("file_missing", missing);
    let directory = config::load(&sources(named("tests"), &[])).unwrap_err();
    insta::assert_snapshot!("file_is_directory", directory);

    let search = |paths: &[&str]| FileSource::Search(paths.iter().map(PathBuf::from).collect());
    let first =
        config::load(&sources(search(&["no/such.toml", "tests/config/valid/small_messages.toml", "proxy.toml"]), &[]))
            .unwrap();
    assert_eq!(first.file.as_deref(), Some("tests/config/valid/small_messages.toml"));
    assert_eq!(first.findings, []);

    let none = config::load(&sources(search(&["no/such.toml", "nor/this.toml"]), &[])).unwrap();
    assert_eq!((none.file, &none.settings), (None, &Settings::default()));
    assert!(none.findings.iter().all(|finding| finding.level == Level::Note));
    insta::assert_snapshot!("file_none", Findings(none.findings));

    let flags = Sources {
        listen: Some("127.0.0.1:8080".to_owned()),
        upstream: Some("127.0.0.1:9000".to_owned()),
        ..sources(search(&["no/such.toml"]), &[])
    };
    assert_eq!(config::load(&flags).unwrap().findings, []);
}

/// Goal: a file of unreasonable size is refused before it is all read.
#[test]
fn too_large() {
    let findings = load_text(&"#".repeat((1 << 20) + 1), &[]).unwrap_err();
    assert!(findings.0[0].what.contains("larger than 1MiB"), "{findings}");
}

/// Goal: the text, JSON and one-line forms of effective settings stay as they are.
#[test]
fn effective_forms() {
    let env = [("TIDEGATE_CLOSE__DELAY", "0ms"), ("TIDEGATE_LISTEN__WORKERS", "2")];
    let loaded = config::load(&sources(named("tests/config/valid/most.toml"), &env)).unwrap();
    insta::assert_snapshot!("effective_toml", loaded.to_toml());
    insta::assert_snapshot!("effective_json", serde_json::to_string_pretty(&loaded.settings).unwrap());
    let small = config::load(&sources(named("tests/config/valid/small_messages.toml"), &env)).unwrap();
    insta::assert_snapshot!("summary", small.settings.summary());
    let routes = config::load(&sources(named("tests/config/valid/routes.toml"), &env)).unwrap();
    let written = routes.to_toml();
    insta::assert_snapshot!("effective_routes_toml", written.split_once("[[route]]").unwrap().1);
    let json = serde_json::to_value(&routes.settings).unwrap();
    insta::assert_snapshot!("effective_routes_json", serde_json::to_string_pretty(&json["route"]).unwrap());
    assert!(routes.settings.summary().ends_with(" routes=5"), "{}", routes.settings.summary());
    let finding = load_text("[close]\n  delay = 1\n", &[]).unwrap_err().0.remove(0);
    assert!(
        finding
            .line()
            .ends_with(r#"proxy.toml:2:11: `close.delay` is a duration without a unit: 1; write "1ms" or "1s""#),
        "{}",
        finding.line()
    );
}

/// Runs the program in `directory`, in an environment of only `env`.
fn tidegate(directory: &Path, env: &[(&str, &str)], arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(arguments)
        .env_clear()
        .envs(env.iter().copied())
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Code, stdout, stderr.
fn ends(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn help() {
    let directory = tempfile::tempdir().unwrap();
    for command in ["", "run", "demo", "check", "doctor", "config", "completions", "man"] {
        let arguments: Vec<&str> = [command, "--help"].into_iter().filter(|argument| !argument.is_empty()).collect();
        let (code, stdout, stderr) = ends(&tidegate(directory.path(), &[], &arguments));
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        insta::assert_snapshot!(format!("help_{}", if command.is_empty() { "tidegate" } else { command }), stdout);
    }
    let version = ends(&tidegate(directory.path(), &[], &["--version"]));
    assert_eq!(version, (Some(0), format!("tidegate {}\n", env!("CARGO_PKG_VERSION")), String::new()));
}

/// Goal: 0, 2 and 78 as promised; data on stdout and diagnostics on stderr.
#[test]
fn exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let run = |env: &[(&str, &str)], arguments: &[&str]| ends(&tidegate(directory.path(), env, arguments));
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write("good.toml", "[close]\ndelay = \"0ms\"\n");
    write("warns.toml", "[websocket]\nping_interval = \"2m\"\n");
    write("bad.toml", "[close]\ndelay = 0\n");

    // Usage.
    for arguments in [
        &[][..],
        &["fly"],
        &["run", "--fast"],
        &["config", "--default", "--effective"],
        &["config", "--schema", "--default"],
        &["check", "--config"],
    ] {
        let (code, stdout, stderr) = run(&[], arguments);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
        assert!(!stderr.is_empty());
    }

    // `check`, however the file was named.
    assert_eq!(run(&[], &["check", "-c", "good.toml"]), (Some(0), "ok: good.toml\n".into(), String::new()));
    assert_eq!(
        run(&[("TIDEGATE_CONFIG", "good.toml")], &["check"]),
        (Some(0), "ok: good.toml\n".into(), String::new())
    );
    let (code, stdout, stderr) = run(&[], &["check", "-c", "warns.toml"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "ok: warns.toml\n"));
    assert!(stderr.starts_with("warning: "), "{stderr}");
    for (env, arguments) in [
        (&[][..], &["check", "-c", "bad.toml"][..]),
        (&[], &["run", "-c", "bad.toml"]),
        (&[], &["demo", "-c", "bad.toml"]),
        (&[], &["config", "-c", "bad.toml"]),
        (&[], &["check", "-c", "missing.toml"]),
        (&[("TIDEGATE_CONFIG", "missing.toml")], &["check"]),
        (&[("TIDEGATE_CONFIG", "bad.toml")], &["check"]),
        (&[("TIDEGATE_CLOSE__DELAY", "0")], &["check", "-c", "good.toml"]),
        (&[("TIDEGATE_CLOSE__DELAY", "0")], &["demo"]),
        (&[], &["run", "--listen", "8080"]),
        (&[], &["run", "--upstream", "app"]),
    ] {
        let (code, stdout, stderr) = run(env, arguments);
        assert_eq!((code, stdout.as_str()), (Some(78), ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{stderr}");
    }
    assert!(run(&[("TIDEGATE_CONFIG", "missing.toml")], &["check"]).2.contains("named by TIDEGATE_CONFIG"));

    // `config`.
    assert_eq!(run(&[], &["config", "--default"]), (Some(0), config::SHIPPED.to_owned(), String::new()));
    let (code, stdout, _) = run(&[], &["config", "--default", "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &json["listen"]["workers"], &json["close"]["delay"]), (Some(0), &0.into(), &"100ms".into()));
    let (code, stdout, stderr) = run(&[], &["config", "-c", "good.toml"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(
        stdout.contains("delay = \"0ms\" # good.toml:2:9\n") || stdout.contains("delay = \"0s\" # good.toml:2:9\n"),
        "{stdout}"
    );
    assert_eq!(run(&[], &["config", "-c", "good.toml", "--effective"]).1, stdout);

    // ./proxy.toml comes before /etc; an empty variable is none.
    write("proxy.toml", "[close]\ndelay = 1\n");
    for env in [&[][..], &[("TIDEGATE_CONFIG", "")]] {
        let (code, _, stderr) = run(env, &["check"]);
        assert_eq!(code, Some(78));
        assert!(stderr.contains(" --> proxy.toml:2:9\n"), "{stderr}");
    }
}

proptest::proptest! {
    /// Goal: no text, however broken, makes reading or its messages panic. Method: pieces of TOML and of real keys in any order.
    #[test]
    fn no_text_panics(pieces in proptest::collection::vec(PIECES, 0..12)) {
        if let Err(findings) = load_text(&pieces.concat(), &[]) {
            proptest::prop_assert!(findings.to_string().contains(" --> "));
        }
    }
}

/// As a regular expression, which proptest takes for a generator.
const PIECES: &str =
    r#"\[|\]|\[\[|=|\n|\r\n|"|'|"""|\{|\}|\.|,|#|\t| |close|delay|"100ms"|1|-1|0x|1979-05-27|true|é|\x00|\PC{1,3}"#;
