//! Parts of `benches/compare` that figures stand or fall with.

use std::time::Duration;

#[path = "../../benches/compare/histogram.rs"]
#[allow(unreachable_pub, reason = "a module of another program")]
mod histogram;

use histogram::Histogram;

/// Quantiles are never below those of the values, and above them by less than a step: every microsecond up to 100 ms is recorded once, in two
/// halves that are added. The largest is exact, and nothing has no quantiles.
#[test]
fn quantiles_are_within_a_step() {
    let (mut even, mut odd) = (Histogram::default(), Histogram::default());
    for us in 1..=100_000_u32 {
        let half = if us % 2 == 0 { &mut even } else { &mut odd };
        half.record(Duration::from_micros(us.into()));
    }
    even.add(&odd);
    assert_eq!(even.count(), 100_000);
    for of_100_000 in [1_u32, 10, 1_000, 50_000, 99_000, 99_900, 99_999] {
        let us = even.quantile_us(of_100_000.into()).expect("it is not empty");
        let true_us = f64::from(of_100_000);
        assert!((true_us..true_us * (1.0 + 1.0 / 64.0)).contains(&us), "of 100,000 {of_100_000}: {us}");
    }
    assert_eq!(even.quantile_us(100_000), Some(100_000.0));
    assert_eq!(Histogram::default().quantile_us(50_000), None);
}

/// What is kept in the JSON is the whole: written and read again it has the same quantiles.
#[test]
fn a_histogram_survives_json() {
    let mut histogram = Histogram::default();
    for us in [3, 70, 71, 5_000, 1_000_000] {
        histogram.record(Duration::from_micros(us));
    }
    let json = serde_json::to_string(&histogram).expect("it is numbers");
    let read: Histogram = serde_json::from_str(&json).expect("it was just written");
    for of_100_000 in [0, 20_000, 50_000, 80_000, 100_000] {
        assert_eq!(read.quantile_us(of_100_000), histogram.quantile_us(of_100_000), "{json}");
    }
}
