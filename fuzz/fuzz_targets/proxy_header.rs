//! A PROXY header in any portions: no panic; what was found is not changed by what comes behind it; only a header that ends where it says
//! is one, and only up to its bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::downstream::{ProxyHeader, V2_MOST, proxy_header};

fuzz_target!(|input: &[u8]| {
    let whole = proxy_header(input);
    let mut first = None;
    for end in 0..=input.len() {
        let found = proxy_header(&input[..end]);
        if found != Ok(None) {
            first = Some((end, found));
            break;
        }
    }
    let Some((end, found)) = first else {
        assert_eq!(whole, Ok(None));
        assert!(input.len() < V2_MOST);
        return;
    };
    assert_eq!(found, whole);
    let Ok(Some(ProxyHeader { source, length })) = found else { return };
    assert_eq!(length, end);
    let is_line = input[0] == b'P';
    assert!(length <= if is_line { 107 } else { V2_MOST });
    if let Some(source) = source {
        assert_eq!(source.ip(), source.ip().to_canonical());
        assert!(is_line || input[12] == 0x21);
    }
    if is_line {
        assert!(input[..length].starts_with(b"PROXY ") && input[..length].ends_with(b"\r\n"));
    }
});
