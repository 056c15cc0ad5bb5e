//! What a client waits for its 101, with and without connections opened ahead (`pool.prewarm`), to a backend that is a round trip away.
//!
//! Between tidegate and the backend is a relay in user space that holds all bytes back for 10 ms, in each direction. Its kernel takes connections
//! at once, so it also lets a connection's first bytes begin their way only a round trip after that was accepted, as a TCP handshake
//! would have it. A handshake of TLS needs no such help: its round trips are bytes. It is TLS 1.3, each time in full: nothing is resumed, so
//! nothing is sent early either.
//!
//! All rows are measured in turn, and that three times.
//!
//! Not here: throughput, and many clients at once (`compare`).

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer, server::NoServerSessionStorage, version::TLS13},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// In each direction.
const DELAY: Duration = Duration::from_millis(10);

const CLIENTS: usize = 200;

/// Between one client and the next: for what was used to be replaced. That takes two round trips with TLS.
const PAUSE: Duration = Duration::from_millis(50);

/// How often each row is measured.
const RUNS: usize = 3;

/// How many connections are kept ready.
const PREWARM: [usize; 2] = [0, 8];

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let tls = Tls::new()?;
        let rows: Vec<_> = [("TCP", None), ("TLS 1.3", Some(&tls))]
            .into_iter()
            .flat_map(|(transport, tls)| PREWARM.map(|prewarm| (transport, tls, prewarm)))
            .collect();
        let mut runs = vec![Vec::new(); rows.len()];
        for _ in 0..RUNS {
            for ((transport, tls, prewarm), runs) in rows.iter().zip(&mut runs) {
                let took = run(*prewarm, *tls).await?;
                let of = |share: usize| took[(took.len() - 1) * share / 100].as_secs_f64() * 1e3;
                eprintln!("{transport}, pool.prewarm = {prewarm}: p50 {:.1} ms, p99 {:.1} ms", of(50), of(99));
                runs.push([of(50), of(99)]);
            }
        }
        println!("Each of {RUNS} runs in ms, sorted.\n");
        println!("| transport | `pool.prewarm` | p50 | p99 |\n|---|---|---|---|");
        for ((transport, _, prewarm), runs) in rows.iter().zip(&runs) {
            let [p50, p99] = [0, 1].map(|which| {
                let mut of_each: Vec<f64> = runs.iter().map(|run| run[which]).collect();
                of_each.sort_by(f64::total_cmp);
                of_each.iter().map(|ms| format!("{ms:.1}")).collect::<Vec<_>>().join(", ")
            });
            println!("| {transport} | {prewarm} | {p50} | {p99} |");
        }
        Ok(())
    })
}

/// The backend's side of TLS, and whom tidegate is to believe.
struct Tls {
    acceptor: TlsAcceptor,
    authority: tempfile::NamedTempFile,
}

impl Tls {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let mut authority = tempfile::NamedTempFile::new()?;
        authority.write_all(params.self_signed(&key)?.pem().as_bytes())?;
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(["127.0.0.1".to_owned()])?.signed_by(&key, &issuer)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der())?)?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), authority })
    }
}

/// How long each client waited from its connect to its 101, sorted.
async fn run(prewarm: usize, tls: Option<&Tls>) -> Result<Vec<Duration>> {
    // All of it ends with these.
    let mut tasks = JoinSet::new();
    let backend = TcpListener::bind("127.0.0.1:0").await?;
    let behind = backend.local_addr()?;
    let acceptor = tls.map(|tls| tls.acceptor.clone());
    tasks.spawn(accept(backend, move |stream| {
        let acceptor = acceptor.clone();
        async move {
            match acceptor {
                Some(acceptor) => answer(acceptor.accept(stream).await?).await,
                None => answer(stream).await,
            }
        }
    }));
    let relay = TcpListener::bind("127.0.0.1:0").await?;
    let before = relay.local_addr()?;
    tasks.spawn(accept(relay, move |stream| delay(stream, behind)));
    let tidegate = Tidegate::start(prewarm, tls, before)?;
    // For those that are opened ahead of the first, one at a time.
    sleep(Duration::from_secs(1)).await;
    let mut took = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        took.push(timeout(Duration::from_secs(10), visit(tidegate.address)).await??);
        sleep(PAUSE).await;
    }
    took.sort_unstable();
    Ok(took)
}

async fn accept<F>(listener: TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        tasks.spawn(serve(stream));
        while tasks.try_join_next().is_some() {}
    }
}

/// A 101 for whoever asks, and then nothing until it ends.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
    }
    let accept = derive_accept_key(KEY.as_bytes());
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await?;
    while stream.read_buf(&mut read).await? > 0 {
        read.clear();
    }
    Ok(())
}

async fn delay(stream: TcpStream, to: SocketAddr) -> std::io::Result<()> {
    let established = Instant::now() + 2 * DELAY;
    let onward = TcpStream::connect(to).await?;
    onward.set_nodelay(true)?;
    let ((a_read, a_write), (b_read, b_write)) = (stream.into_split(), onward.into_split());
    tokio::try_join!(pass(a_read, b_write, established), pass(b_read, a_write, established))?;
    Ok(())
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, established: Instant) -> std::io::Result<()> {
    let (queue, mut held) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    let read = async move {
        loop {
            let mut bytes = Vec::with_capacity(16 * 1024);
            let count = from.read_buf(&mut bytes).await?;
            let due = Instant::now().max(established) + DELAY;
            if queue.send((due, bytes)).await.is_err() || count == 0 {
                return std::io::Result::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = held.recv().await {
            sleep_until(due).await;
            if bytes.is_empty() {
                return to.shutdown().await;
            }
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::try_join!(read, write)?;
    Ok(())
}

async fn visit(address: SocketAddr) -> std::io::Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await? == 0 {
            break;
        }
    }
    let took = begun.elapsed();
    if !read.starts_with(b"HTTP/1.1 101 ") {
        return Err(std::io::Error::other(String::from_utf8_lossy(&read).into_owned()));
    }
    stream.shutdown().await?;
    Ok(took)
}

/// Killed when it is dropped: its sessions are over.
struct Tidegate {
    child: Child,
    address: SocketAddr,
    _config: tempfile::NamedTempFile,
}

impl Tidegate {
    fn start(prewarm: usize, tls: Option<&Tls>, backend: SocketAddr) -> Result<Self> {
        let mut config = tempfile::NamedTempFile::with_suffix(".toml")?;
        write!(
            config,
            "listen.address = '127.0.0.1:0'\nlisten.workers = 1\nadmin.address = 'off'\nupstream.address = '{backend}'\n\
             pool.prewarm = {prewarm}\nlog.format = 'json'\nlog.filter = 'info'\n"
        )?;
        if let Some(tls) = tls {
            writeln!(config, "upstream.tls = true\nupstream.tls_ca = '{}'", tls.authority.path().display())?;
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command
            .args(["run", "-c"])
            .arg(config.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let outputs: [Option<Box<dyn std::io::Read + Send>>; 2] =
            [child.stdout.take().map(|it| Box::new(it) as _), child.stderr.take().map(|it| Box::new(it) as _)];
        let (send, found) = std::sync::mpsc::channel();
        for output in outputs.into_iter().flatten() {
            let send = send.clone();
            // Read to its end, so that it never waits for us.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                    let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
                    if line["message"] == "listening"
                        && let Some(address) = line["address"].as_str().and_then(|address| address.parse().ok())
                    {
                        let _ = send.send(address);
                    }
                }
            });
        }
        let address = found.recv_timeout(Duration::from_secs(10));
        let mut started = Self { child, address: SocketAddr::from(([0, 0, 0, 0], 0)), _config: config };
        started.address = address?;
        Ok(started)
    }
}

impl Drop for Tidegate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
