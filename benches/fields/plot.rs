//! A plot of one report as SVG, without a script, a font or a colour of its own that a reader's page would have to know: a line for
//! each leg, a panel for each figure, a dot at the median of the rounds, and a bar from the smallest to the largest. The scale is
//! logarithmic, with a place for 0.

use std::fmt::{self, Write as _};

use crate::{
    report::{Line, number},
    stories::{Story, Through},
};

const LABELS: f64 = 370.0;
const PANEL: f64 = 230.0;
const GAP: f64 = 54.0;
const TOP: f64 = 64.0;
const ROW: f64 = 24.0;
const BOTTOM: f64 = 34.0;
/// Between 0 and the first decade.
const ZERO: f64 = 22.0;

/// Told apart without colours too: by their lightness, and by the words at the left.
fn colour(through: Through) -> &'static str {
    match through {
        Through::Report => "#8a8a8a",
        Through::Direct => "#d1782a",
        Through::Tidegate => "#155a94",
    }
}

pub fn svg(story: &Story, lines: &[Line]) -> String {
    let mut text = String::new();
    write(&mut text, story, lines).expect("writing to a String does not fail");
    text
}

#[expect(clippy::cast_precision_loss, reason = "some lines")]
fn write(text: &mut String, story: &Story, lines: &[Line]) -> fmt::Result {
    let width = LABELS + story.panels.len() as f64 * (PANEL + GAP);
    let bottom = TOP + lines.len() as f64 * ROW;
    let height = bottom + BOTTOM;
    let title = escaped(story.title);
    write!(
        text,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}""#
    )?;
    writeln!(text, r##" role="img" aria-label="{title}" font-family="sans-serif" font-size="12" fill="#222">"##)?;
    writeln!(text, r##"<rect width="{width}" height="{height}" fill="#fff"/>"##)?;
    writeln!(text, r#"<text x="12" y="24" font-size="15" font-weight="bold">{}. {title}</text>"#, story.number)?;
    for (row, line) in lines.iter().enumerate() {
        let y = TOP + (row as f64 + 0.5) * ROW;
        if row % 2 == 0 {
            writeln!(text, r##"<rect y="{}" width="{width}" height="{ROW}" fill="#f4f4f4"/>"##, y - ROW / 2.0)?;
        }
        let (fill, label) = (colour(line.through), escaped(&line.label));
        writeln!(
            text,
            r#"<text x="12" y="{}"><tspan fill="{fill}" font-weight="bold">{}</tspan> {label}</text>"#,
            y + 4.0,
            line.through
        )?;
    }
    for (index, (heading, name)) in story.panels.iter().enumerate() {
        let left = LABELS + index as f64 * (PANEL + GAP);
        let scale = Scale::of(
            lines.iter().filter_map(|line| line.values.get(*name)).flat_map(|spread| [spread.min, spread.max]),
        );
        writeln!(text, r#"<text x="{left}" y="{}" font-weight="bold">{}</text>"#, TOP - 10.0, escaped(heading))?;
        for (tick, at) in scale.ticks() {
            let x = left + at;
            writeln!(text, r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{bottom}" stroke="#ccc"/>"##)?;
            writeln!(
                text,
                r##"<text x="{x:.1}" y="{}" text-anchor="middle" fill="#555" font-size="10">{}</text>"##,
                bottom + 14.0,
                number(tick)
            )?;
        }
        for (row, line) in lines.iter().enumerate() {
            let Some(spread) = line.values.get(*name) else { continue };
            let y = TOP + (row as f64 + 0.5) * ROW;
            let [from, at, to] = [spread.min, spread.median, spread.max].map(|value| left + scale.at(value));
            let fill = colour(line.through);
            writeln!(
                text,
                r#"<line x1="{from:.1}" y1="{y}" x2="{to:.1}" y2="{y}" stroke="{fill}" stroke-width="3" stroke-opacity="0.45"/>"#
            )?;
            writeln!(text, r#"<circle cx="{at:.1}" cy="{y}" r="5" fill="{fill}"/>"#)?;
            // On the side where there is room.
            let (x, anchor) =
                if at - left > PANEL * 0.72 { (from.min(at) - 9.0, "end") } else { (to.max(at) + 9.0, "start") };
            writeln!(
                text,
                r#"<text x="{x:.1}" y="{}" text-anchor="{anchor}" font-size="11">{}</text>"#,
                y + 4.0,
                number(spread.median)
            )?;
        }
    }
    writeln!(text, "</svg>")
}

/// Decades.
#[derive(Debug)]
struct Scale {
    first: i32,
    last: i32,
}

impl Scale {
    #[expect(clippy::cast_possible_truncation, reason = "exponents")]
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut most) = (f64::INFINITY, 0.0_f64);
        for value in values.filter(|value| *value > 0.0) {
            (least, most) = (least.min(value), most.max(value));
        }
        if most <= 0.0 {
            return Self { first: 0, last: 1 };
        }
        let first = least.log10().floor() as i32;
        Self { first, last: (most.log10().ceil() as i32).max(first + 1) }
    }

    fn at(&self, value: f64) -> f64 {
        if value <= 0.0 {
            return 0.0;
        }
        let decades = f64::from(self.last - self.first);
        ZERO + (value.log10() - f64::from(self.first)) / decades * (PANEL - ZERO)
    }

    fn ticks(&self) -> Vec<(f64, f64)> {
        let decades = (self.first..=self.last).map(|exponent| 10_f64.powi(exponent));
        [0.0].into_iter().chain(decades).map(|tick| (tick, self.at(tick))).collect()
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
