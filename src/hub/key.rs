//! Who may share a WebSocket: clients whose handshakes say the same of who they are and what they want.
//!
//! The rule: the handshake with the backend carries only header values that are in the key. So nobody's name, address or token stands for
//! somebody else, and what is not known to tell clients apart does not reach the backend. Of a key only a keyed hash can be seen.

use std::{
    fmt,
    hash::{Hash, Hasher},
    num::NonZeroU64,
    sync::{Arc, LazyLock},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Version,
    header::{
        ACCEPT, ACCEPT_ENCODING, ACCEPT_LANGUAGE, AUTHORIZATION, CACHE_CONTROL, CONNECTION, COOKIE, HOST, ORIGIN,
        PRAGMA, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
};
use ring::hmac;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;

use super::Config;
use crate::fields::tokens;

/// Fields that say who somebody is, what he may do, or where he has come in, beside those that browsers send.
const NAMES: [&str; 55] = [
    "x-forwarded-client-cert",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-user",
    "x-forwarded-email",
    "x-forwarded-groups",
    "x-forwarded-preferred-username",
    "x-forwarded-access-token",
    "x-forwarded-id-token",
    "proxy-authorization",
    "client-cert",
    "client-cert-chain",
    "x-client-dn",
    "x-client-verify",
    "x-arr-clientcert",
    "x-client-id",
    "x-device-id",
    "remote-user",
    "remote-email",
    "remote-groups",
    "remote-name",
    "api-key",
    "apikey",
    "x-api-key",
    "x-api-token",
    "x-apikey",
    "x-auth",
    "x-authorization",
    "x-access-token",
    "x-id-token",
    "x-token",
    "x-vault-token",
    "private-token",
    "dpop",
    "eppn",
    "x-email",
    "x-login",
    "x-principal",
    "x-subject",
    "x-identity",
    "x-group",
    "x-groups",
    "x-team",
    "x-workspace",
    "x-realm",
    "x-jwt-assertion",
    "x-jwt-payload",
    "x-endpoint-api-userinfo",
    "x-apigateway-api-userinfo",
    "x-amz-security-token",
    "x-csrf-token",
    "x-xsrf-token",
    "x-anonymous-consumer",
];

/// What such fields begin with: of oauth2-proxy, Authelia, authentik, Ory, Okta, Pomerium, Vouch, Kong, Hasura, Teleport, Google, AWS, Azure,
/// Cloudflare, Grafana, Shibboleth, `mod_auth_openidc` and `mod_auth_mellon`, `SiteMinder`, `WebSEAL`, Kubernetes, nginx and Apache; and what applications
/// call them.
const PREFIXES: [&str; 47] = [
    "x-auth-",
    "x-authenticated-",
    "x-authentik-",
    "x-authelia-",
    "x-ory-",
    "x-kratos-",
    "x-okta-",
    "x-pomerium-",
    "x-vouch-",
    "x-consumer-",
    "x-credential-",
    "x-hasura-",
    "teleport-",
    "x-goog-",
    "x-appengine-user-",
    "x-amzn-oidc-",
    "x-amzn-mtls-",
    "x-ms-client-principal",
    "x-ms-token-",
    "cf-access-",
    "x-webauth-",
    "shib-",
    "oidc-",
    "mellon-",
    "sm-",
    "iv-",
    "impersonate-",
    "x-remote-",
    "x-sso-",
    "x-ssl-",
    "ssl-client-",
    "x-tls-client-",
    "x-client-cert",
    "x-forwarded-tls-client-cert",
    "x-forwarded-role",
    "x-jwt-claim",
    "x-oidc-",
    "x-user",
    "x-account",
    "x-customer",
    "x-tenant",
    "x-org",
    "x-role",
    "x-scope",
    "x-session",
    "x-permission",
    "x-impersonate-",
];

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What no backend judges anybody by: of one connection or of one request, or made anew for the backend.
const HARMLESS: [HeaderName; 15] = [
    HOST,
    CONNECTION,
    UPGRADE,
    SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION,
    SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_EXTENSIONS,
    ACCEPT,
    ACCEPT_ENCODING,
    ACCEPT_LANGUAGE,
    CACHE_CONTROL,
    PRAGMA,
    REQUEST_ID,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// The secret of this process: what it makes of a handshake can't be made of guesses elsewhere.
static SECRET: LazyLock<hmac::Key> = LazyLock::new(|| hmac::Key::new(hmac::HMAC_SHA256, &rand::random::<[u8; 32]>()));

/// Who is alike. Clones are the same.
#[derive(Clone)]
pub(super) struct Key(Arc<Inner>);

/// The beginning of a key's hash: enough to know it again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(NonZeroU64);

struct Inner {
    /// All that follows is in it.
    hash: [u8; 32],
    /// The handshake, but for what is of one connection.
    request: Request<()>,
    /// It says all that the client's said, but for what is harmless.
    is_whole: bool,
}

impl Key {
    /// Of a client's handshake as it would be passed on to the backend of `route`.
    pub(super) fn new(route: &str, request: &Request<()>, sharing: &Config) -> Self {
        let from = request.headers();
        let (mut names, mut is_whole) = (Vec::new(), true);
        for name in from.keys() {
            let is_wanted = tells_apart(name) || sharing.key_headers.contains(name);
            if !is_wanted || sharing.ignore_headers.contains(name) {
                is_whole &= HARMLESS.contains(name);
            } else {
                // In the order of their names, whatever that of the client: there are a few.
                let at = names.iter().position(|known: &&HeaderName| known.as_str() > name.as_str());
                names.insert(at.unwrap_or(names.len()), name);
            }
        }
        let mut headers = HeaderMap::new();
        for host in from.get_all(HOST) {
            headers.append(HOST, own(host));
        }
        for name in names {
            for value in from.get_all(name) {
                let mut value = own(value);
                value.set_sensitive(true);
                headers.append(name.clone(), value);
            }
        }
        let offered: Vec<_> = tokens(from, &SEC_WEBSOCKET_PROTOCOL).collect();
        if !offered.is_empty()
            && let Ok(offered) = HeaderValue::from_str(&offered.join(", "))
        {
            headers.insert(SEC_WEBSOCKET_PROTOCOL, offered);
        }
        let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let mut hash = hmac::Context::with_key(&SECRET);
        // With its length each part is where it is, whatever is in it.
        let mut put = |part: &[u8]| {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part);
        };
        put(route.as_bytes());
        put(target.as_bytes());
        for (name, value) in &headers {
            put(name.as_str().as_bytes());
            put(value.as_bytes());
        }
        let hash = hash.sign().as_ref().try_into().expect("SHA-256 has 32 bytes");
        let mut request = Request::new(());
        *request.uri_mut() = target.parse().unwrap_or_default();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = headers;
        Self(Arc::new(Inner { hash, request, is_whole }))
    }

    /// The handshake for all who are alike, with a key and an id of its own.
    pub(super) fn request(&self) -> Request<()> {
        let mut request = self.0.request.clone();
        let headers = request.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        let ids = [(SEC_WEBSOCKET_KEY, generate_key()), (REQUEST_ID, format!("{:016x}", rand::random::<u64>()))];
        for (name, id) in ids {
            headers.insert(name, HeaderValue::from_str(&id).expect("letters and digits"));
        }
        request
    }

    /// What [`Key::request`] says is all that a backend may judge the client by.
    pub(super) fn is_whole(&self) -> bool {
        self.0.is_whole
    }

    /// What is shown of it.
    pub(super) fn digest(&self) -> Digest {
        let first = self.0.hash.first_chunk().expect("32 bytes are more than 8");
        // Six of these bytes, and something that is never 0.
        Digest(NonZeroU64::MIN | u64::from_be_bytes(*first) & !0xffff)
    }

    /// Which of `count` it falls to.
    pub(super) fn share(&self, count: usize) -> usize {
        let [a, b, c, d, ..] = self.0.hash;
        u32::from_be_bytes([a, b, c, d]) as usize % count.max(1)
    }
}

fn tells_apart(name: &HeaderName) -> bool {
    if [AUTHORIZATION, COOKIE, ORIGIN].contains(name) {
        return true;
    }
    // Some servers take `_` for `-` (CGI and its heirs).
    let name = name.as_str().replace('_', "-");
    NAMES.contains(&name.as_str()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.hash == other.0.hash
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash.hash(state);
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.digest().fmt(f)
    }
}

/// A value by itself: as it came it holds all that was read with it, for as long as the key lives.
fn own(value: &HeaderValue) -> HeaderValue {
    HeaderValue::from_bytes(value.as_bytes()).unwrap_or_else(|_| value.clone())
}

#[cfg(test)]
impl Digest {
    /// That of no key.
    pub(super) fn of(number: u64) -> Self {
        Self(NonZeroU64::MIN | number << 16)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0.get() >> 16)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Settings;

    fn sharing() -> Config {
        Settings::default().sharing
    }

    fn request(target: &str, fields: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().uri(target).header(HOST, "app");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request")
    }

    fn key(fields: &[(&str, &str)]) -> Key {
        Key::new("/r", &request("/p?q", fields), &sharing())
    }

    /// Whatever tells clients apart makes another key, and reaches the backend; whatever does not, does neither. Method: one field after the other.
    #[test]
    fn only_what_is_in_the_key_reaches_the_backend() {
        let plain = key(&[]);
        let in_it = [
            "Origin",
            "Authorization",
            "Cookie",
            "X-Forwarded-Client-Cert",
            "X-Forwarded-User",
            "X-Auth-Request-Email",
            "Remote-User",
            "x_remote_user",
            "X-User-Id",
            "X-Authenticated-User",
            "X-Goog-Authenticated-User-Id",
            "X-Amzn-Oidc-Data",
            "Cf-Access-Jwt-Assertion",
            "X-MS-CLIENT-PRINCIPAL-NAME",
            "X-Api-Key",
            "X-Forwarded-Tls-Client-Cert-Info",
            "X-Forwarded-Roles",
            "X-Jwt-Claim-Sub",
            "X-Client-Cert-Dn",
            "X-Oidc-Email",
            "X-Tenant-Id",
            "Ssl-Client-S-Dn",
            "X-SSL-Client-Cert",
            "Proxy-Authorization",
            "Sec-WebSocket-Protocol",
        ];
        for name in in_it {
            let (a, b) = (key(&[(name, "a")]), key(&[(name, "b")]));
            assert!(a != b && a != plain, "{name}");
            assert_eq!(a, key(&[(name, "a")]), "{name}");
            assert!(a.is_whole(), "{name}");
            assert_eq!(a.request().headers()[name], "a", "{name}");
        }
        let beside_it = [
            "X-Forwarded-For",
            "Forwarded",
            "X-Real-IP",
            "User-Agent",
            "X-Request-Id",
            "traceparent",
            "Accept-Language",
            "Sec-WebSocket-Extensions",
            "Sec-WebSocket-Key",
            "Pragma",
            "X-Something",
        ];
        for name in beside_it {
            let a = key(&[(name, "a")]);
            assert_eq!(a, plain, "{name}");
            assert!(a.request().headers().get(name).is_none_or(|value| value != "a"), "{name}");
        }
        for other in [
            Key::new("/s", &request("/p?q", &[]), &sharing()),
            Key::new("/r", &request("/p?r", &[]), &sharing()),
            Key::new("/r", &request("/P?q", &[]), &sharing()),
        ] {
            assert_ne!(other, plain);
        }
    }

    /// Of a field that comes several times each value counts, and their order.
    #[test]
    fn values_count_in_order() {
        let keys = [
            key(&[("Cookie", "a"), ("Cookie", "b")]),
            key(&[("Cookie", "b"), ("Cookie", "a")]),
            key(&[("Cookie", "a; b")]),
            key(&[("Cookie", "a")]),
            key(&[("Cookie", "a"), ("Cookie", "")]),
        ];
        for (index, one) in keys.iter().enumerate() {
            for other in &keys[index + 1..] {
                assert_ne!(one, other);
            }
        }
        let protocols = |value| key(&[("Sec-WebSocket-Protocol", value)]);
        assert_eq!(protocols("a,b"), protocols(" a , b"));
        assert_ne!(protocols("a, b"), protocols("b, a"));
    }

    /// Fields that the configuration adds are in the key and reach the backend; those that it leaves out do neither.
    #[test]
    fn the_configuration_adds_and_leaves_out() {
        let mut sharing = sharing();
        sharing.key_headers = vec![HeaderName::from_static("x-region")];
        sharing.ignore_headers = vec![COOKIE];
        let of = |region, cookie| Key::new("/r", &request("/", &[("X-Region", region), ("Cookie", cookie)]), &sharing);
        assert_eq!(of("eu", "a"), of("eu", "b"));
        assert_ne!(of("eu", "a"), of("us", "a"));
        let request = of("eu", "a").request();
        assert_eq!(request.headers()["x-region"], "eu");
        assert!(!request.headers().contains_key(COOKIE));
        assert!(!of("eu", "a").is_whole() && key(&[("Cookie", "a")]).is_whole());
    }

    /// Whatever a backend may judge a client by, and is not in the key, is missed there.
    #[test]
    fn what_is_left_out_is_missed() {
        for name in ["X-Forwarded-For", "X-Real-IP", "User-Agent", "X-Something", "Sec-Fetch-Site"] {
            assert!(!key(&[(name, "a"), ("Cookie", "a")]).is_whole(), "{name}");
        }
        for name in ["X-Request-Id", "traceparent", "Accept-Language", "Sec-WebSocket-Extensions", "Sec-WebSocket-Key"]
        {
            assert!(key(&[(name, "a"), ("Cookie", "a")]).is_whole(), "{name}");
        }
    }

    /// What is shown of a key has nothing of what is in it, and is the same for the same.
    #[test]
    fn nothing_is_told_of_a_key() {
        let key = key(&[("Authorization", "Bearer swordfish"), ("Cookie", "id=swordfish")]);
        for shown in [key.to_string(), format!("{key:?}"), format!("{:?}", key.request())] {
            assert!(!shown.contains("swordfish"), "{shown}");
        }
        assert_eq!(key.to_string().len(), 12);
    }

    proptest! {
        /// No two different sets of values have the same key, however they are cut: each part stands with its length.
        #[test]
        fn parts_do_not_run_together(a in "[ab:, ]{0,4}", b in "[ab:, ]{0,4}", c in "[ab:, ]{0,4}", d in "[ab:, ]{0,4}") {
            let of = |user: &str, cookie: &str| key(&[("X-User", user.trim()), ("Cookie", cookie.trim())]);
            let is_same = (a.trim(), b.trim()) == (c.trim(), d.trim());
            prop_assert_eq!(of(&a, &b) == of(&c, &d), is_same);
        }
    }
}
