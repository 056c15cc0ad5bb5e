//! Header fields: those that are lists (RFC 9110 5.6.1), and how all are read and written.
//!
//! A header is a map where hyper or h2 has read it, and where we have it is its lines where they lie ([`Lines`]): to look at each of a few
//! lines takes less than to make a map of them. Whoever looks for something in it need not know which it is ([`Header`]).

use std::{borrow::Cow, ops::Range};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri, header::SEC_WEBSOCKET_KEY};

/// A header that is looked at.
pub trait Header {
    /// The values of a field, in order.
    fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]>;

    /// The first value of a field.
    fn first(&self, name: &HeaderName) -> Option<&[u8]> {
        self.values_of(name).next()
    }

    /// The value of a field that stands there exactly once.
    fn only(&self, name: &HeaderName) -> Option<&[u8]> {
        let mut values = self.values_of(name);
        values.next().filter(|_| values.next().is_none())
    }
}

impl Header for HeaderMap {
    fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]> {
        self.get_all(name).iter().map(HeaderValue::as_bytes)
    }
}

/// The lines of a header where they lie.
#[derive(Debug)]
pub struct Lines {
    bytes: Bytes,
    spans: Spans,
}

/// Of each line its name and its value.
pub type Spans = Box<[(Span, Span)]>;

/// Where something lies.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    from: u16,
    to: u16,
}

impl Span {
    /// `part` is one of `bytes`; `None`: it ends beyond 64 KiB.
    fn of(part: &[u8], bytes: &[u8]) -> Option<Self> {
        let from = part.as_ptr().addr() - bytes.as_ptr().addr();
        Some(Self { from: from.try_into().ok()?, to: (from + part.len()).try_into().ok()? })
    }

    const fn range(self) -> Range<usize> {
        self.from as usize..self.to as usize
    }
}

/// Where the lines lie that httparse has found in `bytes`; `None`: not all within 64 KiB.
pub fn spans(fields: &[httparse::Header<'_>], bytes: &[u8]) -> Option<Spans> {
    let mut spans = Vec::with_capacity(fields.len());
    for field in fields {
        spans.push((Span::of(field.name.as_bytes(), bytes)?, Span::of(field.value, bytes)?));
    }
    Some(spans.into())
}

impl Lines {
    /// What [`spans`] found in these bytes.
    pub const fn new(bytes: Bytes, spans: Spans) -> Self {
        Self { bytes, spans }
    }

    /// All that they lie in.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// How much that is.
    pub const fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.spans.iter().map(|(name, value)| (&self.bytes[name.range()], &self.bytes[value.range()]))
    }

    /// The same as hyper would have it.
    ///
    /// # Panics
    /// If httparse takes a name or value that http does not; there is a test for all bytes.
    pub fn to_map(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(self.spans.len() + MORE);
        for ((name, _), (_, value)) in self.iter().zip(&self.spans) {
            let name = HeaderName::from_bytes(name).expect("httparse takes no other names");
            let value = HeaderValue::from_maybe_shared(self.bytes.slice(value.range()));
            headers.append(name, value.expect("httparse takes no other values"));
        }
        headers
    }
}

impl Header for Lines {
    fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]> {
        let name = name.as_str().as_bytes();
        let lines = self.spans.iter().filter(move |(found, _)| {
            usize::from(found.to - found.from) == name.len() && self.bytes[found.range()].eq_ignore_ascii_case(name)
        });
        lines.map(|(_, value)| &self.bytes[value.range()])
    }
}

/// A value as text; `None`: it is not all visible ASCII, blanks and tabs.
pub fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t')))
}

/// The comma-separated elements of a field, over all its lines; what is no visible ASCII is passed over.
pub fn tokens<'a>(header: &'a impl Header, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    header.values_of(name).filter_map(text).flat_map(tokens_of)
}

/// Those of one value.
pub fn tokens_of(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim_ascii).filter(|token| !token.is_empty())
}

/// As [`tokens`]; `None` stands for an element that is no visible ASCII.
pub fn elements<'a>(header: &'a impl Header, name: &HeaderName) -> impl Iterator<Item = Option<&'a str>> {
    let elements = header.values_of(name).flat_map(|value| value.split(|byte| *byte == b','));
    let elements = elements.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty());
    elements.map(|element| {
        std::str::from_utf8(element).ok().filter(|text| text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
    })
}

/// A field has this element, whatever its case.
pub fn has_token(header: &impl Header, name: &HeaderName, wanted: &str) -> bool {
    tokens(header, name).any(|token| token.eq_ignore_ascii_case(wanted))
}

/// Fields that come to a header on its way.
const MORE: usize = 4;

/// What httparse has found in `bytes`, of which the values stay a part; `None`: a name or value that http does not take.
pub fn read_header(fields: &[httparse::Header<'_>], bytes: &Bytes) -> Option<HeaderMap> {
    let mut headers = HeaderMap::with_capacity(fields.len() + MORE);
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(bytes.slice_ref(field.value)).ok()?);
    }
    Some(headers)
}

/// Appends the lines of a header, and the empty one behind it. Its parts are valid by their types.
pub fn write_header(headers: &HeaderMap, to: &mut Vec<u8>) {
    for (name, value) in headers {
        write_line(name.as_str().as_bytes(), value.as_bytes(), to);
    }
    to.extend_from_slice(b"\r\n");
}

/// Appends one line of a header.
pub fn write_line(name: &[u8], value: &[u8], to: &mut Vec<u8>) {
    for part in [name, b": ", value, b"\r\n"] {
        to.extend_from_slice(part);
    }
}

/// A WebSocket handshake on its way to a backend.
#[derive(Debug)]
pub enum Ask {
    /// As it goes out over HTTP/1.1.
    Written(Vec<u8>, [u8; 24]),
    /// As a request.
    Request(Request<()>),
}

/// Room for most requests.
const MOST: usize = 1024;

impl Ask {
    /// As it goes out over HTTP/1.1.
    pub fn head(&self) -> Cow<'_, [u8]> {
        let request = match self {
            Self::Written(head, _) => return Cow::Borrowed(head),
            Self::Request(request) => request,
        };
        let mut head = Vec::with_capacity(MOST);
        let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        // "http://host?query" has an empty path, which is sent as "/" (RFC 9112 3.2.1).
        let root = if target.starts_with('/') { "" } else { "/" };
        for part in [request.method().as_str(), " ", root, target, " HTTP/1.1\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
        write_header(request.headers(), &mut head);
        Cow::Owned(head)
    }

    /// Its `Sec-WebSocket-Key`.
    pub fn key(&self) -> &[u8] {
        match self {
            Self::Written(_, key) => key,
            Self::Request(request) => {
                request.headers().get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default()
            }
        }
    }

    /// As a request.
    ///
    /// # Panics
    /// If what was written is none.
    pub fn request(&self) -> Cow<'_, Request<()>> {
        let head = match self {
            Self::Written(head, _) => Bytes::copy_from_slice(head),
            Self::Request(request) => return Cow::Borrowed(request),
        };
        let mut fields = [httparse::EMPTY_HEADER; 128];
        let mut read = httparse::Request::new(&mut fields);
        let is_whole = read.parse(&head).is_ok_and(|status| status.is_complete());
        let target = read.path.filter(|_| is_whole).and_then(|target| Uri::try_from(target).ok());
        let (target, headers) = target.zip(read_header(read.headers, &head)).expect("it was written here");
        let mut request = Request::new(());
        (*request.uri_mut(), *request.headers_mut()) = (target, headers);
        Cow::Owned(request)
    }
}

/// The header of a backend's 101.
#[derive(Debug)]
pub enum Switching {
    /// It was read here.
    Lines(Lines),
    /// Somebody else has read it.
    Map(HeaderMap),
}

impl Switching {
    /// As a map.
    pub fn into_map(self) -> HeaderMap {
        match self {
            Self::Lines(lines) => lines.to_map(),
            Self::Map(headers) => headers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each byte in a name and in a value: what httparse takes, http takes too. So a header that was read as lines can be had as a map, and
    /// both have the same to say.
    #[test]
    fn lines_are_what_a_map_is() {
        for byte in 0..=u8::MAX {
            let name = [b"GET / HTTP/1.1\r\nx".as_slice(), &[byte], b"Y: a\r\nb:\r\n\r\n"].concat();
            let value =
                [b"GET / HTTP/1.1\r\nX-Y: a".as_slice(), &[byte], b", b\r\nb:  c \r\nx-y: c\t\r\n\r\n"].concat();
            for bytes in [name, value] {
                let bytes = Bytes::from(bytes);
                let mut fields = [httparse::EMPTY_HEADER; 8];
                let mut read = httparse::Request::new(&mut fields);
                if !read.parse(&bytes).is_ok_and(|status| status.is_complete()) {
                    continue;
                }
                let map = read_header(read.headers, &bytes).unwrap_or_else(|| panic!("{bytes:?}"));
                let lines = Lines::new(bytes.clone(), spans(read.headers, &bytes).expect("few bytes"));
                assert_eq!(lines.to_map(), map, "{bytes:?}");
                for name in ["x-y", "b", "none"].map(HeaderName::from_static) {
                    assert!(lines.values_of(&name).eq(map.values_of(&name)), "{bytes:?}");
                    assert!(tokens(&lines, &name).eq(tokens(&map, &name)), "{bytes:?}");
                    let texts = map.get_all(&name).iter().map(|value| value.to_str().ok());
                    assert!(lines.values_of(&name).map(text).eq(texts), "{bytes:?}");
                }
            }
        }
    }
}
