//! The header of the PROXY protocol, in which a balancer says whose connection it passes on
//! (haproxy.org/download/3.0/doc/proxy-protocol.txt, versions 1 and 2).
//!
//! What it says is `ppp`'s to read. Here is where it ends, which is known without keeping anything, and what is taken: no more than
//! the text of the protocol allows, since whoever sends less than that is somebody else.
//!
//! Not here: who may send one, and how long is waited for it (`session/`). What is behind the addresses (TLV) is passed over, its
//! checksum too: TCP has one.

use std::net::{IpAddr, SocketAddr};

use ppp::{v1, v2};

/// Whether clients' connections begin with it. Never guessed: whoever can leave it out can forge it as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// They do not.
    Off,
    /// All do.
    Required,
}

impl ProxyProtocol {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Off, Self::Required];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Required => "required",
        }
    }
}

/// A header that is there as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyHeader {
    /// Whose connection it is. `None`: the balancer's own (a health check), or it does not know.
    pub source: Option<SocketAddr>,
    /// Its bytes.
    pub length: usize,
}

/// What is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadProxyHeader {
    /// It begins otherwise.
    #[error("there is none")]
    Missing,
    /// It begins like one, but is none.
    #[error("it is not as it should be: {0}")]
    Broken(&'static str),
    /// It is longer than [`V2_MOST`], or than 107 bytes in version 1.
    #[error("it is too long")]
    TooLong,
}

const V1_START: &[u8] = b"PROXY ";

/// "a 107-byte buffer is always enough to store all the line and a trailing zero", for which it counts 108.
const V1_MOST: usize = 107;

/// Of version 2: what it begins with, its version, family and length.
const V2_HEAD: usize = 16;

/// The longest of version 2 that is taken. Addresses take 216 bytes at most, and what is behind them is not of interest here; but balancers put
/// certificates' names there.
pub const V2_MOST: usize = V2_HEAD + (4 << 10);

/// The header that `bytes` begin with; `None`: they are the beginning of one.
///
/// # Errors
///
/// No bytes behind them could make them one.
pub fn proxy_header(bytes: &[u8]) -> Result<Option<ProxyHeader>, BadProxyHeader> {
    let begins = |start: &[u8]| bytes.iter().zip(start).all(|(byte, expected)| byte == expected);
    if begins(v2::PROTOCOL_PREFIX) {
        version_2(bytes)
    } else if begins(V1_START) {
        version_1(bytes)
    } else {
        Err(BadProxyHeader::Missing)
    }
}

fn version_1(bytes: &[u8]) -> Result<Option<ProxyHeader>, BadProxyHeader> {
    const NO_LINE: BadProxyHeader = BadProxyHeader::Broken("its line does not end as it should");
    let start = &bytes[..bytes.len().min(V1_MOST)];
    let Some(end) = start.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() < V1_MOST { Ok(None) } else { Err(BadProxyHeader::TooLong) };
    };
    let (line, length) = (start[..end].strip_suffix(b"\r").ok_or(NO_LINE)?, end + 1);
    let rest = line.get(V1_START.len()..).ok_or(NO_LINE)?;
    // "the receiver must ignore anything presented before the CRLF is found".
    if rest == b"UNKNOWN" || rest.starts_with(b"UNKNOWN ") {
        return Ok(Some(ProxyHeader { source: None, length }));
    }
    // Numbers as Rust reads them may begin with a plus.
    let header = v1::Header::try_from(&start[..length]).ok().filter(|_| !line.contains(&b'+'));
    let source = match header.map(|header| header.addresses) {
        Some(v1::Addresses::Tcp4(v1::IPv4 { source_address, source_port, .. })) => at(source_address, source_port),
        Some(v1::Addresses::Tcp6(v1::IPv6 { source_address, source_port, .. })) => at(source_address, source_port),
        _ => return Err(BadProxyHeader::Broken("its line can't be understood")),
    };
    Ok(Some(ProxyHeader { source: Some(source), length }))
}

fn version_2(bytes: &[u8]) -> Result<Option<ProxyHeader>, BadProxyHeader> {
    let broken = |what| Err(BadProxyHeader::Broken(what));
    // As soon as it can be known: nobody is waited for who is somebody else.
    let version = bytes.get(12).copied();
    if version.is_some_and(|version| !matches!(version, 0x20 | 0x21)) {
        return broken("its version is not 2, or its command unknown");
    }
    let Some(&[.., high, low]) = bytes.get(..V2_HEAD) else { return Ok(None) };
    let length = V2_HEAD + usize::from(u16::from_be_bytes([high, low]));
    if length > V2_MOST {
        return Err(BadProxyHeader::TooLong);
    }
    let Some(whole) = bytes.get(..length) else { return Ok(None) };
    // LOCAL: "the receiver must ... use the real connection endpoints and must discard the protocol block including the family".
    if version == Some(0x20) {
        return Ok(Some(ProxyHeader { source: None, length }));
    }
    let Ok(header) = v2::Header::try_from(whole) else { return broken("its family and its length do not go together") };
    // "Other values are unspecified and must not be emitted in version 2 of this protocol and must be rejected as invalid by receivers."
    if (header.address_family() == v2::AddressFamily::Unspecified) != (header.protocol == v2::Protocol::Unspecified) {
        return broken("its family is unknown");
    }
    if header.tlvs().any(|tlv| tlv.is_err()) {
        return broken("what is behind its addresses has no end");
    }
    let source = match header.addresses {
        v2::Addresses::IPv4(v2::IPv4 { source_address, source_port, .. }) => Some(at(source_address, source_port)),
        v2::Addresses::IPv6(v2::IPv6 { source_address, source_port, .. }) => Some(at(source_address, source_port)),
        // Of these nobody has an address that could be said.
        v2::Addresses::Unspecified | v2::Addresses::Unix(_) => None,
    };
    Ok(Some(ProxyHeader { source, length }))
}

/// IPv4 in IPv6 is IPv4: limits and lists of networks are to mean the same client by both.
fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into().to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(version: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [v2::PROTOCOL_PREFIX, &[version, family], &length, block].concat()
    }

    const IPV4: [u8; 12] = [203, 0, 113, 7, 10, 0, 0, 1, 0x10, 0x92, 0, 80];

    fn ipv6() -> Vec<u8> {
        [&[0x20, 1, 13, 0xb8][..], &[0; 11], &[7], &[0; 15], &[1], &[0x10, 0x92, 0, 80]].concat()
    }

    /// What is taken, and for whom. Whatever is behind it is not looked at, and no beginning of it is taken for anything.
    #[test]
    fn what_is_taken() {
        let (four, six) = ("203.0.113.7:4242", "[2001:db8::7]:4242");
        let tlv =
            |kind: u8, value: &[u8]| [&[kind][..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat();
        let most = tlv(4, &[0; (4 << 10) - 12 - 3]);
        for (header, source) in [
            (b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\r\n".to_vec(), Some(four)),
            (b"PROXY TCP6 2001:db8::7 ::1 4242 80\r\n".to_vec(), Some(six)),
            (b"PROXY TCP6 ::ffff:203.0.113.7 ::ffff:10.0.0.1 4242 80\r\n".to_vec(), Some(four)),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ::1 ::1 1 2 and whatever else there may be\r\n".to_vec(), None),
            (v2(0x21, 0x11, &IPV4), Some(four)),
            // How it came to the balancer is that one's own business: QUIC.
            (v2(0x21, 0x12, &IPV4), Some(four)),
            (v2(0x21, 0x21, &ipv6()), Some(six)),
            (v2(0x21, 0x11, &[&IPV4[..], &tlv(1, b"h2"), &tlv(2, b"app.example")].concat()), Some(four)),
            (v2(0x21, 0x11, &[&IPV4[..], &most].concat()), Some(four)),
            (v2(0x21, 0x00, b""), None),
            (v2(0x21, 0x31, &[b'/'; 216]), None),
            (v2(0x20, 0x00, b""), None),
            (v2(0x20, 0x11, &IPV4), None),
            (v2(0x20, 0xff, b"whatever"), None),
        ] {
            let whole = ProxyHeader { source: source.map(|text| text.parse().unwrap()), length: header.len() };
            let behind = [&header[..], b"GET / HTTP/1.1\r\n"].concat();
            assert_eq!(proxy_header(&behind), Ok(Some(whole)), "{}", behind.escape_ascii());
            for end in 0..header.len() {
                assert_eq!(proxy_header(&header[..end]), Ok(None), "{end} of {}", header.escape_ascii());
            }
        }
    }

    /// What is refused, and as what. Method: the thirty of which each is what somebody might send, and what other readers take.
    #[test]
    fn what_is_refused() {
        use BadProxyHeader::{Broken, Missing, TooLong};
        const BROKEN: BadProxyHeader = Broken("");
        let line = |text: &str| format!("{text}\r\n").into_bytes();
        let long = [&IPV4[..], &[4, 0x0f, 0xf2], &[0; 0x0ff2]].concat();
        let vectors = [
            // Somebody else.
            (line("GET / HTTP/1.1"), Missing),
            (b"\x16\x03\x01\x02\x00\x01".to_vec(), Missing),
            (line("proxy TCP4 203.0.113.7 10.0.0.1 4242 80"), Missing),
            (line(" PROXY TCP4 203.0.113.7 10.0.0.1 4242 80"), Missing),
            (line("PROXY\tTCP4 203.0.113.7 10.0.0.1 4242 80"), Missing),
            (b"\r\n\r\n\0\r\nQUIX\n\x21\x11\0\x0c".to_vec(), Missing),
            // Lines.
            (line("PROXY TCP4"), BROKEN),
            (line("PROXY "), BROKEN),
            (line("PROXY TCP5 203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY UDP4 203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY tcp4 203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY UNKNOWNER 203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 2001:db8::7 ::1 4242 80"), BROKEN),
            (line("PROXY TCP6 203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.256 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.07 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 app.example 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.7 10.0.0.1 65536 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.7 10.0.0.1 +4242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.7 10.0.0.1 04242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.7 10.0.0.1 4242"), BROKEN),
            (line("PROXY TCP4 203.0.113.7 10.0.0.1 4242 80 80"), BROKEN),
            (line("PROXY TCP4  203.0.113.7 10.0.0.1 4242 80"), BROKEN),
            (line("PROXY TCP4 203.0.113.7\r10.0.0.1 4242 80"), BROKEN),
            (b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\n".to_vec(), BROKEN),
            (b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\0\r\n".to_vec(), BROKEN),
            (line(&format!("PROXY UNKNOWN {}", "a".repeat(92))), TooLong),
            ([V1_START, &[b'P'; 101]].concat(), TooLong),
            // Binary.
            (v2(0x11, 0x11, &IPV4), BROKEN),
            (v2(0x22, 0x11, &IPV4), BROKEN),
            (v2(0x21, 0x41, &IPV4), BROKEN),
            (v2(0x21, 0x13, &IPV4), BROKEN),
            (v2(0x21, 0x10, &IPV4), BROKEN),
            (v2(0x21, 0x01, b""), BROKEN),
            (v2(0x21, 0x11, &IPV4[..11]), BROKEN),
            (v2(0x21, 0x11, b""), BROKEN),
            (v2(0x21, 0x21, &IPV4), BROKEN),
            (v2(0x21, 0x31, &ipv6()), BROKEN),
            (v2(0x21, 0x11, &[&IPV4[..], &[1, 0, 9, 0]].concat()), BROKEN),
            (v2(0x21, 0x11, &[&IPV4[..], &[1, 0]].concat()), BROKEN),
            (v2(0x21, 0x11, &long), TooLong),
            // Nothing is waited for, let alone kept, of what only says that it is long.
            ([v2::PROTOCOL_PREFIX, &[0x20, 0, 0xff, 0xff]].concat(), TooLong),
        ];
        assert!(vectors.len() >= 36);
        for (bytes, expected) in vectors {
            let found = proxy_header(&bytes).map_err(|error| if let Broken(_) = error { BROKEN } else { error });
            assert_eq!(found, Err(expected), "{}", bytes.escape_ascii());
        }
    }

    proptest! {
        /// However it is cut, it is the same; nothing of what comes behind it belongs to it, and no bytes are too many for an answer.
        #[test]
        fn whatever_comes(start in prop_oneof![Just(V1_START.to_vec()), Just(v2::PROTOCOL_PREFIX.to_vec()), Just(Vec::new())],
                          rest in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = [start, rest].concat();
            let judged: Vec<_> = (0..=bytes.len()).map(|end| proxy_header(&bytes[..end])).collect();
            let first = judged.iter().position(|found| *found != Ok(None));
            for found in &judged[first.unwrap_or(judged.len())..] {
                prop_assert_eq!(found, &judged[first.expect("found")]);
            }
            if let Some(Ok(Some(header))) = first.map(|at| judged[at]) {
                prop_assert_eq!(Some(header.length), first);
            }
        }

        /// What is written by another hand is read as it was meant.
        #[test]
        fn written_and_read(source: SocketAddr, destination: SocketAddr) {
            let bytes = v2::Builder::with_addresses(0x21, v2::Protocol::Stream, (source, destination)).build().unwrap();
            let found = proxy_header(&bytes);
            // Of two families together there is nothing to be said.
            let is_one = source.is_ipv4() == destination.is_ipv4();
            let meant = is_one.then(|| SocketAddr::new(source.ip().to_canonical(), source.port()));
            let family_is_known = bytes[13] != 0x01;
            prop_assert!(!family_is_known || found == Ok(Some(ProxyHeader { source: meant, length: bytes.len() })), "{:?}", found);
            if is_one {
                let kind = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                let line = format!("PROXY {kind} {} {} {} {}\r\n", source.ip(), destination.ip(), source.port(), destination.port());
                prop_assert_eq!(proxy_header(line.as_bytes()), Ok(Some(ProxyHeader { source: meant, length: line.len() })));
            }
        }
    }
}
