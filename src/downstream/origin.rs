//! Which web pages may open WebSockets. A browser lets every page do so, with the cookies of the site that it connects to, and only
//! says in `Origin` whose page it is (RFC 6455 10.2): the server is to look.
//!
//! Compared is what browsers send, byte by byte: an origin has one form (RFC 6454 6.2), and whatever differs is another one.

use std::{fmt, str::FromStr};

use http::{Uri, header::ORIGIN};

use crate::fields::Header;

/// An origin in the form in which browsers send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

/// What is no origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadOrigin {
    /// The one that was probably meant.
    pub meant: Option<String>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Origin {
    type Err = BadOrigin;

    /// Only what a browser may send is taken, since nothing else would ever be found.
    fn from_str(text: &str) -> Result<Self, BadOrigin> {
        // Of pages without an origin: files, sandboxed frames.
        if text == "null" {
            return Ok(Self(text.to_owned()));
        }
        let uri: Option<Uri> = text.parse().ok();
        let parts = uri.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.host()?, uri.port_u16())));
        let Some((scheme, host, port)) = parts else { return Err(BadOrigin { meant: None }) };
        let (scheme, host) = (scheme.to_ascii_lowercase(), host.to_ascii_lowercase());
        let usual = match scheme.as_str() {
            "https" | "wss" => Some(443),
            "http" | "ws" => Some(80),
            _ => None,
        };
        // A page's scheme is never that of a WebSocket.
        let page = match scheme.as_str() {
            "wss" => "https",
            "ws" => "http",
            other => other,
        };
        let port = port.filter(|port| Some(*port) != usual).map(|port| format!(":{port}")).unwrap_or_default();
        let meant = format!("{page}://{host}{port}");
        if meant == text { Ok(Self(meant)) } else { Err(BadOrigin { meant: Some(meant) }) }
    }
}

/// The page that `header` is of may open a WebSocket, as far as that is decided by its origin: one of `allowed`, if there are any.
/// Clients that are no browsers send no origin, and there is nobody whom they could be made to deceive.
pub fn is_allowed(header: &impl Header, allowed: &[Origin]) -> bool {
    let mut sent = header.values_of(&ORIGIN);
    let Some(origin) = sent.next() else { return true };
    allowed.is_empty() || (sent.next().is_none() && allowed.iter().any(|Origin(allowed)| origin == allowed.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_form_alone_is_an_origin() {
        for origin in ["https://app.example", "http://127.0.0.1:3000", "http://[::1]:8080", "null", "app://local"] {
            assert_eq!(origin.parse::<Origin>().map(|origin| origin.to_string()), Ok(origin.to_owned()));
        }
        for (text, meant) in [
            ("https://app.example/", Some("https://app.example")),
            ("https://app.example:443", Some("https://app.example")),
            ("HTTPS://App.Example:8443", Some("https://app.example:8443")),
            ("wss://app.example/chat?a", Some("https://app.example")),
            ("https://user@app.example", Some("https://app.example")),
            ("app.example", None),
            ("*", None),
            ("https://*.app.example extra", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<Origin>(), Err(BadOrigin { meant: meant.map(ToOwned::to_owned) }), "{text}");
        }
    }
}
