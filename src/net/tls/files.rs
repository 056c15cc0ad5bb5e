//! Who we are and whom we believe, made of PEM files: certificates, keys and roots, and what is wrong with them.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio_rustls::rustls::{
    self, CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{verify_server_cert_signed_by_trust_anchor, verify_server_name},
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime,
        pem::{self, PemObject},
    },
    server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};

/// What a connection is used for, by its name in ALPN.
const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// A certificate that expires by then should have been renewed.
const SOON: Duration = Duration::from_hours(72);

/// The largest file that is read.
pub const TLS_FILE_BYTES: u64 = 4 << 20;

/// Who we are toward servers, and whom we believe.
#[derive(Clone)]
pub struct TlsClient {
    pub(super) config: Arc<ClientConfig>,
    given: Arc<Given>,
}

/// What a [`TlsClient`] was made of.
#[derive(PartialEq, Eq)]
struct Given {
    roots: Vec<TrustAnchor<'static>>,
    identity: Option<Chain>,
}

/// Who we are toward clients.
#[derive(Clone)]
pub struct TlsServer {
    pub(super) config: Arc<ServerConfig>,
    /// The same for those who may have HTTP/2.
    pub(super) with_http2: Arc<ServerConfig>,
    given: Arc<ServerGiven>,
    /// Who looks at clients' certificates, if they are asked for one.
    pub(super) clients: Option<Arc<dyn ClientCertVerifier>>,
}

/// What a [`TlsServer`] was made of.
#[derive(PartialEq, Eq)]
struct ServerGiven {
    chains: Vec<Chain>,
    /// Who signs clients' certificates, and whether they must have one.
    clients: Option<(Vec<TrustAnchor<'static>>, bool)>,
}

/// A certificate with those between it and its root, and its key.
type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Chooses among several certificates.
#[derive(Debug)]
struct ByName(Vec<Arc<CertifiedKey>>);

/// A file that a [`TlsClient`] or a [`TlsServer`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFile {
    /// Whom we believe.
    Roots,
    /// Our certificate, and those between it and its root.
    Certificate,
    /// Its key.
    Key,
}

/// Why a file is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFileError {
    /// Which.
    pub file: TlsFile,
    /// What is wrong, to follow on its name.
    pub what: String,
    /// What to do.
    pub fix: String,
}

impl TlsClient {
    /// Of PEM files. `roots`: whom to believe, `None`: whom the host believes. `identity`: our certificate and its key, for servers
    /// that ask for one.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the files.
    pub fn load(roots: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<Self, Vec<TlsFileError>> {
        let store = match roots {
            Some(path) => roots_of(path, "name the certificates of those who sign the backend's"),
            None => host_roots(),
        };
        let identity = identity.map(|(certificate, key)| (certificates(certificate), private_key(key)));
        let (store, identity) = match (store, identity) {
            (Ok(store), None) => (store, None),
            (Ok(store), Some((Ok(chain), Ok(key)))) => (store, Some((chain, key))),
            (store, identity) => {
                let (chain, key) = identity.map_or((None, None), |(chain, key)| (chain.err(), key.err()));
                return Err([store.err(), chain, key].into_iter().flatten().collect());
            }
        };
        let given = Given { roots: store.roots.clone(), identity };
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for all versions")
            .with_root_certificates(store);
        let config = match &given.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(|error| {
                let what = format!("is no key that can be used with the certificate: {error}");
                vec![mistake(TlsFile::Key, what, "name the key that the certificate was made for")]
            })?,
        };
        Ok(Self { config: Arc::new(config), given: Arc::new(given) })
    }
}

impl TlsServer {
    /// Of PEM files, each certificate with its key. The first one is for whoever names no other. `clients`: who signs theirs, and
    /// whether they must have one; `None`: they are not asked.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the files, with the number of each.
    ///
    /// # Panics
    /// Without any.
    pub fn load(
        files: &[(PathBuf, PathBuf)],
        clients: Option<(&Path, bool)>,
    ) -> Result<Self, Vec<(usize, TlsFileError)>> {
        let provider = Arc::new(ring::default_provider());
        let (mut given, mut keys, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (certificate, key)) in files.iter().enumerate() {
            match (certificates(certificate), private_key(key)) {
                (Ok(chain), Ok(key)) => match CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider) {
                    Ok(certified) => {
                        given.push((chain, key));
                        keys.push(Arc::new(certified));
                    }
                    Err(error) => {
                        let what = format!("is no key that can be used with the certificate: {error}");
                        let fix = "name the key that the certificate was made for";
                        wrong.push((index, mistake(TlsFile::Key, what, fix)));
                    }
                },
                (chain, key) => {
                    wrong.extend([chain.err(), key.err()].into_iter().flatten().map(|error| (index, error)));
                }
            }
        }
        let clients = clients.map(|(path, is_required)| verifier(path, is_required, &provider)).transpose();
        let clients = clients.map_err(|error| wrong.push((0, error))).unwrap_or_default();
        if !wrong.is_empty() {
            return Err(wrong);
        }
        assert!(!keys.is_empty(), "a server has a certificate");
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for all versions");
        let (verifier, believed) = clients.unzip();
        let builder = match &verifier {
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(ByName(keys)));
        config.alpn_protocols = vec![HTTP1.to_vec()];
        // With tickets nothing of a session is kept here. Their keys are random, change every six hours, and are gone with these files.
        config.ticketer = ring::Ticketer::new().map_err(|error| {
            let what = format!("can't be used, since this host gives no random numbers: {error}");
            vec![(0, mistake(TlsFile::Key, what, "see getrandom(2)"))]
        })?;
        let mut with_http2 = config.clone();
        with_http2.alpn_protocols.insert(0, HTTP2.to_vec());
        let with_http2 = Arc::new(with_http2);
        let given = Arc::new(ServerGiven { chains: given, clients: believed });
        Ok(Self { config: Arc::new(config), with_http2, given, clients: verifier })
    }

    /// It shows clients the same certificates as `other`.
    pub fn shows_the_same(&self, other: &Self) -> bool {
        self.given.chains == other.given.chains
    }

    /// Certificates that clients will not believe, by their numbers, and why.
    pub fn doubts(&self) -> Vec<(usize, &'static str)> {
        let now = UnixTime::now();
        let doubt = |chain: &[CertificateDer<'_>]| {
            let (own, between) = chain.split_first()?;
            let Ok(parsed) = ParsedCertificate::try_from(own) else { return Some("can't be understood") };
            let algorithms = ring::default_provider().signature_verification_algorithms.all;
            // Its dates come before its signatures, for which nobody's word is known here.
            let judge = |at| {
                let roots = RootCertStore::empty();
                match verify_server_cert_signed_by_trust_anchor(&parsed, &roots, between, at, algorithms) {
                    Err(rustls::Error::InvalidCertificate(error)) => Some(error),
                    _ => None,
                }
            };
            match judge(now)? {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Some("has expired"),
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Some("is not valid yet"),
                _ => {
                    let soon = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + SOON);
                    let expires =
                        matches!(judge(soon)?, CertificateError::Expired | CertificateError::ExpiredContext { .. });
                    expires.then_some("expires within three days")
                }
            }
        };
        let each = self.given.chains.iter().enumerate();
        each.filter_map(|(index, (chain, _))| Some((index, doubt(chain)?))).collect()
    }
}

impl PartialEq for TlsServer {
    /// The same files, as far as what is in them goes.
    fn eq(&self, other: &Self) -> bool {
        self.given == other.given
    }
}

impl Eq for TlsServer {}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer")
            .field("certificates", &self.given.chains.len())
            .field("asks_clients", &self.clients.is_some())
            .finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let Self(keys) = self;
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let is_for = |key: &CertifiedKey| {
            let parsed = key.end_entity_cert().ok().and_then(|own| ParsedCertificate::try_from(own).ok());
            let pair = parsed.as_ref().zip(name.as_ref());
            pair.is_some_and(|(certificate, name)| verify_server_name(certificate, name).is_ok())
        };
        // A name may have one of each kind of key.
        let can_sign = |key: &CertifiedKey| key.key.choose_scheme(hello.signature_schemes()).is_some();
        let found = keys.iter().find(|key| can_sign(key) && is_for(key));
        found.or_else(|| keys.iter().find(|key| can_sign(key))).or_else(|| keys.first()).cloned()
    }
}

impl PartialEq for TlsClient {
    /// The same files, as far as what is in them goes.
    fn eq(&self, other: &Self) -> bool {
        self.given == other.given
    }
}

impl Eq for TlsClient {}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Given { roots, identity } = &*self.given;
        f.debug_struct("TlsClient")
            .field("roots", &roots.len())
            .field("identity", &identity.is_some())
            .finish_non_exhaustive()
    }
}

fn mistake(file: TlsFile, what: impl Into<String>, fix: impl Into<String>) -> TlsFileError {
    TlsFileError { file, what: what.into(), fix: fix.into() }
}

fn read(file: TlsFile, path: &Path) -> Result<Vec<u8>, TlsFileError> {
    let unreadable = |error: io::Error| {
        let fix = "name a file in PEM that this process may read";
        mistake(file, format!("cannot be read: {}: {error}", path.display()), fix)
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > TLS_FILE_BYTES {
        let what = format!("is no regular file of at most 4 MiB: {}", path.display());
        return Err(mistake(file, what, "name a file in PEM"));
    }
    let mut bytes = Vec::new();
    // It may have grown.
    fs::File::open(path).and_then(|open| open.take(TLS_FILE_BYTES).read_to_end(&mut bytes)).map_err(unreadable)?;
    Ok(bytes)
}

fn no_pem(file: TlsFile, path: &Path, error: &pem::Error) -> TlsFileError {
    let (noun, label) = match file {
        TlsFile::Roots | TlsFile::Certificate => ("certificate", "CERTIFICATE"),
        TlsFile::Key => ("private key without a password", "PRIVATE KEY"),
    };
    // Never what it says itself: it quotes the lines that it does not understand, which may be the key.
    let why = match error {
        pem::Error::MissingSectionEnd { .. } => "a section in it has no end (were its line breaks lost?)",
        pem::Error::IllegalSectionStart { .. } => {
            "a section in it does not begin as it should (were its line breaks lost?)"
        }
        pem::Error::Base64Decode(_) => "what is between BEGIN and END is no base64",
        pem::Error::NoItemsFound => "there is none",
        _ => "it can't be understood",
    };
    let what = format!("has no {noun} in PEM: {}: {why}", path.display());
    mistake(file, what, format!("name a file with -----BEGIN {label}----- in it"))
}

fn certificates_in(file: TlsFile, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let bytes = read(file, path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(no_pem(file, path, &pem::Error::NoItemsFound)),
        certificates => certificates.map_err(|error| no_pem(file, path, &error)),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    certificates_in(TlsFile::Certificate, path)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFileError> {
    let bytes = read(TlsFile::Key, path)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| no_pem(TlsFile::Key, path, &error))
}

type Verifier = (Arc<dyn ClientCertVerifier>, (Vec<TrustAnchor<'static>>, bool));

/// Who looks at clients' certificates, and what it was made of.
fn verifier(path: &Path, is_required: bool, provider: &Arc<CryptoProvider>) -> Result<Verifier, TlsFileError> {
    let fix = "name the certificates of those who sign the clients'";
    let store = roots_of(path, fix)?;
    let believed = store.roots.clone();
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider));
    let builder = if is_required { builder } else { builder.allow_unauthenticated() };
    let unusable = |error| mistake(TlsFile::Roots, format!("can't be used: {}: {error}", path.display()), fix);
    Ok((builder.build().map_err(unusable)?, (believed, is_required)))
}

fn roots_of(path: &Path, fix: &str) -> Result<RootCertStore, TlsFileError> {
    let mut store = RootCertStore::empty();
    for (index, certificate) in certificates_in(TlsFile::Roots, path)?.into_iter().enumerate() {
        store.add(certificate).map_err(|error| {
            let what = format!("has a certificate, number {}, that is no root: {}: {error}", index + 1, path.display());
            mistake(TlsFile::Roots, what, fix)
        })?;
    }
    Ok(store)
}

/// Those that can't be used are passed over: a host may have some that are older than X.509 v3.
fn host_roots() -> Result<RootCertStore, TlsFileError> {
    let mut store = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (usable, _) = store.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        let fix = "name a file with the certificates of those who sign the backend's, or install this host's (ca-certificates)";
        return Err(mistake(TlsFile::Roots, format!("is not set, and this host has no roots{why}"), fix));
    }
    Ok(store)
}

/// A certificate can be for this: a name as in DNS, or an IP address.
pub fn is_server_name(text: &str) -> bool {
    ServerName::try_from(text).is_ok()
}
