//! TLS for clients: what is configured.

use std::path::PathBuf;

use crate::net::{TlsFileError, TlsServer};

/// The `tls` keys of `[listen]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM files with tidegate's certificates, and those between them and their roots; none: clients are not spoken to by TLS.
    pub certificates: Vec<String>,
    /// Of each the file with its key.
    pub keys: Vec<String>,
    /// What is in these files; `None` when it is off, or as long as there are errors.
    pub server: Option<TlsServer>,
}

impl Tls {
    /// There is none.
    pub const OFF: Self = Self { certificates: Vec::new(), keys: Vec::new(), server: None };

    /// Reads the files, if it is on and each certificate has its key.
    ///
    /// # Errors
    ///
    /// What is wrong with them, with the number of each.
    pub fn load(&mut self) -> Result<(), Vec<(usize, TlsFileError)>> {
        self.server = None;
        if self.certificates.is_empty() || self.certificates.len() != self.keys.len() {
            return Ok(());
        }
        let path = |text: &String| PathBuf::from(text);
        let files: Vec<_> = self.certificates.iter().map(path).zip(self.keys.iter().map(path)).collect();
        self.server = Some(TlsServer::load(&files)?);
        Ok(())
    }

    /// The files that [`Tls::load`] reads.
    pub fn files(&self) -> Vec<PathBuf> {
        self.certificates.iter().chain(&self.keys).map(PathBuf::from).collect()
    }
}
