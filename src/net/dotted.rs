//! An IPv4 address as text. It is in two log lines and a header field of each session, and for `fmt` its four numbers take a thousand
//! instructions.

use std::net::Ipv4Addr;

/// An IPv4 address as it is displayed.
#[derive(Debug)]
pub(crate) struct Dotted {
    /// With a dot behind it.
    text: [u8; 16],
    length: usize,
}

impl Dotted {
    pub(crate) fn new(address: Ipv4Addr) -> Self {
        let (mut text, mut end) = ([0; 16], 0);
        let mut push = |byte| {
            text[end] = byte;
            end += 1;
        };
        for octet in address.octets() {
            if octet >= 100 {
                push(b'0' + octet / 100);
            }
            if octet >= 10 {
                push(b'0' + octet / 10 % 10);
            }
            push(b'0' + octet % 10);
            push(b'.');
        }
        Self { text, length: end - 1 }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.text[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each number at each place, next to what the standard library displays.
    #[test]
    fn addresses_are_as_they_are_displayed() {
        for octet in 0..=255 {
            for address in [[octet, 0, 99, 255], [100, octet, octet, 9], [octet; 4]].map(Ipv4Addr::from) {
                assert_eq!(String::from_utf8_lossy(Dotted::new(address).as_bytes()), address.to_string());
            }
        }
    }
}
