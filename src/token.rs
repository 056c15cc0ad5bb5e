//! A secret by which somebody is known who asks: read from a file, compared in a time that tells nothing of it, and never shown.

use std::{
    fmt,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use subtle::ConstantTimeEq as _;

/// Bytes of a token: fewer are guessed, more do not fit well into a header.
pub const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 16..=1024;

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Arc<[u8]>);

/// A file in which there is none.
#[derive(Debug, thiserror::Error)]
pub enum BadToken {
    /// It can't be read.
    #[error("cannot be read: {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// What is in it can't be used.
    #[error("has no token of {} to {} visible ASCII characters, without spaces, in one line: {}", TOKEN_BYTES.start(), TOKEN_BYTES.end(), .0.display())]
    NoToken(PathBuf),
}

impl Token {
    /// The only line of a file; white space around it does not count.
    pub fn read(path: &Path) -> Result<Self, BadToken> {
        let unreadable = |error| BadToken::Unreadable { path: path.to_owned(), error };
        let mut bytes = Vec::new();
        // Opening a pipe would wait for its writer.
        if std::fs::metadata(path).map_err(unreadable)?.is_file() {
            let most = *TOKEN_BYTES.end() as u64 * 2;
            File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes)).map_err(unreadable)?;
        }
        let token = bytes.trim_ascii();
        if !TOKEN_BYTES.contains(&token.len()) || !token.iter().all(u8::is_ascii_graphic) {
            return Err(BadToken::NoToken(path.to_owned()));
        }
        Ok(Self(token.into()))
    }

    /// Whether this is it.
    pub fn is(&self, said: &[u8]) -> bool {
        self.0.ct_eq(said).into()
    }

    /// For a header that no log shows.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in a file is a token or not, and nobody is shown it.
    #[test]
    fn files() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        let read = |text: &[u8]| {
            std::fs::write(&path, text).expect("room");
            Token::read(&path)
        };
        let token = read(b"0123456789abcdef\n").expect("one");
        assert!(token.is(b"0123456789abcdef"));
        for other in [&b"0123456789abcdeg"[..], b"0123456789abcde", b"", b"0123456789abcdef\n"] {
            assert!(!token.is(other));
        }
        assert_eq!(format!("{token:?}"), "Token(..)");
        for text in [
            &b""[..],
            b"short",
            b"0123456789 abcdef",
            b"0123456789abcdef\nand more",
            b"0123456789abcde\xff",
            &[b'a'; 1025],
        ] {
            let error = read(text).expect_err("none").to_string();
            assert!(error.starts_with("has no token of 16 to 1024 ") && !error.contains("0123456789"), "{error}");
        }
        assert!(Token::read(folder.path()).is_err());
        assert!(
            Token::read(&folder.path().join("none")).expect_err("none").to_string().starts_with("cannot be read: ")
        );
    }
}
