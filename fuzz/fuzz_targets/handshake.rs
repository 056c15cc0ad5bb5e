//! What a request wants: no panic; only a complete and unambiguous handshake is ever called one.
//!
//! The input is a method, a version, and header fields, one a line: `GET 1`, `host: a`, and so on.
#![no_main]

use http::{HeaderName, HeaderValue, Method, Request, Version, header};
use libfuzzer_sys::fuzz_target;
use tidegate::downstream::{Intent, intent};

fuzz_target!(|input: &[u8]| {
    let Some(request) = request(input) else { return };
    let Ok(Intent::WebSocket) = intent(&request) else { return };
    let count = |name: HeaderName| request.headers().get_all(name).iter().count();
    assert_eq!(request.method(), Method::GET);
    assert_eq!(request.version(), Version::HTTP_11);
    assert_eq!(count(header::HOST), 1);
    assert_eq!(count(header::TRANSFER_ENCODING), 0);
    assert_eq!(count(header::SEC_WEBSOCKET_KEY), 1);
    assert_eq!(count(header::SEC_WEBSOCKET_VERSION), 1);
    let key = &request.headers()[header::SEC_WEBSOCKET_KEY];
    assert!(key.as_bytes().len() == 24 && key.as_bytes().ends_with(b"=="));
    assert!(count(header::CONNECTION) >= 1);
    let upgrades: Vec<_> = request.headers().get_all(header::UPGRADE).iter().map(HeaderValue::as_bytes).collect();
    let upgrades = upgrades.join(&b',').to_ascii_lowercase();
    let mut upgrades = upgrades.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
    assert_eq!((upgrades.next(), upgrades.next()), (Some(&b"websocket"[..]), None));
});

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
