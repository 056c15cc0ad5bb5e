//! What `tidegate demo` tells its visitor to try. Every line can be pasted into a shell as it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The text that `tidegate demo` prints: what to open and to paste, for a tidegate that listens on `listen` and has its
/// admin listener, if any, on `admin`.
pub fn instructions(listen: SocketAddr, admin: Option<SocketAddr>) -> String {
    let at = reachable(listen);
    let counts = admin.map(reachable).map_or(String::new(), |admin| {
        format!(
            "
What tidegate sees, in a browser, in a terminal or by curl; what it counts; and whether it is ready:
  http://{admin}/
  tidegate status --watch --admin {admin}
  curl http://{admin}/live.json
  curl http://{admin}/metrics
  curl http://{admin}/readyz
"
        )
    });
    format!(
        "\
tidegate listens on {listen}, with a demo backend behind it.

In a browser, open
  http://{at}/

or in another terminal try one of
  websocat ws://{at}/echo
  python3 -m websockets ws://{at}/echo
  node -e 'const w = new WebSocket(\"ws://{at}/echo\"); w.onopen = () => w.send(\"hello\"); w.onmessage = (m) => {{ console.log(m.data); w.close(); }}'
  curl http://{at}/healthz

(Python needs the package \"websockets\" and Node version 22. With /broadcast for /echo, all hear what one says.)

One feed for many clients: connect to /feed as often as you like, and ask how many connections the backend has
  python3 -m websockets ws://{at}/feed
  curl http://{at}/feed/connections
{counts}
Leave a client connected and press Ctrl-C: it is told 1001, in an orderly way. A second Ctrl-C ends it at once.
"
    )
}

/// The address to connect to: one cannot connect to "any address" everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_is_shown_as_one_that_can_be_connected_to() {
        let text = instructions("0.0.0.0:8080".parse().unwrap(), Some("[::]:9090".parse().unwrap()));
        assert!(text.starts_with("tidegate listens on 0.0.0.0:8080"), "{text}");
        assert!(text.contains("\n  http://127.0.0.1:8080/\n"), "{text}");
        assert!(text.contains("\n  websocat ws://127.0.0.1:8080/echo\n"), "{text}");
        assert!(text.contains("\n  curl http://127.0.0.1:8080/feed/connections\n"), "{text}");
        assert!(text.contains("\n  http://[::1]:9090/\n"), "{text}");
        assert!(text.contains("http://[::1]:9090/metrics"), "{text}");
    }

    #[test]
    fn without_an_admin_listener_it_is_not_mentioned() {
        let text = instructions("127.0.0.1:1".parse().unwrap(), None);
        assert!(!text.contains("metrics"), "{text}");
    }
}
