//! The words that labels and logs have for what is counted: fixed sets, so that the number of series is bounded. Nothing of the metrics crate.

/// Why WebSockets that should share a connection have their own. The backend: speaks no HTTP/2, ends it before its SETTINGS, or sends
/// none; has no extended CONNECT, refuses what it then accepts, gives no answer, wants HTTP/1.1 for this one; was found to be like that
/// (`known`). The connection was lost twice before anything was sent (`unsent`), the drain or a reload has begun (`closing`), or the
/// client's Host can't be said in HTTP/2.
pub const FALLBACKS: [&str; 11] = [
    "no_http2",
    "closed",
    "no_settings",
    "no_extension",
    "fails",
    "unanswered",
    "required",
    "known",
    "unsent",
    "closing",
    "host",
];

/// How a request that wanted something of the backend went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// 101 on both legs.
    Accepted,
    /// The backend answered with something else.
    Refused,
    /// The same, when it was shown who wants to join others (`pool.authorize`).
    Unauthorized,
    /// No valid WebSocket handshake; the backend was not asked.
    Invalid,
    /// Of a web page that is not among `http.allowed_origins`; the backend was not asked.
    Origin,
    /// Its route is not for clients of that address; the backend was not asked.
    Denied,
    /// The backend answered 101 with a wrong or missing header, or no HTTP.
    BadBackend,
    /// Not connected.
    Unreachable,
    /// A deadline passed.
    Timeout,
    /// Too many at once.
    Shed,
    /// The client left before the answer.
    Abandoned,
}

impl Handshake {
    pub(super) const ALL: [Self; 11] = [
        Self::Accepted,
        Self::Refused,
        Self::Unauthorized,
        Self::Invalid,
        Self::Origin,
        Self::Denied,
        Self::BadBackend,
        Self::Unreachable,
        Self::Timeout,
        Self::Shed,
        Self::Abandoned,
    ];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
            Self::Unauthorized => "unauthorized",
            Self::Invalid => "invalid",
            Self::Origin => "origin",
            Self::Denied => "denied",
            Self::BadBackend => "bad_backend",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Shed => "shed",
            Self::Abandoned => "abandoned",
        }
    }
}

/// How a TLS handshake with a client went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsHandshake {
    /// As it should.
    Full,
    /// The same, shorter, with a ticket of an earlier session.
    Resumed,
    /// The client does not believe our certificate.
    Distrusted,
    /// The client has no certificate, and must have one.
    NoCertificate,
    /// Its certificate is not good.
    BadCertificate,
    /// Nothing could be agreed on, or what came was no TLS.
    Failed,
    /// It was plain HTTP.
    PlainHttp,
    /// The deadline passed.
    Timeout,
    /// The client left.
    Abandoned,
    /// There was no memory for it.
    Shed,
}

impl TlsHandshake {
    pub(super) const ALL: [Self; 10] = [
        Self::Full,
        Self::Resumed,
        Self::Distrusted,
        Self::NoCertificate,
        Self::BadCertificate,
        Self::Failed,
        Self::PlainHttp,
        Self::Timeout,
        Self::Abandoned,
        Self::Shed,
    ];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Resumed => "resumed",
            Self::Distrusted => "distrusted",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::Failed => "failed",
            Self::PlainHttp => "plain_http",
            Self::Timeout => "timeout",
            Self::Abandoned => "abandoned",
            Self::Shed => "shed",
        }
    }
}

/// What came of waiting for a PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyResult {
    /// It says who the client is.
    Accepted,
    /// It says that it is the balancer itself, or that nobody knows.
    Local,
    /// It would be of somebody who may not send one.
    Untrusted,
    /// Something else came.
    Missing,
    /// It is not as it should be, or too long.
    Broken,
    /// The deadline passed.
    Timeout,
    /// The connection ended before it was there.
    Abandoned,
}

impl ProxyResult {
    pub(super) const ALL: [Self; 7] =
        [Self::Accepted, Self::Local, Self::Untrusted, Self::Missing, Self::Broken, Self::Timeout, Self::Abandoned];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Local => "local",
            Self::Untrusted => "untrusted",
            Self::Missing => "missing",
            Self::Broken => "broken",
            Self::Timeout => "timeout",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Of connections that wait for their use.
pub(super) const IDLE: [&str; 2] = ["prewarm", "keep_alive"];

/// What came of looking for a connection that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleUse {
    /// It was used.
    Hit,
    /// None was there.
    Miss,
    /// The backend had ended it, or did so before a byte of an answer.
    Stale,
}

impl IdleUse {
    pub(super) const ALL: [Self; 3] = [Self::Hit, Self::Miss, Self::Stale];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
        }
    }
}

/// What came of a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReloadResult {
    /// Everything that may change while it runs is as it was written.
    Applied,
    /// Something is wrong with it; all is as it was.
    Rejected,
    /// It was not read, or not looked at: the process is about to end.
    Refused,
}

impl ReloadResult {
    pub(super) const ALL: [Self; 3] = [Self::Applied, Self::Rejected, Self::Refused];

    /// For people and programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Rejected => "rejected",
            Self::Refused => "refused",
        }
    }
}

/// Why clients that share a WebSocket missed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gap {
    /// One was too slow.
    Slow,
    /// The backend was lost, for all of them.
    Lost,
}

/// By the name of the label.
pub(super) const GAPS: [&str; 2] = ["slow", "lost"];

/// What became of the search for a backend that was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconnect {
    /// It is back.
    Connected,
    /// It says no, or is another one.
    Refused,
    /// It was not back in time.
    Expired,
    /// Nobody waits for it.
    Unused,
}

impl Reconnect {
    pub(super) const ALL: [Self; 4] = [Self::Connected, Self::Refused, Self::Expired, Self::Unused];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::Unused => "unused",
        }
    }
}

/// Why a JSON-RPC message on a WebSocket that clients share was for nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RpcDrop {
    /// The backend's is no JSON-RPC.
    Malformed,
    /// The backend's is no text.
    Binary,
    /// An error of the backend's about something that it did not understand.
    WithoutId,
    /// The backend's answer to what is not asked, or not any more.
    Stray,
    /// A notification of a subscription that nobody has.
    Unheard,
    /// A notification by a method that is of no subscription, nor for all.
    Unlisted,
    /// A notification of which too many waited for their client to know the id.
    Overflow,
    /// With the id that its client knows it would be too long.
    TooLong,
    /// A response, by a client.
    ClientResponse,
}

impl RpcDrop {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Malformed,
        Self::Binary,
        Self::WithoutId,
        Self::Stray,
        Self::Unheard,
        Self::Unlisted,
        Self::Overflow,
        Self::TooLong,
        Self::ClientResponse,
    ];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Binary => "binary",
            Self::WithoutId => "without_id",
            Self::Stray => "stray",
            Self::Unheard => "unheard",
            Self::Unlisted => "unlisted",
            Self::Overflow => "overflow",
            Self::TooLong => "too_long",
            Self::ClientResponse => "client_response",
        }
    }
}

/// What became of a JSON-RPC request on a WebSocket that clients share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RpcResult {
    /// The backend's result.
    Answered,
    /// The backend's error.
    Error,
    /// No answer in time.
    Timeout,
    /// The backend was lost before it.
    Lost,
    /// Its client has left.
    Left,
    /// It was not passed on.
    Refused,
}

impl RpcResult {
    pub(super) const ALL: [Self; 6] =
        [Self::Answered, Self::Error, Self::Timeout, Self::Lost, Self::Left, Self::Refused];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Lost => "lost",
            Self::Left => "left",
            Self::Refused => "refused",
        }
    }
}

/// What clients who share a WebSocket may suffer, for the live page: their backend was lost, it was not found again, they were too slow, their request
/// was not answered in time.
pub(super) const SHARED: [&str; 4] = ["lost", "given_up", "slow", "rpc_timeout"];

/// What is done about slow clients, in the order of `hub::SlowClient`.
pub(super) const SLOW_CLIENTS: [&str; 3] = ["disconnect", "drop_oldest", "conflate"];

pub(super) const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// The causes of [`Metrics::abnormal`].
pub const ABNORMAL: [&str; 15] = [
    "client_fin",
    "client_reset",
    "client_silent",
    "client_stalled",
    "client_violation",
    "client_no_answer",
    "backend_fin",
    "backend_reset",
    "backend_silent",
    "backend_stalled",
    "backend_violation",
    "backend_no_answer",
    "cut_inside_frame",
    "drain_cut",
    "panic",
];

/// How sockets go after their last wait.
pub const LINGERED: [&str; 5] = ["fin", "acked", "reset", "expired", "evicted"];

/// Who begins the end of a session.
pub const INITIATORS: [&str; 3] = ["client", "backend", "tidegate"];

/// Codes by name as far as RFC 6455 and IANA name them; the rest by range, so that the set stays fixed.
pub(super) const CODES: [&str; 16] = [
    "none", "1000", "1001", "1002", "1003", "1007", "1008", "1009", "1010", "1011", "1012", "1013", "1014", "3xxx",
    "4xxx", "other",
];

/// The index of a code's name in [`CODES`].
pub(super) const fn code_class(code: Option<u16>) -> usize {
    match code {
        None => 0,
        Some(code @ 1000..=1003) => code as usize - 999,
        Some(code @ 1007..=1014) => code as usize - 1002,
        Some(3000..=3999) => 13,
        Some(4000..=4999) => 14,
        Some(_) => 15,
    }
}

/// What the live page shows of the kernel's counters: a name as in `/metrics`, a group and a field.
pub const KERNEL: [(&str, &str, &str); 11] = [
    ("listen_overflows", "TcpExt", "ListenOverflows"),
    ("listen_drops", "TcpExt", "ListenDrops"),
    ("tcp_aborts on_data", "TcpExt", "TCPAbortOnData"),
    ("tcp_aborts on_close", "TcpExt", "TCPAbortOnClose"),
    ("tcp_aborts on_memory", "TcpExt", "TCPAbortOnMemory"),
    ("tcp_aborts on_timeout", "TcpExt", "TCPAbortOnTimeout"),
    ("tcp_aborts on_linger", "TcpExt", "TCPAbortOnLinger"),
    ("tcp_aborts failed", "TcpExt", "TCPAbortFailed"),
    ("tcp_out_rsts", "Tcp", "OutRsts"),
    ("tcp_estab_resets", "Tcp", "EstabResets"),
    ("tcp_timeouts", "TcpExt", "TCPTimeouts"),
];
