//! Header fields: those that are lists (RFC 9110 5.6.1), and how all are read and written.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header::GetAll};

/// The comma-separated elements of a field, over all its lines; what is no visible ASCII is passed over.
pub fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    tokens_of(&headers.get_all(name))
}

/// The same of a field that was found already.
pub fn tokens_of<'a>(field: &GetAll<'a, HeaderValue>) -> impl Iterator<Item = &'a str> + use<'a> {
    let values = field.iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim_ascii).filter(|token| !token.is_empty())
}

/// As [`tokens`]; `None` stands for an element that is no visible ASCII.
pub fn elements<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = Option<&'a str>> {
    let elements = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let elements = elements.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty());
    elements.map(|element| {
        std::str::from_utf8(element).ok().filter(|text| text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
    })
}

/// A field has this element, whatever its case.
pub fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
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
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            to.extend_from_slice(part);
        }
    }
    to.extend_from_slice(b"\r\n");
}
