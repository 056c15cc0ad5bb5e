//! Log lines as JSON: an object each, with the fields of the event beside `timestamp` and `level`. And [`log_line!`], for what is
//! said of each session.
//!
//! tracing-subscriber has such lines too. There each value goes through several writers and is looked at byte by byte in each of them: two
//! lines took as many instructions as all else of a session. What has to be escaped is `serde_json`'s.
//!
//! tracing hands over each value of an event by itself, and what is displayed goes through `fmt`. That is nothing for what is said now and
//! then, and was an eighth of a session for its two lines, which have thirty fields. So [`log_line!`] asks tracing whether its line is wanted,
//! and if these lines are what wants it, writes its fields where they are to go. For any other listener it is an event.

use std::{
    cell::Cell,
    fmt::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use tracing::{
    Event, Subscriber,
    callsite::{Callsite as _, DefaultCallsite},
    dispatcher::get_default,
    field::{DisplayValue, Field, Visit, display},
    level_filters::LevelFilter,
};
use tracing_subscriber::{Layer, layer::Context};

use crate::{log_queue::LogQueue, net::Dotted};

/// Most lines are shorter, in bytes.
const USUAL: usize = 1024;
/// What a thread keeps for its next line, in bytes.
const MAX_KEPT: usize = 16 * 1024;

thread_local! {
    /// The room of the line before. Absent while there is a line in it.
    static KEPT: Cell<Option<Box<LogLine>>> = const { Cell::new(None) };
}

/// Says a line of which there is one for each session: `log_line!(INFO, "open", path, route = unquoted(route))` is the event
/// `info!(path, %route, "open")`, for a fraction of its instructions where lines are JSON. Its values are those that are [`LogValue`]; in its
/// message nothing has to be escaped.
macro_rules! log_line {
    ($level:ident, $message:literal, $($field:ident $(= $value:expr)?),+ $(,)?) => {{
        use $crate::log_lines::{Listener, LogValue, listener};
        static METADATA: tracing::Metadata<'static> = tracing::metadata! {
            name: concat!("line ", $message),
            target: module_path!(),
            level: tracing::Level::$level,
            fields: &["message", $(stringify!($field)),+],
            callsite: &CALLSITE,
            kind: tracing::metadata::Kind::EVENT,
        };
        // tracing keeps in it whether somebody listens.
        static CALLSITE: tracing::callsite::DefaultCallsite = tracing::callsite::DefaultCallsite::new(&METADATA);
        // Values are computed in one of the arms.
        match listener(&CALLSITE) {
            Listener::Nobody => {}
            Listener::Json(mut line) => {
                line.put($crate::log_lines::log_line!(@bytes "\",\"level\":\"", stringify!($level), "\",\"message\":\"", $message, "\""));
                $(
                    let name = $crate::log_lines::log_line!(@bytes ",\"", stringify!($field), "\":");
                    LogValue::json(&$crate::log_lines::log_line!(@value $field $(= $value)?), name, &mut line);
                )+
                line.end();
            }
            Listener::Another => {
                tracing::event!(
                    tracing::Level::$level,
                    $($field = LogValue::traced(&$crate::log_lines::log_line!(@value $field $(= $value)?)),)+
                    $message
                );
            }
        }
    }};
    (@value $field:ident) => { $field };
    (@value $field:ident = $value:expr) => { $value };
    (@bytes $($part:expr),+) => {{
        const TEXT: &str = concat!($($part),+);
        const BYTES: &[u8; TEXT.len()] = TEXT.as_bytes().first_chunk().expect("it is as long as it is");
        BYTES
    }};
}
pub(crate) use log_line;

/// See the module.
pub(crate) struct JsonLines(LogQueue);

impl JsonLines {
    pub(crate) const fn new(queue: LogQueue) -> Self {
        Self(queue)
    }

    #[expect(clippy::unnecessary_box_returns, reason = "it comes in one, and is kept in it")]
    fn begin(&self) -> Box<LogLine> {
        // What a value's own code says meanwhile, and a thread that ends, have a room of their own.
        let mut line = KEPT.try_with(Cell::take).ok().flatten().unwrap_or_default();
        // No clock of a host with a log is set to before 1970.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.begin(since.as_secs(), since.subsec_micros());
        // Most threads have one log, whose queue stays with their room: its references are counted by all of them.
        if line.queue.as_ref().is_none_or(|queue| !queue.is(&self.0)) {
            line.queue = Some(self.0.clone());
        }
        line
    }
}

impl<S: Subscriber> Layer<S> for JsonLines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = self.begin();
        line.put(b"\",\"level\":\"");
        line.put_all(event.metadata().level().as_str().as_bytes());
        line.put(b"\"");
        event.record(&mut *line);
        line.end();
    }
}

/// Who wants a line.
pub(crate) enum Listener {
    Nobody,
    /// [`JsonLines`]: to be ended with [`LogLine::end`].
    Json(Box<LogLine>),
    /// Somebody who is told of events.
    Another,
}

/// For [`log_line!`].
pub(crate) fn listener(callsite: &'static DefaultCallsite) -> Listener {
    if *callsite.metadata().level() > LevelFilter::current() {
        return Listener::Nobody;
    }
    let interest = callsite.interest();
    if interest.is_never() {
        return Listener::Nobody;
    }
    get_default(|listener| match listener.downcast_ref::<JsonLines>() {
        _ if !interest.is_always() && !listener.enabled(callsite.metadata()) => Listener::Nobody,
        Some(lines) => Listener::Json(lines.begin()),
        None => Listener::Another,
    })
}

/// What [`log_line!`] can say.
pub(crate) trait LogValue {
    /// As tracing has it.
    type Traced<'a>: tracing::Value
    where
        Self: 'a;

    fn traced(&self) -> Self::Traced<'_>;

    /// Appends it behind its name, which has a comma before it and a colon behind it.
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine);
}

impl LogValue for u64 {
    type Traced<'a> = Self;

    fn traced(&self) -> Self {
        *self
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.number(*self);
    }
}

impl LogValue for u16 {
    type Traced<'a> = Self;

    fn traced(&self) -> Self {
        *self
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.code(*self);
    }
}

impl LogValue for bool {
    type Traced<'a> = Self;

    fn traced(&self) -> Self {
        *self
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.flag(*self);
    }
}

impl LogValue for &str {
    type Traced<'a>
        = &'a str
    where
        Self: 'a;

    fn traced(&self) -> &str {
        self
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.text(self);
    }
}

/// `None` is not said.
impl<T: LogValue> LogValue for Option<T> {
    type Traced<'a>
        = Option<T::Traced<'a>>
    where
        Self: 'a;

    fn traced(&self) -> Self::Traced<'_> {
        self.as_ref().map(T::traced)
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        if let Some(value) = self {
            value.json(name, line);
        }
    }
}

/// A word of ours, in which nothing has to be escaped: it is not looked for.
pub(crate) const fn word(word: &'static str) -> Word {
    Word(word)
}

/// See [`word`].
pub(crate) struct Word(&'static str);

impl LogValue for Word {
    type Traced<'a> = &'static str;

    fn traced(&self) -> &'static str {
        self.0
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.plain(self.0);
    }
}

/// A text that has no quotes around it where lines are text.
pub(crate) const fn unquoted(text: &str) -> Unquoted<'_> {
    Unquoted(text)
}

/// See [`unquoted`].
pub(crate) struct Unquoted<'a>(&'a str);

impl AsRef<str> for Unquoted<'_> {
    fn as_ref(&self) -> &str {
        self.0
    }
}

impl LogValue for Unquoted<'_> {
    type Traced<'a>
        = DisplayValue<&'a str>
    where
        Self: 'a;

    fn traced(&self) -> Self::Traced<'_> {
        display(self.0)
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        self.0.json(name, line);
    }
}

/// A text that has been looked at before: `is_plain` of it.
pub(crate) const fn checked<T>(text: T, is_plain: bool) -> Checked<T> {
    Checked { text, is_plain }
}

/// See [`checked`].
pub(crate) struct Checked<T> {
    text: T,
    is_plain: bool,
}

impl<T: LogValue + AsRef<str>> LogValue for Checked<T> {
    type Traced<'a>
        = T::Traced<'a>
    where
        Self: 'a;

    fn traced(&self) -> Self::Traced<'_> {
        self.text.traced()
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        if self.is_plain {
            line.plain(self.text.as_ref());
        } else {
            line.text(self.text.as_ref());
        }
    }
}

impl LogValue for SocketAddr {
    type Traced<'a> = DisplayValue<&'a Self>;

    fn traced(&self) -> Self::Traced<'_> {
        display(self)
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        let Self::V4(address) = self else { return Shown(self).json(name, line) };
        line.put(name);
        line.put(b"\"");
        line.dotted(*address.ip());
        line.put(b":");
        line.number(address.port().into());
        line.put(b"\"");
    }
}

/// What most lines lack, by its `Display`.
pub(crate) const fn shown<T: fmt::Display>(value: T) -> Shown<T> {
    Shown(value)
}

/// See [`shown`].
pub(crate) struct Shown<T>(T);

impl<T: fmt::Display> LogValue for Shown<T> {
    type Traced<'a>
        = DisplayValue<&'a T>
    where
        Self: 'a;

    fn traced(&self) -> Self::Traced<'_> {
        display(&self.0)
    }

    #[inline]
    fn json<const N: usize>(&self, name: &[u8; N], line: &mut LogLine) {
        line.put(name);
        line.shown(format_args!("{}", self.0));
    }
}

/// A line that lacks its end.
pub(crate) struct LogLine {
    /// All of it can be written to: so each write looks once whether there is enough of it.
    room: Vec<u8>,
    length: usize,
    /// Of its moment, which the line before may have been in too; and the length up to the point behind it.
    second: Option<u64>,
    until_second: usize,
    /// Where it goes.
    queue: Option<LogQueue>,
}

impl Default for LogLine {
    fn default() -> Self {
        Self { room: vec![0; USUAL], length: 0, second: None, until_second: 0, queue: None }
    }
}

impl LogLine {
    /// So many bytes, for which there is always room.
    #[inline]
    fn room(&mut self, length: usize) -> &mut [u8] {
        let (begin, end) = (self.length, self.length + length);
        if self.room.len() < end {
            self.grow(end);
        }
        self.length = end;
        &mut self.room[begin..end]
    }

    #[cold]
    fn grow(&mut self, end: usize) {
        self.room.resize(end.max(2 * self.room.len()), 0);
    }

    /// What is known when this is compiled is copied in a few registers.
    #[inline]
    pub(crate) fn put<const N: usize>(&mut self, bytes: &[u8; N]) {
        if let Some(room) = self.room.get_mut(self.length..).and_then(|room| room.first_chunk_mut()) {
            *room = *bytes;
            self.length += N;
        } else {
            self.put_beyond(bytes);
        }
    }

    #[cold]
    fn put_beyond(&mut self, bytes: &[u8]) {
        self.put_all(bytes);
    }

    fn put_all(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// In place of what was there, with its moment since 1970 as RFC 3339 has it, in UTC, to the microsecond.
    fn begin(&mut self, second: u64, micros: u32) {
        if self.second != Some(second) {
            self.second = Some(second);
            self.length = 0;
            self.put(b"{\"timestamp\":\"");
            self.put(&until_second(second));
            self.until_second = self.length;
        }
        // Up to there it is as in the line before.
        self.length = self.until_second;
        let mut behind = *b"000000Z";
        for (at, number) in [(0, micros / 10_000), (2, micros / 100 % 100), (4, micros % 100)] {
            [behind[at], behind[at + 1]] = two_digits(number);
        }
        self.put(&behind);
    }

    /// Hands it over.
    pub(crate) fn end(mut self: Box<Self>) {
        self.put(b"}\n");
        if let Some(queue) = &self.queue {
            queue.put(&self.room[..self.length]);
        }
        if self.room.len() <= MAX_KEPT {
            let _ = KEPT.try_with(|kept| kept.set(Some(self)));
        }
    }

    /// Most have a digit or two.
    #[inline]
    fn number(&mut self, number: u64) {
        if number < 10 {
            self.put(&[b'0' + (number % 10) as u8]);
        } else {
            self.long_number(number);
        }
    }

    fn long_number(&mut self, number: u64) {
        let low = (number % 10_000) as u32;
        let ([thousands, hundreds], [tens, ones]) = (two_digits(low / 100), two_digits(low % 100));
        let digits = [thousands, hundreds, tens, ones];
        if number >= 10_000 {
            self.number(number / 10_000);
            return self.put(&digits);
        }
        // All four are written, those before the first one that counts behind the others, where what comes next is written over them.
        let ahead = usize::from(number < 1_000) + usize::from(number < 100);
        self.put(&(u32::from_be_bytes(digits) << (8 * ahead)).to_be_bytes());
        self.length -= ahead;
    }

    fn dotted(&mut self, address: Ipv4Addr) {
        let dotted = Dotted::new(address);
        // All of its room is written: what comes next is written over what is too much.
        self.put(dotted.room());
        self.length -= dotted.room().len() - dotted.as_bytes().len();
    }

    /// Most have four digits.
    fn code(&mut self, code: u16) {
        let code = u32::from(code);
        if (1_000..10_000).contains(&code) {
            let ([thousands, hundreds], [tens, ones]) = (two_digits(code / 100), two_digits(code % 100));
            self.put(&[thousands, hundreds, tens, ones]);
        } else {
            self.number(code.into());
        }
    }

    fn flag(&mut self, flag: bool) {
        if flag {
            self.put(b"true");
        } else {
            self.put(b"false");
        }
    }

    #[inline]
    fn text(&mut self, text: &str) {
        if text.is_empty() {
            self.put(b"\"\"");
        } else if is_plain(text.as_bytes()) {
            self.plain(text);
        } else {
            self.escaped(text);
        }
    }

    /// Of which nothing has to be escaped.
    fn plain(&mut self, text: &str) {
        if let [first, room @ .., last] = self.room(text.len() + 2) {
            *first = b'"';
            copy(text.as_bytes(), room);
            *last = b'"';
        }
    }

    #[cold]
    fn escaped(&mut self, text: &str) {
        self.put_all(Value::from(text).to_string().as_bytes());
    }

    /// It is written as it is, and once more if that was wrong.
    fn shown(&mut self, text: fmt::Arguments<'_>) {
        let begin = self.length;
        self.put(b"\"");
        // To memory nothing fails.
        let _ = self.write_fmt(text);
        let shown = &self.room[begin + 1..self.length];
        if is_plain(shown) {
            self.put(b"\"");
        } else {
            let shown = String::from_utf8_lossy(shown).into_owned();
            self.length = begin;
            self.text(&shown);
        }
    }

    fn name(&mut self, field: &Field) {
        self.put(b",\"");
        self.put_all(field.name().as_bytes());
        self.put(b"\":");
    }

    fn displayed(&mut self, field: &Field, number: impl fmt::Display) {
        self.name(field);
        let _ = write!(self, "{number}");
    }
}

impl fmt::Write for LogLine {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put_all(text.as_bytes());
        Ok(())
    }
}

impl Visit for LogLine {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.displayed(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.displayed(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.name(field);
        self.number(value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.name(field);
        self.flag(value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.name(field);
        self.text(value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.name(field);
        self.shown(format_args!("{value:?}"));
    }
}

/// As `copy_from_slice`: both are of one length. Most texts of a line are so short that to call the C library takes longer than to copy
/// them. The last bytes overlap with those before.
#[inline]
fn copy(from: &[u8], to: &mut [u8]) {
    fn ends<const N: usize>(from: &[u8], to: &mut [u8]) {
        if let (Some(first), Some(last)) = (from.first_chunk::<N>(), from.last_chunk::<N>())
            && let Some(end) = to.last_chunk_mut()
        {
            *end = *last;
            if let Some(begin) = to.first_chunk_mut() {
                *begin = *first;
            }
        }
    }
    match from.len() {
        4..=7 => ends::<4>(from, to),
        8..=16 => ends::<8>(from, to),
        _ => to.copy_from_slice(from),
    }
}

/// JSON takes it as it is: it has no quote, no backslash, and nothing below a space. Eight bytes at once: one by one they took as long
/// as all else of a line.
#[inline(never)]
pub(crate) fn is_plain(bytes: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHEST: u64 = u64::from_ne_bytes([0x80; 8]);
    // "Bit Twiddling Hacks", "Determine if a word has a byte less than n": exact for whether there is one.
    let less = |word: u64, than: u8| word.wrapping_sub(ONES * u64::from(than)) & !word;
    let has_odd = |word: u64| {
        let is_byte = |byte: u8| less(word ^ (ONES * u64::from(byte)), 1);
        (less(word, b' ') | is_byte(b'"') | is_byte(b'\\')) & HIGHEST != 0
    };
    // The last ones overlap with those before.
    if let Some(last) = bytes.last_chunk() {
        if has_odd(u64::from_ne_bytes(*last)) {
            return false;
        }
        return !bytes[..bytes.len() - 1].as_chunks().0.iter().any(|word| has_odd(u64::from_ne_bytes(*word)));
    }
    if let (Some([a, b, c, d]), Some([e, f, g, h])) = (bytes.first_chunk(), bytes.last_chunk()) {
        return !has_odd(u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
    }
    !bytes.iter().any(|byte| matches!(byte, 0..b' ' | b'"' | b'\\'))
}

/// Of a moment this many seconds after 1970 began.
fn until_second(second: u64) -> [u8; 20] {
    let (days, second) = (second / 86_400, second % 86_400);
    // Days are counted from the first of March of the year 0, so that a leap day is a year's last, and 400 years are 146,097 of them.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on five months have 153 days, and then again.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    let year = era * 400 + year;
    let mut text = *b"0000-00-00T00:00:00.";
    let numbers = [(0, year / 100), (2, year), (5, month), (8, day), (11, hour), (14, minute), (17, second)];
    for (at, number) in numbers {
        [text[at], text[at + 1]] = two_digits((number % 100) as u32);
    }
    text
}

/// Of a number below 100. Looked up: to compute the tens takes five instructions.
#[inline]
fn two_digits(number: u32) -> [u8; 2] {
    const DIGITS: [[u8; 2]; 100] = {
        let (mut digits, mut number) = ([[0; 2]; 100], 0_u8);
        while number < 100 {
            digits[number as usize] = [b'0' + number / 10, b'0' + number % 10];
            number += 1;
        }
        digits
    };
    DIGITS[number as usize % 100]
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use serde_json::json;
    use tracing_subscriber::{filter::Targets, fmt::layer as fmt_layer, layer::SubscriberExt as _, registry};

    use super::*;

    /// Moments around the days that a calendar may be wrong about, next to those of `date -u`.
    #[test]
    fn moments() {
        // In one line after the other, since a line has what it needs from the one before.
        let mut line = LogLine::default();
        let mut moment = |second, micros| {
            line.begin(second, micros);
            let text = String::from_utf8_lossy(&line.room[..line.length]);
            text.strip_prefix("{\"timestamp\":\"").expect("a moment").to_owned()
        };
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000000Z"),
            (1_772_323_199, "2026-02-28T23:59:59.000000Z"),
            (1_772_323_200, "2026-03-01T00:00:00.000000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(moment(seconds, 0), expected);
        }
        assert_eq!(moment(1, 42), "1970-01-01T00:00:01.000042Z");
        assert_eq!(moment(1, 999_999), "1970-01-01T00:00:01.999999Z");
    }

    /// Around each power of ten, and in a line that has to grow for it.
    #[test]
    fn numbers() {
        let powers = (0..20).map(|digits| 10_u64.pow(digits));
        for number in
            powers.flat_map(|power| [power - 1, power, power + 1, power + power / 2]).chain([10_203, u64::MAX])
        {
            for room in [USUAL, 0, 3, 5] {
                let mut line = LogLine { room: vec![0; room], ..LogLine::default() };
                line.number(number);
                line.put(b",");
                assert_eq!(String::from_utf8_lossy(&line.room[..line.length]), format!("{number},"));
            }
        }
    }

    /// Of each length, since short ones are copied in other ways.
    #[test]
    fn texts() {
        let text = "abcdefghijklmnopqrstuvwxyz";
        for length in 0..text.len() {
            let mut line = LogLine::default();
            line.text(&text[..length]);
            assert_eq!(String::from_utf8_lossy(&line.room[..line.length]), format!("\"{}\"", &text[..length]));
        }
    }

    const ODD: &str = "a \"quote\", a \\, a tab\t, an end\n, \u{0}\u{1b}[31m, \u{e4}\u{1f980}";

    /// Whatever is in it, a line is an object, and its values are those that were given, in their types.
    #[test]
    fn a_line_is_an_object() {
        let lines = lines_of(
            |lines| registry().with(lines),
            || {
                tracing::info!(ODD, shown = %ODD, debug = ?ODD, plain = "a", "first");
                tracing::warn!(
                    u = u64::MAX,
                    i = i64::MIN,
                    f = 0.5,
                    nan = f64::NAN,
                    yes = true,
                    none = None::<u64>,
                    "second"
                );
            },
        );
        let first = json!({
            "level": "INFO", "message": "first", "ODD": ODD, "shown": ODD, "debug": format!("{ODD:?}"), "plain": "a",
        });
        let second = json!({
            "level": "WARN", "message": "second", "u": u64::MAX, "i": i64::MIN, "f": 0.5, "nan": null, "yes": true,
        });
        let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).expect(line)).collect();
        assert_eq!(lines, [first, second]);
    }

    /// What is said of a session is byte for byte what it is as an event of tracing, which it is for any other listener: as JSON, and as
    /// text. With values of each kind, short and long ones, and with something to escape at each place of a word.
    #[test]
    fn a_line_is_an_event() {
        let mut texts = vec![String::new(), ODD.to_owned(), "x".repeat(3 * MAX_KEPT)];
        for length in 1..40 {
            let plain = "\u{7f}~ !az#[]".repeat(5)[..length].to_owned();
            texts.extend((0..length).map(|at| {
                let mut odd = plain.clone();
                odd.replace_range(at..=at, ["\"", "\\", "\u{1f}", "\u{e4}"][(at + length) % 4]);
                odd
            }));
            texts.push(plain);
        }
        let addresses =
            ["192.0.2.1:80", "0.10.255.99:65535", "[2001:db8::1]:443", "[fe80::1%7]:1", "[::ffff:192.0.2.1]:0"];
        let addresses: Vec<SocketAddr> = addresses.iter().map(|address| address.parse().expect("an address")).collect();
        let mut numbers = vec![0, 65_535, 1_000_200_003_000, u64::MAX];
        numbers.extend((1..20).map(|places| 10_u64.pow(places)).flat_map(|power| [power - 1, power]));
        let said = || {
            for (index, text) in texts.iter().enumerate() {
                let (address, number) = (addresses[index % addresses.len()], numbers[index % numbers.len()]);
                let short = u16::try_from(number).ok();
                log_line!(
                    WARN,
                    "a line",
                    address,
                    number,
                    short,
                    text = &**text,
                    bare = unquoted(text),
                    word = word("a word"),
                    checked = checked(&**text, is_plain(text.as_bytes())),
                    bare_checked = checked(unquoted(text), is_plain(text.as_bytes())),
                    some = Some(&**text).filter(|_| index % 2 == 0),
                    as_shown = Some(shown(format_args!("{number}{text}"))),
                    yes = index % 3 == 0,
                );
            }
        };
        let traced = || {
            for (index, text) in texts.iter().enumerate() {
                let (address, number) = (addresses[index % addresses.len()], numbers[index % numbers.len()]);
                let short = u16::try_from(number).ok();
                let some = Some(&**text).filter(|_| index % 2 == 0);
                let (as_shown, yes) = (format_args!("{number}{text}"), index % 3 == 0);
                tracing::warn!(%address, number, short, text, bare = %text, word = "a word", checked = text, bare_checked = %text, some, %as_shown, yes, "a line");
            }
        };
        let json = |lines| registry().with(lines);
        let expected = lines_of(json, traced);
        assert_eq!(expected.len(), texts.len());
        for (index, (line, text)) in expected.iter().zip(&texts).enumerate() {
            let (address, number) = (addresses[index % addresses.len()], numbers[index % numbers.len()]);
            let text = Value::from(&**text).to_string();
            let begin = "{\"level\":\"WARN\",\"message\":\"a line\"";
            assert!(line.starts_with(&format!("{begin},\"address\":\"{address}\",\"number\":{number},")), "{line}");
            assert!(line.contains(&format!("\"text\":{text},\"bare\":{text},\"word\":\"a word\"")), "{line}");
        }
        assert_eq!(lines_of(json, said), expected);
        // Not as JsonLines alone is there.
        assert_eq!(lines_of(|lines| registry().with(Another(lines)), said), expected);
        let text = |told: &dyn Fn()| {
            let (sender, lines) = mpsc::channel();
            let layer = fmt_layer().without_time().with_writer(move || Sent(sender.clone()));
            tracing::subscriber::with_default(registry().with(layer), told);
            lines.iter().collect::<Vec<_>>()
        };
        assert_eq!(text(&said), text(&traced));
    }

    /// A line that nobody wants is none, and what it would have said is not computed: by level, by module, and where it has no such field.
    #[test]
    fn a_line_is_filtered() {
        for (filter, is_wanted) in [
            ("info", true),
            ("warn", false),
            ("off", false),
            ("info,tidegate::log_lines=warn", false),
            ("warn,tidegate::log_lines=info", true),
            ("off,tidegate[{number}]=info", true),
            ("off,tidegate[{message}]=info", true),
            ("off,tidegate[{other}]=info", false),
        ] {
            let targets: Targets = filter.parse().expect("a filter");
            let was_computed = Cell::new(false);
            let filtered = |lines| registry().with(targets.clone()).with(lines);
            let event = lines_of(filtered, || tracing::info!(number = 1, "a line"));
            let lines = lines_of(filtered, || {
                log_line!(
                    INFO,
                    "a line",
                    number = {
                        was_computed.set(true);
                        1_u64
                    },
                );
            });
            assert_eq!((event.len(), was_computed.get()), (usize::from(is_wanted), is_wanted), "{filter}");
            assert_eq!(lines, event, "{filter}");
        }
    }

    /// What was said, without its moments.
    fn lines_of<S>(subscriber: impl FnOnce(JsonLines) -> S, said: impl FnOnce()) -> Vec<String>
    where
        S: Subscriber + Send + Sync,
    {
        let (sender, lines) = mpsc::channel();
        let (queue, last) = LogQueue::start(Sent(sender)).expect("a thread");
        tracing::subscriber::with_default(subscriber(JsonLines::new(queue)), said);
        drop(last);
        let lines = lines.iter().collect::<Vec<_>>().concat();
        let without_time = |line: &str| {
            let (time, rest) = line.strip_prefix("{\"timestamp\":\"")?.split_once("\",")?;
            (time.len() == 27 && time.starts_with("20") && time.ends_with('Z')).then(|| format!("{{{rest}"))
        };
        lines.lines().map(|line| without_time(line).expect(line)).collect()
    }

    /// Has [`JsonLines`] in it, which is not to be seen.
    struct Another(JsonLines);

    impl<S: Subscriber> Layer<S> for Another {
        fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
            self.0.on_event(event, context);
        }
    }

    /// Sends on what is written.
    struct Sent(mpsc::Sender<String>);

    impl std::io::Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let text = String::from_utf8(bytes.to_vec()).map_err(std::io::Error::other)?;
            self.0.send(text).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
