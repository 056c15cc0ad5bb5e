//! What a request wants: no panic; only a complete and unambiguous handshake is ever called one, and it goes on in the same way whoever
//! has read it.
//!
//! The input is a method, a version, and header fields, one a line: `GET 1`, `host: a`, and so on. Or it is what a client would send:
//! `GET / HTTP/1.1`, `host: a`, and so on up to an empty line, with line feeds alone if need be.
#![no_main]

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, header};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tidegate::{
    config::Settings,
    downstream::{Config, Intent, Opening, Whole, forward_request, intent},
    fields::read_header,
};

static CONFIG: LazyLock<Config> = LazyLock::new(|| Settings::default().downstream);

fuzz_target!(|input: &[u8]| {
    if let Some(request) = request(input)
        && intent(&request) == Ok(Intent::WebSocket)
    {
        is_a_handshake(&request);
    }
    if let Ok((whole, behind)) = Whole::read(Bytes::copy_from_slice(input), &CONFIG) {
        is_read_in_one_way(&whole, &input[..input.len() - behind.len()]);
    }
});

fn is_a_handshake(request: &Request<()>) {
    let count = |name: HeaderName| request.headers().get_all(name).iter().count();
    assert_eq!(request.method(), Method::GET);
    assert_eq!(request.version(), Version::HTTP_11);
    assert_eq!(count(header::HOST), 1);
    assert!(!request.headers()[header::HOST].as_bytes().iter().any(|byte| !byte.is_ascii() || b", /".contains(byte)));
    assert_eq!(count(header::TRANSFER_ENCODING), 0);
    assert_eq!(count(header::SEC_WEBSOCKET_KEY), 1);
    assert_eq!(count(header::SEC_WEBSOCKET_VERSION), 1);
    assert_eq!(request.headers()[header::SEC_WEBSOCKET_VERSION], "13");
    let key = &request.headers()[header::SEC_WEBSOCKET_KEY];
    assert!(key.as_bytes().len() == 24 && key.as_bytes().ends_with(b"=="));
    assert!(count(header::CONNECTION) >= 1);
    let upgrades: Vec<_> = request.headers().get_all(header::UPGRADE).iter().map(HeaderValue::as_bytes).collect();
    let upgrades = upgrades.join(&b',').to_ascii_lowercase();
    let mut upgrades = upgrades.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
    assert_eq!((upgrades.next(), upgrades.next()), (Some(&b"websocket"[..]), None));
}

/// Next to what the same bytes are as a request.
fn is_read_in_one_way(whole: &Whole, bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Request::new(&mut fields);
    assert_eq!(head.parse(&bytes), Ok(httparse::Status::Complete(bytes.len())), "bytes behind it were taken");
    let mut request = Request::new(());
    *request.method_mut() = head.method.and_then(|method| method.parse().ok()).expect("a method");
    *request.version_mut() = if head.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    *request.uri_mut() = head.path.and_then(|target| Uri::try_from(target).ok()).expect("a target");
    *request.headers_mut() = read_header(head.headers, &bytes).expect("fields that http takes");
    assert_eq!(intent(&request), Ok(Intent::WebSocket));
    is_a_handshake(&request);
    assert!(!request.headers().contains_key(header::CONTENT_LENGTH), "of a body");
    assert_eq!(whole.target(), request.uri());
    let key = request.headers()[header::SEC_WEBSOCKET_KEY].clone();
    for trusted in [&[][..], &["198.51.100.0/24".parse().expect("a network")]] {
        let (client, mut request) = ([198, 51, 100, 1].into(), request.clone());
        let was_replaced = forward_request(&mut request, client, None, trusted, "an-id", true);
        let (ask, is_same) = whole.forward(client, None, trusted, "an-id");
        assert_eq!(is_same, was_replaced);
        assert_eq!((ask.request().uri(), ask.request().headers()), (request.uri(), request.headers()));
        assert_eq!(ask.key(), key.as_bytes());
    }
}

/// `None`: the HTTP library would not have made a request of it.
fn request(input: &[u8]) -> Option<Request<()>> {
    let mut lines = input.split(|byte| *byte == b'\n');
    let (version, method) = lines.next()?.split_last()?;
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(method.strip_suffix(b" ")?).ok()?;
    *request.version_mut() = if *version == b'0' { Version::HTTP_10 } else { Version::HTTP_11 };
    for line in lines.filter(|line| !line.is_empty()).take(100) {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        request.headers_mut().append(name, value);
    }
    Some(request)
}
