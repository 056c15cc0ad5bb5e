//! What is passed on of a header, in both directions.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
    num::NonZeroU128,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING,
        UPGRADE,
    },
    uri::PathAndQuery,
};
use ipnet::IpNet;

use crate::{
    fields::{elements, has_token, tokens},
    net::{ClientCertificate, Secured},
};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const CLIENT_CERTIFICATE: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE: HeaderName = HeaderName::from_static("traceparent");

/// What is meant for one hop, whatever `Connection` says.
static ONE_HOP: [HeaderName; 8] = [
    CONNECTION,
    UPGRADE,
    TE,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
];

/// Removes what is meant for one hop (RFC 9110 7.6.1): what `Connection` lists, and the fixed names. `upgrade`: `Connection` and `Upgrade`
/// get the values of a WebSocket handshake.
///
/// `Host`, the framing, and what a proxy says of its client stay whatever `Connection` says: naming them there is an attack on the next
/// hop (CVE-2022-31813).
fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    // Few are there, and to look at all names costs less than to look for each of these.
    let mut is_there = [false; ONE_HOP.len()];
    for name in headers.keys() {
        if let Some(index) = ONE_HOP.iter().position(|known| known == name) {
            is_there[index] = true;
        }
    }
    // Before it goes: whoever sends TE names it in Connection (RFC 9110 10.1.4).
    let trailers = has_token(headers, &TE, "trailers");
    let listed: Vec<HeaderName> = tokens(headers, &CONNECTION)
        // Nearly all list nothing else, and these are looked for below.
        .filter(|token| !["upgrade", "keep-alive"].iter().any(|known| token.eq_ignore_ascii_case(known)))
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .filter(|name| ![HOST, CONTENT_LENGTH, TRANSFER_ENCODING].contains(name) && !is_claim(name.as_str()))
        .collect();
    for name in listed {
        headers.remove(name);
    }
    for (name, is_there) in ONE_HOP.iter().zip(is_there) {
        if is_there && !(upgrade && (name == CONNECTION || name == UPGRADE)) {
            headers.remove(name);
        }
    }
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Makes a client's request one for the backend: one-hop headers go, the target becomes a path, `X-Forwarded-*` and
/// `X-Request-Id` come.
///
/// `Host` is kept. Of a client that is no trusted proxy, what it says of others (`X-Forwarded-*` of any kind, `X-Real-IP`,
/// `Forwarded`, of certificates) is replaced or removed; a trusted proxy's is kept, and its own address added. Where clients are asked for a
/// certificate nobody's word but theirs counts for what it says. `secured`: it came by TLS. `upgrade`: it stays a WebSocket handshake. True: an `X-Forwarded-For` was not believed.
pub fn forward_request<B>(
    request: &mut Request<B>,
    client: IpAddr,
    secured: Option<&Secured>,
    trusted: &[IpNet],
    id: &str,
    upgrade: bool,
) -> bool {
    let client = client.to_canonical();
    // An absolute target's authority replaces Host (RFC 9112 3.2.2).
    let authority = request.uri().authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok());
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    strip_hop_by_hop(headers, upgrade);
    if let Some(authority) = authority {
        headers.insert(HOST, authority);
    }
    // HTTP/1.0 may lack it, HTTP/1.1 must not: "If the authority component is missing or undefined for the target URI, then
    // a client MUST send a Host header field with an empty field value" (RFC 9112 3.2).
    headers.entry(HOST).or_insert(HeaderValue::from_static(""));
    let is_trusted = is_trusted(client, trusted);
    let was_replaced = !is_trusted && headers.contains_key(FOR);
    if !is_trusted {
        drop_claims(headers);
    }
    match secured.map(|secured| &secured.certificate) {
        None | Some(ClientCertificate::NotAsked) => {}
        Some(ClientCertificate::Missing) => drop_those(headers, speaks_of_certificates),
        Some(ClientCertificate::Verified(names)) => {
            drop_those(headers, speaks_of_certificates);
            if let Ok(names) = HeaderValue::from_str(names) {
                headers.insert(CLIENT_CERTIFICATE, names);
            }
        }
    }
    let mut chain = String::new();
    for element in elements(headers, &FOR) {
        // "unknown" is RFC 7239's word for it (6.2).
        chain.push_str(element.unwrap_or("unknown"));
        chain.push_str(", ");
    }
    push_address(&mut chain, client);
    if let Ok(chain) = HeaderValue::try_from(chain) {
        headers.insert(FOR, chain);
    }
    headers.entry(PROTO).or_insert(HeaderValue::from_static(if secured.is_some() { "https" } else { "http" }));
    if let Some(host) = headers.get(HOST).filter(|host| !host.is_empty()).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
    if upgrade {
        headers.remove(CONTENT_LENGTH);
        headers.remove(TE);
    } else {
        // One request per connection, unless the upstream keeps it: its end is ours to make orderly. "A sender of TE MUST also send a 'TE' connection
        // option" (RFC 9110 10.1.4).
        let options = if headers.contains_key(TE) { "close, TE" } else { "close" };
        headers.insert(CONNECTION, HeaderValue::from_static(options));
    }
    was_replaced
}

/// As it is displayed, for which the four numbers of most take a thousand instructions.
fn push_address(text: &mut String, address: IpAddr) {
    let IpAddr::V4(address) = address else {
        // It can't fail.
        let _ = write!(text, "{address}");
        return;
    };
    for (index, octet) in address.octets().into_iter().enumerate() {
        if index > 0 {
            text.push('.');
        }
        let digits = [octet / 100, octet / 10 % 10, octet % 10].map(|digit| char::from(b'0' + digit));
        let begin = if octet >= 100 { 0 } else { 1 + usize::from(octet < 10) };
        text.extend(&digits[begin..]);
    }
}

/// Whose request it is, as far as that is told by those who are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// Somebody who is no proxy: the client itself, or of whom the last trusted proxy says so.
    Client(IpAddr),
    /// All are trusted: the first of them. It may have the requests of many.
    Proxy(IpAddr),
    /// A trusted proxy names somebody, and not by an address.
    Unknown,
}

impl Speaker {
    /// If it is known.
    pub const fn address(self) -> Option<IpAddr> {
        match self {
            Self::Client(address) | Self::Proxy(address) => Some(address),
            Self::Unknown => None,
        }
    }
}

/// It is in one of these networks, `http.trusted_proxies`.
pub fn is_trusted(ip: IpAddr, trusted: &[IpNet]) -> bool {
    let ip = ip.to_canonical();
    trusted.iter().any(|network| network.contains(&ip))
}

/// Whose request it is. What is on the left of somebody who is not trusted is nobody's word.
pub fn speaker(headers: &HeaderMap, client: IpAddr, trusted: &[IpNet]) -> Speaker {
    let client = client.to_canonical();
    if !is_trusted(client, trusted) {
        return Speaker::Client(client);
    }
    let chain: Vec<_> = elements(headers, &FOR).collect();
    if chain.is_empty() && ["forwarded", "x-real-ip"].iter().any(|name| headers.contains_key(*name)) {
        // It speaks of somebody, in words that are not read here.
        return Speaker::Unknown;
    }
    let mut first = client;
    for name in chain.into_iter().rev() {
        let Some(name) = name else { return Speaker::Unknown };
        // Some proxies add the port.
        let address = name.parse().ok().or_else(|| Some(name.parse::<SocketAddr>().ok()?.ip()));
        let address: Option<IpAddr> = address.or_else(|| name.strip_prefix('[')?.strip_suffix(']')?.parse().ok());
        let Some(address) = address.map(|address| address.to_canonical()) else { return Speaker::Unknown };
        if !is_trusted(address, trusted) {
            return Speaker::Client(address);
        }
        first = address;
    }
    Speaker::Proxy(first)
}

/// A response's length is said in one way, or not at all: what another reader might make of it is not for a client to find out.
pub fn is_length_clear(headers: &HeaderMap) -> bool {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let is_number = lengths.next().is_none_or(|length| {
        let is_digits = length.as_bytes().iter().all(u8::is_ascii_digit);
        is_digits && length.to_str().is_ok_and(|length| length.parse::<i64>().is_ok())
    });
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = codings.next().is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
    is_number && is_chunked && lengths.next().is_none() && codings.next().is_none()
}

/// Removes what says who the client is, also from trailers.
pub fn drop_claims(headers: &mut HeaderMap) {
    drop_those(headers, is_claim);
}

fn is_claim(name: &str) -> bool {
    let start = "x-forwarded-";
    name.get(..start.len()).is_some_and(|name| is_taken_for(name, start))
        || ["forwarded", "x-real-ip"].iter().any(|claim| is_taken_for(name, claim))
        || speaks_of_certificates(name)
}

/// Some servers take `_` for `-` (CGI and its heirs).
fn is_taken_for(name: &str, known: &str) -> bool {
    // Nearly all differ in this already.
    name.len() == known.len()
        && name.bytes().zip(known.bytes()).all(|(byte, known)| byte == known || (byte == b'_' && known == b'-'))
}

fn drop_those(headers: &mut HeaderMap, are: impl Fn(&str) -> bool) {
    let those: Vec<HeaderName> = headers.keys().filter(|name| are(name.as_str())).cloned().collect();
    for name in those {
        headers.remove(name);
    }
}

/// Envoy's, and those of RFC 9440.
fn speaks_of_certificates(name: &str) -> bool {
    ["x-forwarded-client-cert", "client-cert", "client-cert-chain"].iter().any(|claim| is_taken_for(name, claim))
}

/// Makes a backend's response one for the client; `upgrade`: it is the 101 of a WebSocket.
pub fn forward_response<B>(response: &mut Response<B>, upgrade: bool) {
    *response.version_mut() = Version::HTTP_11;
    let needs_upgrade =
        response.status() == StatusCode::UPGRADE_REQUIRED && has_token(response.headers(), &UPGRADE, "websocket");
    let headers = response.headers_mut();
    if upgrade {
        // None is allowed in a 1xx (RFC 9110 8.6, RFC 9112 6.1), and some clients refuse one that has them.
        for name in [CONTENT_LENGTH, TRANSFER_ENCODING, TRAILER] {
            headers.remove(name);
        }
    } else if headers.contains_key(TRANSFER_ENCODING) {
        // "a message ... received with both a Transfer-Encoding and a Content-Length header field, the Transfer-Encoding
        // overrides" (RFC 9112 6.3), and whoever forwards it must remove the latter.
        headers.remove(CONTENT_LENGTH);
    }
    strip_hop_by_hop(headers, upgrade);
    if needs_upgrade {
        // "A server that sends a 426 response MUST send an Upgrade header field" (RFC 9110 15.5.22).
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("close, Upgrade"));
    }
}

/// The request's id: the client's `X-Request-Id` when it is short and printable, else a random one.
pub fn request_id(headers: &HeaderMap) -> String {
    match headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()) {
        Some(id) if (1..=128).contains(&id.len()) => id.to_owned(),
        _ => format!("{:016x}", rand::random::<u64>()),
    }
}

/// Under which a client's traces know a request (W3C Trace Context 3.2.2.3). `traceparent` itself is passed on as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(NonZeroU128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Of a `traceparent` that is valid, and the only one.
pub fn trace_id(headers: &HeaderMap) -> Option<TraceId> {
    let mut values = headers.get_all(TRACE).iter();
    let (value, None) = (values.next()?.to_str().ok()?, values.next()) else { return None };
    let parts: Vec<&str> = value.splitn(5, '-').collect();
    let [version, trace, parent, flags, rest @ ..] = &parts[..] else { return None };
    let is_hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let is_valid =
        is_hex(version, 2) && *version != "ff" && is_hex(trace, 32) && is_hex(parent, 16) && is_hex(flags, 2);
    // Only later versions may say more.
    let is_known = rest.is_empty() || *version != "00";
    let is_parent = parent.bytes().any(|byte| byte != b'0');
    let id = u128::from_str_radix(trace, 16).ok().and_then(NonZeroU128::new)?;
    (is_valid && is_known && is_parent).then_some(TraceId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_they_are_displayed() {
        for octet in 0..=255 {
            for address in [IpAddr::from([octet, 0, 255, octet]), IpAddr::from([u16::from(octet); 8])] {
                let mut text = "a, ".to_owned();
                push_address(&mut text, address);
                assert_eq!(text, format!("a, {address}"));
            }
        }
    }

    #[test]
    fn trace_ids() {
        let of = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("traceparent", HeaderValue::from_static(value));
            }
            trace_id(&headers).map(|id| id.to_string())
        };
        let known = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let id = Some("4bf92f3577b34da6a3ce929d0e0e4736".to_owned());
        assert_eq!(of(&[known]), id);
        assert_eq!(of(&["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes-later"]), id);
        for value in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(of(&[value]), None, "{value}");
        }
        assert_eq!(of(&[known, known]), None);
    }

    #[test]
    fn a_length_is_clear_or_not() {
        let is_clear = |fields: &[(&'static str, &'static str)]| {
            let fields =
                fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            let mut headers = HeaderMap::new();
            fields.for_each(|(name, value)| _ = headers.append(name, value));
            is_length_clear(&headers)
        };
        let (length, coding) = ("content-length", "transfer-encoding");
        for fields in [&[][..], &[(length, "5")], &[(length, "0")], &[(coding, "chunked")], &[(coding, "Chunked")]] {
            assert!(is_clear(fields), "{fields:?}");
        }
        for value in ["", "+5", "-1", "0x5", "5, 5", "five", "9223372036854775808"] {
            assert!(!is_clear(&[(length, value)]), "{value}");
        }
        assert!(!is_clear(&[(length, "5"), (length, "5")]));
        assert!(!is_clear(&[(coding, "chunked"), (coding, "chunked")]));
        assert!(!is_clear(&[(coding, "gzip, chunked")]));
    }

    /// What a proxy says of its client is not for that client to have removed.
    #[test]
    fn nobody_lists_what_a_proxy_says() {
        let trusted = ["10.0.0.0/8".parse().unwrap()];
        let request = Request::builder().header(CONNECTION, "Upgrade, X-Forwarded-For, x-forwarded_proto, X-Mine");
        let request = request.header(FOR, "198.51.100.1").header("x-forwarded_proto", "https").header("x-mine", "a");
        let mut request = request.body(()).unwrap();
        forward_request(&mut request, "10.0.0.1".parse().unwrap(), None, &trusted, "id", true);
        let headers = request.headers();
        assert_eq!(headers[FOR], "198.51.100.1, 10.0.0.1");
        assert_eq!(headers["x-forwarded_proto"], "https");
        assert!(!headers.contains_key("x-mine"));
    }

    #[test]
    fn who_speaks() {
        let trusted: Vec<IpNet> = ["10.0.0.0/8", "2001:db8::/32"].iter().map(|text| text.parse().unwrap()).collect();
        let [of, proxy] = [Speaker::Client, Speaker::Proxy].map(|kind| move |text: &str| kind(text.parse().unwrap()));
        for (chain, client, expected) in [
            (&["198.51.100.1"][..], "203.0.113.7", of("203.0.113.7")),
            (&["198.51.100.1"], "10.0.0.1", of("198.51.100.1")),
            (&["198.51.100.1"], "::ffff:10.0.0.1", of("198.51.100.1")),
            // What is on the left may be anybody's invention.
            (&["192.0.2.1, 198.51.100.1, 10.1.1.1"], "10.0.0.1", of("198.51.100.1")),
            (&["unknown, 198.51.100.1"], "10.0.0.1", of("198.51.100.1")),
            (&["192.0.2.1", "198.51.100.1"], "10.0.0.1", of("198.51.100.1")),
            (&["198.51.100.1:4242, 10.1.1.1:80"], "10.0.0.1", of("198.51.100.1")),
            (&["[2001:db9::7]:4242"], "2001:db8::1", of("2001:db9::7")),
            (&["[2001:db9::7]"], "10.0.0.1", of("2001:db9::7")),
            (&["198.51.100.1, unknown"], "10.0.0.1", Speaker::Unknown),
            // A byte beyond ASCII hides nobody who stands in the same line.
            (&["\u{ff}, 198.51.100.1"], "10.0.0.1", of("198.51.100.1")),
            (&["198.51.100.1, \u{ff}"], "10.0.0.1", Speaker::Unknown),
            (&["10.0.0.2"], "10.0.0.1", proxy("10.0.0.2")),
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.1", proxy("10.0.0.3")),
            (&[], "10.0.0.1", proxy("10.0.0.1")),
        ] {
            let mut headers = HeaderMap::new();
            for value in chain {
                headers.append(FOR, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            let found = speaker(&headers, client.parse().unwrap(), &trusted);
            assert_eq!(found, expected, "{chain:?} of {client}");
        }
    }
}
