//! What each value allows on its own, but not all of them together.
//!
//! Not here: bounds of single values, which are in `keys.rs`.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    Grace, Settings,
    finding::{Finding, Place},
    keys::{BACKEND, Name, PATH, ROUTE},
    units::{format_duration, format_size},
    written::named_route,
};
use crate::{
    downstream::{ClientAuth, ProxyProtocol},
    hub::{Kind, Replay},
    net::{Address, TlsFile, TlsFileError, TlsServer},
    upstream::{Addresses, Mode, Pool},
};

/// Where the values came from.
#[derive(Clone, Copy)]
pub(super) struct Origins<'a> {
    /// The last place of each key that is not at its default.
    pub written: &'a HashMap<Name, Place>,
    /// Keys that have their default only because what was written was refused. Nothing is said about that.
    pub refused: &'a [Name],
}

const LISTEN: Name = name("listen", "address");
const PROXY_PROTOCOL: Name = name("listen", "proxy_protocol");
const CERTIFICATE: Name = name("listen", "tls_certificate");
const TOKEN_FILE: Name = name("admin", "token_file");
const CERTIFICATE_KEY: Name = name("listen", "tls_key");
const CLIENT_AUTH: Name = name("listen", "tls_client_auth");
const CLIENT_CA: Name = name("listen", "tls_client_ca");
const UPSTREAM: Name = name("upstream", "address");
const TLS: Name = name("upstream", "tls");
const TLS_CA: Name = name("upstream", "tls_ca");
const TLS_SERVER_NAME: Name = name("upstream", "tls_server_name");
const TLS_CERTIFICATE: Name = name("upstream", "tls_client_certificate");
const TLS_KEY: Name = name("upstream", "tls_client_key");
const ADMIN: Name = name("admin", "address");
const PROXIES: Name = name("http", "trusted_proxies");
const MAX_MESSAGE: Name = name("websocket", "max_message");
pub(super) const MAX_FRAME: Name = name("websocket", "max_frame");
const PING_INTERVAL: Name = name("websocket", "ping_interval");
const WRITE_TIMEOUT: Name = name("websocket", "write_timeout");
const STALL_TIMEOUT: Name = name("pool", "stall_timeout");
const MAX_STREAMS: Name = name("pool", "max_streams");
const MAX_USES: Name = name("pool", "max_uses");
const POOL_MODE: Name = name("pool", "mode");
const QUEUE_MESSAGES: Name = name("pool", "queue_messages");
const QUEUE_BYTES: Name = name("pool", "queue_bytes");
const KEY_HEADERS: Name = name("pool", "key_headers");
const IGNORE_HEADERS: Name = name("pool", "ignore_headers");
const SHARED: Name = name("pool", "shared");
const REPLAY_MESSAGES: Name = name("pool", "replay_messages");
const DELAY: Name = name("drain", "delay");
const WINDOW: Name = name("drain", "window");
const TIMEOUT: Name = name("drain", "timeout");
const GRACE_PERIOD: Name = name("drain", "grace_period");
const BACKEND_STOP: Name = name("drain", "backend_stop");
const LINGER: Name = name("close", "linger");
const LINGER_MAX: Name = name("close", "linger_max");

const fn name(section: &'static str, key: &'static str) -> Name {
    Name { section, route: None, key }
}

/// What the kubelet, or another service manager, needs for itself in a grace period.
const KUBELET: Duration = Duration::from_secs(5);

impl Origins<'_> {
    fn place(&self, name: Name) -> Place {
        self.written.get(&name).cloned().unwrap_or(Place::Default)
    }

    fn judged(&self, names: &[Name]) -> bool {
        !names.iter().any(|name| self.refused.contains(name))
    }

    /// Says that two values do not go together, and that at the place that was written last: nobody can correct a default.
    /// The other value is named with its own place.
    fn pair(&self, (a, a_text): (Name, &str), relation: &str, (b, b_text): (Name, &str)) -> (String, Place) {
        let (a_place, b_place) = (self.place(a), self.place(b));
        let (a_origin, b_origin) = if a_place >= b_place {
            (String::new(), format!(", {b_place}"))
        } else {
            (format!(", {a_place}"), String::new())
        };
        let text = |name: Name| match name.route {
            Some(route) => format!("`{}` of {}", name.key, named_route(route, None)),
            None => format!("`{}.{}`", name.section, name.key),
        };
        let what = format!("{} ({a_text}{a_origin}) {relation} {} ({b_text}{b_origin})", text(a), text(b));
        (what, a_place.max(b_place))
    }
}

/// Adds what is wrong, or dubious, about the settings as a whole.
pub(super) fn check(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    addresses(settings, origins, findings);
    tls(settings, origins, findings);
    client_auth(settings, origins, findings);
    limits(settings, origins, findings);
    routes(settings, origins, findings);
    shared(settings, origins, findings);
    unused(settings, origins, findings);
    grace(settings, origins, findings);
}

/// What ends last, the backend, must have ended before the grace period does.
fn grace(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let (drain, Grace { period: Some(period), backend_stop }) = (&settings.drain, settings.grace) else { return };
    let whole = drain.delay + drain.window + drain.timeout + backend_stop;
    let needed = whole + KUBELET;
    if period >= needed || !origins.judged(&[DELAY, WINDOW, TIMEOUT, GRACE_PERIOD, BACKEND_STOP]) {
        return;
    }
    let parts = [drain.delay, drain.window, drain.timeout, backend_stop].map(format_duration).join(" + ");
    let what = format!(
        "`drain.grace_period` is {}, but delay + window + timeout + backend_stop ({parts}) is {}, and {} more are for hooks and probes on \
         their way",
        format_duration(period),
        format_duration(whole),
        format_duration(KUBELET),
    );
    let fix = format!(
        "whoever is left then is cut by SIGKILL: raise the grace period to {needed} (terminationGracePeriodSeconds, TimeoutStopSec, \
         docker stop -t) and say so in drain.grace_period, or shorten drain.window",
        needed = format_duration(needed),
    );
    findings.push(Finding::warning(what, origins.place(GRACE_PERIOD), fix));
}

fn routes(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let mut known = HashMap::new();
    for (index, route) in settings.routes.iter().enumerate() {
        let Some(pattern) = &route.path else { continue };
        // Of two that differ in how they are encoded, no backend tells one from the other.
        if let Some(earlier) = known.insert(pattern.decoded(), index) {
            let place_of = |route| origins.place(Name { section: ROUTE, route: Some(route), key: PATH });
            let same = named_route(earlier, None);
            findings.push(Finding::error(
                format!("`path` of {} is that of {same}, {}", named_route(index, None), place_of(earlier)),
                place_of(index),
                format!(
                    "each path has one route: leave this one out, or name another path than {:?}",
                    pattern.to_string()
                ),
            ));
        }
    }
}

/// Fields that no two handshakes have in common: tidegate, or what is in front of it, makes them anew for each.
const ALWAYS_OTHER: [&str; 2] = ["x-request-id", "traceparent"];

/// Keys that mean something with one kind of `pool.shared` alone.
const OF_BROADCAST: &[&str] =
    &["pool.slow_client", "pool.replay", "pool.replay_messages", "pool.batch_delay", "pool.allow_client_messages"];
const OF_RPC: &[&str] = &[
    "pool.request_timeout",
    "pool.max_requests",
    "pool.max_subscriptions",
    "pool.subscriptions",
    "pool.notifications",
];

/// Of keys that are written in a route: those in `[pool]` may be for others.
fn unused(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let is_shared = |pool: &Pool| pool.mode == Mode::Shared;
    let mut routes = settings.routes.iter().map(|route| &route.pool).peekable();
    // Where there are no routes yet it may be for those that are to come.
    if origins.written.contains_key(&SHARED) && routes.peek().is_some() && !routes.any(is_shared) {
        findings.push(Finding::warning(
            "`pool.shared` is set, but no route has `pool.mode` \"shared\"",
            origins.place(SHARED),
            "set pool.mode to \"shared\" in the [[route]] whose clients may share one WebSocket, or leave it out",
        ));
    }
    for (index, route) in settings.routes.iter().enumerate() {
        let own = |key| Name { section: ROUTE, route: Some(index), key };
        let (keys, of, fix) = match route.sharing.kind {
            _ if !origins.judged(&[own("pool.mode"), own("pool.shared")]) => continue,
            _ if !is_shared(&route.pool) => (
                &["pool.shared"][..],
                "`pool.mode` \"shared\"",
                "set pool.mode to \"shared\" too, or leave it out: without that each client has a WebSocket of its own",
            ),
            Some(Kind::Rpc) => {
                (OF_BROADCAST, "`pool.shared` \"broadcast\"", "leave it out: with \"rpc\" it changes nothing")
            }
            Some(Kind::Broadcast) => {
                (OF_RPC, "`pool.shared` \"rpc\"", "leave it out: with \"broadcast\" it changes nothing")
            }
            None => continue,
        };
        for key in keys.iter().filter(|key| origins.written.contains_key(&own(key))) {
            let path = route.path.as_ref().map(ToString::to_string);
            let what = format!("`{key}` of {} is for {of} alone", named_route(index, path.as_deref()));
            findings.push(Finding::warning(what, origins.place(own(key)), fix));
        }
    }
}

/// Routes whose clients share one WebSocket.
fn shared(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    if settings.upstream.pool.mode == Mode::Shared {
        findings.push(Finding::error(
            "`pool.mode` is \"shared\" for all paths",
            origins.place(POOL_MODE),
            "set it for the paths where clients may share one WebSocket: pool.mode = \"shared\" in a [[route]]",
        ));
        return;
    }
    let own = |index, key| Name { section: ROUTE, route: Some(index), key };
    for (index, route) in settings.routes.iter().enumerate().filter(|(_, route)| route.pool.mode == Mode::Shared) {
        let sharing = &route.sharing;
        let (mode, kind) = (own(index, "pool.mode"), own(index, "pool.shared"));
        let path = route.path.as_ref().map(ToString::to_string);
        let of = named_route(index, path.as_deref());
        if !origins.judged(&[mode, kind]) {
            continue;
        }
        match sharing.kind {
            Some(_) => {}
            None => findings.push(Finding::error(
                format!("`pool.mode` of {of} is \"shared\", and `pool.shared` says nothing"),
                origins.place(mode),
                "set pool.shared to \"broadcast\": each message of the backend goes to all clients; or to \"rpc\": JSON-RPC 2.0, each answer goes to who \
                 has asked",
            )),
        }
        let place = |name: Name, route: &'static str| {
            let own = own(index, route);
            if origins.written.contains_key(&own) { own } else { name }
        };
        let named = place(KEY_HEADERS, "pool.key_headers");
        if let Some(name) = sharing.key_headers.iter().find(|name| ALWAYS_OTHER.contains(&name.as_str()))
            && origins.judged(&[named])
        {
            findings.push(Finding::error(
                format!("`pool.key_headers` of {of} has {name:?}, which is another one in each handshake"),
                origins.place(named),
                "leave it out: nobody would share a WebSocket with anybody; the backend gets one of the WebSocket's own",
            ));
        }
        let (replayed, kept) =
            (place(REPLAY_MESSAGES, "pool.replay_messages"), place(QUEUE_MESSAGES, "pool.queue_messages"));
        let is_more = sharing.replay == Replay::LastN && sharing.replay_messages > sharing.queue_messages;
        if is_more && origins.judged(&[replayed, kept]) {
            let values = (sharing.replay_messages.to_string(), sharing.queue_messages.to_string());
            let (what, place) = origins.pair((replayed, &values.0), "is more than", (kept, &values.1));
            findings.push(Finding::error(what, place, "no more can be replayed than is kept: raise queue_messages"));
        }
        let left_out = place(IGNORE_HEADERS, "pool.ignore_headers");
        if let Some(header) = sharing.key_headers.iter().find(|header| sharing.ignore_headers.contains(header)) {
            let (what, place) = origins.pair(
                (named, header.as_str()),
                "names a header that is left out by",
                (left_out, header.as_str()),
            );
            let fix = "it is left out of the key, and the backend does not get it: name it in one of the two";
            findings.push(Finding::error(what, place, fix));
        }
        let kept = place(QUEUE_BYTES, "pool.queue_bytes");
        let is_said = [kept, MAX_MESSAGE].iter().any(|name| origins.written.contains_key(name));
        let is_less = (sharing.queue_bytes as u64) < settings.relay.max_message;
        if sharing.kind == Some(Kind::Rpc) && is_less && is_said && origins.judged(&[kept, MAX_MESSAGE]) {
            let values = (format_size(sharing.queue_bytes as u64), format_size(settings.relay.max_message));
            let (what, place) = origins.pair((kept, &values.0), "is less than", (MAX_MESSAGE, &values.1));
            let fix = "a client's message beyond queue_bytes gets Close 1009, and who is sent two such answers at once 1013: raise queue_bytes, or \
                       lower max_message";
            findings.push(Finding::warning(what, place, fix));
        }
    }
}

/// Reads the files that are named. What is in them is a part of the settings, so that other ones are applied like another value.
pub(super) fn load_certificates(settings: &mut Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    load_for_clients(settings, origins, findings);
    if !origins.judged(&[TLS, TLS_CA, TLS_CERTIFICATE, TLS_KEY]) {
        return;
    }
    for TlsFileError { file, what, fix } in settings.upstream.tls.load().err().unwrap_or_default() {
        let name = match file {
            TlsFile::Roots => TLS_CA,
            TlsFile::Certificate => TLS_CERTIFICATE,
            TlsFile::Key => TLS_KEY,
        };
        findings.push(Finding::error(format!("`{}.{}` {what}", name.section, name.key), origins.place(name), fix));
    }
}

/// The same for the admin listener's token.
pub(super) fn load_token(settings: &mut Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    if !origins.judged(&[TOKEN_FILE]) {
        return;
    }
    match settings.admin.read_token() {
        Ok(token) => settings.admin.token = token,
        Err(what) => findings.push(Finding::error(
            format!("`{}.{}` {what}", TOKEN_FILE.section, TOKEN_FILE.key),
            origins.place(TOKEN_FILE),
            "`openssl rand -hex 32` makes a good one; \"\" for none",
        )),
    }
}

fn load_for_clients(settings: &mut Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    if !origins.judged(&[CERTIFICATE, CERTIFICATE_KEY, CLIENT_AUTH, CLIENT_CA]) {
        return;
    }
    let tls = &mut settings.downstream.tls;
    let (certificates, keys) = (tls.certificates.len(), tls.keys.len());
    if certificates != keys {
        let (what, place) =
            origins.pair((CERTIFICATE, &files(certificates)), "must name as many as", (CERTIFICATE_KEY, &files(keys)));
        let fix = "name for each certificate its key, in the same order";
        findings.push(Finding::error(what, place, fix));
        return;
    }
    for (index, TlsFileError { file, what, fix }) in tls.load().err().unwrap_or_default() {
        let (name, which) = match file {
            TlsFile::Key => (CERTIFICATE_KEY, which(&tls.keys, index)),
            TlsFile::Certificate => (CERTIFICATE, which(&tls.certificates, index)),
            TlsFile::Roots => (CLIENT_CA, String::new()),
        };
        findings.push(Finding::error(
            format!("`{}.{}`{which} {what}", name.section, name.key),
            origins.place(name),
            fix,
        ));
    }
    for (index, doubt) in tls.server.iter().flat_map(TlsServer::doubts) {
        let (which, path) = (which(&tls.certificates, index), &tls.certificates[index]);
        findings.push(Finding::warning(
            format!("`listen.{}`{which} names a certificate that {doubt}: {path}", CERTIFICATE.key),
            origins.place(CERTIFICATE),
            "renew it, or clients will refuse it; the new one is used as soon as it is there (reload.watch)",
        ));
    }
}

fn files(count: usize) -> String {
    match count {
        1 => "1 file".to_owned(),
        _ => format!("{count} files"),
    }
}

/// Of several.
fn which(all: &[String], index: usize) -> String {
    if all.len() > 1 { format!(", number {},", index + 1) } else { String::new() }
}

/// Clients that are asked for a certificate.
fn client_auth(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let tls = &settings.downstream.tls;
    if !origins.judged(&[CERTIFICATE, CERTIFICATE_KEY, CLIENT_AUTH, CLIENT_CA]) {
        return;
    }
    if tls.client_auth == ClientAuth::Off {
        if !tls.client_ca.is_empty() {
            findings.push(Finding::warning(
                "`listen.tls_client_ca` is set, but `listen.tls_client_auth` is \"off\": nobody is asked for a certificate",
                origins.place(CLIENT_CA),
                "set tls_client_auth to \"optional\" or \"required\", or leave tls_client_ca out",
            ));
        }
        return;
    }
    let auth = tls.client_auth.as_str();
    if tls.client_ca.is_empty() {
        findings.push(Finding::error(
            format!(
                "`listen.tls_client_auth` is {auth:?}, but `listen.tls_client_ca` names nobody who signs certificates"
            ),
            origins.place(CLIENT_AUTH),
            "name a PEM file with the certificates of those who sign the clients'",
        ));
    }
    if tls.certificates.is_empty() {
        findings.push(Finding::error(
            format!("`listen.tls_client_auth` is {auth:?}, but there is no `listen.tls_certificate`"),
            origins.place(CLIENT_AUTH),
            "clients can show a certificate only by TLS: set tls_certificate and tls_key",
        ));
    }
}

fn tls(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let tls = &settings.upstream.tls;
    for (name, text, other, without) in [
        (TLS_CERTIFICATE, &tls.client_certificate, TLS_KEY, &tls.client_key),
        (TLS_KEY, &tls.client_key, TLS_CERTIFICATE, &tls.client_certificate),
    ] {
        if !text.is_empty() && without.is_empty() && origins.judged(&[other]) {
            findings.push(Finding::error(
                format!("`upstream.{}` is set, but not `upstream.{}`", name.key, other.key),
                origins.place(name),
                "a certificate and its key are of use together: set both, or none",
            ));
        }
    }
    if !tls.is_on {
        let unused = [
            (TLS_CA, &tls.ca),
            (TLS_SERVER_NAME, &tls.server_name),
            (TLS_CERTIFICATE, &tls.client_certificate),
            (TLS_KEY, &tls.client_key),
        ];
        for (name, _) in unused.into_iter().filter(|(_, text)| !text.is_empty() && origins.judged(&[TLS])) {
            findings.push(Finding::warning(
                format!("`upstream.{}` is set, but `upstream.tls` is false", name.key),
                origins.place(name),
                "set upstream.tls to true, unless backends are to be spoken to without TLS",
            ));
        }
        return;
    }
    for (name, addresses) in backends(settings, origins) {
        let nameless = addresses.as_slice().iter().find(|address| tls.server(address).is_none());
        if let (Some(address), true) = (nameless, origins.judged(&[name, TLS, TLS_SERVER_NAME])) {
            findings.push(Finding::error(
                format!("{address} has no name that a certificate could be for, and `upstream.tls` is true"),
                origins.place(name),
                "set upstream.tls_server_name to a name that the backend's certificate is for",
            ));
        }
    }
}

/// All that are named. A route without a backend of its own has the one that is there for all.
fn backends<'a>(settings: &'a Settings, origins: &Origins<'_>) -> impl Iterator<Item = (Name, &'a Addresses)> {
    let routes = settings.routes.iter().enumerate().filter_map(|(index, route)| {
        let name = Name { section: ROUTE, route: Some(index), key: BACKEND };
        origins.written.contains_key(&name).then_some((name, &route.address))
    });
    [(UPSTREAM, &settings.upstream.address)].into_iter().chain(routes)
}

fn addresses(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let listen = settings.listen.address;
    let listen_text = listen.to_string();
    if let Some(admin) = settings.admin.address
        && overlaps(admin, listen)
        && origins.judged(&[ADMIN, LISTEN])
    {
        let (what, place) = origins.pair((ADMIN, &admin.to_string()), "takes the port of", (LISTEN, &listen_text));
        findings.push(Finding::error(what, place, "give each a port of its own, or set admin.address to \"off\""));
    }
    for (name, upstream) in backends(settings, origins) {
        let listeners = settings.admin.address.map(|admin| (ADMIN, admin)).into_iter().chain([(LISTEN, listen)]);
        for (listener_name, listener) in listeners {
            let mut own = upstream.as_slice().iter().filter(|address| reaches(address, listener));
            if let (Some(address), true) = (own.next(), origins.judged(&[listener_name, name])) {
                let (address, listener) = (address.to_string(), listener.to_string());
                let (what, place) = origins.pair((name, &address), "leads back to", (listener_name, &listener));
                findings.push(Finding::error(
                    what,
                    place,
                    "name the address where the backend listens, and not tidegate",
                ));
            }
        }
    }

    let required = settings.downstream.proxy_protocol == ProxyProtocol::Required;
    if required && settings.downstream.trusted_proxies.is_empty() && origins.judged(&[PROXY_PROTOCOL, PROXIES]) {
        findings.push(Finding::error(
            "`listen.proxy_protocol` is \"required\", but `http.trusted_proxies` names nobody who may send a header",
            origins.place(PROXY_PROTOCOL),
            "add the networks of the balancers in front of tidegate to http.trusted_proxies, or set proxy_protocol to \"off\"",
        ));
    }
    for network in settings.downstream.trusted_proxies.iter().filter(|network| network.prefix_len() == 0) {
        findings.push(Finding::warning(
            format!("`http.trusted_proxies` contains {network}: every client may claim any address"),
            origins.place(PROXIES),
            "name only the networks of the proxies in front of tidegate",
        ));
    }
}

fn limits(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let relay = &settings.relay;
    let (message, frame) = (format_size(relay.max_message), format_size(relay.max_frame));
    if origins.judged(&[MAX_FRAME, MAX_MESSAGE]) {
        if relay.max_frame > relay.max_message {
            let (what, place) = origins.pair((MAX_FRAME, &frame), "is more than", (MAX_MESSAGE, &message));
            let fix = format!(
                "such a frame could never pass: set max_message to \"{frame}\" or more, or leave max_frame out"
            );
            findings.push(Finding::error(what, place, fix));
        } else if relay.max_frame < relay.max_message && !origins.written.contains_key(&MAX_FRAME) {
            let (what, place) = origins.pair((MAX_MESSAGE, &message), "is more than", (MAX_FRAME, &frame));
            let fix = format!(
                "many clients send a message as one frame: set max_frame to \"{message}\" too, or to \"{frame}\" if it is meant"
            );
            findings.push(Finding::warning(what, place, fix));
        }
    }

    let close = &settings.close;
    if close.patience.linger > close.patience.linger_max && origins.judged(&[LINGER, LINGER_MAX]) {
        let (linger, max) = (format_duration(close.patience.linger), format_duration(close.patience.linger_max));
        let (what, place) = origins.pair((LINGER, &linger), "is longer than", (LINGER_MAX, &max));
        let fix =
            format!("linger is a part of the wait and linger_max the whole: set linger_max to \"{linger}\" or more");
        findings.push(Finding::error(what, place, fix));
    }

    slow_clients(settings, origins, findings);
    few_uses(settings, origins, findings);

    if relay.ping_interval >= Duration::from_mins(1) {
        findings.push(Finding::warning(
            format!("`websocket.ping_interval` is {}", format_duration(relay.ping_interval)),
            origins.place(PING_INTERVAL),
            "most load balancers cut what was silent for 60s: use \"25s\", unless none is in between",
        ));
    }
}

/// What waits for a client that shares its connection with others must not wait for as long as it may elsewhere: the first of both
/// deadlines ends the session.
fn slow_clients(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let write = settings.relay.write_timeout;
    let mut said = Vec::new();
    for (name, pool) in shared_pools(settings, origins, STALL_TIMEOUT, "pool.stall_timeout") {
        let is_late = pool.stall_timeout >= write;
        if !is_late || said.contains(&name) || !origins.judged(&[name, WRITE_TIMEOUT]) {
            continue;
        }
        said.push(name);
        let (stall, write) = (format_duration(pool.stall_timeout), format_duration(write));
        let (what, place) = origins.pair((name, &stall), "is not shorter than", (WRITE_TIMEOUT, &write));
        let fix = format!(
            "a client that takes nothing would get a FIN without a Close, and not 1013: set stall_timeout to less than \"{write}\""
        );
        findings.push(Finding::warning(what, place, fix));
    }
}

/// A connection that takes fewer handshakes than it may have sessions never has as many.
fn few_uses(settings: &Settings, origins: &Origins<'_>, findings: &mut Vec<Finding>) {
    let mut said = Vec::new();
    let streams = shared_pools(settings, origins, MAX_STREAMS, "pool.max_streams");
    for ((name, pool), (streams, _)) in shared_pools(settings, origins, MAX_USES, "pool.max_uses").zip(streams) {
        let is_few = pool.max_uses > 0 && pool.max_uses < pool.max_streams;
        if !is_few || said.contains(&(name, streams)) || !origins.judged(&[name, streams]) {
            continue;
        }
        said.push((name, streams));
        let values = (pool.max_uses.to_string(), pool.max_streams.to_string());
        let (what, place) = origins.pair((name, &values.0), "is less than", (streams, &values.1));
        let fix = "a connection takes no more sessions than that in its life: raise max_uses, or set it to 0 if the backend has no limit \
                   of its own on the requests of a connection";
        findings.push(Finding::warning(what, place, fix));
    }
}

/// All pools of shared connections, each with the name under which its value of a key was written.
fn shared_pools<'a>(
    settings: &'a Settings,
    origins: &Origins<'_>,
    of_all: Name,
    of_route: &'static str,
) -> impl Iterator<Item = (Name, &'a Pool)> {
    let of_routes = settings.routes.iter().enumerate().map(move |(index, route)| {
        let own = Name { section: ROUTE, route: Some(index), key: of_route };
        (if origins.written.contains_key(&own) { own } else { of_all }, &route.pool)
    });
    [(of_all, &settings.upstream.pool)].into_iter().chain(of_routes).filter(|(_, pool)| pool.mode == Mode::Multiplexed)
}

/// Whether binding both fails. Port 0 is any free port, so never the same; an unspecified address is all of its family, and
/// `[::]` also takes IPv4 on most hosts.
fn overlaps(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |a: IpAddr, b: IpAddr| a == b || (a.is_unspecified() && (a.is_ipv6() || b.is_ipv4()));
    a.port() != 0 && a.port() == b.port() && (covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}

/// Whether connecting to `backend` surely ends at a listener of ours. Names other than localhost are not looked up.
fn reaches(backend: &Address, listener: SocketAddr) -> bool {
    let Address::Tcp { host, port } = backend else {
        return false;
    };
    let local = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    let same = match host.parse::<IpAddr>() {
        // Connecting to 0.0.0.0 or [::] is connecting to the loopback.
        Ok(ip) => {
            ip == listener.ip()
                || (ip.is_unspecified() && listener.ip().is_loopback())
                || (local(ip) && listener.ip().is_unspecified())
        }
        Err(_) => host.eq_ignore_ascii_case("localhost") && local(listener.ip()),
    };
    same && *port == listener.port()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_addresses_collide() {
        let listener = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (a, b, collide) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "[::]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
        ] {
            assert_eq!(overlaps(listener(a), listener(b)), collide, "{a} {b}");
            assert_eq!(overlaps(listener(b), listener(a)), collide, "{b} {a}");
        }
        for (backend, listen, loops) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "0.0.0.0:80", true),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("localhost:80", "127.0.0.1:80", true),
            ("LocalHost:80", "[::]:80", true),
            ("app:80", "0.0.0.0:80", false),
            ("10.0.0.1:80", "0.0.0.0:80", false),
            ("127.0.0.1:80", "10.0.0.1:80", false),
            ("127.0.0.1:81", "127.0.0.1:80", false),
            ("unix:/a", "127.0.0.1:80", false),
        ] {
            let backend = super::super::units::parse_backend(backend).unwrap();
            assert_eq!(reaches(&backend, listener(listen)), loops, "{backend} {listen}");
        }
    }
}
