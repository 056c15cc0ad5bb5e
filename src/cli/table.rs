//! Tables and times for people at a terminal.

use std::fmt::Write as _;

/// As wide as their widest cell; the last one is as it is.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// In two units at most: "4m12s", "3d7h".
pub(super) fn age(ms: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let seconds = ms / 1000;
    let largest = UNITS.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(UNITS.len() - 1);
    let mut rest = seconds;
    let mut text = String::new();
    for (unit, name) in UNITS.iter().skip(largest).take(2) {
        write!(text, "{}{name}", rest / unit).expect("a String takes everything");
        rest %= unit;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (252, "4m12s"), (3_600, "1h0m"), (284_400, "3d7h")] {
            assert_eq!(age(seconds * 1000 + 999), text);
        }
    }
}
