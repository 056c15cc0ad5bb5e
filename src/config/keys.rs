//! The keys of `proxy.toml`: each one's name, the setting it stands for, its bounds. Named here once; reading, writing,
//! unknown-key errors and the tests go by this list.
//!
//! The explanations are in `proxy.toml` itself, the defaults in [`Settings::unresolved`].

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use http::HeaderName;
use ipnet::IpNet;
use tracing_subscriber::filter::Targets;

use super::{
    Admin, Grace, Log, LogFormat, Plain, Reload, Route, Settings,
    units::{
        Refusal, either, format_duration, format_pace, format_size, parse_backend, parse_duration, parse_listen,
        parse_network, parse_pace, parse_pattern, parse_size, refuse,
    },
    written::Value,
};
use crate::{
    admission::{self, Memory, Pace},
    close,
    downstream::{self, BadOrigin, ClientAuth, Origin, ProxyProtocol},
    drain::{self, Readiness},
    hub::{
        self, Authorize, Replay, SlowClient,
        rpc::methods::{Triple, TripleError},
    },
    listen,
    net::{Address, SocketConfig, is_server_name},
    relay,
    upstream::{self, Addresses, Mode, Pattern, Pool, Rules, Tls},
};

/// What a key is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Name {
    pub section: &'static str,
    /// Which `[[route]]`, from 0, when that is the section.
    pub route: Option<usize>,
    pub key: &'static str,
}

/// A key, with the place in a [`Settings`] where its value lives.
pub(super) struct Key<'a> {
    pub name: Name,
    /// A reload applies it: to sessions, and whatever else, that begins after it. Else it takes a restart.
    pub is_live: bool,
    pub slot: Slot<'a>,
    /// Of a route: whether it was written there. If not, it is as in the section that is for all.
    pub is_own: Option<&'a mut bool>,
}

/// What a route is written under.
pub(super) const ROUTE: &str = "route";
/// Its own key.
pub(super) const PATH: &str = "path";
/// Its backend, in place of `upstream.address`.
pub(super) const BACKEND: &str = "upstream";
/// What its keys begin with that are those of `[pool]`.
pub(super) const POOL: &str = "pool.";
/// How many it may have in place of what is for all.
pub(super) const OVERRIDES: usize = 33;

/// What kind of value a key has, its bounds, and where it goes.
pub(super) enum Slot<'a> {
    /// An IP address and a port; port 0 means any free one.
    Listen(&'a mut SocketAddr),
    /// The same, or "off".
    ListenOrOff(&'a mut Option<SocketAddr>),
    /// `host:port` or `unix:/path`, or a list of them.
    Backends(&'a mut Addresses),
    /// Which paths a route is for.
    Path(&'a mut Option<Pattern>),
    /// "dedicated", "multiplexed" or, of a route, "shared".
    Mode(&'a mut Mode),
    /// One of a few words.
    Word(&'a mut dyn Words),
    /// Names of header fields.
    HeaderNames(&'a mut Vec<HeaderName>),
    /// Each the names of three methods.
    Subscriptions(&'a mut Vec<Triple>),
    /// Names of methods, or how they begin, with a `*` behind it.
    Methods(&'a mut Vec<String>),
    /// A whole number.
    Count(Number<'a>, RangeInclusive<u64>),
    /// Bytes. An optional number also takes 0, which means none.
    Size(Number<'a>, RangeInclusive<u64>),
    /// A duration, a multiple of the last field. An optional one also takes 0, which means none.
    Time(Time<'a>, RangeInclusive<Duration>, Duration),
    /// A Close code out of these.
    Code(&'a mut u16, &'static [RangeInclusive<u16>]),
    /// Networks.
    Networks(&'a mut Vec<IpNet>),
    /// Origins of web pages.
    Origins(&'a mut Vec<Origin>),
    /// Addresses of this host.
    Addresses(&'a mut Vec<IpAddr>),
    /// `true` or `false`.
    Switch(&'a mut bool),
    /// "auto", "off", or bytes, at least so many.
    Memory(&'a mut Memory, u64),
    /// Text of at most so many bytes.
    Text(&'a mut String, usize),
    /// The path of a file, or nothing.
    File(&'a mut String),
    /// The same, or a list of them.
    Files(&'a mut Vec<String>),
    /// A name or an address in a certificate, or nothing.
    Host(&'a mut String),
    /// "after-delay" or "immediate".
    Readiness(&'a mut Readiness),
    /// So many in a second, a minute or an hour, or "off".
    Pace(&'a mut Option<Pace>),
    /// "off", "optional" or "required".
    ClientAuth(&'a mut ClientAuth),
    /// "off" or "required".
    ProxyProtocol(&'a mut ProxyProtocol),
    /// "auto", "json" or "text".
    Format(&'a mut LogFormat),
    /// Levels of modules, as tracing's `Targets` reads them.
    Filter(&'a mut String),
}

pub(super) enum Number<'a> {
    U32(&'a mut u32),
    U64(&'a mut u64),
    Usize(&'a mut usize),
    /// 0 is `None`.
    OptionU32(&'a mut Option<u32>),
    OptionUsize(&'a mut Option<usize>),
}

pub(super) enum Time<'a> {
    Always(&'a mut Duration),
    OrOff(&'a mut Option<Duration>),
}

/// A value that is one of a few words.
pub(super) trait Words {
    /// All of them.
    fn words(&self) -> Vec<&'static str>;
    /// The one that it is.
    fn word(&self) -> &'static str;
    /// Another one; false: there is none like that.
    fn choose(&mut self, word: &str) -> bool;
}

/// What has a word for each of its values.
trait Spelled: Copy + PartialEq + 'static {
    const SPELLED: &'static [(&'static str, Self)];
}

impl<T: Spelled> Words for T {
    fn words(&self) -> Vec<&'static str> {
        Self::SPELLED.iter().map(|(word, _)| *word).collect()
    }

    fn word(&self) -> &'static str {
        Self::SPELLED.iter().find(|(_, value)| value == self).map_or("", |(word, _)| word)
    }

    fn choose(&mut self, word: &str) -> bool {
        let found = Self::SPELLED.iter().find(|(spelled, _)| *spelled == word);
        found.map(|(_, value)| *self = *value).is_some()
    }
}

impl Spelled for Option<hub::Kind> {
    const SPELLED: &'static [(&'static str, Self)] =
        &[("", None), ("broadcast", Some(hub::Kind::Broadcast)), ("rpc", Some(hub::Kind::Rpc))];
}

impl Spelled for Authorize {
    const SPELLED: &'static [(&'static str, Self)] = &[("first", Self::First), ("always", Self::Always)];
}

impl Spelled for SlowClient {
    const SPELLED: &'static [(&'static str, Self)] =
        &[("disconnect", Self::Disconnect), ("drop_oldest", Self::DropOldest), ("conflate", Self::Conflate)];
}

impl Spelled for Replay {
    const SPELLED: &'static [(&'static str, Self)] =
        &[("none", Self::None), ("last", Self::Last), ("last_n", Self::LastN)];
}

/// `PATH_MAX` (include/uapi/linux/limits.h), without the NUL.
pub(super) const PATH_BYTES: usize = 4095;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const NINE_HOURS: Duration = Duration::from_hours(9);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
const WEEK: Duration = Duration::from_hours(24 * 7);
const LONGEST_AGE: Duration = Duration::from_hours(24 * 365);
/// For a wait that may be left out.
const FROM_ZERO: RangeInclusive<Duration> = Duration::ZERO..=DAY;
/// For a wait that always has to be.
const ABOVE_ZERO: RangeInclusive<Duration> = MS..=DAY;

/// What may stand in a Close frame (RFC 6455 7.4). 1004, 1005, 1006 and 1015 never may; 1016 to 2999 are not assigned.
const ANY_CODE: &[RangeInclusive<u16>] = &[1000..=1003, 1007..=1014, 3000..=4999];
/// The server's side failed: internal error, service restart, try again later, bad gateway.
const BACKEND_CODES: &[RangeInclusive<u16>] = &[1011..=1014];
/// Going away, service restart.
const DRAIN_CODES: &[RangeInclusive<u16>] = &[1001..=1001, 1012..=1012];

/// "All control frames MUST have a payload length of 125 bytes or less" (RFC 6455 5.5), two of which a Close's code takes.
const REASON_BYTES: usize = 123;
/// No control frame may be refused for its size.
const CONTROL_FRAME_BYTES: u64 = 125;
const FILTER_BYTES: usize = 4096;
pub(super) const MAX_NETWORKS: usize = 1024;
pub(super) const MAX_ADDRESSES: usize = 256;
pub(super) const MAX_ORIGINS: usize = 256;
pub(super) const MAX_BACKENDS: usize = 64;
pub(super) const MAX_FILES: usize = 64;
pub(super) const MAX_HEADER_NAMES: usize = 64;
pub(super) const MAX_SUBSCRIPTIONS: usize = 16;
pub(super) const MAX_METHODS: usize = 64;
/// A request is compared with each of them at most.
pub(super) const MAX_ROUTES: usize = 256;

/// The methods of the subscriptions that there are most of.
const ETHEREUM: &str = "eth_subscribe eth_unsubscribe eth_subscription";

impl Settings {
    /// The defaults as `proxy.toml` says them: `listen.workers` is 0, and what depends on other settings is not computed yet.
    #[expect(clippy::too_many_lines, reason = "a line for each setting")]
    pub(super) fn unresolved() -> Self {
        let seconds = Duration::from_secs;
        Self {
            listen: listen::Config {
                address: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8080),
                backlog: 65_535,
                max_sockets: 128,
                accept_loops: 0,
                workers: 0,
                hand_off: true,
            },
            limits: admission::Config {
                max_connections: None,
                max_connections_per_address: None,
                handshakes_per_second: None,
                handshakes_per_address: None,
                handshake_delay: seconds(1),
                memory: Memory::Auto,
            },
            downstream: downstream::Config {
                header_timeout: seconds(10),
                body_rate: 500,
                header_bytes: 32 << 10,
                header_count: 100,
                retry_after: seconds(1),
                proxy_protocol: ProxyProtocol::Off,
                trusted_proxies: Vec::new(),
                tls: downstream::Tls::OFF,
                http2: downstream::Http2 { is_on: true, max_streams: 100 },
                allowed_origins: Vec::new(),
            },
            upstream: upstream::Config {
                address: Address::Tcp { host: "127.0.0.1".to_owned(), port: 9000 }.into(),
                pool: Pool {
                    mode: Mode::Dedicated,
                    prewarm: 0,
                    prewarm_max_age: seconds(15),
                    keep_alive: 32,
                    keep_alive_timeout: seconds(4),
                    max_streams: 64,
                    max_uses: 900,
                    max_connections: 16,
                    idle_timeout: seconds(10),
                    stall_timeout: seconds(10),
                    ping_interval: Some(seconds(15)),
                },
                rules: Rules::default(),
                tls: Tls::OFF,
                resolve_interval: seconds(5),
                eject_after: 2,
                eject_time: seconds(5),
                health_interval: None,
                connect_timeout: seconds(5),
                handshake_timeout: seconds(10),
                response_timeout: seconds(60),
                body_timeout: seconds(120),
                max_pending: 64,
                max_waiting: 65_536,
                queue_timeout: seconds(30),
                source_addresses: Vec::new(),
                header_bytes: 32 << 10,
                write_timeout: seconds(30),
            },
            sharing: hub::Config {
                kind: None,
                authorize: Authorize::First,
                key_headers: Vec::new(),
                ignore_headers: Vec::new(),
                max_keys: 1024,
                reconnect_grace: seconds(10),
                queue_messages: 1024,
                queue_bytes: 1 << 20,
                slow_client: SlowClient::Disconnect,
                replay: Replay::None,
                replay_messages: 16,
                batch_delay: Duration::ZERO,
                allow_client_messages: false,
                request_timeout: seconds(30),
                max_requests: 256,
                max_subscriptions: 256,
                subscriptions: vec![ETHEREUM.parse().expect("three methods")],
                notifications: Vec::new(),
            },
            relay: relay::Config {
                max_message: 16 << 20,
                max_frame: 16 << 20,
                max_control_rate: 1000,
                hold_frame: 16 << 10,
                splice_from: Some(64 << 10),
                hold_timeout: seconds(30),
                ping_interval: seconds(25),
                pong_timeout: seconds(20),
                write_timeout: seconds(30),
                max_age: None,
                max_age_jitter: 10,
                idle_timeout: None,
                close_delay: Duration::from_millis(100),
                close_handshake_timeout: seconds(2),
                client_lost_code: 1001,
                backend_lost_code: 1012,
                backend_error_code: 1014,
            },
            close: close::Config {
                patience: close::Patience { linger: seconds(2), linger_max: seconds(10) },
                max_lingering: 16_384,
            },
            drain: drain::Config {
                delay: seconds(5),
                window: seconds(20),
                quiet: Duration::from_millis(20),
                timeout: seconds(4),
                close_code: 1001,
                reason: "server is going away".to_owned(),
                readiness: Readiness::AfterDelay,
            },
            admin: Admin {
                address: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090)),
                token_file: String::new(),
                token: None,
            },
            reload: Reload { watch: Some(seconds(5)) },
            grace: Grace { period: None, backend_stop: seconds(10) },
            socket: SocketConfig {
                keepalive: Some(seconds(60)),
                recv_buffer: Some(128 << 10),
                send_buffer: Some(128 << 10),
                user_timeout: None,
            },
            log: Log { format: LogFormat::Auto, filter: "info".to_owned(), sample: 1 },
            routes: Vec::new(),
        }
    }
}

/// All keys, in the order of `proxy.toml`; behind them those of the routes.
#[rustfmt::skip] // a table
#[expect(clippy::too_many_lines, reason = "a line for each key")]
pub(super) fn keys(settings: &mut Settings) -> Vec<Key<'_>> {
    use Number::{OptionU32, OptionUsize, U32, U64, Usize};
    use Slot::{Addresses, Backends, Code, Count, Filter, Format, Listen, ListenOrOff, Networks, Size, Switch, Text};
    use Time::{Always, OrOff};
    fn time(to: &mut Duration, range: RangeInclusive<Duration>) -> Slot<'_> {
        Slot::Time(Always(to), range, MS)
    }

    // Taken apart in full, so that a new setting without a key does not go unnoticed. `_`: computed by `Settings::resolve`.
    let Settings { listen, limits, downstream, upstream, sharing, relay, close, drain, admin: Admin { address: admin, token_file, token: _ }, reload: Reload { watch }, grace: Grace { period: grace_period, backend_stop }, socket, log, routes } = settings;
    let listen::Config { address, backlog, max_sockets, accept_loops, workers, hand_off } = listen;
    let admission::Config { max_connections, max_connections_per_address, handshakes_per_second, handshakes_per_address, handshake_delay, memory } = limits;
    let downstream::Config { header_timeout, body_rate, header_bytes, header_count, retry_after, proxy_protocol, trusted_proxies, allowed_origins, tls: clients_tls, http2: downstream::Http2 { is_on: http2, max_streams: client_streams } } = downstream;
    let downstream::Tls { certificates, keys: certificate_keys, client_ca, client_auth, server: _ } = clients_tls;
    let upstream::Config {
        address: backend, pool, rules: _, tls, resolve_interval, eject_after, eject_time, health_interval, connect_timeout, handshake_timeout, response_timeout, body_timeout,
        max_pending, max_waiting, queue_timeout, source_addresses, header_bytes: _, write_timeout: _,
    } = upstream;
    let Tls { is_on: tls, ca, server_name, client_certificate, client_key, client: _ } = tls;
    let relay::Config {
        max_message, max_frame, max_control_rate, hold_frame, splice_from, hold_timeout, ping_interval, pong_timeout, write_timeout,
        max_age, max_age_jitter, idle_timeout, close_delay, close_handshake_timeout, client_lost_code, backend_lost_code, backend_error_code,
    } = relay;
    let close::Config { patience: close::Patience { linger, linger_max }, max_lingering } = close;
    let drain::Config { delay, window, quiet, timeout, close_code, reason, readiness } = drain;
    let SocketConfig { keepalive, recv_buffer, send_buffer, user_timeout: _ } = socket;
    let Log { format, filter, sample } = log;

    let live = |section, key, slot| Key { name: Name { section, route: None, key }, is_live: true, slot, is_own: None };
    // What sockets, threads, memory and ports are given out by at the start.
    let fixed = |section, key, slot| Key { is_live: false, ..live(section, key, slot) };
    let mut keys = vec![
        fixed("listen", "address", Listen(address)),
        fixed("listen", "backlog", Count(U32(backlog), 1..=MIB)),
        fixed("listen", "max_sockets", Count(Usize(max_sockets), 1..=4096)),
        fixed("listen", "accept_loops", Count(Usize(accept_loops), 0..=4096)),
        fixed("listen", "workers", Count(Usize(workers), 0..=64)),
        fixed("listen", "hand_off", Switch(hand_off)),
        // TCP_KEEPIDLE: whole seconds, at most 32767 of them (MAX_TCP_KEEPIDLE, include/net/tcp.h).
        live("listen", "keepalive", Slot::Time(OrOff(keepalive), SECOND..=NINE_HOURS, SECOND)),
        live("listen", "proxy_protocol", Slot::ProxyProtocol(proxy_protocol)),
        live("listen", "tls_certificate", Slot::Files(certificates)),
        live("listen", "tls_key", Slot::Files(certificate_keys)),
        live("listen", "tls_client_auth", Slot::ClientAuth(client_auth)),
        live("listen", "tls_client_ca", Slot::File(client_ca)),

        fixed("limits", "max_connections", Count(OptionUsize(max_connections), 0..=1_000_000)),
        live("limits", "max_connections_per_address", Count(OptionUsize(max_connections_per_address), 0..=1_000_000)),
        live("limits", "handshakes_per_second", Count(OptionU32(handshakes_per_second), 0..=1_000_000)),
        live("limits", "handshakes_per_address", Slot::Pace(handshakes_per_address)),
        live("limits", "handshake_delay", time(handshake_delay, FROM_ZERO)),
        fixed("limits", "memory", Slot::Memory(memory, 16 * MIB)),

        live("http", "header_timeout", time(header_timeout, ABOVE_ZERO)),
        live("http", "body_rate", Count(U32(body_rate), 0..=1_000_000)),
        live("http", "header_bytes", Size(Usize(header_bytes), 8 * KIB..=MIB)),
        live("http", "header_count", Count(Usize(header_count), 16..=1024)),
        // Retry-After is in whole seconds (RFC 9110 10.2.3).
        live("http", "retry_after", Slot::Time(Always(retry_after), FROM_ZERO, SECOND)),
        live("http", "trusted_proxies", Networks(trusted_proxies)),
        live("http", "allowed_origins", Slot::Origins(allowed_origins)),

        live("http2", "enabled", Switch(http2)),
        live("http2", "max_streams", Count(Usize(client_streams), 1..=1024)),

        live("upstream", "address", Backends(backend)),
        live("upstream", "resolve_interval", time(resolve_interval, MS * 100..=HOUR)),
        live("upstream", "eject_after", Count(U32(eject_after), 1..=1000)),
        live("upstream", "eject_time", time(eject_time, MS * 100..=HOUR)),
        live("upstream", "health_interval", Slot::Time(OrOff(health_interval), MS * 100..=HOUR, MS)),
        live("upstream", "connect_timeout", time(connect_timeout, ABOVE_ZERO)),
        live("upstream", "handshake_timeout", time(handshake_timeout, ABOVE_ZERO)),
        live("upstream", "response_timeout", time(response_timeout, ABOVE_ZERO)),
        live("upstream", "body_timeout", time(body_timeout, ABOVE_ZERO)),
        live("upstream", "max_pending", Count(Usize(max_pending), 1..=65_536)),
        live("upstream", "max_waiting", Count(Usize(max_waiting), 1..=1_000_000)),
        live("upstream", "queue_timeout", time(queue_timeout, ABOVE_ZERO)),
        live("upstream", "source_addresses", Addresses(source_addresses)),
        live("upstream", "tls", Switch(tls)),
        live("upstream", "tls_ca", Slot::File(ca)),
        live("upstream", "tls_server_name", Slot::Host(server_name)),
        live("upstream", "tls_client_certificate", Slot::File(client_certificate)),
        live("upstream", "tls_client_key", Slot::File(client_key)),

    ];
    keys.extend(pool_slots(pool, sharing).map(|(key, slot)| live("pool", key.trim_start_matches(POOL), slot)));
    keys.extend([
        live("websocket", "max_message", Size(U64(max_message), CONTROL_FRAME_BYTES..=1024 * GIB)),
        live("websocket", "max_frame", Size(U64(max_frame), CONTROL_FRAME_BYTES..=1024 * GIB)),
        live("websocket", "max_control_rate", Count(U32(max_control_rate), 0..=1_000_000)),
        live("websocket", "hold_frame", Size(Usize(hold_frame), KIB..=32 * KIB)),
        live("websocket", "splice_from", Size(OptionUsize(splice_from), KIB..=GIB)),
        live("websocket", "hold_timeout", time(hold_timeout, ABOVE_ZERO)),
        live("websocket", "ping_interval", time(ping_interval, FROM_ZERO)),
        live("websocket", "pong_timeout", time(pong_timeout, ABOVE_ZERO)),
        live("websocket", "write_timeout", time(write_timeout, ABOVE_ZERO)),
        live("websocket", "max_age", Slot::Time(OrOff(max_age), SECOND..=LONGEST_AGE, MS)),
        live("websocket", "max_age_jitter", Count(U32(max_age_jitter), 0..=100)),
        live("websocket", "idle_timeout", Slot::Time(OrOff(idle_timeout), SECOND..=DAY, MS)),
        live("websocket", "recv_buffer", Size(OptionUsize(recv_buffer), 4 * KIB..=64 * MIB)),
        live("websocket", "send_buffer", Size(OptionUsize(send_buffer), 4 * KIB..=64 * MIB)),

        live("close", "delay", time(close_delay, FROM_ZERO)),
        live("close", "handshake_timeout", time(close_handshake_timeout, ABOVE_ZERO)),
        live("close", "linger", time(linger, ABOVE_ZERO)),
        live("close", "linger_max", time(linger_max, ABOVE_ZERO)),
        live("close", "max_lingering", Count(Usize(max_lingering), 1..=1_000_000)),
        live("close", "client_lost_code", Code(client_lost_code, ANY_CODE)),
        live("close", "backend_lost_code", Code(backend_lost_code, BACKEND_CODES)),
        live("close", "backend_error_code", Code(backend_error_code, BACKEND_CODES)),

        live("drain", "delay", time(delay, FROM_ZERO)),
        live("drain", "window", time(window, FROM_ZERO)),
        live("drain", "quiet", time(quiet, FROM_ZERO)),
        live("drain", "timeout", time(timeout, ABOVE_ZERO)),
        live("drain", "close_code", Code(close_code, DRAIN_CODES)),
        live("drain", "reason", Text(reason, REASON_BYTES)),
        live("drain", "readiness", Slot::Readiness(readiness)),
        live("drain", "grace_period", Slot::Time(Time::OrOff(grace_period), SECOND..=WEEK, MS)),
        live("drain", "backend_stop", time(backend_stop, FROM_ZERO)),

        fixed("admin", "address", ListenOrOff(admin)),
        live("admin", "token_file", Slot::File(token_file)),

        live("reload", "watch", Slot::Time(OrOff(watch), MS * 100..=HOUR, MS)),

        fixed("log", "format", Format(format)),
        live("log", "filter", Filter(filter)),
        live("log", "sample", Count(U32(sample), 0..=MIB)),
    ]);
    for (index, route) in routes.iter_mut().enumerate() {
        let key = |key, slot, is_own| Key { name: Name { section: ROUTE, route: Some(index), key }, is_live: true, slot, is_own };
        let (path, overrides) = route.keys();
        keys.push(key(PATH, path, None));
        keys.extend(overrides.map(|(name, slot, own)| key(name, slot, Some(own))));
    }
    keys
}

/// `[pool]`, and what a route has of its own.
fn pool_slots<'a>(pool: &'a mut Pool, sharing: &'a mut hub::Config) -> [(&'static str, Slot<'a>); 29] {
    let Pool {
        mode,
        prewarm,
        prewarm_max_age,
        keep_alive,
        keep_alive_timeout,
        max_streams,
        max_uses,
        max_connections,
        idle_timeout,
        stall_timeout,
        ping_interval,
    } = pool;
    let hub::Config {
        kind,
        authorize,
        key_headers,
        ignore_headers,
        max_keys,
        reconnect_grace,
        queue_messages,
        queue_bytes,
        slow_client,
        replay,
        replay_messages,
        batch_delay,
        allow_client_messages,
        request_timeout,
        max_requests,
        max_subscriptions,
        subscriptions,
        notifications,
    } = sharing;
    let time = |to, range| Slot::Time(Time::Always(to), range, MS);
    let count = |to, range| Slot::Count(Number::Usize(to), range);
    [
        ("pool.mode", Slot::Mode(mode)),
        ("pool.prewarm", count(prewarm, 0..=1024)),
        ("pool.prewarm_max_age", time(prewarm_max_age, MS * 100..=HOUR)),
        ("pool.keep_alive", count(keep_alive, 0..=4096)),
        ("pool.keep_alive_timeout", time(keep_alive_timeout, MS..=HOUR)),
        ("pool.max_streams", count(max_streams, 1..=16_384)),
        ("pool.max_uses", count(max_uses, 0..=1_000_000)),
        ("pool.max_connections", count(max_connections, 1..=1024)),
        ("pool.idle_timeout", time(idle_timeout, Duration::ZERO..=HOUR)),
        ("pool.stall_timeout", time(stall_timeout, MS..=HOUR)),
        ("pool.ping_interval", Slot::Time(Time::OrOff(ping_interval), SECOND..=HOUR, MS)),
        ("pool.shared", Slot::Word(kind)),
        ("pool.authorize", Slot::Word(authorize)),
        ("pool.key_headers", Slot::HeaderNames(key_headers)),
        ("pool.ignore_headers", Slot::HeaderNames(ignore_headers)),
        ("pool.max_keys", count(max_keys, 1..=65_536)),
        ("pool.reconnect_grace", time(reconnect_grace, Duration::ZERO..=HOUR)),
        ("pool.queue_messages", count(queue_messages, 1..=65_536)),
        ("pool.queue_bytes", Slot::Size(Number::Usize(queue_bytes), KIB..=GIB)),
        ("pool.slow_client", Slot::Word(slow_client)),
        ("pool.replay", Slot::Word(replay)),
        ("pool.replay_messages", count(replay_messages, 1..=65_536)),
        ("pool.batch_delay", time(batch_delay, Duration::ZERO..=SECOND)),
        ("pool.allow_client_messages", Slot::Switch(allow_client_messages)),
        ("pool.request_timeout", time(request_timeout, MS..=HOUR)),
        ("pool.max_requests", count(max_requests, 1..=65_536)),
        ("pool.max_subscriptions", count(max_subscriptions, 1..=65_536)),
        ("pool.subscriptions", Slot::Subscriptions(subscriptions)),
        ("pool.notifications", Slot::Methods(notifications)),
    ]
}

/// The names of all keys, in the order of `proxy.toml`, but for those of routes.
pub(super) fn names() -> Vec<(&'static str, &'static str)> {
    keys(&mut Settings::unresolved()).into_iter().map(|key| (key.name.section, key.name.key)).collect()
}

impl Route {
    /// One of which nothing was read yet.
    pub(super) fn unresolved() -> Self {
        let Settings { upstream: upstream::Config { address, pool, .. }, sharing, .. } = Settings::unresolved();
        Self { path: None, address, pool, sharing, rules: Rules::default(), own: [false; OVERRIDES] }
    }

    /// One of which all is resolved: on `path` clients share a WebSocket (`pool.shared = "broadcast"`) to the backend of `settings`.
    pub fn broadcast(path: &str, settings: &Settings) -> Self {
        let mut route = Self { path: Some(Pattern::Exact(path.to_owned())), ..Self::unresolved() };
        for (key, mut slot, is_own) in route.keys().1 {
            let word = match key {
                "pool.mode" => "shared",
                "pool.shared" => "broadcast",
                _ => continue,
            };
            slot.read(&Value::Text(word.to_owned())).expect("a word of this key");
            *is_own = true;
        }
        route.resolve(&settings.upstream, &settings.sharing);
        route
    }

    /// What is not its own is as in the sections that are for all.
    pub(super) fn resolve(&mut self, upstream: &upstream::Config, sharing: &hub::Config) {
        let (address, pool, sharing) = (upstream.address.clone(), upstream.pool.clone(), sharing.clone());
        let mut all = Self { address, pool, sharing, ..Self::unresolved() };
        for ((_, theirs, _), (_, mut ours, is_own)) in all.keys().1.zip(self.keys().1) {
            if !*is_own {
                ours.read(&theirs.write().into()).expect("what was written by a key is read by the same key");
            }
        }
    }

    /// Its path; then what it may have of its own, and whether it has.
    pub(super) fn keys(&mut self) -> (Slot<'_>, impl Iterator<Item = (&'static str, Slot<'_>, &mut bool)>) {
        let Self { path, address, pool, sharing, rules: Rules { allow, deny, max_sessions }, own } = self;
        let slots = std::iter::once((BACKEND, Slot::Backends(address))).chain(pool_slots(pool, sharing)).chain([
            ("allow", Slot::Networks(allow)),
            ("deny", Slot::Networks(deny)),
            ("max_sessions", Slot::Count(Number::OptionUsize(max_sessions), 0..=1_000_000)),
        ]);
        (Slot::Path(path), slots.zip(own).map(|((key, slot), own)| (key, slot, own)))
    }

    /// The names of all its keys.
    pub(super) fn names() -> Vec<&'static str> {
        [PATH].into_iter().chain(Self::unresolved().keys().1.map(|(key, ..)| key)).collect()
    }
}

impl Slot<'_> {
    /// Puts a written value into its place, if it is of the right type and within its bounds.
    #[expect(clippy::too_many_lines, reason = "an arm for each kind of value")]
    pub(super) fn read(&mut self, value: &Value) -> Result<(), Refusal> {
        match self {
            Slot::Listen(to) => **to = parse_listen(value.text("an address", "0.0.0.0:8080")?)?,
            Slot::ListenOrOff(to) => {
                let text = value.text("an address or \"off\"", "127.0.0.1:9090")?;
                **to = match text {
                    "off" => None,
                    "" => return refuse("is empty", "write \"off\" for none"),
                    _ => Some(parse_listen(text)?),
                }
            }
            Slot::Backends(to) => **to = read_backends(value)?,
            Slot::Path(to) => **to = Some(parse_pattern(value.text("a path", "/chat")?)?),
            Slot::Mode(to) => {
                **to = match value.text("a text", "dedicated")? {
                    "dedicated" => Mode::Dedicated,
                    "multiplexed" => Mode::Multiplexed,
                    "shared" => Mode::Shared,
                    text => {
                        let fix = r#"use "dedicated" or "multiplexed", or "shared" in a route"#;
                        return refuse(format!("is no mode: {text:?}"), fix);
                    }
                };
            }
            Slot::Word(to) => {
                let words = to.words();
                let example = words.iter().find(|word| !word.is_empty()).copied().unwrap_or_default();
                let text = value.text("a text", example)?;
                if !to.choose(text) {
                    let words: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
                    return refuse(format!("is none of them: {text:?}"), format!("use {}", either(&words)));
                }
            }
            Slot::HeaderNames(to) => {
                **to = items(value, "names", r#"["X-Tenant"]"#, MAX_HEADER_NAMES, parse_header_name)?;
            }
            Slot::Subscriptions(to) => {
                let example = r#"["eth_subscribe eth_unsubscribe eth_subscription"]"#;
                **to = items(value, "subscriptions", example, MAX_SUBSCRIPTIONS, parse_subscription)?;
            }
            Slot::Methods(to) => {
                **to = items(value, "methods", r#"["news", "chain_*"]"#, MAX_METHODS, parse_method)?;
            }
            Slot::Count(to, range) => {
                let fix = format!("use a number from {} to {}", range.start(), range.end());
                let count = value.integer(&fix)?;
                let Some(count) = u64::try_from(count).ok().filter(|count| range.contains(count)) else {
                    return refuse(format!("is out of range: {count}"), fix);
                };
                to.set(count);
            }
            Slot::Size(to, range) => {
                let bytes = match value {
                    // Bytes without a unit need no quotes.
                    Value::Integer(bytes) => u64::try_from(*bytes).ok(),
                    _ => Some(parse_size(value.text("a size", "64KiB")?)?),
                };
                let optional = matches!(to, Number::OptionUsize(_));
                match bytes {
                    Some(bytes) if range.contains(&bytes) || (optional && bytes == 0) => {
                        to.set(bytes);
                    }
                    _ => {
                        let (least, most) = (format_size(*range.start()), format_size(*range.end()));
                        let none = if optional { ", or \"0\" for the kernel's autotuning" } else { "" };
                        return refuse(
                            format!("is out of range: {value}"),
                            format!("use a size from \"{least}\" to \"{most}\"{none}"),
                        );
                    }
                }
            }
            Slot::Time(to, range, step) => {
                let duration = match value {
                    Value::Integer(0) => {
                        return refuse("is a duration without a unit: 0", "write \"0s\"");
                    }
                    Value::Integer(number) => {
                        return refuse(
                            format!("is a duration without a unit: {number}"),
                            format!("write \"{number}ms\" or \"{number}s\""),
                        );
                    }
                    _ => parse_duration(value.text("a duration", "30s")?)?,
                };
                let optional = matches!(to, Time::OrOff(_));
                let fits = range.contains(&duration) || (optional && duration.is_zero());
                if !fits {
                    let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
                    let none = match (optional, duration.is_zero()) {
                        (true, _) => ", or \"0s\" for none",
                        (false, true) => "; this wait cannot be left out, nor be without an end",
                        (false, false) => "",
                    };
                    return refuse(
                        format!("is out of range: {value}"),
                        format!("use a duration from \"{least}\" to \"{most}\"{none}"),
                    );
                }
                // The steps are a millisecond and a second, and nothing finer than a millisecond can be written.
                if *step == SECOND && duration.subsec_millis() != 0 {
                    return refuse(
                        format!("is not a whole number of seconds: {value}"),
                        format!("write whole seconds: \"{}s\"", duration.as_secs() + 1),
                    );
                }
                match to {
                    Time::Always(to) => **to = duration,
                    Time::OrOff(to) => **to = (!duration.is_zero()).then_some(duration),
                }
            }
            Slot::Code(to, allowed) => {
                let ranges: Vec<String> = allowed
                    .iter()
                    .map(|range| match (range.start(), range.end()) {
                        (start, end) if start == end => start.to_string(),
                        (start, end) => format!("{start} to {end}"),
                    })
                    .collect();
                let fix = format!("use {}", either(&ranges));
                let code = value.integer(&fix)?;
                let known = u16::try_from(code).ok().filter(|code| allowed.iter().any(|range| range.contains(code)));
                let Some(known) = known else {
                    let what = match code {
                        1004..=1006 | 1015 => format!("is a code that must never be sent: {code}"),
                        _ => format!("is not a Close code for this: {code}"),
                    };
                    return refuse(what, fix);
                };
                **to = known;
            }
            Slot::Networks(to) => {
                **to = items(value, "networks", r#"["10.0.0.0/8", "192.168.0.0/16"]"#, MAX_NETWORKS, parse_network)?;
            }
            Slot::Origins(to) => {
                let example = r#"["https://app.example", "http://localhost:3000"]"#;
                **to = items(value, "origins", example, MAX_ORIGINS, parse_origin)?;
            }
            Slot::Addresses(to) => {
                let source = |text: &str| {
                    let usable = text.parse().ok().filter(|ip: &IpAddr| !ip.is_unspecified() && !ip.is_multicast());
                    usable.map_or_else(
                        || {
                            refuse(
                                format!("contains an item that is no address to connect from: {text:?}"),
                                "name addresses of this host: \"127.0.0.2\"; all of 127.0.0.0/8 are",
                            )
                        },
                        Ok,
                    )
                };
                **to = items(value, "addresses", r#"["127.0.0.2", "127.0.0.3"]"#, MAX_ADDRESSES, source)?;
            }
            Slot::Switch(to) => match value {
                Value::Switch(on) => **to = *on,
                Value::Text(text) if ["true", "false"].contains(&text.as_str()) => {
                    return refuse(
                        format!("must be true or false, but is a string: {text:?}"),
                        format!("write it without quotes: {text}"),
                    );
                }
                _ => {
                    return refuse(format!("must be true or false, but is {}", value.kind()), "write true or false");
                }
            },
            Slot::Memory(to, least) => {
                let bytes = match value {
                    Value::Integer(bytes) => u64::try_from(*bytes).ok(),
                    _ => match value.text("a size, \"auto\" or \"off\"", "512MiB")? {
                        "auto" => {
                            return {
                                **to = Memory::Auto;
                                Ok(())
                            };
                        }
                        "off" => {
                            return {
                                **to = Memory::Off;
                                Ok(())
                            };
                        }
                        text => Some(parse_size(text).map_err(|refusal| {
                            let fix = format!("{}; or \"auto\", or \"off\"", refusal.fix);
                            Refusal { fix, ..refusal }
                        })?),
                    },
                };
                let range = *least..=1024 * GIB;
                let Some(bytes) = bytes.filter(|bytes| range.contains(bytes)) else {
                    let (least, most) = (format_size(*range.start()), format_size(*range.end()));
                    let fix = format!("use a size from \"{least}\" to \"{most}\", \"auto\" or \"off\"");
                    return refuse(format!("is out of range: {value}"), fix);
                };
                **to = Memory::Limit(bytes);
            }
            Slot::Text(to, max_bytes) => {
                let text = value.text("a text", "server is going away")?;
                if text.len() > *max_bytes {
                    let what = format!("is too long: {} bytes of UTF-8", text.len());
                    return refuse(what, format!("use at most {max_bytes} bytes; a Close frame has no room for more"));
                }
                text.clone_into(to);
            }
            Slot::File(to) => {
                let text = value.text("a path", "/etc/tidegate/ca.pem")?;
                check_path(text)?;
                text.clone_into(to);
            }
            Slot::Files(to) => **to = read_files(value)?,
            Slot::Host(to) => {
                let text = value.text("a name", "backend.example")?;
                if !text.is_empty() && !is_server_name(text) {
                    return refuse(
                        format!("is no name of a host: {text:?}"),
                        "write it as it is in the backend's certificate, without scheme or port: \"backend.example\"",
                    );
                }
                text.clone_into(to);
            }
            Slot::Readiness(to) => {
                let text = value.text("a text", "after-delay")?;
                **to = match text {
                    "after-delay" => Readiness::AfterDelay,
                    "immediate" => Readiness::Immediate,
                    _ => return refuse(format!("is neither of both: {text:?}"), r#"use "after-delay" or "immediate""#),
                };
            }
            Slot::Pace(to) => **to = parse_pace(value.text("a rate", "20/s")?)?,
            Slot::ClientAuth(to) => {
                let text = value.text("a text", "off")?;
                let known = ClientAuth::ALL.into_iter().find(|known| known.as_str() == text);
                let fix = r#"use "off", "optional" or "required""#;
                **to = known.map_or_else(|| refuse(format!("is none of them: {text:?}"), fix), Ok)?;
            }
            Slot::ProxyProtocol(to) => {
                let text = value.text("a text", "off")?;
                let known = ProxyProtocol::ALL.into_iter().find(|known| known.as_str() == text);
                let fix = r#"use "off" or "required": it is never guessed whether there is a header"#;
                **to = known.map_or_else(|| refuse(format!("is neither of both: {text:?}"), fix), Ok)?;
            }
            Slot::Format(to) => {
                let text = value.text("a text", "auto")?;
                let Some(format) = LogFormat::ALL.into_iter().find(|format| format.as_str() == text) else {
                    return refuse(format!("is no log format: {text:?}"), r#"use "auto", "json" or "text""#);
                };
                **to = format;
            }
            Slot::Filter(to) => {
                let text = value.text("a text", "info")?;
                check_filter(text)?;
                text.clone_into(to);
            }
        }
        Ok(())
    }

    /// The value as it would be written.
    pub(super) fn write(&self) -> Plain {
        match self {
            Slot::Listen(from) => Plain::Text(from.to_string()),
            Slot::ListenOrOff(from) => {
                Plain::Text(from.map_or_else(|| "off".to_owned(), |address| address.to_string()))
            }
            Slot::Backends(from) => match from.as_slice() {
                [one] => Plain::Text(one.to_string()),
                several => Plain::List(several.iter().map(ToString::to_string).collect()),
            },
            Slot::Path(from) => Plain::Text(from.as_ref().map_or_else(String::new, ToString::to_string)),
            Slot::Mode(from) => Plain::Text(from.as_str().to_owned()),
            Slot::Word(from) => Plain::Text(from.word().to_owned()),
            Slot::HeaderNames(from) => Plain::List(from.iter().map(ToString::to_string).collect()),
            Slot::Subscriptions(from) => Plain::List(from.iter().map(ToString::to_string).collect()),
            Slot::Methods(from) => Plain::List((*from).clone()),
            Slot::Count(from, _) => Plain::Integer(from.get()),
            Slot::Size(from, _) => Plain::Text(format_size(from.get())),
            Slot::Time(Time::Always(from), ..) => Plain::Text(format_duration(**from)),
            Slot::Time(Time::OrOff(from), ..) => Plain::Text(format_duration(from.unwrap_or_default())),
            Slot::Code(from, _) => Plain::Integer(u64::from(**from)),
            Slot::Addresses(from) => Plain::List(from.iter().map(ToString::to_string).collect()),
            Slot::Switch(from) => Plain::Switch(**from),
            Slot::Memory(from, _) => Plain::Text(match from {
                Memory::Auto => "auto".to_owned(),
                Memory::Off => "off".to_owned(),
                Memory::Limit(bytes) => format_size(*bytes),
            }),
            Slot::Networks(from) => Plain::List(from.iter().map(ToString::to_string).collect()),
            Slot::Origins(from) => Plain::List(from.iter().map(ToString::to_string).collect()),
            Slot::Text(from, _) | Slot::File(from) | Slot::Host(from) | Slot::Filter(from) => {
                Plain::Text((*from).clone())
            }
            Slot::Files(from) => match from.as_slice() {
                [] => Plain::Text(String::new()),
                [one] => Plain::Text(one.clone()),
                several => Plain::List(several.to_vec()),
            },
            Slot::Readiness(from) => Plain::Text(
                match from {
                    Readiness::AfterDelay => "after-delay",
                    Readiness::Immediate => "immediate",
                }
                .to_owned(),
            ),
            Slot::Pace(from) => Plain::Text(format_pace(**from)),
            Slot::ClientAuth(from) => Plain::Text(from.as_str().to_owned()),
            Slot::ProxyProtocol(from) => Plain::Text(from.as_str().to_owned()),
            Slot::Format(from) => Plain::Text(from.as_str().to_owned()),
        }
    }
}

/// The texts of a list, each as what it stands for.
fn items<T>(
    value: &Value,
    what: &str,
    example: &str,
    most: usize,
    parse: impl Fn(&str) -> Result<T, Refusal>,
) -> Result<Vec<T>, Refusal> {
    let Value::List(items) = value else {
        let fix = match value {
            Value::Text(text) => format!("put it in brackets: [{text:?}]"),
            _ => format!("write it like {example}"),
        };
        return refuse(format!("must be a list, but is {}", value.kind()), fix);
    };
    if items.len() > most {
        return refuse(format!("has {} {what}", items.len()), format!("use at most {most}"));
    }
    let items = items.iter().enumerate().map(|(index, item)| {
        let parsed = match item {
            Value::Text(text) => parse(text),
            _ => refuse(format!("contains {}", item.kind()), format!("write {what} as strings: {example}")),
        };
        parsed.map_err(|refusal| Refusal { item: Some(index), ..refusal })
    });
    items.collect()
}

/// The name of a field that may be the same in the handshakes of several clients.
fn parse_header_name(text: &str) -> Result<HeaderName, Refusal> {
    const OWN: [&str; 9] = [
        "host",
        "connection",
        "upgrade",
        "content-length",
        "transfer-encoding",
        "te",
        "trailer",
        "keep-alive",
        "proxy-connection",
    ];
    let Ok(name) = HeaderName::from_bytes(text.as_bytes()) else {
        return refuse(
            format!("contains an item that is no name of a header field: {text:?}"),
            "write it without a colon: \"X-Tenant\"",
        );
    };
    if OWN.contains(&name.as_str()) || name.as_str().starts_with("sec-websocket-") {
        return refuse(
            format!("contains a field that is not for this: {text:?}"),
            "leave it out: what belongs to a connection or to its handshake is tidegate's own, and Host and the subprotocols always count",
        );
    }
    Ok(name)
}

fn parse_subscription(text: &str) -> Result<Triple, Refusal> {
    text.parse().or_else(|error| match error {
        TripleError::Count => refuse(
            format!("contains an item that is not three methods: {text:?}"),
            "write the method that subscribes, the one that unsubscribes, and that of the notifications: \"eth_subscribe eth_unsubscribe \
             eth_subscription\"",
        ),
        TripleError::Stars(_) | TripleError::Unbound(_) => refuse(
            format!("contains an item with {error}: {text:?}"),
            "one * in a name stands for what is the same in all three: \"*Subscribe *Unsubscribe *Notification\"",
        ),
    })
}

fn parse_method(text: &str) -> Result<String, Refusal> {
    let name = text.strip_suffix('*').unwrap_or(text);
    let is_whole = name.chars().all(|letter| letter != '*' && !letter.is_whitespace() && !letter.is_control());
    if text.is_empty() || !is_whole {
        return refuse(
            format!("contains an item that is no method: {text:?}"),
            "write its name, or how it begins and a * behind it: \"news\", \"chain_*\"",
        );
    }
    Ok(text.to_owned())
}

fn parse_origin(text: &str) -> Result<Origin, Refusal> {
    text.parse().or_else(|BadOrigin { meant }| {
        let fix = match meant {
            Some(meant) => format!("browsers send {meant:?}: write it like that"),
            None => "write scheme and host, and the port where it is not the usual one: \"https://app.example\"; or \"null\" for files and \
                     sandboxed frames. To allow all leave the list empty"
                .to_owned(),
        };
        refuse(format!("contains an item that is no origin: {text:?}"), fix)
    })
}

impl Number<'_> {
    fn set(&mut self, value: u64) {
        const WITHIN: &str = "the bounds of every key fit its type";
        match self {
            Number::U32(to) => **to = u32::try_from(value).expect(WITHIN),
            Number::U64(to) => **to = value,
            Number::Usize(to) => **to = usize::try_from(value).expect(WITHIN),
            Number::OptionU32(to) => **to = (value > 0).then(|| u32::try_from(value).expect(WITHIN)),
            Number::OptionUsize(to) => {
                **to = (value > 0).then(|| usize::try_from(value).expect(WITHIN));
            }
        }
    }

    fn get(&self) -> u64 {
        let wide = |value: usize| u64::try_from(value).expect("no pointer is wider than 64 bits");
        match self {
            Number::U32(from) => u64::from(**from),
            Number::U64(from) => **from,
            Number::Usize(from) => wide(**from),
            Number::OptionU32(from) => u64::from(from.unwrap_or_default()),
            Number::OptionUsize(from) => wide(from.unwrap_or_default()),
        }
    }
}

fn check_path(text: &str) -> Result<(), Refusal> {
    if text.len() > PATH_BYTES || text.contains('\0') {
        return refuse("is no path", format!("a path has at most {PATH_BYTES} bytes, and no NUL"));
    }
    Ok(())
}

/// The path of a file, or several, or none.
fn read_files(value: &Value) -> Result<Vec<String>, Refusal> {
    let items = match value {
        Value::Text(text) if text.is_empty() => return Ok(Vec::new()),
        Value::Text(text) => {
            check_path(text)?;
            return Ok(vec![text.clone()]);
        }
        Value::List(items) => items,
        _ => {
            let fix = r#"write it like "/etc/tidegate/tls/tls.crt", or like ["a.pem", "b.pem"]"#;
            return refuse(format!("must be a path or a list of them, but is {}", value.kind()), fix);
        }
    };
    if items.len() > MAX_FILES {
        return refuse(format!("has {} files", items.len()), format!("use at most {MAX_FILES}"));
    }
    let files = items.iter().enumerate().map(|(index, item)| {
        let file = match item {
            Value::Text(text) if text.is_empty() => refuse("contains an empty path", "leave it out, or name a file"),
            Value::Text(text) => check_path(text).map(|()| text.clone()),
            _ => refuse(format!("contains {}", item.kind()), r#"write paths as strings: ["a.pem", "b.pem"]"#),
        };
        file.map_err(|refusal| Refusal { item: Some(index), ..refusal })
    });
    files.collect()
}

/// An address of a backend, or several.
fn read_backends(value: &Value) -> Result<Addresses, Refusal> {
    const FIX: &str = r#"write it like "127.0.0.1:9000", or like ["10.0.0.1:9000", "10.0.0.2:9000"]"#;
    let items = match value {
        Value::Text(text) => return Ok(parse_backend(text)?.into()),
        Value::List(items) => items,
        _ => return refuse(format!("must be an address or a list of them, but is {}", value.kind()), FIX),
    };
    if items.len() > MAX_BACKENDS {
        return refuse(format!("has {} addresses", items.len()), format!("use at most {MAX_BACKENDS}"));
    }
    let mut addresses: Vec<Address> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let address = match item {
            Value::Text(text) => parse_backend(text),
            _ => refuse(format!("contains {}", item.kind()), r#"write addresses as strings: ["127.0.0.1:9000"]"#),
        };
        let address = address.and_then(|address| {
            if addresses.contains(&address) {
                return refuse(
                    format!("contains an address twice: {address}"),
                    "name each once: all get the same share",
                );
            }
            Ok(address)
        });
        addresses.push(address.map_err(|refusal| Refusal { item: Some(index), ..refusal })?);
    }
    Addresses::new(addresses).map_or_else(|| refuse("is an empty list", FIX), Ok)
}

/// What `Targets` refuses, and what it takes but nobody means: it reads a bare "inof" as the name of a module.
fn check_filter(text: &str) -> Result<(), Refusal> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    if text.trim().is_empty() {
        return refuse("is empty", "write \"off\" to log nothing");
    }
    if text.len() > FILTER_BYTES {
        return refuse(format!("is too long: {} bytes", text.len()), format!("use at most {FILTER_BYTES} bytes"));
    }
    for word in text.split(',').map(str::trim) {
        let lower = word.to_ascii_lowercase();
        let nearest = LEVELS
            .iter()
            .find(|level| lower == "warning" && **level == "warn" || strsim::damerau_levenshtein(level, &lower) == 1);
        if let Some(level) = nearest.filter(|_| !LEVELS.contains(&lower.as_str())) {
            return refuse(format!("has an unknown level: {word:?}"), format!("did you mean \"{level}\"?"));
        }
    }
    match text.parse::<Targets>() {
        // It would take a span, of which tidegate has none, for a part of a module's name.
        Ok(_) if !text.contains(['[', '{', ' ']) => Ok(()),
        _ => refuse(
            format!("is no filter: {text:?}"),
            r#"write a level, or module=level pairs with commas between them: "info,tidegate=debug""#,
        ),
    }
}
