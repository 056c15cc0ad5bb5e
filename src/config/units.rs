//! Durations, sizes and addresses as people write them, and back. Each refusal says what to write instead.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use crate::{admission::Pace, net::Address, upstream::Pattern};

/// Why a value is not taken: `what` follows the name of the key, `fix` says what to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub what: String,
    pub fix: String,
    /// Which item of a list it is about.
    pub item: Option<usize>,
}

pub(super) fn refuse<T>(what: impl Into<String>, fix: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { what: what.into(), fix: fix.into(), item: None })
}

/// "a", "a or b", "a, b or c".
pub(super) fn either(choices: &[String]) -> String {
    match choices {
        [] => String::new(),
        [only] => only.clone(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// How often something may be, at most so many times.
const PACE_MOST: u32 = 1_000_000;

/// Reads "20/s", "600/m", "1000/h", or "off".
pub(super) fn parse_pace(text: &str) -> Result<Option<Pace>, Refusal> {
    const FIX: &str = r#"write "20/s", "600/m" or "1000/h" (1 to 1000000), or "off" for any number"#;
    if text == "off" {
        return Ok(None);
    }
    let parsed = text.split_once('/').and_then(|(count, per)| {
        let per = match per {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        let is_plain = count.bytes().all(|byte| byte.is_ascii_digit());
        let count = count.parse().ok().filter(|count| is_plain && (1..=PACE_MOST).contains(count))?;
        Some(Pace { count, per: Duration::from_secs(per) })
    });
    parsed.map_or_else(|| refuse(format!("is no rate: {text:?}"), FIX), |pace| Ok(Some(pace)))
}

/// The other way.
pub(super) fn format_pace(pace: Option<Pace>) -> String {
    let Some(Pace { count, per }) = pace else { return "off".to_owned() };
    let unit = match per.as_secs() {
        3600 => "h",
        60 => "m",
        _ => "s",
    };
    format!("{count}/{unit}")
}

/// The units of time, largest first, in milliseconds.
const TIMES: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
/// The units of size, largest first, in bytes.
const SIZES: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
/// `sun_path` of unix(7) has 108 bytes and ends with a NUL.
const UNIX_PATH_BYTES: usize = 107;
/// Of a route's path.
const PATTERN_BYTES: usize = 1024;

/// Reads "250ms", "30s", "5m", "1h" or "1m30s". What is too long for a number is the longest there is.
pub(super) fn parse_duration(text: &str) -> Result<Duration, Refusal> {
    if text.is_empty() {
        return refuse("is empty", r#"write "250ms", "30s", "5m" or "1h""#);
    }
    let squeezed = text.replace(' ', "");
    if squeezed != text && parse_duration(&squeezed).is_ok() {
        return refuse(format!("contains a space: {text:?}"), format!("write \"{squeezed}\""));
    }
    let mut rest = text;
    let mut milliseconds = 0_u64;
    let mut units = TIMES.iter();
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let unit = tail.split(|c: char| c.is_ascii_digit()).next().unwrap_or_default();
        if digits > 0 && unit.starts_with(['.', ',']) {
            return refuse(
                format!("is a fraction: {text:?}"),
                "use the next smaller unit: \"1500ms\" instead of \"1.5s\"",
            );
        }
        if digits == 0 || unit.chars().any(|c| !c.is_ascii_alphabetic()) {
            return refuse(
                format!("is not a duration: {text:?}"),
                r#"write a number and its unit: "250ms", "30s", "5m" or "1h""#,
            );
        }
        if unit.is_empty() {
            return refuse(
                format!("is a duration without a unit: {text:?}"),
                format!(r#"write "{number}ms" or "{number}s""#),
            );
        }
        if !TIMES.iter().any(|(name, _)| *name == unit) {
            let meant = match unit.to_ascii_lowercase().as_str() {
                "msec" | "msecs" | "millis" => "ms",
                "s" | "sec" | "secs" | "second" | "seconds" => "s",
                "min" | "mins" | "minute" | "minutes" => "m",
                "h" | "hr" | "hrs" | "hour" | "hours" => "h",
                _ => "",
            };
            let instead = if meant.is_empty() { String::new() } else { format!(": \"{number}{meant}\"") };
            return refuse(
                format!("has an unknown unit of time: {unit:?}"),
                format!("the units are ms, s, m and h{instead}"),
            );
        }
        // Advancing through the units accepts each once, in falling order.
        let Some((_, factor)) = units.find(|(name, _)| *name == unit) else {
            return refuse(
                format!("has its units out of order: {text:?}"),
                "write larger units first, each once: \"1m30s\"",
            );
        };
        let number = number.parse::<u64>().unwrap_or(u64::MAX);
        milliseconds = milliseconds.saturating_add(number.saturating_mul(*factor));
        rest = &tail[unit.len()..];
    }
    Ok(Duration::from_millis(milliseconds))
}

/// Writes whole milliseconds so that [`parse_duration`] reads the same back; what is finer is lost.
pub(super) fn format_duration(duration: Duration) -> String {
    let milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    // People say 90s and 120s, but 5m.
    let unit = TIMES
        .iter()
        .find(|(name, factor)| milliseconds.is_multiple_of(*factor) && (*name != "m" || milliseconds > 120_000));
    match unit {
        Some((name, factor)) if milliseconds > 0 => format!("{}{name}", milliseconds / factor),
        _ => "0s".to_owned(),
    }
}

/// Reads "512", "64KiB", "16MiB" or "1GiB". What is too large for a number is the largest there is.
pub(super) fn parse_size(text: &str) -> Result<u64, Refusal> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if digits > 0 && unit.starts_with(['.', ',']) {
        return refuse(
            format!("is a fraction: {text:?}"),
            "use the next smaller unit: \"1536KiB\" instead of \"1.5MiB\"",
        );
    }
    if digits == 0 {
        return refuse(
            format!("is not a size: {text:?}"),
            r#"write bytes, or a number and its unit: "512", "64KiB", "16MiB" or "1GiB""#,
        );
    }
    let known = SIZES.iter().find(|(name, _)| *name == if unit.is_empty() { "B" } else { unit });
    if let Some((_, factor)) = known {
        let number = number.parse::<u64>().unwrap_or(u64::MAX);
        return Ok(number.saturating_mul(*factor));
    }
    // What is meant by 64k, 64KB or 64 kib is clear, and the units look as if they were powers of 1000 only to some.
    let meant = match unit.trim().to_ascii_lowercase().as_str() {
        "b" => Some("B"),
        "k" | "kb" | "ki" | "kib" => Some("KiB"),
        "m" | "mb" | "mi" | "mib" => Some("MiB"),
        "g" | "gb" | "gi" | "gib" => Some("GiB"),
        _ => None,
    };
    refuse(
        format!("has an unknown unit of size: {unit:?}"),
        match meant {
            Some(name) => format!(r#"write "{number}{name}" (units are powers of 1024)"#),
            None => "the units are KiB, MiB and GiB; bytes need none".to_owned(),
        },
    )
}

/// Writes bytes so that [`parse_size`] reads the same back.
pub(super) fn format_size(bytes: u64) -> String {
    match SIZES.iter().find(|(_, factor)| bytes.is_multiple_of(*factor)) {
        Some((name, factor)) if bytes > 0 && *name != "B" => format!("{}{name}", bytes / factor),
        _ => bytes.to_string(),
    }
}

/// Reads an address to listen on: an IP address and a port, where 0 means any free one.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, Refusal> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if text.starts_with("unix:") || text.starts_with('/') {
        return refuse("is a Unix socket", r#"only TCP can be listened on: write "127.0.0.1:8080""#);
    }
    if let Some((_, rest)) = text.split_once("://") {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        return refuse(format!("is a URL: {text:?}"), format!("write only the address and the port: \"{authority}\""));
    }
    refuse_bare_ipv6(text)?;
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return refuse(format!("has no port: {text:?}"), format!("add it: \"{}\"", SocketAddr::new(ip, 8080)));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let Ok(port) = port.parse::<u16>() else {
        return if port.bytes().all(|b| b.is_ascii_digit()) && !port.is_empty() {
            refuse(format!("has a port beyond 65535: {text:?}"), "use a port from 0 to 65535; 0 means any free one")
        } else {
            refuse(
                format!("is not an IP address and a port: {text:?}"),
                r#"write "0.0.0.0:8080", "[::]:8080" or "127.0.0.1:8080""#,
            )
        };
    };
    if host.is_empty() || host == "*" {
        return refuse(
            format!("has no IP address: {text:?}"),
            format!(r#"write "0.0.0.0:{port}" (IPv4) or "[::]:{port}" (IPv6)"#),
        );
    }
    let instead = if host == "localhost" { "127.0.0.1" } else { "0.0.0.0" };
    refuse(
        format!("has no valid IP address: {host:?}"),
        format!("write an IP address of this host: \"{instead}:{port}\""),
    )
}

/// Reads the backend's address: `host:port` or `unix:/path`.
pub(super) fn parse_backend(text: &str) -> Result<Address, Refusal> {
    if let Some(path) = text.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return if !path.starts_with('/') {
            refuse(
                format!("is not an absolute path: {path:?}"),
                r#"write "unix:" and the whole path: "unix:/run/app.sock""#,
            )
        } else if path.len() > UNIX_PATH_BYTES || path.contains('\0') {
            refuse(
                format!("has a path of {} bytes", path.len()),
                format!("the kernel takes at most {UNIX_PATH_BYTES} bytes (and no NUL)"),
            )
        } else {
            Ok(Address::Unix(PathBuf::from(path)))
        };
    }
    if text.starts_with('/') {
        return refuse(format!("is a path: {text:?}"), format!("write \"unix:{text}\" for a Unix socket"));
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let port = if authority.contains(':') { "" } else { ":80" };
        return match scheme {
            "https" | "wss" => refuse(
                format!("asks for TLS: {text:?}"),
                "tidegate talks to its backend in plain text: write \"host:port\"",
            ),
            _ => refuse(
                format!("is a URL: {text:?}"),
                format!("write only the host and the port: \"{authority}{port}\""),
            ),
        };
    }
    if text.contains(',') {
        let list: Vec<&str> = text.split(',').map(str::trim).filter(|one| !one.is_empty()).collect();
        return refuse(format!("names several backends: {text:?}"), format!("write a list: {list:?}"));
    }
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return refuse(format!("has no host: {text:?}"), format!("write \"127.0.0.1:{text}\""));
    }
    refuse_bare_ipv6(text)?;
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return refuse(format!("has no port: {text:?}"), format!("add it: \"{}\"", SocketAddr::new(ip, 9000)));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        let example = if text.is_empty() { "127.0.0.1" } else { text };
        return refuse(format!("has no port: {text:?}"), format!("add it: \"{example}:9000\""));
    };
    let port = match port.parse::<u16>() {
        Ok(port) if port > 0 => port,
        _ => {
            return refuse(
                format!("has no valid port: {text:?}"),
                "name the port where the backend listens, from 1 to 65535",
            );
        }
    };
    Ok(Address::Tcp { host: parse_host(host, port)?.to_owned(), port })
}

/// Refuses `::1:8080`, of which nobody can tell where the port begins. IPv6 itself takes it for an address.
fn refuse_bare_ipv6(text: &str) -> Result<(), Refusal> {
    match text.rsplit_once(':') {
        Some((host, port)) if host.parse::<Ipv6Addr>().is_ok() && port.parse::<u16>().is_ok() => {
            refuse(format!("is an IPv6 address without brackets: {text:?}"), format!("write \"[{host}]:{port}\""))
        }
        _ => Ok(()),
    }
}

/// Reads the host of a backend whose port is `port`, and takes the brackets off an IPv6 address.
fn parse_host(host: &str, port: u16) -> Result<&str, Refusal> {
    if let Some(literal) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // A zone ("fe80::1%eth0") is the resolver's matter.
        return match literal.split('%').next().unwrap_or_default().parse::<Ipv6Addr>() {
            Ok(_) => Ok(literal),
            Err(_) => refuse(
                format!("has no valid IPv6 address in its brackets: {literal:?}"),
                format!("write \"[::1]:{port}\""),
            ),
        };
    }
    if host.contains(':') {
        return refuse(
            format!("is an IPv6 address without brackets: \"{host}:{port}\""),
            format!("write \"[{host}]:{port}\""),
        );
    }
    if host.is_empty() {
        return refuse(format!("has no host: \":{port}\""), format!("write \"127.0.0.1:{port}\""));
    }
    let is_name =
        host.len() <= 253 && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    // A name that ends in a number is an IPv4 address or a mistake; resolvers read "10.1" as 10.0.0.1.
    let ends_in_number =
        host.trim_end_matches('.').rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit()));
    if !is_name || (ends_in_number && host.parse::<Ipv4Addr>().is_err()) {
        return refuse(
            format!("has no valid host: {host:?}"),
            format!("write a host name or an IP address: \"127.0.0.1:{port}\""),
        );
    }
    Ok(host)
}

/// Reads the path of a route: "/chat", or "/chat/*".
pub(super) fn parse_pattern(text: &str) -> Result<Pattern, Refusal> {
    const EXAMPLES: &str = r#"write "/chat" for exactly this path, or "/chat/*" for everything below"#;
    if text.is_empty() {
        return refuse("is empty", EXAMPLES);
    }
    if let Some((_, rest)) = text.split_once("://") {
        let path = rest.split_once('/').map_or("", |(_, path)| path);
        return refuse(format!("is a URL: {text:?}"), format!("write only the path: \"/{path}\""));
    }
    if !text.starts_with('/') {
        return refuse(format!("does not begin with a slash: {text:?}"), format!("write \"/{text}\""));
    }
    if let Some(mark) = text.find(['?', '#']) {
        return refuse(
            format!("has more than a path: {text:?}"),
            format!("paths are compared without the query: write \"{}\"", &text[..mark]),
        );
    }
    if text.len() > PATTERN_BYTES {
        return refuse(format!("is too long: {} bytes", text.len()), format!("use at most {PATTERN_BYTES} bytes"));
    }
    let (path, is_below) = match text.strip_suffix('*') {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.contains('*') || (is_below && !path.ends_with('/')) {
        let begin = text.split('*').next().unwrap_or_default().trim_end_matches('/');
        return refuse(
            format!("has a * that is not its last segment: {text:?}"),
            format!("only whole segments at the end can be left open: \"{begin}/*\""),
        );
    }
    if !path.bytes().all(|byte| byte == b'%' || stands_in_a_path(byte)) {
        return refuse(
            format!("has a character that no path is sent with: {text:?}"),
            "write it as clients send it, percent-encoded: \"/caf%C3%A9\"",
        );
    }
    let is_odd = |piece: &str| match piece.get(..2).map(|digits| u8::from_str_radix(digits, 16)) {
        Some(Ok(byte)) => stands_in_a_path(byte) || byte == b'\\',
        _ => true,
    };
    let is_dots = |segment: &str| segment == "." || segment == "..";
    if path.contains("//") || path.contains(';') || path.split('/').any(is_dots) || path.split('%').skip(1).any(is_odd)
    {
        return refuse(
            format!("can be read as another path: {text:?}"),
            "leave out empty and dot segments and parameters (;), and encode only what can't be sent as it is",
        );
    }
    Ok(if is_below { Pattern::Below(path.to_owned()) } else { Pattern::Exact(path.to_owned()) })
}

/// As it is (RFC 3986 3.3).
fn stands_in_a_path(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte)
}

/// Reads a network; a single address is a network of one.
pub(super) fn parse_network(text: &str) -> Result<IpNet, Refusal> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        // As clients are compared: one that comes by a socket for both families is an IPv4 address all the same.
        return Ok(IpNet::from(ip.to_canonical()));
    }
    let Ok(network) = text.parse::<IpNet>() else {
        return refuse(
            format!("contains an item that is no network: {text:?}"),
            r#"write "10.0.0.0/8", "fd00::/8" or a single address"#,
        );
    };
    // Believing more proxies than were meant is a hole, so this is not rounded in silence.
    if network != network.trunc() {
        return refuse(
            format!("contains a network with host bits set: {text:?}"),
            format!("write \"{}\" for the network, or \"{}\" for the address alone", network.trunc(), network.addr()),
        );
    }
    if let (IpNet::V6(v6), IpAddr::V4(ip)) = (network, network.addr().to_canonical()) {
        let fix = format!("write \"{ip}/{}\": clients are compared as IPv4", v6.prefix_len().saturating_sub(96));
        return refuse(format!("contains a network of IPv4 addresses in the form of IPv6: {text:?}"), fix);
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations() {
        let ms = |text: &str| parse_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("250ms"), Ok(250));
        assert_eq!(ms("0s"), Ok(0));
        assert_eq!(ms("90s"), Ok(90_000));
        assert_eq!(ms("1h1m1s1ms"), Ok(3_661_001));
        assert_eq!(ms("99999999999999999999s"), Ok(u128::from(u64::MAX)));
        for bad in ["", "250", "s", "1.5s", "-1s", "1 s", "1s ", "1d", "1us", "1s1m", "1s1s", "1S", "١s"] {
            assert!(ms(bad).is_err(), "{bad:?}");
        }
        for (milliseconds, text) in
            [(0, "0s"), (250, "250ms"), (60_000, "60s"), (120_000, "120s"), (300_000, "5m"), (86_400_000, "24h")]
        {
            assert_eq!(format_duration(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("512B"), Ok(512));
        assert_eq!(parse_size("64KiB"), Ok(65_536));
        assert_eq!(parse_size("99999999999GiB"), Ok(u64::MAX));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        for bad in ["", "KiB", "64k", "64KB", "1.5MiB", "-1", "64 TiB", "64 KiB", "1é", "64KiBs"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
        assert!(parse_size("64k").is_err_and(|refusal| refusal.fix.contains("\"64KiB\"")));
    }

    #[test]
    fn listen_addresses() {
        assert!(parse_listen("0.0.0.0:0").is_ok());
        assert!(parse_listen("[::]:8080").is_ok());
        for bad in [
            "",
            "8080",
            ":8080",
            "*:8080",
            "localhost:8080",
            "1.2.3.4",
            "::1",
            "::1:80",
            "http://1.2.3.4:80/",
            "1.2.3.4:70000",
            "unix:/a",
        ] {
            assert!(parse_listen(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn backend_addresses() {
        for good in [
            "127.0.0.1:9000",
            "app:1",
            "app.ns.svc.cluster.local.:65535",
            "[::1]:9000",
            "[fe80::1%eth0]:80",
            "unix:/run/app.sock",
        ] {
            assert_eq!(parse_backend(good).map(|address| address.to_string()), Ok(good.to_owned()));
        }
        for bad in [
            "",
            "9000",
            ":9000",
            "app",
            "app:",
            "app:0",
            "app:70000",
            "app:80x",
            "::1",
            "[::1]",
            "::1:80",
            "[::g]:80",
            "127.0.0.256:80",
            "10.1:80",
            "a b:80",
            "ä:80",
            "ws://app:80/x",
            "wss://app",
            "a:1,b:2",
            "unix:app.sock",
            "unix:",
            "/run/app.sock",
        ] {
            assert!(parse_backend(bad).is_err(), "{bad:?}");
        }
        assert!(parse_backend(&format!("unix:/{}", "x".repeat(107))).is_err());
    }

    #[test]
    fn networks() {
        assert_eq!(parse_network("10.0.0.1").map(|network| network.to_string()), Ok("10.0.0.1/32".to_owned()));
        assert!(parse_network("10.0.0.0/8").is_ok());
        for bad in ["", "10.0.0.1/8", "10.0.0.0/33", "app"] {
            assert!(parse_network(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// What is written reads back, and no text makes a parser panic.
        #[test]
        fn round_trips(number in 0..=86_400_000_u64, text in "\\PC{0,12}") {
            let duration = Duration::from_millis(number);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
            prop_assert_eq!(parse_size(&format_size(number)), Ok(number));
            let _ = (parse_duration(&text), parse_size(&text), parse_listen(&text), parse_backend(&text), parse_network(&text));
        }
    }
}
