//! TLS to a backend: what is configured, how a connection gets it, and what is said when it does not.
//!
//! Verification can't be turned off: a certificate that nobody vouches for can be vouched for by name (`upstream.tls_ca`).

use std::{
    error::Error as StdError,
    io,
    path::{Path, PathBuf},
};

use tokio::time::Instant;
use tokio_rustls::rustls::{self, AlertDescription, CertificateError, pki_types::ServerName};

use super::{Config, Error, Failure, Mode, Pool};
use crate::net::{self, Address, Stream, TlsClient, TlsFileError};

/// What a connection is to be used for, in the order of preference (ALPN).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaks {
    /// HTTP/1.1 alone.
    Http1,
    /// HTTP/2, or else it is not for what was meant.
    Http2,
}

/// As ALPN names it.
const H2: &[u8] = b"h2";

impl Speaks {
    /// What WebSockets are to have of a backend.
    pub(super) const fn with(pool: &Pool) -> Self {
        match pool.mode {
            Mode::Dedicated | Mode::Shared => Self::Http1,
            Mode::Multiplexed => Self::Http2,
        }
    }

    fn protocols(self) -> &'static [&'static [u8]] {
        match self {
            Self::Http1 => &[b"http/1.1"],
            Self::Http2 => &[H2, b"http/1.1"],
        }
    }
}

/// The `tls` keys of `[upstream]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Connections are encrypted.
    pub is_on: bool,
    /// Whom to believe, a PEM file; empty: whom the host believes.
    pub ca: String,
    /// What the backend's certificate must be for; empty: the host of its address.
    pub server_name: String,
    /// Our own certificate, a PEM file; empty: none.
    pub client_certificate: String,
    /// Its key.
    pub client_key: String,
    /// What is in these files; `None` when it is off, or as long as there are errors.
    pub client: Option<TlsClient>,
}

impl Tls {
    /// There is none.
    pub const OFF: Self = Self {
        is_on: false,
        ca: String::new(),
        server_name: String::new(),
        client_certificate: String::new(),
        client_key: String::new(),
        client: None,
    };

    /// Reads the files, if it is on.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn load(&mut self) -> Result<(), Vec<TlsFileError>> {
        let path = |text: &'_ String| (!text.is_empty()).then(|| Path::new(text.as_str()).to_owned());
        let identity = path(&self.client_certificate).zip(path(&self.client_key));
        self.client = None;
        if self.is_on {
            let identity = identity.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
            self.client = Some(TlsClient::load(path(&self.ca).as_deref(), identity)?);
        }
        Ok(())
    }

    /// The files that [`Tls::load`] reads.
    pub fn files(&self) -> Vec<PathBuf> {
        let named = [&self.ca, &self.client_certificate, &self.client_key];
        named.into_iter().filter(|path| self.is_on && !path.is_empty()).map(PathBuf::from).collect()
    }

    /// What the certificate of the backend at `address` must be for; `None`: nobody knows.
    pub fn server(&self, address: &Address) -> Option<ServerName<'static>> {
        let name = match address {
            _ if !self.server_name.is_empty() => &self.server_name,
            Address::Tcp { host, .. } => host,
            Address::Unix(_) => return None,
        };
        ServerName::try_from(name.as_str()).ok().map(|name| name.to_owned())
    }
}

/// It was agreed that HTTP/2 is spoken. Without TLS there is nothing to agree on, only to try.
pub(super) fn may_be_http2(stream: &Stream) -> bool {
    !matches!(stream, Stream::Tls(_)) || stream.protocol() == Some(H2)
}

/// Makes a connection of a dial, until `deadline`.
pub(super) async fn secure(
    stream: Stream,
    address: &Address,
    config: &Config,
    speaks: Speaks,
    deadline: Instant,
) -> Result<Stream, Failure> {
    let Some(client) = &config.tls.client else { return Ok(stream) };
    let backend = address.to_string();
    let Some(server) = config.tls.server(address) else {
        let what = "nobody knows what its certificate must be for: set upstream.tls_server_name".to_owned();
        return Err(Failure { error: Error::Tls { backend, what }, stream: Some(stream) });
    };
    // Boxed: every dial would have room for it.
    let encrypted = Box::pin(net::encrypt(stream, client, server, speaks.protocols(), deadline)).await;
    encrypted.map_err(|(error, stream)| {
        let error = match explain(&error) {
            Some(what) => Error::Tls { backend, what },
            None if error.kind() == io::ErrorKind::TimedOut => {
                Error::Timeout("backend did not finish the TLS handshake in time")
            }
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                let what = "it closed the connection in the handshake: does it speak TLS there?".to_owned();
                Error::Tls { backend, what }
            }
            None => Error::Tls { backend, what: error.to_string() },
        };
        Failure { error, stream }
    })
}

/// What TLS has to say in an error, and what may be done about it; `None`: it is about something else.
pub(super) fn explain(error: &(dyn StdError + 'static)) -> Option<String> {
    let error = net::tls_error(error)?;
    let hint = match error {
        rustls::Error::InvalidCertificate(error) => match error {
            // The latter: of another with the same name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "name the certificates of those who signed it in upstream.tls_ca, and have the backend send those in between"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "set upstream.tls_server_name to a name that it is for"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "renew the backend's certificate",
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "compare this host's clock with the certificate"
            }
            _ => "give the backend a certificate that can be verified",
        },
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::AccessDenied,
        ) => "the backend wants another client certificate: see upstream.tls_client_certificate",
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => {
            "the backend may want a client certificate (upstream.tls_client_certificate), or only what is older than TLS 1.2"
        }
        rustls::Error::AlertReceived(AlertDescription::UnrecognisedName) => {
            "the backend knows no such name: set upstream.tls_server_name"
        }
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            "the backend speaks no HTTP/1.1 there (ALPN)"
        }
        rustls::Error::InvalidMessage(_) => "does it speak TLS there? if not, set upstream.tls to false",
        _ => return Some(error.to_string()),
    };
    Some(format!("{error}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a certificate must be for: what was configured, or the host of the address, also an IP address; else nobody knows.
    #[test]
    fn who_the_backend_is() {
        let tcp = |host: &str| Address::Tcp { host: host.to_owned(), port: 443 };
        let tls = |server_name: &str| Tls { is_on: true, server_name: server_name.to_owned(), ..Tls::OFF };
        for (name, address, server) in [
            ("", tcp("backend.test"), Some("backend.test")),
            ("", tcp("10.0.0.1"), Some("10.0.0.1")),
            ("", tcp("fd00::1"), Some("fd00::1")),
            ("", tcp("no name"), None),
            ("", Address::Unix("/run/app.sock".into()), None),
            ("other.test", tcp("backend.test"), Some("other.test")),
            ("other.test", Address::Unix("/run/app.sock".into()), Some("other.test")),
        ] {
            let found = tls(name).server(&address).map(|server| server.to_str().into_owned());
            assert_eq!(found.as_deref(), server, "{name:?} {address}");
        }
    }
}
