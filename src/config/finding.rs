//! What there is to say about a configuration, to the person who wrote it: where, what, and what to write instead.
//!
//! Not here: deciding what is wrong. This file only points at it.

use std::fmt;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing is started.
    Error,
    /// It is started, and probably not as it was meant.
    Warning,
    /// Good to know.
    Note,
}

/// One thing to say: `what` and `fix` are single lines in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What is wrong.
    pub what: String,
    /// Where it was written.
    pub place: Place,
    /// What to write instead.
    pub fix: String,
}

/// Where a value was written. The order is the order of the sources: later ones win.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A default that nobody overrode.
    Default,
    /// A file as a whole, or several.
    File {
        /// As it was named.
        path: String,
    },
    /// A piece of one line of a file.
    Line {
        /// As it was named.
        path: String,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// In characters, at least 1.
        width: usize,
        /// The line, without its end.
        text: String,
    },
    /// An environment variable.
    Env {
        /// With its prefix.
        name: String,
        /// As it was set.
        value: String,
    },
    /// A command line flag.
    Flag {
        /// With its dashes.
        name: &'static str,
        /// As it was given.
        value: String,
    },
}

/// Everything found in one go, most urgent first; at least one is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings(pub Vec<Finding>);

/// Longer lines are shown in part.
const SHOWN_CHARS: usize = 120;

impl Place {
    /// The place of `span` (in bytes) in `text`, the content of the file `path`.
    pub(super) fn in_file(path: &str, text: &str, span: std::ops::Range<usize>) -> Self {
        let start = text.floor_char_boundary(span.start.min(text.len()));
        let end = text.floor_char_boundary(span.end.min(text.len())).max(start);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line = text[line_start..].lines().next().unwrap_or_default();
        let before = text[line_start..start].chars().count();
        let width = text[start..end].lines().next().unwrap_or_default().chars().count();
        Self::Line {
            path: path.to_owned(),
            line: text[..line_start].matches('\n').count() + 1,
            column: before + 1,
            width: width.max(1),
            text: line.to_owned(),
        }
    }
}

impl fmt::Display for Place {
    /// In a few words, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path } => f.write_str(path),
            Self::Line { path, line, column, .. } => write!(f, "{path}:{line}:{column}"),
            Self::Env { name, .. } => write!(f, "environment variable {name}"),
            Self::Flag { name, .. } => write!(f, "flag {name}"),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        })
    }
}

impl Finding {
    pub(super) fn error(what: impl Into<String>, place: Place, fix: impl Into<String>) -> Self {
        Self { level: Level::Error, what: what.into(), place, fix: fix.into() }
    }

    pub(super) fn warning(what: impl Into<String>, place: Place, fix: impl Into<String>) -> Self {
        Self { level: Level::Warning, what: what.into(), place, fix: fix.into() }
    }

    /// On one line, for a log: place, what, fix.
    pub fn line(&self) -> String {
        match self.place {
            Place::Default => format!("{}; {}", self.what, self.fix),
            _ => format!("{}: {}; {}", self.place, self.what, self.fix),
        }
    }
}

impl fmt::Display for Finding {
    /// For a terminal: several lines with the offending text underlined, without a newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.level, self.what)?;
        let (gutter, text, column, width) = match &self.place {
            Place::Line { line, column, width, text, .. } => (line.to_string(), text, *column, *width),
            Place::Env { value, .. } | Place::Flag { value, .. } => {
                (" ".to_owned(), value, 1, value.chars().count().max(1))
            }
            Place::File { path } => return write!(f, "\n --> {path}\n  = help: {}", self.fix),
            Place::Default => return write!(f, "\n  = help: {}", self.fix),
        };
        let pad = gutter.len();

        // What is shown of a long line begins a little before the caret. Control characters must not reach the terminal.
        let skipped = if text.chars().count() > SHOWN_CHARS { column.saturating_sub(40) } else { 0 };
        let shown: String = text
            .chars()
            .skip(skipped)
            .take(SHOWN_CHARS)
            .map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c })
            .collect();
        let before = column - 1 - skipped.min(column - 1);
        let indent: String = shown.chars().take(before).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let missing = before.saturating_sub(indent.chars().count());
        let carets = width.min(shown.chars().count().saturating_sub(before)).max(1);

        write!(f, "\n{:pad$}--> {}", "", self.place)?;
        write!(f, "\n{:pad$} |", "")?;
        write!(f, "\n{gutter} | {shown}")?;
        write!(f, "\n{:pad$} | {indent}{:missing$}{}", "", "", "^".repeat(carets))?;
        write!(f, "\n{:pad$} = help: {}", "", self.fix)
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            finding.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Findings {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The caret stands below the offending characters, also after tabs and wide characters, in long lines, at the end of the file.
    #[test]
    fn carets_point_at_the_text() {
        let under = |text: &str, span: std::ops::Range<usize>| {
            let finding = Finding {
                level: Level::Error,
                what: String::new(),
                place: Place::in_file("f", text, span),
                fix: String::new(),
            };
            let lines: Vec<String> = finding.to_string().lines().map(str::to_owned).collect();
            (lines[1].trim().to_owned(), lines[3].clone(), lines[4].clone())
        };
        let place = |line: usize, column: usize| format!("--> f:{line}:{column}");
        assert_eq!(under("a\n\tb = 1\n", 3..4), (place(2, 2), "2 | \tb = 1".into(), "  | \t^".into()));
        assert_eq!(under("ä = 12", 5..7), (place(1, 5), "1 | ä = 12".into(), "  |     ^^".into()));
        assert_eq!(under("a = [\n1", 4..7), (place(1, 5), "1 | a = [".into(), "  |     ^".into()));
        assert_eq!(under("a =", 3..3), (place(1, 4), "1 | a =".into(), "  |    ^".into()));
        assert_eq!(under("", 0..0), (place(1, 1), "1 | ".into(), "  | ^".into()));
        assert_eq!(under("a\r\nb", 3..4), (place(2, 1), "2 | b".into(), "  | ^".into()));
        assert_eq!(under("a = \u{1b}[2J", 0..1).1, "1 | a = \u{fffd}[2J");
        let (_, line, caret) = under(&format!("{}x{}", " ".repeat(300), "y".repeat(300)), 300..301);
        assert_eq!(line.find('x'), caret.find('^'), "{line}\n{caret}");
    }
}
