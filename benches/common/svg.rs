//! Pictures as SVG: bars with their spread, bars of several parts, quantiles, timelines, and dots with their spread over decades. Numbers in,
//! text out; nothing here knows what was measured.
//!
//! For a light background, with labels that can be read at half the size, and colours that can be told apart by most who see few of them.

#![expect(clippy::cast_precision_loss, reason = "counts of bars and lines")]

use std::fmt::{self, Write as _};

use crate::figures::{Spread, grouped, number};

const WIDTH: f64 = 900.0;
const MARGIN: f64 = 24.0;
/// Left of bars, for names; right of them, for figures.
const NAMES: f64 = 110.0;
const FIGURES: f64 = 190.0;
const ROW: f64 = 24.0;
/// Under a panel: numbers on its axis, and what they are.
const AXIS: f64 = 46.0;
const HEAD: f64 = 86.0;
const FOOT: f64 = 34.0;
/// Right of lines, for their names.
const LEGEND: f64 = 130.0;
/// Of panels with lines.
const PANEL: f64 = 260.0;

/// Between lines that would lie on one another.
const ASIDE: f64 = 2.4;

/// Of dots: left of them, for names; each panel, and between two; above and below; between 0 and the first decade.
const LABELS: f64 = 370.0;
const DOTS: f64 = 230.0;
const GAP: f64 = 54.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 34.0;
const ZERO: f64 = 22.0;

const INK: &str = "#222222";
const FAINT: &str = "#666666";
const GRID: &str = "#e2e2e2";

/// Ticks of a linear axis, about so many.
const TICKS: f64 = 6.0;

/// A bar or a line, and what it is called.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    pub label: &'static str,
    pub colour: &'static str,
    /// A line that is no proxy's.
    pub is_dashed: bool,
}

/// Bars that are compared with one another.
#[derive(Debug)]
pub struct Bars {
    pub title: String,
    pub bars: Vec<(Name, Spread)>,
}

/// Bars of several parts.
#[derive(Debug)]
pub struct Parts {
    pub title: String,
    pub bars: Vec<(Name, Vec<f64>)>,
}

#[derive(Debug)]
pub struct Line {
    pub name: Name,
    pub points: Vec<(f64, f64)>,
}

/// Lines over one another.
#[derive(Debug)]
pub struct Lines {
    pub axis: &'static str,
    pub lines: Vec<Line>,
}

/// What is said above a picture.
#[derive(Debug, Clone, Copy)]
pub struct Title<'a> {
    pub title: &'a str,
    /// In two lines.
    pub about: [&'a str; 2],
}

#[derive(Debug, Default)]
struct Picture {
    text: String,
}

/// How a text is laid to its place.
#[derive(Debug, Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

impl Picture {
    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        self.text.write_fmt(element).expect("writing to a String does not fail");
        self.text.push('\n');
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str, width: f64) {
        self.push(format_args!(
            "<line x1='{x1:.1}' y1='{y1:.1}' x2='{x2:.1}' y2='{y2:.1}' stroke='{colour}' stroke-width='{width}'/>"
        ));
    }

    fn bar(&mut self, [x, y]: [f64; 2], width: f64, colour: &str) {
        let height = ROW - 6.0;
        self.push(format_args!("<rect x='{x:.1}' y='{y:.1}' width='{width:.1}' height='{height}' fill='{colour}'/>"));
    }

    fn words(&mut self, [x, y]: [f64; 2], size: f64, colour: &str, anchor: Anchor, words: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let words = escaped(words);
        self.push(format_args!(
            "<text x='{x:.1}' y='{y:.1}' font-size='{size}' fill='{colour}' text-anchor='{anchor}'>{words}</text>"
        ));
    }

    fn turned(&mut self, [x, y]: [f64; 2], words: &str) {
        self.push(format_args!(
            "<text transform='translate({x:.1} {y:.1}) rotate(-90)' font-size='13' fill='{FAINT}' text-anchor='middle'>{words}</text>"
        ));
    }

    fn curve(&mut self, points: &[[f64; 2]], name: Name) {
        let points: Vec<String> = points.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        let dash = if name.is_dashed { " stroke-dasharray='6 4'" } else { "" };
        self.push(format_args!(
            "<polyline points='{}' fill='none' stroke='{}' stroke-width='2.2' stroke-linejoin='round'{dash}/>",
            points.join(" "),
            name.colour
        ));
    }

    /// Names of lines, one below the other.
    fn legend(&mut self, x: f64, mut y: f64, names: impl Iterator<Item = Name>) {
        for name in names {
            self.curve(&[[x, y], [x + 26.0, y]], name);
            self.words([x + 32.0, y + 4.5], 13.0, INK, Anchor::Start, name.label);
            y += 20.0;
        }
    }

    fn finish(self, title: Title<'_>, height: f64) -> String {
        let mut whole = Self::default();
        whole.push(format_args!(
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0}' width='{WIDTH}' height='{height:.0}' \
             font-family='DejaVu Sans, Verdana, Helvetica, Arial, sans-serif' role='img'>"
        ));
        whole.push(format_args!("<rect width='100%' height='100%' fill='#ffffff'/>"));
        whole.words([MARGIN, 32.0], 18.0, INK, Anchor::Start, title.title);
        whole.words([MARGIN, 52.0], 11.0, FAINT, Anchor::Start, title.about[0]);
        whole.words([MARGIN, 67.0], 11.0, FAINT, Anchor::Start, title.about[1]);
        whole.text + &self.text + "</svg>\n"
    }
}

/// Steps of 1, 2 or 5 times a power of ten, so that `max` has about [`TICKS`] of them.
fn step(max: f64) -> f64 {
    let rough = (max / TICKS).max(1e-9);
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough).unwrap_or(rough)
}

/// From 0 to `max` or a bit more.
fn ticks(max: f64) -> Vec<f64> {
    let step = step(max);
    let mut ticks = vec![0.0];
    while ticks[ticks.len() - 1] < max {
        ticks.push(ticks[ticks.len() - 1] + step);
    }
    ticks
}

/// From below `min` to above `max`: 1, 2 and 5 times powers of ten.
fn log_ticks(min: f64, max: f64) -> Vec<f64> {
    let mut power = 10_f64.powf(min.max(1e-3).log10().floor());
    let mut ticks = Vec::new();
    while ticks.last().is_none_or(|last| *last < max) {
        ticks.extend([1.0, 2.0, 5.0].map(|factor| factor * power));
        power *= 10.0;
    }
    let first = ticks.iter().rposition(|tick| *tick <= min).unwrap_or_default();
    let last = ticks.iter().position(|tick| *tick >= max).unwrap_or(ticks.len() - 1);
    ticks[first..=last].to_vec()
}

/// A number on an axis.
fn tick(value: f64) -> String {
    let value = (value * 1000.0).round() / 1000.0;
    if value >= 1000.0 && value.fract() == 0.0 {
        return grouped(&format!("{value:.0}"));
    }
    format!("{value}")
}

/// Grid and axis of bars.
fn bars_axis(picture: &mut Picture, top: f64, bottom: f64, width: f64, ticks: &[f64], axis: &str) {
    let max = ticks[ticks.len() - 1];
    let left = MARGIN + NAMES;
    for value in ticks {
        let x = left + value / max * width;
        picture.line([x, top], [x, bottom], GRID, 1.0);
        picture.words([x, bottom + 16.0], 12.0, FAINT, Anchor::Middle, &tick(*value));
    }
    picture.words([left + width / 2.0, bottom + 34.0], 13.0, FAINT, Anchor::Middle, axis);
}

/// A panel for each case, each with an axis of its own.
pub fn bars(title: Title<'_>, axis: &str, panels: &[Bars]) -> String {
    let mut picture = Picture::default();
    let (left, width) = (MARGIN + NAMES, WIDTH - 2.0 * MARGIN - NAMES - FIGURES);
    let mut y = HEAD;
    for panel in panels {
        picture.words([MARGIN, y + 14.0], 14.0, INK, Anchor::Start, &panel.title);
        y += 24.0;
        let bottom = y + ROW * panel.bars.len() as f64;
        let ticks = ticks(panel.bars.iter().map(|(_, spread)| spread.max).fold(1e-6, f64::max));
        let max = ticks[ticks.len() - 1];
        bars_axis(&mut picture, y, bottom, width, &ticks, axis);
        for (name, spread) in &panel.bars {
            let x = |value: f64| left + value.max(0.0) / max * width;
            let middle = y + ROW / 2.0;
            picture.words([left - 8.0, middle + 4.5], 13.0, INK, Anchor::End, name.label);
            picture.bar([left, y + 3.0], x(spread.median) - left, name.colour);
            if spread.max > spread.min {
                picture.line([x(spread.min), middle], [x(spread.max), middle], INK, 1.5);
                for end in [spread.min, spread.max] {
                    picture.line([x(end), middle - 5.0], [x(end), middle + 5.0], INK, 1.5);
                }
            }
            let figures = spread.to_string();
            picture.words([WIDTH - MARGIN, middle + 4.5], 12.0, INK, Anchor::End, &figures);
            y += ROW;
        }
        picture.line([left, bottom - ROW * panel.bars.len() as f64], [left, bottom], INK, 1.0);
        y = bottom + AXIS + 10.0;
    }
    let note = "Bar: median of the rounds. Line: from the smallest to the largest.";
    picture.words([MARGIN, y + 8.0], 12.0, FAINT, Anchor::Start, note);
    picture.finish(title, y + FOOT)
}

/// As [`bars`], of parts with names and colours.
pub fn parts(title: Title<'_>, axis: &str, names: &[(&str, &str)], panels: &[Parts]) -> String {
    let mut picture = Picture::default();
    let (left, width) = (MARGIN + NAMES, WIDTH - 2.0 * MARGIN - NAMES - FIGURES);
    let mut y = HEAD;
    let mut x = MARGIN;
    for (name, colour) in names {
        picture.bar([x, y - 4.0], 18.0, colour);
        picture.words([x + 24.0, y + 9.5], 13.0, INK, Anchor::Start, name);
        x += 52.0 + 8.0 * name.len() as f64;
    }
    y += 30.0;
    for panel in panels {
        picture.words([MARGIN, y + 14.0], 14.0, INK, Anchor::Start, &panel.title);
        y += 24.0;
        let bottom = y + ROW * panel.bars.len() as f64;
        let sums = panel.bars.iter().map(|(_, parts)| parts.iter().sum());
        let ticks = ticks(sums.fold(1.0, f64::max));
        let max = ticks[ticks.len() - 1];
        bars_axis(&mut picture, y, bottom, width, &ticks, axis);
        for (name, parts) in &panel.bars {
            let middle = y + ROW / 2.0;
            picture.words([left - 8.0, middle + 4.5], 13.0, INK, Anchor::End, name.label);
            let mut x = left;
            for (part, (_, colour)) in parts.iter().zip(names) {
                let width = part / max * width;
                picture.bar([x, y + 3.0], width, colour);
                x += width;
            }
            let figures: Vec<String> = parts.iter().map(|part| number(*part)).collect();
            picture.words([WIDTH - MARGIN, middle + 4.5], 12.0, INK, Anchor::End, &figures.join(" / "));
            y += ROW;
        }
        y = bottom + AXIS + 10.0;
    }
    picture.words([MARGIN, y + 8.0], 12.0, FAINT, Anchor::Start, "Medians of the rounds, in the order of the legend.");
    picture.finish(title, y + FOOT)
}

/// Where the points of a panel are.
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Frame {
    fn at(top: f64, height: f64) -> Self {
        Self { left: MARGIN + 70.0, top, width: WIDTH - 2.0 * MARGIN - 70.0 - LEGEND, height }
    }

    /// Of parts of its width and height.
    fn point(&self, x: f64, y: f64) -> [f64; 2] {
        [self.left + x * self.width, self.top + (1.0 - y) * self.height]
    }

    fn across(&self, picture: &mut Picture, y: f64, label: &str) {
        let [left, at] = self.point(0.0, y);
        picture.line([left, at], [left + self.width, at], GRID, 1.0);
        picture.words([left - 8.0, at + 4.5], 12.0, FAINT, Anchor::End, label);
    }

    fn upright(&self, picture: &mut Picture, x: f64, label: &str) {
        let [at, bottom] = self.point(x, 0.0);
        picture.line([at, self.top], [at, bottom], GRID, 1.0);
        picture.words([at, bottom + 17.0], 12.0, FAINT, Anchor::Middle, label);
    }

    fn axis(&self, picture: &mut Picture, axis: &str) {
        picture.turned([MARGIN + 12.0, self.top + self.height / 2.0], axis);
    }
}

/// Quantiles of what is `of`, between 0 and 1, on an axis that gives each further nine as much room, over times on a logarithmic one.
pub fn quantiles(title: Title<'_>, of: &str, lines: &Lines) -> String {
    let mut picture = Picture::default();
    let frame = Frame::at(HEAD + 6.0, PANEL * 1.5);
    let nines = |quantile: f64| -(1.0 - quantile).log10();
    let points = || lines.lines.iter().flat_map(|line| &line.points);
    let last = points().map(|(quantile, _)| nines(*quantile)).fold(1.0, f64::max);
    let times = || points().map(|(_, time)| *time);
    let ticks = log_ticks(times().fold(f64::INFINITY, f64::min), times().fold(1.0, f64::max));
    let (low, high) = (ticks[0].log10(), ticks[ticks.len() - 1].log10());
    for value in &ticks {
        frame.across(&mut picture, (value.log10() - low) / (high - low).max(1e-9), &tick(*value));
    }
    for (quantile, label) in
        [(0.0, "0"), (0.5, "50"), (0.9, "90"), (0.99, "99"), (0.999, "99.9"), (0.9999, "99.99"), (0.99999, "99.999")]
    {
        if nines(quantile) <= last + 1e-6 {
            frame.upright(&mut picture, nines(quantile) / last, label);
        }
    }
    for line in &lines.lines {
        let at = |(quantile, time): &(f64, f64)| {
            frame.point(nines(*quantile) / last, (time.log10() - low) / (high - low).max(1e-9))
        };
        let points: Vec<[f64; 2]> = line.points.iter().map(at).collect();
        picture.curve(&points, line.name);
    }
    frame.axis(&mut picture, lines.axis);
    let [_, bottom] = frame.point(0.0, 0.0);
    let axis = format!("percentile of the {of}");
    picture.words([frame.left + frame.width / 2.0, bottom + 38.0], 13.0, FAINT, Anchor::Middle, &axis);
    picture.legend(WIDTH - MARGIN - LEGEND + 20.0, frame.top + 10.0, lines.lines.iter().map(|line| line.name));
    picture.finish(title, bottom + 50.0 + FOOT)
}

/// Panels below one another, over the same seconds; some moments have names.
pub fn times(title: Title<'_>, (from, to): (f64, f64), moments: &[(f64, &str)], panels: &[Lines]) -> String {
    let mut picture = Picture::default();
    let mut top = HEAD + 20.0;
    let mut bottom = top;
    for panel in panels {
        let frame = Frame::at(top, PANEL);
        let max = panel.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value).fold(1.0, f64::max);
        let ticks = ticks(max);
        let max = ticks[ticks.len() - 1];
        for value in &ticks {
            frame.across(&mut picture, value / max, &tick(*value));
        }
        let x = |second: f64| (second - from) / (to - from);
        let mut second = from.ceil();
        while second <= to {
            frame.upright(&mut picture, x(second), &tick(second));
            second += 1.0;
        }
        for (moment, name) in moments {
            let [at, end] = frame.point(x(*moment), 0.0);
            picture.line([at, frame.top - 4.0], [at, end], INK, 1.2);
            picture.words([at, frame.top - 8.0], 12.0, INK, Anchor::Middle, name);
        }
        for (nth, line) in panel.lines.iter().enumerate() {
            // Several may be the same: none may hide another.
            let aside = (nth as f64 - (panel.lines.len() - 1) as f64 / 2.0) * ASIDE;
            let at = |(second, value): &(f64, f64)| frame.point(x(*second), value / max).map(|at| at + aside);
            picture.curve(&line.points.iter().map(at).collect::<Vec<_>>(), line.name);
        }
        frame.axis(&mut picture, panel.axis);
        picture.legend(WIDTH - MARGIN - LEGEND + 20.0, frame.top + 10.0, panel.lines.iter().map(|line| line.name));
        bottom = frame.top + frame.height;
        top = bottom + 52.0;
    }
    let middle = MARGIN + 70.0 + (WIDTH - 2.0 * MARGIN - 70.0 - LEGEND) / 2.0;
    picture.words([middle, bottom + 38.0], 13.0, FAINT, Anchor::Middle, "seconds");
    let note = "Lines that would lie on one another are drawn side by side.";
    picture.words([MARGIN, bottom + 60.0], 12.0, FAINT, Anchor::Start, note);
    picture.finish(title, bottom + 50.0 + FOOT)
}

/// A row of [`dots`]: its name, in its colour, and what else is said of it.
#[derive(Debug)]
pub struct Row<'a> {
    pub name: String,
    pub colour: &'static str,
    pub label: &'a str,
}

/// A panel of [`dots`]: one for each row, where there is one.
#[derive(Debug)]
pub struct Dots<'a> {
    pub title: &'a str,
    pub dots: Vec<Option<Spread>>,
}

/// Panels side by side, with the same rows: a dot at the median, and a bar from the smallest to the largest. The scales are logarithmic,
/// with a place for 0. `number` is before the title, where it is seen.
pub fn dots(number: &str, title: &str, rows: &[Row<'_>], panels: &[Dots<'_>]) -> String {
    let mut text = String::new();
    write_dots(&mut text, number, title, rows, panels).expect("writing to a String does not fail");
    text
}

fn write_dots(text: &mut String, nth: &str, title: &str, rows: &[Row<'_>], panels: &[Dots<'_>]) -> fmt::Result {
    let width = LABELS + panels.len() as f64 * (DOTS + GAP);
    let bottom = TOP + rows.len() as f64 * ROW;
    let height = bottom + BOTTOM;
    let title = escaped(title);
    write!(
        text,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}""#
    )?;
    writeln!(text, r##" role="img" aria-label="{title}" font-family="sans-serif" font-size="12" fill="#222">"##)?;
    writeln!(text, r##"<rect width="{width}" height="{height}" fill="#fff"/>"##)?;
    writeln!(text, r#"<text x="12" y="24" font-size="15" font-weight="bold">{nth}{title}</text>"#)?;
    for (row, Row { name, colour, label }) in rows.iter().enumerate() {
        let y = TOP + (row as f64 + 0.5) * ROW;
        if row % 2 == 0 {
            writeln!(text, r##"<rect y="{}" width="{width}" height="{ROW}" fill="#f4f4f4"/>"##, y - ROW / 2.0)?;
        }
        let label = escaped(label);
        writeln!(
            text,
            r#"<text x="12" y="{}"><tspan fill="{colour}" font-weight="bold">{name}</tspan> {label}</text>"#,
            y + 4.0
        )?;
    }
    for (index, Dots { title, dots }) in panels.iter().enumerate() {
        let left = LABELS + index as f64 * (DOTS + GAP);
        let scale = Decades::of(dots.iter().flatten().flat_map(|spread| [spread.min, spread.max]));
        writeln!(text, r#"<text x="{left}" y="{}" font-weight="bold">{}</text>"#, TOP - 10.0, escaped(title))?;
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
        for (row, (Row { colour, .. }, spread)) in rows.iter().zip(dots).enumerate() {
            let Some(spread) = spread else { continue };
            let y = TOP + (row as f64 + 0.5) * ROW;
            let [from, at, to] = [spread.min, spread.median, spread.max].map(|value| left + scale.at(value));
            writeln!(
                text,
                r#"<line x1="{from:.1}" y1="{y}" x2="{to:.1}" y2="{y}" stroke="{colour}" stroke-width="3" stroke-opacity="0.45"/>"#
            )?;
            writeln!(text, r#"<circle cx="{at:.1}" cy="{y}" r="5" fill="{colour}"/>"#)?;
            // On the side where there is room.
            let (x, anchor) =
                if at - left > DOTS * 0.72 { (from.min(at) - 9.0, "end") } else { (to.max(at) + 9.0, "start") };
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

/// From a power of ten to another one, and 0 below them.
#[derive(Debug)]
struct Decades {
    first: i32,
    last: i32,
}

impl Decades {
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
        ZERO + (value.log10() - f64::from(self.first)) / decades * (DOTS - ZERO)
    }

    fn ticks(&self) -> Vec<(f64, f64)> {
        let decades = (self.first..=self.last).map(|exponent| 10_f64.powi(exponent));
        [0.0].into_iter().chain(decades).map(|tick| (tick, self.at(tick))).collect()
    }
}

/// For an element's text, and between double quotes.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
