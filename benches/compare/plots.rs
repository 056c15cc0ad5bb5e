//! From what was measured to pictures: which case is which panel, which peer has which colour. How they are drawn is in `svg.rs`.

#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]

use std::{collections::BTreeMap, time::Duration};

use crate::{
    case::Case,
    histogram::Histogram,
    peers::Peer,
    report::{Row, Summary},
    svg::{self, Bars, Line, Lines, Name, Parts, Title},
    tables::{Kind, Plot},
};

/// Of 100,000: enough for a smooth line, and no more than there are messages.
const QUANTILES: [u64; 22] = [
    0, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000, 80_000, 85_000, 90_000, 92_500, 95_000, 97_000, 98_000,
    99_000, 99_300, 99_500, 99_700, 99_800, 99_900, 99_950,
];

/// In the palette of Okabe and Ito, where there are enough.
fn name(peer: Peer) -> Name {
    let (label, colour) = match peer {
        Peer::Direct => ("direct", "#444444"),
        Peer::Null => ("null", "#9a9a9a"),
        Peer::Nginx => ("nginx", "#009e73"),
        Peer::Haproxy => ("haproxy", "#0072b2"),
        Peer::Envoy => ("envoy", "#cc79a7"),
        Peer::Caddy => ("caddy", "#56b4e9"),
        Peer::Tidegate => ("tidegate", "#d55e00"),
        Peer::Tidegate1 => ("tidegate-1", "#d55e00"),
        Peer::Tidegate2 => ("tidegate-2", "#8a3d00"),
        Peer::Broadcast => ("broadcast", "#8a3d00"),
        Peer::Batched => ("batched", "#5c2900"),
        Peer::Other => ("other", "#e69f00"),
    };
    Name { label, colour, is_dashed: matches!(peer, Peer::Direct | Peer::Null) }
}

/// In the order of the cases.
fn by_case<'a, R>(rows: &[&'a R], case: impl Fn(&R) -> Case) -> BTreeMap<Case, Vec<&'a R>> {
    let mut panels: BTreeMap<Case, Vec<&'a R>> = BTreeMap::new();
    for row in rows {
        panels.entry(case(row)).or_default().push(row);
    }
    panels
}

pub fn plot(plot: &Plot, about: [&str; 2], summaries: &[&Summary], rows: &[&Row]) -> String {
    let title = Title { title: plot.title, about };
    match &plot.kind {
        Kind::Bars { column, axis } => {
            let panels: Vec<Bars> = by_case(summaries, |summary| summary.case)
                .into_iter()
                .map(|(case, summaries)| Bars {
                    title: case.to_string(),
                    bars: summaries
                        .iter()
                        .filter_map(|summary| Some((name(summary.peer), *summary.values.get(*column)?)))
                        .collect(),
                })
                .collect();
            svg::bars(title, axis, &panels)
        }
        Kind::Parts { parts, axis } => {
            let names: Vec<(&str, &str)> = parts.iter().map(|(name, _, colour)| (*name, *colour)).collect();
            let value = |summary: &Summary, column: &str| summary.values.get(column).map_or(0.0, |value| value.median);
            let panels: Vec<Parts> = by_case(summaries, |summary| summary.case)
                .into_iter()
                .map(|(case, summaries)| Parts {
                    title: case.to_string(),
                    bars: summaries
                        .iter()
                        .map(|summary| {
                            let values = parts.iter().map(|(_, column, _)| value(summary, column));
                            (name(summary.peer), values.collect())
                        })
                        .collect(),
                })
                .collect();
            svg::parts(title, axis, &names, &panels)
        }
        Kind::Quantiles { histogram, axis, of } => {
            let mut peers: BTreeMap<Peer, Histogram> = BTreeMap::new();
            for row in rows {
                if let Some(histogram) = row.histograms.get(*histogram) {
                    peers.entry(row.peer).or_default().add(histogram);
                }
            }
            let line = |(peer, histogram): (Peer, Histogram)| {
                let count = histogram.count();
                // What one message decides says nothing.
                let told = QUANTILES.into_iter().filter(|quantile| (100_000 - quantile) * count >= 1_000_000);
                let points =
                    told.filter_map(|quantile| Some((quantile as f64 / 1e5, histogram.quantile_us(quantile)?)));
                Line { name: name(peer), points: points.collect() }
            };
            svg::quantiles(title, of, &Lines { axis, lines: peers.into_iter().map(line).collect() })
        }
        Kind::Times { end } => times(title, *end, rows),
    }
}

/// Means over the rounds, to a bit after the last end.
fn times(title: Title<'_>, end: Option<Duration>, rows: &[&Row]) -> String {
    let end_s = end.map(|end| end.as_secs_f64());
    let mut peers: BTreeMap<Peer, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        peers.entry(row.peer).or_default().push(row);
    }
    let (mut there, mut answered) = (Vec::new(), Vec::new());
    let (mut from, mut last) = (0.0_f64, end_s.unwrap_or_default());
    for (peer, rows) in peers {
        let timelines: Vec<_> = rows.iter().filter_map(|row| row.timeline.as_ref()).collect();
        let Some(first) = timelines.first() else { continue };
        let steps = first.series.values().map(Vec::len).max().unwrap_or_default();
        let second = |step: usize| (first.from_ms as f64 + step as f64 * f64::from(first.step_ms)) / 1e3;
        let rounds = timelines.len() as f64;
        // Of one step, in the mean.
        let of = |step: usize, is_meant: fn(&str) -> bool| {
            let series = timelines.iter().flat_map(|timeline| &timeline.series).filter(|(name, _)| is_meant(name));
            series.map(|(_, counts)| counts.get(step).copied().unwrap_or_default() as f64).sum::<f64>() / rounds
        };
        let mut left = rows.iter().filter_map(|row| row.values.get("count")).sum::<f64>() / rounds;
        let mut left_points = vec![(second(0), left)];
        for step in 0..steps {
            let ended = of(step, |name| name != "answered");
            left -= ended;
            left_points.push((second(step + 1), left));
            last = if ended > 0.0 { last.max(second(step + 1)) } else { last };
        }
        from = from.min(second(0));
        there.push(Line { name: name(peer), points: left_points });
        let points = (0..steps).map(|step| (second(step + 1), of(step, |name| name == "answered")));
        answered.push(Line { name: name(peer), points: points.collect() });
    }
    let to = last.floor() + 1.0;
    for line in there.iter_mut().chain(&mut answered) {
        line.points.retain(|(second, _)| *second <= to);
    }
    let mut moments = vec![(0.0, if end_s.is_some() { "asked to stop" } else { "killed" })];
    moments.extend(end_s.map(|second| (second, "its time is over")));
    svg::times(
        title,
        (from, to),
        &moments,
        &[
            Lines { axis: "sessions that are there", lines: there },
            Lines { axis: "messages answered per 100 ms", lines: answered },
        ],
    )
}
