//! Header fields that are lists (RFC 9110 5.6.1).

use http::{HeaderMap, HeaderName};

/// The comma-separated elements of a field, over all its lines; what is no visible ASCII is passed over.
pub fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// A field has this element, whatever its case.
pub fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
}
