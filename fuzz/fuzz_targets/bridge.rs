//! Requests between HTTP/2 and HTTP/1.1, both ways, and answers: what was one message on one side is the same one on the other, and
//! nothing in it says where another one begins.
//!
//! The input is a request as h2 would give it, a NUL, and an answer as hyper would: `CONNECT https a.test:1 /path w`, `cookie: a`, NUL,
//! `200`, `via: b`, a line each. After the target: `w` for `:protocol`, `e` for END_STREAM.
#![no_main]

use bytes::Bytes;
use h2::ext::Protocol;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, SEC_WEBSOCKET_KEY, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
};
use libfuzzer_sys::fuzz_target;
use std::{collections::BTreeSet, sync::LazyLock};
use tidegate::{
    config::Settings,
    downstream::{Config, Intent, forward_request, forward_response, from_stream, intent, stream_response},
    fields::{read_header, write_header},
    upstream::extended_connect,
};

static CONFIG: LazyLock<Config> = LazyLock::new(|| Settings::default().downstream);

/// Of a connection; h2 refuses a header with one of these, both ways (RFC 9113 8.2.2).
const OF_A_CONNECTION: [&str; 5] = ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"];

/// What the proxy says for itself.
const OURS: [&str; 3] = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"];

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    if let Some((request, is_over)) = parts.next().and_then(from_lines) {
        request_passes(request, is_over);
    }
    if let Some(response) = parts.next().and_then(response_from_lines) {
        response_passes(response);
    }
});

fn request_passes(mut request: Request<()>, is_over: bool) {
    let was = request.headers().clone();
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let is_tunnel = request.extensions().get::<Protocol>().is_some();
    let Ok(wants) = from_stream(&mut request, is_over, &CONFIG) else { return };
    assert_eq!(wants == Intent::WebSocket, is_tunnel && method == Method::CONNECT, "who asked for a tunnel");
    forward_request(&mut request, [198, 51, 100, 1].into(), None, &[], "an-id", wants == Intent::WebSocket);

    // Over HTTP/1.1 it is one request, and ends where its header ends.
    let mut bytes = format!("{} {} HTTP/1.1\r\n", request.method(), request.uri()).into_bytes();
    write_header(request.headers(), &mut bytes);
    let bytes = Bytes::from(bytes);
    let mut fields = [httparse::EMPTY_HEADER; 256];
    let mut head = httparse::Request::new(&mut fields);
    assert_eq!(head.parse(&bytes), Ok(httparse::Status::Complete(bytes.len())), "{}", bytes.escape_ascii());
    let asks_for = if is_tunnel { "GET" } else { method.as_str() };
    assert_eq!(head.method, Some(asks_for));
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    assert_eq!(head.path, Some(target), "another target");
    let headers = read_header(head.headers, &bytes).expect("what was written");
    assert_eq!(&headers, request.headers(), "what was written is read");

    // Who is meant: one Host, and no other than the authority.
    let hosts: Vec<_> = headers.get_all(HOST).iter().collect();
    assert_eq!(hosts.len(), 1, "{headers:?}");
    if let Some(authority) = uri.authority() {
        assert_eq!(hosts[0].as_bytes(), authority.as_str().as_bytes());
    }

    // Where the body ends is said in one way.
    let count = |name: &HeaderName| headers.get_all(name).iter().count();
    let (lengths, codings) = (count(&CONTENT_LENGTH), count(&TRANSFER_ENCODING));
    if wants == Intent::WebSocket {
        assert_eq!((lengths, codings, count(&TE)), (0, 0, 0));
        assert_eq!(
            (&headers[CONNECTION], &headers[UPGRADE]),
            (&"Upgrade".parse().expect("a value"), &"websocket".parse().expect("a value"))
        );
        assert_ne!(was.get(SEC_WEBSOCKET_KEY), headers.get(SEC_WEBSOCKET_KEY), "the client's own key");
    } else {
        assert_eq!(count(&UPGRADE), 0);
        assert_eq!(lengths + codings, usize::from(!is_over || lengths > 0), "{headers:?}");
        assert!(codings == 0 || headers[TRANSFER_ENCODING] == "chunked");
        let options = if headers.contains_key(TE) { "close, TE" } else { "close" };
        assert_eq!((count(&CONNECTION), &headers[CONNECTION]), (1, &HeaderValue::from_static(options)));
    }
    assert!(intent(&request) == Ok(wants), "the next proxy takes it for something else");

    // Nothing else has come, and of what means nothing to a proxy nothing has gone.
    assert_eq!(headers["x-forwarded-for"], "198.51.100.1");
    let is_kept = |name: &str| {
        !OURS.contains(&name)
            && !OF_A_CONNECTION.contains(&name)
            && !["host", "cookie", "te", "content-length", "sec-websocket-key", "x-request-id", "http2-settings"]
                .contains(&name)
            && !["proxy-authenticate", "proxy-authorization", "forwarded", "x-real-ip"].contains(&name)
    };
    let claims = |name: &str| {
        let name = name.replace('_', "-");
        name.starts_with("x-forwarded-")
            || ["forwarded", "x-real-ip", "x-forwarded-client-cert", "client-cert", "client-cert-chain"]
                .contains(&&*name)
    };
    for name in was.keys().filter(|name| is_kept(name.as_str()) && !claims(name.as_str())) {
        assert!(was.get_all(name).iter().eq(headers.get_all(name).iter()), "{name}: {was:?} {headers:?}");
    }
    for name in headers.keys().filter(|name| is_kept(name.as_str())) {
        assert!(was.contains_key(name), "{name} out of nowhere");
    }
    assert!(count(&COOKIE) <= 1);

    if wants == Intent::WebSocket {
        goes_on_as_a_stream(&request, &headers);
    }
}

/// The same handshake for a backend that takes streams.
fn goes_on_as_a_stream(request: &Request<()>, headers: &HeaderMap) {
    let Some(bridged) = extended_connect(request, http::uri::Scheme::HTTP) else { return };
    assert_eq!((bridged.method(), bridged.version()), (&Method::CONNECT, Version::HTTP_2));
    assert_eq!(bridged.extensions().get::<Protocol>().map(Protocol::as_str), Some("websocket"));
    let authority = bridged.uri().authority().expect("made with one");
    assert_eq!(authority.as_str().as_bytes(), headers[HOST].as_bytes());
    assert_eq!(bridged.uri().path_and_query(), request.uri().path_and_query());
    fit_for_a_stream(bridged.headers());
    for name in [HOST, SEC_WEBSOCKET_KEY] {
        assert!(!bridged.headers().contains_key(name));
    }
    // And back it is the same handshake, but for the key.
    let mut back = bridged;
    assert_eq!(from_stream(&mut back, false, &CONFIG), Ok(Intent::WebSocket));
    let names = |headers: &HeaderMap| headers.keys().map(|name| name.as_str().to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(back.headers()), names(headers));
    assert_eq!(back.headers()[HOST], headers[HOST]);
}

fn response_passes(mut response: Response<()>) {
    let (status, was) = (response.status(), response.headers().clone());
    let is_tunnel = status == StatusCode::SWITCHING_PROTOCOLS;
    forward_response(&mut response, is_tunnel);
    let headers = response.headers();
    assert!(!headers.contains_key(CONTENT_LENGTH) || !was.contains_key(TRANSFER_ENCODING), "two lengths");
    if is_tunnel {
        assert!([CONTENT_LENGTH, TRANSFER_ENCODING, TRAILER].iter().all(|name| !headers.contains_key(name)));
    }
    stream_response(&mut response);
    assert_eq!(response.status(), if is_tunnel { StatusCode::OK } else { status });
    assert_eq!(response.version(), Version::HTTP_2);
    fit_for_a_stream(response.headers());
}

fn fit_for_a_stream(headers: &HeaderMap) {
    for name in OF_A_CONNECTION {
        assert!(!headers.contains_key(name), "{name} on a stream");
    }
    // "... it MUST NOT contain any value other than 'trailers'" (RFC 9113 8.2.2).
    assert!(headers.get_all(TE).iter().all(|value| value == "trailers"));
}

/// `None`: h2 would not have made a request of it.
fn from_lines(input: &[u8]) -> Option<(Request<()>, bool)> {
    let mut lines = input.split(|byte| *byte == b'\n');
    let mut words = lines.next()?.split(|byte| *byte == b' ');
    let method = Method::from_bytes(words.next()?).ok()?;
    let (scheme, authority, path) = (words.next()?, words.next()?, words.next()?);
    // "This pseudo-header field MUST NOT be empty" (RFC 9113 8.3.1).
    if path.is_empty() {
        return None;
    }
    let flags = words.next().unwrap_or_default();
    let mut uri = Uri::builder();
    if !authority.is_empty() {
        uri = uri.scheme(scheme).authority(authority).path_and_query(path);
    } else {
        uri = uri.path_and_query(path);
    }
    let mut request = Request::new(());
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri.build().ok()?;
    if flags.contains(&b'w') {
        // Without CONNECT it is malformed (RFC 8441 4).
        if method != Method::CONNECT {
            return None;
        }
        request.extensions_mut().insert(Protocol::from_static("websocket"));
    }
    *request.method_mut() = method;
    *request.headers_mut() = headers_from(lines)?;
    let headers = request.headers();
    let is_fit = OF_A_CONNECTION.iter().all(|name| !headers.contains_key(*name))
        && headers.get_all(TE).iter().all(|value| value == "trailers");
    is_fit.then_some((request, flags.contains(&b'e')))
}

/// `None`: hyper would not have made an answer of it.
fn response_from_lines(input: &[u8]) -> Option<Response<()>> {
    let mut lines = input.split(|byte| *byte == b'\n');
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_bytes(lines.next()?).ok()?;
    *response.headers_mut() = headers_from(lines)?;
    Some(response)
}

fn headers_from<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for line in lines.filter(|line| !line.is_empty()).take(100) {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        headers.append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    Some(headers)
}
