//! Log lines as JSON: an object each, with the fields of the event beside `timestamp` and `level`.
//!
//! tracing-subscriber has such lines too. There each value goes through several writers and is looked at byte by byte in each of them: two lines
//! took as many instructions as all else of a session. What has to be escaped is `serde_json`'s.

use std::{
    fmt::{self, Write as _},
    io::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::{Layer, layer::Context};

/// Most lines are shorter.
const USUAL: usize = 1024;

/// See the module.
pub(super) struct JsonLines {
    writer: NonBlocking,
}

impl JsonLines {
    pub(super) const fn new(writer: NonBlocking) -> Self {
        Self { writer }
    }
}

impl<S: Subscriber> Layer<S> for JsonLines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line(String::with_capacity(USUAL));
        line.0.push_str("{\"timestamp\":\"");
        push_moment(&mut line.0, SystemTime::now());
        line.0.push_str("\",\"level\":\"");
        line.0.push_str(event.metadata().level().as_str());
        line.0.push('"');
        event.record(&mut line);
        line.0.push_str("}\n");
        // Nobody is there to be told of an error; lines that are dropped are counted.
        let _ = self.writer.clone().write_all(line.0.as_bytes());
    }
}

/// A line that lacks its end.
struct Line(String);

impl Line {
    fn name(&mut self, field: &Field) {
        self.0.push_str(",\"");
        self.0.push_str(field.name());
        self.0.push_str("\":");
    }

    /// To a string nothing fails.
    fn number(&mut self, field: &Field, number: impl fmt::Display) {
        self.name(field);
        let _ = write!(self.0, "{number}");
    }

    /// It is written as it is, and once more if that was wrong.
    fn text(&mut self, field: &Field, write: impl FnOnce(&mut String)) {
        self.name(field);
        self.0.push('"');
        let begin = self.0.len();
        write(&mut self.0);
        if self.0.as_bytes()[begin..].iter().any(|byte| matches!(byte, 0..b' ' | b'"' | b'\\')) {
            let text = json!(&self.0[begin..]).to_string();
            self.0.truncate(begin - 1);
            self.0.push_str(&text);
        } else {
            self.0.push('"');
        }
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.number(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.number(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, |line| line.push_str(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, |line| _ = write!(line, "{value:?}"));
    }
}

/// As RFC 3339 has it, in UTC, to the microsecond.
fn push_moment(line: &mut String, moment: SystemTime) {
    // No clock of a host with a log is set to before 1970.
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
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
    let (year, micros) = (era * 400 + year, u64::from(since.subsec_micros()));
    for (number, places, behind) in [
        (year, 4, '-'),
        (month, 2, '-'),
        (day, 2, 'T'),
        (hour, 2, ':'),
        (minute, 2, ':'),
        (second, 2, '.'),
        (micros, 6, 'Z'),
    ] {
        push_digits(line, number, places);
        line.push(behind);
    }
}

/// The last digits of a number, six at most. What can pad numbers with anything to any side takes ten times as long.
fn push_digits(line: &mut String, number: u64, places: usize) {
    const PLACES: [u64; 6] = [100_000, 10_000, 1_000, 100, 10, 1];
    for place in &PLACES[PLACES.len() - places..] {
        line.push(u8::try_from(number / place % 10).map_or('?', |digit| char::from(b'0' + digit)));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tracing_appender::non_blocking::NonBlockingBuilder;
    use tracing_subscriber::{layer::SubscriberExt as _, registry};

    use super::*;

    /// Moments around the days that a calendar may be wrong about, next to those of `date -u`.
    #[test]
    fn moments() {
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
            let mut line = String::new();
            push_moment(&mut line, UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(line, expected);
        }
        let mut line = String::new();
        push_moment(&mut line, UNIX_EPOCH + Duration::from_nanos(1_000_042_999));
        assert_eq!(line, "1970-01-01T00:00:01.000042Z");
    }

    /// Whatever is in it, a line is an object, and its values are those that were given, in their types.
    #[test]
    fn a_line_is_an_object() {
        let (sender, lines) = std::sync::mpsc::channel();
        let (writer, guard) = NonBlockingBuilder::default().finish(Lines(sender));
        let subscriber = registry().with(JsonLines::new(writer));
        let odd = "a \"quote\", a \\, a tab\t, an end\n, \u{0}\u{1b}[31m, \u{e4}\u{1f980}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(odd, shown = %odd, debug = ?odd, plain = "a", "first");
            tracing::warn!(
                u = u64::MAX,
                i = i64::MIN,
                f = 0.5,
                nan = f64::NAN,
                yes = true,
                none = None::<u64>,
                "second"
            );
        });
        drop(guard);
        let lines: Vec<String> = lines.iter().collect();
        let lines: Vec<Value> = lines.concat().lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        let without_time = |line: &Value| {
            let mut line = line.clone();
            let time = line.as_object_mut().and_then(|line| line.remove("timestamp")).expect("a moment");
            assert!(time.as_str().is_some_and(|time| time.len() == 27 && time.starts_with("20")), "{time}");
            line
        };
        let first = json!({
            "level": "INFO", "message": "first", "odd": odd, "shown": odd, "debug": format!("{odd:?}"), "plain": "a",
        });
        let second = json!({
            "level": "WARN", "message": "second", "u": u64::MAX, "i": i64::MIN, "f": 0.5, "nan": null, "yes": true,
        });
        assert_eq!(lines.iter().map(without_time).collect::<Vec<_>>(), [first, second]);
    }

    /// Sends on what is written.
    struct Lines(std::sync::mpsc::Sender<String>);

    impl std::io::Write for Lines {
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
