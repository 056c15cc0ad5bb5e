//! What backends are told of a client's certificate: the value of `X-Forwarded-Client-Cert`, as Envoy writes it.
//!
//! ```text
//! Hash=<SHA-256 of the certificate>;Subject="CN=alice,O=Example";URI=spiffe://example/alice;DNS=alice.example
//! ```
//!
//! Not RFC 9440 (`Client-Cert`), which has the certificate itself: who reads that needs X.509, and most want a name.
//!
//! Whoever signed the certificate may have taken any text for a name. So none is written as it is that could end its field, or be
//! taken for another: what is neither a letter nor a digit nor one of a few signs is escaped, in subjects as by RFC 4514, in URIs by percent signs.

use std::fmt::Write as _;

use tokio_rustls::rustls::{SupportedCipherSuite, crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256};
use x509_cert::{
    Certificate,
    der::{
        Decode as _, Encode as _, Tag, Tagged as _,
        asn1::{Ia5StringRef, PrintableStringRef, TeletexStringRef, Utf8StringRef},
    },
    ext::pkix::{SubjectAltName, name::GeneralName},
    name::RdnSequence,
};

/// No longer than this: a header has bounds, also at the backend. What would be beyond is left out, name by name.
const MOST: usize = 4 << 10;

/// What RFC 4514 has short names for.
const NAMES: [(&str, &str); 9] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.6", "C"),
    ("2.5.4.9", "STREET"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.1", "UID"),
];

/// Of a certificate that was verified. What can't be read is not said: then its hash is all.
pub(super) fn identity(certificate: &[u8]) -> Box<str> {
    let mut said = String::from("Hash=");
    if let SupportedCipherSuite::Tls13(suite) = TLS13_AES_128_GCM_SHA256 {
        for byte in suite.common.hash_provider.hash(certificate).as_ref() {
            let _ = write!(said, "{byte:02x}");
        }
    }
    let Ok(Certificate { tbs_certificate, .. }) = Certificate::from_der(certificate) else { return said.into() };
    let mut add = |name: &str, value: &str| {
        if said.len() + 1 + name.len() + 1 + value.len() <= MOST {
            let _ = write!(said, ";{name}={value}");
        }
    };
    let subject = subject(&tbs_certificate.subject);
    if !subject.is_empty() {
        add("Subject", &format!("\"{subject}\""));
    }
    let names = tbs_certificate.get::<SubjectAltName>().ok().flatten().map(|(_, SubjectAltName(names))| names);
    let names = names.unwrap_or_default();
    for name in &names {
        if let GeneralName::UniformResourceIdentifier(uri) = name {
            add("URI", &uri_of(uri.as_str()));
        }
    }
    for name in &names {
        let is_plain = |name: &str| {
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._*".contains(&byte))
        };
        if let GeneralName::DnsName(name) = name
            && is_plain(name.as_str())
        {
            add("DNS", name.as_str());
        }
    }
    said.into()
}

/// As a text (RFC 4514): the last part first.
fn subject(RdnSequence(parts): &RdnSequence) -> String {
    let mut said = String::new();
    for part in parts.iter().rev() {
        for (index, attribute) in part.0.iter().enumerate() {
            if !said.is_empty() {
                said.push(if index == 0 { ',' } else { '+' });
            }
            let oid = attribute.oid.to_string();
            let value = &attribute.value;
            let text = match value.tag() {
                Tag::Utf8String => Utf8StringRef::try_from(value).map(|text| text.as_str().to_owned()).ok(),
                Tag::PrintableString => PrintableStringRef::try_from(value).map(|text| text.as_str().to_owned()).ok(),
                Tag::Ia5String => Ia5StringRef::try_from(value).map(|text| text.as_str().to_owned()).ok(),
                Tag::TeletexString => TeletexStringRef::try_from(value).map(|text| text.as_str().to_owned()).ok(),
                _ => None,
            };
            if let (Some((_, name)), Some(text)) = (NAMES.iter().find(|(known, _)| *known == oid), text) {
                let _ = write!(said, "{name}=");
                escape(&text, &mut said);
            } else {
                // "an octothorpe ... followed by the hexadecimal representation of each of the bytes of the BER encoding".
                let _ = write!(said, "{oid}=#");
                for byte in value.to_der().unwrap_or_default() {
                    let _ = write!(said, "{byte:02x}");
                }
            }
        }
    }
    said
}

fn escape(text: &str, to: &mut String) {
    let last = text.len().saturating_sub(1);
    for (index, byte) in text.bytes().enumerate() {
        let is_inner_space = byte == b' ' && index > 0 && index < last;
        if byte.is_ascii_alphanumeric() || b".-_:@/*'()".contains(&byte) || is_inner_space {
            to.push(char::from(byte));
        } else {
            let _ = write!(to, "\\{byte:02X}");
        }
    }
}

/// In quotation marks where it has signs that separate fields.
fn uri_of(uri: &str) -> String {
    let mut said = String::new();
    for byte in uri.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte) {
            said.push(char::from(byte));
        } else {
            let _ = write!(said, "%{byte:02X}");
        }
    }
    if said.contains([',', ';', '=']) { format!("\"{said}\"") } else { said }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType, string::Ia5String};

    use super::*;

    fn said(fields: &[(DnType, &str)], names: Vec<SanType>) -> String {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in fields {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.subject_alt_names = names;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        identity(certificate.der()).into()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(Ia5String::try_from(text).unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(Ia5String::try_from(text).unwrap())
    }

    #[test]
    fn names_are_said() {
        let names = vec![dns("alice.example"), uri("spiffe://example/alice"), dns("*.example")];
        let said = said(&[(DnType::OrganizationName, "Example & Co"), (DnType::CommonName, "alice")], names);
        let (hash, rest) = said.split_once(';').unwrap();
        assert!(hash.len() == 5 + 64 && hash[5..].bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");
        let expected =
            r#"Subject="CN=alice,O=Example \26 Co";URI=spiffe://example/alice;DNS=alice.example;DNS=*.example"#;
        assert_eq!(rest, expected);
    }

    /// Whatever a name is, it does not end its field, nor the header.
    #[test]
    fn names_stay_what_they_are() {
        for name in [
            "a\";Hash=0;Subject=\"CN=root",
            "a\\",
            "a\\\",b",
            "a,CN=root",
            "a\r\nX-Real-IP: 1",
            "\u{e4} ",
            "#a",
            "a+b\0",
        ] {
            let said = said(&[(DnType::CommonName, name)], vec![uri("urn:a;DNS=b"), uri("urn:a\"\\,\r\n b")]);
            let rest = said.split_once(';').unwrap().1;
            let subject = rest.strip_prefix("Subject=\"CN=").unwrap().split_once('"').unwrap();
            assert!(!subject.0.contains([',', '=', ';', '+', '#']), "{said}");
            assert_eq!(subject.1, ";URI=\"urn:a;DNS=b\";URI=\"urn:a%22%5C,%0D%0A%20b\"", "{said}");
            assert!(said.bytes().all(|byte| (b' '..0x7f).contains(&byte)), "{said}");
            // By RFC 4514 it is the same name again.
            let mut bytes = Vec::new();
            let mut rest = subject.0.as_bytes();
            while let Some((first, more)) = rest.split_first() {
                rest = if *first == b'\\' {
                    bytes.push(u8::from_str_radix(std::str::from_utf8(&more[..2]).unwrap(), 16).unwrap());
                    &more[2..]
                } else {
                    bytes.push(*first);
                    more
                };
            }
            assert_eq!(bytes, name.as_bytes());
        }
        let many = (0..1000).map(|index| dns(&format!("name-{index}.example"))).collect();
        let said = said(&[(DnType::CommonName, "many")], many);
        assert!(said.len() <= MOST && said.contains("DNS=name-100.example") && !said.ends_with("name-999.example"));
        assert!(identity(b"no certificate").starts_with("Hash="));
    }
}
