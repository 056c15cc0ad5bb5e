//! The plot of one report: a line for each leg, a panel for each figure. How it is drawn is in `svg.rs`.

use crate::{
    report::Line,
    stories::{Story, Through},
    svg::{self, Dots, Row},
};

/// Told apart without colours too: by their lightness, and by the words at the left.
fn colour(through: Through) -> &'static str {
    match through {
        Through::Report => "#8a8a8a",
        Through::Direct => "#d1782a",
        Through::Tidegate => "#155a94",
    }
}

pub fn svg(story: &Story, lines: &[Line]) -> String {
    let rows: Vec<Row<'_>> = lines
        .iter()
        .map(|line| Row { name: line.through.to_string(), colour: colour(line.through), label: &line.label })
        .collect();
    let panels: Vec<Dots<'_>> = story
        .panels
        .iter()
        .map(|(title, name)| Dots { title, dots: lines.iter().map(|line| line.values.get(*name).copied()).collect() })
        .collect();
    svg::dots(&format!("{}. ", story.number), story.title, &rows, &panels)
}
