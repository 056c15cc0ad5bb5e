//! TLS for clients: what is configured.

use std::path::{Path, PathBuf};

use crate::net::{TlsFileError, TlsServer};

/// Whether clients have to say who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// They are not asked.
    Off,
    /// Who has a certificate shows it, and then it must be good.
    Optional,
    /// Nobody is served without one.
    Required,
}

impl ClientAuth {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Off, Self::Optional, Self::Required];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Optional => "optional",
            Self::Required => "required",
        }
    }
}

/// The `tls` keys of `[listen]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM files with tidegate's certificates, and those between them and their roots; none: clients are not spoken to by TLS.
    pub certificates: Vec<String>,
    /// Of each the file with its key.
    pub keys: Vec<String>,
    /// PEM file with the certificates of those who may sign clients'; empty: none.
    pub client_ca: String,
    /// Whether they are asked for one.
    pub client_auth: ClientAuth,
    /// What is in these files; `None` when it is off, or as long as there are errors.
    pub server: Option<TlsServer>,
}

impl Tls {
    /// There is none.
    pub const OFF: Self = Self {
        certificates: Vec::new(),
        keys: Vec::new(),
        client_ca: String::new(),
        client_auth: ClientAuth::Off,
        server: None,
    };

    /// Reads the files, if it is on and each certificate has its key.
    ///
    /// # Errors
    ///
    /// What is wrong with them, with the number of each.
    pub fn load(&mut self) -> Result<(), Vec<(usize, TlsFileError)>> {
        self.server = None;
        let asks = self.client_auth != ClientAuth::Off;
        let is_incomplete = asks && self.client_ca.is_empty();
        if self.certificates.is_empty() || self.certificates.len() != self.keys.len() || is_incomplete {
            return Ok(());
        }
        let path = |text: &String| PathBuf::from(text);
        let files: Vec<_> = self.certificates.iter().map(path).zip(self.keys.iter().map(path)).collect();
        let clients = asks.then(|| (Path::new(&self.client_ca), self.client_auth == ClientAuth::Required));
        self.server = Some(TlsServer::load(&files, clients)?);
        Ok(())
    }

    /// The files that [`Tls::load`] reads.
    pub fn files(&self) -> Vec<PathBuf> {
        let ca = Some(&self.client_ca).filter(|path| !path.is_empty() && self.client_auth != ClientAuth::Off);
        self.certificates.iter().chain(&self.keys).chain(ca).map(PathBuf::from).collect()
    }
}
