//! What is passed on of a header, in both directions.

use std::{
    cmp::Ordering,
    fmt,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    num::NonZeroU128,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
    uri::PathAndQuery,
};
use ipnet::IpNet;

use crate::{
    fields::{Header, Lines, elements, has_token, text, tokens, write_line},
    net::{ClientCertificate, Dotted, Secured},
};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const CLIENT_CERTIFICATE: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE: HeaderName = HeaderName::from_static("traceparent");

/// What is meant for one hop, whatever `Connection` says.
const ONE_HOP: [&str; 8] = [
    "connection",
    "upgrade",
    "te",
    "proxy-authenticate",
    "proxy-authorization",
    "keep-alive",
    "proxy-connection",
    "http2-settings",
];

/// What `Connection` may list in vain. To name them there is an attack on the next hop (CVE-2022-31813).
const KEPT: [&str; 3] = ["host", "content-length", "transfer-encoding"];

/// What goes on of a header, and what does not: what is meant for one hop (RFC 9110 7.6.1) does not, which is what `Connection` lists and the
/// fixed names. `Host`, the framing, and what a proxy says of its client do whatever `Connection` says.
struct Passage<'a> {
    /// See [`listed`].
    listed: Vec<&'a [u8]>,
    /// Without what is said of who the client is.
    is_unbelieved: bool,
    /// Without what is said of certificates.
    is_verified: bool,
}

impl Passage<'_> {
    fn takes(&self, name: &[u8]) -> bool {
        let is_one_of = |names: &[&str]| names.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()));
        let lists = || self.listed.binary_search_by(|listed| in_order(listed, name)).is_ok();
        let is_dropped = is_one_of(&ONE_HOP)
            || self.is_unbelieved && is_claim(name)
            || self.is_verified && speaks_of_certificates(name)
            || !self.listed.is_empty() && !is_one_of(&KEPT) && !is_claim(name) && lists();
        !is_dropped
    }
}

/// What `Connection` lists beside what nearly all do: mostly nothing, and then nothing is allocated. It is read once, and sorted, so that many
/// names can be looked up in it: how many options a backend lists is bounded by the length of its header alone.
fn listed(header: &impl Header) -> Vec<&[u8]> {
    let more = tokens(header, &CONNECTION).filter(|option| !is_usual_option(option));
    let mut listed: Vec<_> = more.map(str::as_bytes).collect();
    listed.sort_unstable_by(|one, other| in_order(one, other));
    listed
}

/// What nearly all `Connection` lines list.
pub(super) fn is_usual_option(option: &str) -> bool {
    ["upgrade", "keep-alive"].iter().any(|usual| option.eq_ignore_ascii_case(usual))
}

/// Whatever their case, and by their length first, in which most differ.
fn in_order(one: &[u8], other: &[u8]) -> Ordering {
    let lower = |byte: &u8| byte.to_ascii_lowercase();
    one.len().cmp(&other.len()).then_with(|| one.iter().map(lower).cmp(other.iter().map(lower)))
}

/// Removes what does not go on; see [`Passage`]. `upgrade`: `Connection` and `Upgrade` get the values of a WebSocket handshake.
fn strip(headers: &mut HeaderMap, upgrade: bool, is_unbelieved: bool, is_verified: bool) {
    // Before it goes: whoever sends TE names it in Connection (RFC 9110 10.1.4).
    let trailers = has_token(headers, &TE, "trailers");
    let passage = Passage { listed: listed(headers), is_unbelieved, is_verified };
    let those = headers.keys().filter(|name| !passage.takes(name.as_str().as_bytes()));
    for name in those.cloned().collect::<Vec<_>>() {
        headers.remove(name);
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
    let is_trusted = is_trusted(client, trusted);
    let was_replaced = !is_trusted && headers.contains_key(FOR);
    let (is_verified, certificate) = certificate(secured);
    strip(headers, upgrade, !is_trusted, is_verified);
    if let Some(authority) = authority {
        headers.insert(HOST, authority);
    }
    // HTTP/1.0 may lack it, HTTP/1.1 must not: "If the authority component is missing or undefined for the target URI, then
    // a client MUST send a Host header field with an empty field value" (RFC 9112 3.2).
    headers.entry(HOST).or_insert(HeaderValue::from_static(""));
    if let Some(certificate) = certificate {
        headers.insert(CLIENT_CERTIFICATE, certificate);
    }
    let mut chain = Vec::new();
    push_elements(&mut chain, headers);
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

/// The same for a handshake that was read here: `Host` is there once, the target is a path, and it is known whether `Connection` lists more than
/// is usual. It is written as it goes out.
pub(super) fn forward_lines(
    target: &Uri,
    (lines, lists_more): (&Lines, bool),
    client: IpAddr,
    secured: Option<&Secured>,
    trusted: &[IpNet],
    id: &str,
) -> (Vec<u8>, bool) {
    let client = client.to_canonical();
    let is_trusted = is_trusted(client, trusted);
    let (is_verified, certificate) = certificate(secured);
    let listed = if lists_more { listed(lines) } else { Vec::new() };
    let passage = Passage { listed, is_unbelieved: !is_trusted, is_verified };
    let mut head = Vec::with_capacity(lines.length() + ADDED);
    let path = target.path_and_query().map_or("/", PathAndQuery::as_str);
    for part in ["GET ", path, " HTTP/1.1\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    let is = |name: &[u8], known: &HeaderName| name.eq_ignore_ascii_case(known.as_str().as_bytes());
    let (mut was_replaced, mut has_proto, mut has_host) = (false, false, false);
    for (name, value) in lines.iter() {
        was_replaced |= !is_trusted && is(name, &FOR);
        // These are written below.
        if !passage.takes(name) || is(name, &FOR) || is(name, &REQUEST_ID) {
            continue;
        }
        has_proto |= is(name, &PROTO);
        has_host |= is(name, &FORWARDED_HOST);
        push_line(name, value, &mut head);
    }
    let mut add = |name: &HeaderName, value: &[u8]| write_line(name.as_str().as_bytes(), value, &mut head);
    add(&CONNECTION, b"Upgrade");
    add(&UPGRADE, b"websocket");
    if let Some(certificate) = certificate {
        add(&CLIENT_CERTIFICATE, certificate.as_bytes());
    }
    if !has_proto {
        add(&PROTO, if secured.is_some() { b"https" } else { b"http" });
    }
    if let Some(host) = lines.first(&HOST).filter(|host| !has_host && !host.is_empty()) {
        add(&FORWARDED_HOST, host);
    }
    add(&REQUEST_ID, id.as_bytes());
    for part in [FOR.as_str(), ": "] {
        head.extend_from_slice(part.as_bytes());
    }
    if is_trusted {
        push_elements(&mut head, lines);
    }
    push_address(&mut head, client);
    head.extend_from_slice(b"\r\n\r\n");
    (head, was_replaced)
}

/// What nearly all handshakes become longer by at most.
const ADDED: usize = 256;

/// Where clients are asked for a certificate, nobody's word but theirs counts for what it says.
fn certificate(secured: Option<&Secured>) -> (bool, Option<HeaderValue>) {
    match secured.map(|secured| &secured.certificate) {
        None | Some(ClientCertificate::NotAsked) => (false, None),
        Some(ClientCertificate::Missing) => (true, None),
        Some(ClientCertificate::Verified(names)) => (true, HeaderValue::from_str(names).ok()),
    }
}

/// The addresses of `X-Forwarded-For`, with a comma behind each.
fn push_elements(text: &mut Vec<u8>, header: &impl Header) {
    for element in elements(header, &FOR) {
        // "unknown" is RFC 7239's word for it (6.2).
        text.extend_from_slice(element.unwrap_or("unknown").as_bytes());
        text.extend_from_slice(b", ");
    }
}

/// As it is displayed.
fn push_address(text: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => text.extend_from_slice(Dotted::new(address).as_bytes()),
        // It can't fail.
        IpAddr::V6(address) => _ = write!(text, "{address}"),
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
pub fn speaker(header: &impl Header, client: IpAddr, trusted: &[IpNet]) -> Speaker {
    let client = client.to_canonical();
    if !is_trusted(client, trusted) {
        return Speaker::Client(client);
    }
    let chain: Vec<_> = elements(header, &FOR).collect();
    if chain.is_empty() && [FORWARDED, REAL_IP].iter().any(|name| header.first(name).is_some()) {
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
    let claims = headers.keys().filter(|name| is_claim(name.as_str().as_bytes()));
    for name in claims.cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
}

fn is_claim(name: &[u8]) -> bool {
    let start = "x-forwarded-";
    name.get(..start.len()).is_some_and(|name| is_taken_for(name, start))
        || ["forwarded", "x-real-ip"].iter().any(|claim| is_taken_for(name, claim))
        || speaks_of_certificates(name)
}

/// Some servers take `_` for `-` (CGI and its heirs).
fn is_taken_for(name: &[u8], known: &str) -> bool {
    let is_like = |(byte, known): (&u8, u8)| byte.eq_ignore_ascii_case(&known) || (*byte == b'_' && known == b'-');
    // Nearly all differ in this already.
    name.len() == known.len() && name.iter().zip(known.bytes()).all(is_like)
}

/// Envoy's, and those of RFC 9440.
fn speaks_of_certificates(name: &[u8]) -> bool {
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
    strip(headers, upgrade, false, false);
    if needs_upgrade {
        // "A server that sends a 426 response MUST send an Upgrade header field" (RFC 9110 15.5.22).
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("close, Upgrade"));
    }
}

/// The first line of a 101.
pub(super) const SWITCHING: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\n";

/// What [`forward_response`] makes of a 101, as it goes out.
pub fn forward_switching(lines: &Lines) -> Vec<u8> {
    let passage = Passage { listed: listed(lines), is_unbelieved: false, is_verified: false };
    let mut head = Vec::with_capacity(SWITCHING.len() + lines.length() + ADDED);
    head.extend_from_slice(SWITCHING);
    for (name, value) in lines.iter() {
        let is_of_a_body = ["content-length", "transfer-encoding", "trailer"].iter();
        if passage.takes(name) && !is_of_a_body.into_iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes())) {
            push_line(name, value, &mut head);
        }
    }
    write_line(b"connection", b"Upgrade", &mut head);
    write_line(b"upgrade", b"websocket", &mut head);
    if has_token(lines, &TE, "trailers") {
        write_line(b"te", b"trailers", &mut head);
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// A line with its name as hyper writes it.
fn push_line(name: &[u8], value: &[u8], to: &mut Vec<u8>) {
    let begin = to.len();
    write_line(name, value, to);
    to[begin..begin + name.len()].make_ascii_lowercase();
}

/// The request's id: the client's `X-Request-Id` when it is short and printable, else a random one.
pub fn request_id(header: &impl Header) -> Box<str> {
    match header.first(&REQUEST_ID).and_then(text) {
        Some(id) if (1..=128).contains(&id.len()) => id.into(),
        _ => {
            let mut id = String::with_capacity(16);
            // It can't fail.
            let _ = fmt::Write::write_fmt(&mut id, format_args!("{:016x}", rand::random::<u64>()));
            id.into()
        }
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
pub fn trace_id(header: &impl Header) -> Option<TraceId> {
    let value = text(header.only(&TRACE)?)?;
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
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        downstream::{Intent, Opening as _, Whole, intent},
        fields::{Ask, read_header, spans},
    };

    proptest! {
        /// A handshake that was read here is one by all rules, and goes on as if hyper had read it: with the same fields, and of each the same values in the same
        /// order, whoever it comes from. What is no handshake, or not one that is read here, is not taken: of what one needs each may be there as it
        /// should be, with another value, several times, or not at all.
        #[test]
        fn lines_go_on_as_a_map_does(
            odd in prop::collection::vec((0..NEEDED.len(), 0..10_usize, 0..3_usize), 0..3),
            lines in prop::collection::vec((0..NAMES.len(), 0..VALUES.len()), 0..12),
            secured in 0_usize..4,
            is_trusted: bool,
        ) {
            let mut needed = NEEDED.map(|(name, values)| format!("{name}: {}\r\n", values[0]));
            for (field, value, times) in odd {
                let (name, values) = NEEDED[field];
                needed[field] = format!("{name}: {}\r\n", values[value % values.len()]).repeat(times);
            }
            let mut text = "GET /a?b HTTP/1.1\r\n".to_owned() + &needed.concat();
            text.extend(lines.into_iter().map(|(name, value)| format!("{}: {}\r\n", NAMES[name], VALUES[value])));
            let read = Whole::read((text.clone() + "\r\n").into(), &crate::config::Settings::default().downstream);
            let mut map = Ask::Written((text.clone() + "\r\n").into(), [0; 24]).request().into_owned();
            let is_hypers = ["content-length", "transfer-encoding", "expect"].iter().any(|name| map.headers().contains_key(*name));
            prop_assert_eq!(read.is_ok(), intent(&map) == Ok(Intent::WebSocket) && !is_hypers, "{}", text);
            let Ok((whole, _)) = read else { return Ok(()) };
            let certificates = [
                ClientCertificate::NotAsked,
                ClientCertificate::Missing,
                ClientCertificate::Verified("Subject=\"CN=a\"".into()),
            ];
            let secured = certificates.get(secured).map(|certificate| Secured {
                version: "TLSv1.3",
                name: None,
                is_resumed: false,
                certificate: certificate.clone(),
            });
            let trusted = ["10.0.0.0/8".parse().unwrap()];
            let client = if is_trusted { "10.0.0.1" } else { "203.0.113.7" }.parse().unwrap();
            let was_replaced = forward_request(&mut map, client, secured.as_ref(), &trusted, "an-id", true);
            let (ask, is_same) = whole.forward(client, secured.as_ref(), &trusted, "an-id");
            prop_assert!(matches!(ask, Ask::Written(..)));
            prop_assert_eq!(is_same, was_replaced);
            let request = ask.request();
            prop_assert_eq!((request.uri(), request.headers()), (map.uri(), map.headers()), "{}", text);
            prop_assert_eq!(ask.key(), map.headers()["sec-websocket-key"].as_bytes());
        }
    }

    proptest! {
        /// So does a 101.
        #[test]
        fn a_101_goes_on_as_a_map_does(lines in prop::collection::vec((0..NAMES.len(), 0..VALUES.len()), 0..12)) {
            let lines = lines.into_iter().map(|(name, value)| format!("{}: {}\r\n", NAMES[name], VALUES[value]));
            let text = bytes::Bytes::from(format!("HTTP/1.1 101 a\r\n{}\r\n", lines.collect::<String>()));
            let read = |bytes: &bytes::Bytes| {
                let mut fields = [httparse::EMPTY_HEADER; 32];
                let mut read = httparse::Response::new(&mut fields);
                assert!(read.parse(bytes).unwrap().is_complete(), "{bytes:?}");
                (read_header(read.headers, bytes).unwrap(), spans(read.headers, bytes).unwrap())
            };
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let (map, spans) = read(&text);
            *response.headers_mut() = map;
            let lines = Lines::new(text.clone(), spans);
            forward_response(&mut response, true);
            let written = forward_switching(&lines).into();
            prop_assert_eq!(read(&written).0, response.into_parts().0.headers, "{:?} {:?}", text, written);
        }
    }

    /// What a handshake needs: first as it should be, then in ways of which some are as good.
    const NEEDED: [(&str, &[&str]); 5] = [
        ("Host", &["a", "[::1]:80", "", "a, b", "a b", "a:65536", "\u{e9}"]),
        ("Upgrade", &["websocket", "WebSocket,,", "h2c", "websocket, h2c", "websocket\u{e9}", ""]),
        (
            "Connection",
            &[
                "Upgrade",
                "Keep-Alive, UPGRADE",
                "close, Upgrade",
                ",,,,Upgrade,,,X-Mine",
                "keep-alive",
                "Upgrade, Host",
                "Upgrade, Sec-WebSocket-Protocol",
                "Upgrade, \u{e9}",
                "Upgrade, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32",
                "Upgrade, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33",
            ],
        ),
        ("Sec-WebSocket-Version", &["13", "12", "013", "13, 13", "\u{e9}", ""]),
        (
            "Sec-WebSocket-Key",
            &[
                "dGhlIHNhbXBsZSBub25jZQ==",
                "+/+/+/+/+/+/+/+/+/+/+/==",
                "dGhlIHNhbXBsZSBub25jZQ=",
                "dGhlIHNhbXBsZSBub25jZWU=",
                "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ==",
                "dGhlIHNhbXBsZSBub25j\u{e9}==",
                "",
            ],
        ),
    ];

    const NAMES: [&str; 26] = [
        "Content-Length",
        "transfer-encoding",
        "Trailer",
        "Expect",
        "Connection",
        "Cookie",
        "TE",
        "Keep-Alive",
        "Proxy-Connection",
        "Proxy-Authorization",
        "HTTP2-Settings",
        "X-Forwarded-For",
        "x_forwarded-for",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "x-forwarded_host",
        "X-Forwarded-Client-Cert",
        "Client-Cert",
        "Client_Cert-Chain",
        "Forwarded",
        "X-Real-IP",
        "X-Request-Id",
        "X-MINE",
        "Traceparent",
        "Sec-WebSocket-Protocol",
        "Origin",
    ];

    const VALUES: [&str; 10] = [
        "",
        "a",
        "a,  b ,",
        "trailers",
        "TE, keep-alive",
        "x-Mine, upgrade",
        "X-Forwarded-For, cookie, client-cert, X-Request-Id, x-real-ip, x-forwarded-proto",
        "198.51.100.1, 10.0.0.9",
        "198.51.100.1\t,,\u{e9}",
        "https",
    ];

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

    proptest! {
        /// What `Connection` lists does not go on, whatever its case and in whichever line it stands, and all else does: next to a look through all that is listed for each
        /// name.
        #[test]
        fn what_is_listed_does_not_go_on(lines in prop::collection::vec("(,|, |[abAB]{0,3}|keep-alive|Upgrade,){0,12}", 0..4)) {
            let names: Vec<_> = ["a", "b"].into_iter().flat_map(|a| ["", "a", "b"].map(|b| ["", "a", "b"].map(|c| [a, b, c].concat()))).flatten().collect();
            let mut headers = HeaderMap::new();
            for line in &lines {
                headers.append(CONNECTION, HeaderValue::from_str(line).unwrap());
            }
            for name in &names {
                headers.insert(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_static("a"));
            }
            strip(&mut headers, false, false, false);
            for name in &names {
                let is_listed = lines.iter().flat_map(|line| line.split(',')).any(|option| option.trim().eq_ignore_ascii_case(name));
                prop_assert_eq!(headers.contains_key(name), !is_listed, "{}", name);
            }
        }
    }

    /// However many options are listed and names looked up, `Connection` is read once; what nearly all list takes no memory.
    #[test]
    fn what_is_listed_is_read_once() {
        struct Counted(HeaderMap, Cell<usize>);

        impl Header for Counted {
            fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]> {
                self.1.set(self.1.get() + 1);
                self.0.values_of(name)
            }
        }

        for (options, expected) in [("keep-alive, Upgrade".to_owned(), 0), (",".repeat(30_000) + "X-Mine, UPGRADE", 1)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(CONNECTION, HeaderValue::try_from(options).unwrap());
            let header = Counted(headers, Cell::new(0));
            let passage = Passage { listed: listed(&header), is_unbelieved: true, is_verified: false };
            assert_eq!((passage.listed.len(), passage.listed.capacity() > 0), (expected, expected > 0));
            assert_eq!(passage.takes(b"x-mine"), expected == 0);
            assert!((0..100).all(|name| passage.takes(format!("x-{name}").as_bytes())));
            assert_eq!(header.1.get(), 1);
        }
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
