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

/// Of each number: its digits, with a dot and what else there is room for.
const NUMBERS: [[u8; 4]; 256] = {
    let (mut numbers, mut number) = ([[b'.'; 4]; 256], 0_u8);
    loop {
        let digits = [b'0' + number / 100, b'0' + number / 10 % 10, b'0' + number % 10];
        let (mut at, mut end) = (3 - length(number), 0);
        while at < 3 {
            numbers[number as usize][end] = digits[at];
            (at, end) = (at + 1, end + 1);
        }
        if number == u8::MAX {
            break numbers;
        }
        number += 1;
    }
};

/// Digits.
const fn length(number: u8) -> usize {
    1 + (number >= 10) as usize + (number >= 100) as usize
}

impl Dotted {
    pub(crate) fn new(address: Ipv4Addr) -> Self {
        let (mut text, mut end) = ([0; 16], 0);
        for octet in address.octets() {
            // Four numbers of four bytes fit: there is always room.
            if let Some(room) = text[end..].first_chunk_mut() {
                *room = NUMBERS[usize::from(octet)];
            }
            end += length(octet) + 1;
        }
        Self { text, length: end - 1 }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.text[..self.length]
    }

    /// With anything behind it.
    pub(crate) const fn room(&self) -> &[u8; 16] {
        &self.text
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
