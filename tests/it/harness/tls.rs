//! TLS in front of a scripted backend: each connection becomes one to that, so that every script can be played over TLS. With
//! certificates that are as they should be, or not.
//!
//! `close_notify` and FIN are a FIN, and a RST a RST, in both directions.

use super::{
    Board, DEADLINE, LIMIT, Lab, Side,
    lab::{Place, Socket},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use socket2::SockRef;
use std::{
    fs, io,
    net::{Shutdown, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    net::{TcpListener, TcpStream, tcp},
    task::LocalSet,
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ALL_VERSIONS, ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer},
        server::WebPkiClientVerifier,
    },
    server::TlsStream,
};

/// What backends are called, unless a test says otherwise.
pub const NAME: &str = "backend.test";

/// What tidegate is called by its clients, unless a test says otherwise.
pub const CLIENTS_NAME: &str = "tidegate.test";

/// Somebody who signs certificates, with a folder for the files.
#[derive(Debug)]
pub struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
}

impl Identity {
    /// The certificate itself.
    pub fn der(&self) -> &[u8] {
        &self.chain[0]
    }
}

impl Authority {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let name = format!("tidegate's tests {}", COUNT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let folder = tempfile::tempdir().expect("a folder for certificates");
        fs::write(folder.path().join("ca.pem"), certificate.pem()).expect("room for a certificate");
        Self { folder, der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    /// Its own certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn sign(&self, name: &str) -> Identity {
        self.sign_until(name, 2999)
    }

    /// For clients that believe it, and nobody else.
    pub fn client(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }

    /// The same, for somebody who has a certificate of his own.
    pub fn client_as(&self, identity: &Identity) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("versions").with_root_certificates(roots);
        let config = builder.with_client_auth_cert(identity.chain.clone(), identity.key.clone_key());
        let mut config = config.expect("a certificate");
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config
    }

    /// Valid for so long from now on, less a second at most.
    pub fn sign_for(&self, name: &str, time: Duration) -> Identity {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
        let end = date_time_ymd(1970, 1, 1) + Duration::from_secs((now + time).as_secs());
        self.sign_as(name, "soon", |params| params.not_after = end)
    }

    /// Valid from the year 2000 on.
    pub fn sign_until(&self, name: &str, year: i32) -> Identity {
        self.sign_as(name, &year.to_string(), |params| params.not_after = date_time_ymd(year, 1, 1))
    }

    fn sign_as(&self, name: &str, until: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.not_before = date_time_ymd(2000, 1, 1);
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let [certificate_file, key_file] =
            ["pem", "key"].map(|end| self.folder.path().join(format!("{}-{until}.{end}", name.replace('*', "any"))));
        fs::write(&certificate_file, certificate.pem()).expect("room for a certificate");
        fs::write(&key_file, key.serialize_pem()).expect("room for a key");
        Identity {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
            certificate_file,
            key_file,
        }
    }
}

/// How it behaves.
#[derive(Debug)]
pub struct Manners {
    /// Whom tidegate is told to believe.
    pub authority: Authority,
    /// `None`: one that is as it should be.
    pub identity: Option<Identity>,
    /// Clients must have a certificate of this one's.
    pub asks_for: Option<CertificateDer<'static>>,
    pub versions: &'static [&'static SupportedProtocolVersion],
    pub protocols: Vec<Vec<u8>>,
    /// Its FIN comes behind a `close_notify`.
    pub notifies: bool,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            authority: Authority::new(),
            identity: None,
            asks_for: None,
            versions: ALL_VERSIONS,
            protocols: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            notifies: true,
        }
    }
}

impl Manners {
    /// Clients must have a certificate.
    pub fn asking(authority: Authority) -> Self {
        Self { asks_for: Some(authority.der.clone()), authority, ..Self::default() }
    }

    fn acceptor(&self) -> TlsAcceptor {
        let own = self.authority.sign(NAME);
        let identity = self.identity.as_ref().unwrap_or(&own);
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(self.versions)
            .expect("versions");
        let builder = match &self.asks_for {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.clone()).expect("a root");
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
                builder.with_client_cert_verifier(verifier.expect("roots"))
            }
        };
        let mut config =
            builder.with_single_cert(identity.chain.clone(), identity.key.clone_key()).expect("a certificate");
        config.alpn_protocols.clone_from(&self.protocols);
        TlsAcceptor::from(Arc::new(config))
    }
}

/// What tidegate needs to know to speak with whom `authority` has signed for.
pub fn settings(authority: &Authority) -> String {
    let ca = authority.file();
    format!("upstream.tls = true\nupstream.tls_ca = '{}'\nupstream.tls_server_name = '{NAME}'\n", ca.display())
}

/// What tidegate needs to know to be whom clients know as `CLIENTS_NAME`.
pub fn for_clients(identity: &Identity) -> String {
    let Identity { certificate_file, key_file, .. } = identity;
    format!("listen.tls_certificate = '{}'\nlisten.tls_key = '{}'\n", certificate_file.display(), key_file.display())
}

/// What came in.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Handshakes that failed, and why.
    pub failed: Vec<String>,
    /// What was agreed on, by connection.
    pub protocols: Vec<Option<String>>,
    /// Names that were asked for.
    pub names: Vec<Option<String>>,
    /// Connections on which `close_notify` came, and then a FIN.
    pub notified: usize,
    /// Those on which a FIN came without.
    pub truncated: usize,
    /// Those that were reset, by either side, or broke.
    pub reset: usize,
    is_over: bool,
}

#[derive(Debug)]
pub struct TlsFront {
    pub address: SocketAddr,
    authority: Authority,
    seen: Board<Seen>,
    thread: Option<thread::JoinHandle<()>>,
}

impl TlsFront {
    pub fn start(lab: &Lab, manners: Manners, backend: SocketAddr) -> Self {
        let place: Place = lab.place(Side::Backend);
        let (address, seen) = (Board::new(None), Board::new(Seen::default()));
        let at = SocketAddr::new(lab.address(Side::Backend, Side::Proxy), 0);
        let (acceptor, notifies) = (manners.acceptor(), manners.notifies);
        let run = {
            let (address, seen) = (address.clone(), seen.clone());
            move || {
                super::block(LocalSet::new().run_until(async move {
                    let listener = TcpListener::bind(at).await.expect("port 0 is free");
                    address.change(|a| *a = listener.local_addr().ok());
                    let over = async { while seen.until(LIMIT, |seen| seen.is_over.then_some(())).await.is_none() {} };
                    let accept = async {
                        while let Ok((stream, _)) = listener.accept().await {
                            let (acceptor, seen) = (acceptor.clone(), seen.clone());
                            tokio::task::spawn_local(async move {
                                serve(stream, acceptor, seen, backend, notifies).await;
                            });
                        }
                    };
                    tokio::select! { () = over => {}, () = accept => {} }
                }));
            }
        };
        let thread = Some(place.spawn("TLS front", run));
        let address = address.wait(DEADLINE, |address| *address).expect("a listening front");
        Self { address, authority: manners.authority, seen, thread }
    }

    /// What tidegate needs to know.
    pub fn settings(&self) -> String {
        settings(&self.authority)
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn seen(&self) -> Seen {
        self.seen.read(Clone::clone)
    }

    /// Waits until what came in is as `test` wants it.
    #[track_caller]
    pub fn seen_when(&self, what: &str, test: impl Fn(&Seen) -> bool) -> Seen {
        let found = self.seen.wait(DEADLINE, |seen| test(seen).then(|| seen.clone()));
        found.unwrap_or_else(|| panic!("the TLS front never saw {what}: {:?}", self.seen()))
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.seen.change(|seen| seen.is_over = true);
        // A panic of the thread was printed by it; here it must not become a second one.
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// How a direction ended.
enum Reset {
    /// The TLS side's client did it, or nothing could be made of what it sent.
    Client,
    /// The scripted backend did it.
    Backend,
}

/// Of its buffers, so that it is soon seen on one side when nobody reads on the other.
const BUFFER: usize = 64 << 10;

async fn serve(stream: TcpStream, acceptor: TlsAcceptor, seen: Board<Seen>, backend: SocketAddr, notifies: bool) {
    stream.set_nodelay(true).expect("a socket");
    SockRef::from(&stream).set_recv_buffer_size(BUFFER).expect("a socket");
    let stream = match acceptor.accept(stream).into_fallible().await {
        Ok(stream) => stream,
        Err((error, mut stream)) => {
            seen.change(|seen| seen.failed.push(error.to_string()));
            let _ = stream.shutdown().await;
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            return;
        }
    };
    let session = stream.get_ref().1;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    seen.change(|seen| {
        seen.protocols.push(session.alpn_protocol().map(text));
        seen.names.push(session.server_name().map(str::to_owned));
    });
    let mut to = TcpStream::connect(backend).await.expect("a scripted backend");
    to.set_nodelay(true).expect("a socket");
    SockRef::from(&to).set_send_buffer_size(BUFFER).expect("a socket");
    let raw = SockRef::from(stream.get_ref().0).try_clone().expect("a descriptor");
    let (from_client, into_client) = split(stream);
    let (from_backend, into_backend) = to.split();
    let up = upward(from_client, into_backend, &seen);
    let down = downward(from_backend, into_client, notifies, &raw);
    match tokio::try_join!(up, down) {
        Ok((was_notified, _)) => seen.change(|seen| {
            seen.notified += usize::from(was_notified);
            seen.truncated += usize::from(!was_notified);
        }),
        Err(reset) => {
            seen.change(|seen| seen.reset += 1);
            match reset {
                Reset::Client => reset_on_close(&SockRef::from(&to)),
                Reset::Backend => {
                    // A RST would take back what it has not acknowledged.
                    is_acked(&raw).await;
                    reset_on_close(&SockRef::from(&raw));
                }
            }
        }
    }
}

/// True: `close_notify` came before the FIN.
async fn upward(
    mut from: ReadHalf<TlsStream<TcpStream>>,
    mut into: tcp::WriteHalf<'_>,
    seen: &Board<Seen>,
) -> Result<bool, Reset> {
    let mut chunk = vec![0; 16 << 10];
    let was_notified = loop {
        match from.read(&mut chunk).await {
            Ok(0) => break true,
            Ok(count) => {
                // When it fails, that is found by whoever reads.
                let _ = into.write_all(&chunk[..count]).await;
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break false,
            Err(error) => {
                seen.change(|seen| seen.failed.push(error.to_string()));
                return Err(Reset::Client);
            }
        }
    };
    let _ = into.shutdown().await;
    Ok(was_notified)
}

async fn downward(
    mut from: tcp::ReadHalf<'_>,
    mut into: WriteHalf<TlsStream<TcpStream>>,
    notifies: bool,
    raw: &socket2::Socket,
) -> Result<WriteHalf<TlsStream<TcpStream>>, Reset> {
    let mut chunk = vec![0; 16 << 10];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) => {
                let _ = into.flush().await;
                if notifies {
                    let _ = into.shutdown().await;
                } else {
                    let _ = raw.shutdown(Shutdown::Write);
                }
                return Ok(into);
            }
            Ok(count) => {
                let _ = into.write_all(&chunk[..count]).await;
                let _ = into.flush().await;
            }
            Err(_) => return Err(Reset::Backend),
        }
    }
}

async fn is_acked(raw: &socket2::Socket) {
    let address = |address: io::Result<socket2::SockAddr>| address.ok().and_then(|address| address.as_socket());
    let (local, remote) = (address(raw.local_addr()), address(raw.peer_addr()));
    let acked = async {
        loop {
            let sockets = Socket::list().expect("procfs");
            let this = |s: &&Socket| Some(s.local) == local && Some(s.remote) == remote;
            if sockets.iter().find(this).is_none_or(|socket| socket.unacked == 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = timeout(DEADLINE, acked).await;
}

fn reset_on_close(socket: &SockRef<'_>) {
    #[expect(clippy::disallowed_methods, reason = "a RST of the other side is passed on as one")]
    let _ = socket.set_linger(Some(Duration::ZERO));
}
