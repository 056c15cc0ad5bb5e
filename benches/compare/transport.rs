//! What is between a client and a proxy: plain TCP, TLS, or HTTP/2 over TLS. The certificates that all proxies show, and clients that
//! offer one version, one cipher suite and one group, so that all proxies do the same work.
//!
//! Not here: HTTP/2 with prior knowledge, TLS toward the backend, early data.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::ValueEnum;
use h2::{
    client::{self, SendRequest},
    ext::Protocol,
};
use http::{Method, Request, StatusCode, Version};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde::{Deserialize, Serialize};
use tokio::{io::BufReader, net::TcpStream};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        CipherSuite, ClientConfig, HandshakeKind, ProtocolVersion, RootCertStore,
        client::Resumption,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
        version::TLS13,
    },
};
use tokio_util::task::TaskTracker;

use crate::wire::{Connection, Stream};

/// Who the certificate is for.
const NAME: &str = "bench.test";

/// What is used, in words for a report.
pub const SUITE: &str =
    "TLS 1.3, TLS_AES_128_GCM_SHA256, X25519, a certificate with ECDSA P-256 behind one intermediate";

/// Tickets that a client keeps; it uses each of them once.
const TICKETS: usize = 8;

/// What is read of a connection at once: a record and more, where rustls alone would ask for 4 KiB.
const READ_BYTES: usize = 20 * 1024;

/// Windows of the clients, as a browser has them.
const STREAM_WINDOW_BYTES: u32 = 6 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 15 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP
    Plain,
    /// TLS; each session of `churn` has a full handshake
    Tls,
    /// TLS, each session with a ticket of an earlier one; `churn` only
    Resumed,
    /// HTTP/2 over TLS: each session is a stream (RFC 8441)
    H2,
}

impl Transport {
    pub fn is_tls(self) -> bool {
        self != Self::Plain
    }
}

/// To follow on the name of a case.
impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "",
            Self::Tls => ", TLS",
            Self::Resumed => ", TLS resumed",
            Self::H2 => ", HTTP/2",
        })
    }
}

/// One chain for all proxies, in files.
#[derive(Debug)]
pub struct Certificates {
    pub chain: PathBuf,
    pub key: PathBuf,
    /// The chain and its key.
    pub both: PathBuf,
    /// Whom clients believe.
    pub roots: PathBuf,
}

impl Certificates {
    pub fn write(folder: &Path) -> anyhow::Result<Self> {
        let authority = |name: &str, constraint| -> anyhow::Result<_> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(constraint);
            Ok((params, KeyPair::generate()?))
        };
        let (root_params, root_key) = authority("root", BasicConstraints::Unconstrained)?;
        let root = root_params.self_signed(&root_key)?;
        let root_issuer = Issuer::new(root_params, root_key);
        let (between_params, between_key) = authority("intermediate", BasicConstraints::Constrained(0))?;
        let between = between_params.signed_by(&between_key, &root_issuer)?;
        let issuer = Issuer::new(between_params, between_key);
        let key = KeyPair::generate()?;
        let own = CertificateParams::new([NAME.to_owned()])?.signed_by(&key, &issuer)?;

        let chain = own.pem() + &between.pem();
        let files = Self {
            chain: folder.join("chain.pem"),
            key: folder.join("key.pem"),
            both: folder.join("both.pem"),
            roots: folder.join("roots.pem"),
        };
        fs::write(&files.both, chain.clone() + &key.serialize_pem())?;
        fs::write(&files.chain, chain)?;
        fs::write(&files.key, key.serialize_pem())?;
        fs::write(&files.roots, root.pem())?;
        Ok(files)
    }
}

/// How clients get their sessions.
#[derive(Debug)]
pub struct Dialers {
    address: SocketAddr,
    transport: Transport,
    /// Streams of a connection.
    pub streams: usize,
    /// None: plain.
    config: Option<ClientConfig>,
    /// They drive connections.
    drivers: TaskTracker,
}

impl Dialers {
    pub fn new(
        address: SocketAddr,
        transport: Transport,
        streams: usize,
        roots: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let config = roots.map(|roots| config(roots, transport)).transpose()?;
        Ok(Self { address, transport, streams, config, drivers: TaskTracker::new() })
    }

    /// One that shares nothing with others.
    pub async fn one(&self) -> io::Result<Dialer> {
        let Some(config) = &self.config else { return Ok(Dialer::Plain(self.address)) };
        let mut config = config.clone();
        config.resumption = match self.transport {
            Transport::Resumed => Resumption::in_memory_sessions(TICKETS),
            _ => Resumption::disabled(),
        };
        let tls = Tls { address: self.address, config: Arc::new(config), tickets: None };
        Ok(match self.transport {
            Transport::H2 => {
                let sender = self.http2(tls).await?;
                Dialer::Http2 { sender, address: self.address }
            }
            Transport::Resumed => Dialer::Tls(Tls { tickets: Some(false), ..tls }),
            Transport::Plain | Transport::Tls => Dialer::Tls(tls),
        })
    }

    /// For as many sessions at once.
    pub async fn all(&self, count: usize) -> io::Result<Vec<Dialer>> {
        let mut dialers = Vec::with_capacity(count);
        for nth in 0..count {
            let dialer = match dialers.last() {
                Some(Dialer::Http2 { sender, address }) if nth % self.streams > 0 => {
                    Dialer::Http2 { sender: sender.clone(), address: *address }
                }
                _ => self.one().await?,
            };
            dialers.push(dialer);
        }
        Ok(dialers)
    }

    /// A connection that has said that it takes WebSockets.
    async fn http2(&self, mut tls: Tls) -> io::Result<SendRequest<Bytes>> {
        let stream = tls.connect().await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("no HTTP/2 was agreed on"));
        }
        let mut builder = client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let (sender, mut connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
        // "A client MUST NOT use the extended CONNECT before" its SETTINGS say so (RFC 8441 3).
        std::future::poll_fn(|context| {
            use std::{future::Future as _, pin::Pin, task::Poll};
            let ended = Pin::new(&mut connection).poll(context);
            if sender.is_extended_connect_protocol_enabled() {
                return Poll::Ready(Ok(()));
            }
            ended.map(|ended| Err(ended.err().map_or_else(|| io::ErrorKind::UnexpectedEof.into(), io::Error::other)))
        })
        .await?;
        self.drivers.spawn(connection);
        Ok(sender)
    }
}

/// TLS 1.3 with one suite and one group: whoever answers has no choice.
fn config(roots: &Path, transport: Transport) -> anyhow::Result<ClientConfig> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(roots).context("roots")? {
        store.add(certificate?)?;
    }
    let provider = CryptoProvider {
        cipher_suites: vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![ring::kx_group::X25519],
        ..ring::default_provider()
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(&[&TLS13])?;
    let mut config = builder.with_root_certificates(store).with_no_client_auth();
    let protocol: &[u8] = if transport == Transport::H2 { b"h2" } else { b"http/1.1" };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

/// A client that comes again and again.
#[derive(Debug)]
pub enum Dialer {
    Plain(SocketAddr),
    Tls(Tls),
    Http2 { sender: SendRequest<Bytes>, address: SocketAddr },
}

#[derive(Debug)]
pub struct Tls {
    address: SocketAddr,
    config: Arc<ClientConfig>,
    /// It is to come with a ticket, if it has had a session before.
    tickets: Option<bool>,
}

impl Dialer {
    /// A session, upgraded.
    pub async fn open(&mut self) -> io::Result<Connection> {
        match self {
            Self::Plain(address) => Connection::open(*address).await,
            Self::Tls(tls) => {
                let stream = tls.connect().await?;
                let connection = Connection::upgrade(Stream::Tls(Box::new(stream)), tls.address).await?;
                tls.tickets = tls.tickets.map(|_| true);
                Ok(connection)
            }
            Self::Http2 { sender, address } => {
                let request = Request::builder()
                    .method(Method::CONNECT)
                    .version(Version::HTTP_2)
                    .uri(format!("https://{address}/echo"))
                    .header("sec-websocket-version", "13")
                    .extension(Protocol::from_static("websocket"))
                    .body(())
                    .map_err(io::Error::other)?;
                let mut ready = sender.clone().ready().await.map_err(io::Error::other)?;
                let (response, send) = ready.send_request(request, false).map_err(io::Error::other)?;
                let response = response.await.map_err(io::Error::other)?;
                if response.status() != StatusCode::OK {
                    return Err(io::Error::other(format!("not accepted: {}", response.status())));
                }
                Ok(Connection::client(Stream::Http2(send, response.into_body())))
            }
        }
    }
}

impl Tls {
    /// A connection of the kind that is measured, or an error.
    async fn connect(&mut self) -> io::Result<TlsStream<BufReader<TcpStream>>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::clone(&self.config));
        let stream = connector.connect(name, BufReader::with_capacity(READ_BYTES, stream)).await?;
        let session = stream.get_ref().1;
        let expected = if self.tickets == Some(true) { HandshakeKind::Resumed } else { HandshakeKind::Full };
        let suite = session.negotiated_cipher_suite().map(|suite| suite.suite());
        let agreed = (session.protocol_version(), suite, session.handshake_kind());
        if agreed != (Some(ProtocolVersion::TLSv1_3), Some(CipherSuite::TLS13_AES_128_GCM_SHA256), Some(expected)) {
            return Err(io::Error::other(format!("another handshake than {expected:?}: {agreed:?}")));
        }
        Ok(stream)
    }
}
