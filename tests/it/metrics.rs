//! The table of all metrics in docs/metrics.md says what the program says.

use crate::harness::Scene;
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fmt::Write as _,
    fs,
};

const TABLE: &str = "docs/metrics.md";

/// What is above the table.
const BEGIN: &str = "| metric | type | labels | what |\n|---|---|---|---|\n";

#[derive(Default)]
struct Family {
    kind: String,
    help: String,
    /// By name, with their values.
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// Families in the order in which they are told.
fn families(text: &str) -> Vec<(String, Family)> {
    let mut families: Vec<(String, Family)> = Vec::new();
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# ") {
            let mut words = described.splitn(3, ' ');
            let (what, name, rest) = (words.next(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if families.last().is_none_or(|(last, _)| last != name) && what != Some("EOF") {
                families.push((name.to_owned(), Family::default()));
            }
            let Some((_, family)) = families.last_mut() else { continue };
            match what {
                Some("HELP") => rest.clone_into(&mut family.help),
                Some("TYPE") => rest.clone_into(&mut family.kind),
                _ => {}
            }
            continue;
        }
        let (_, family) = families.last_mut().expect("described before");
        let labels = line.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(labels, _)| labels);
        for label in labels.split("\",").filter(|label| !label.is_empty()) {
            let (name, value) = label.split_once("=\"").expect("a label");
            family.labels.entry(name.to_owned()).or_default().insert(value.trim_end_matches('"').to_owned());
        }
    }
    families
}

fn table(families: &[(String, Family)]) -> String {
    let mut table = BEGIN.to_owned();
    for (name, Family { kind, help, labels }) in families {
        let name = match kind.as_str() {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            _ => name.clone(),
        };
        let labels: Vec<_> = labels
            .iter()
            .filter(|(name, _)| *name != "le")
            .map(|(name, values)| match name.as_str() {
                // As many as there are.
                "queue" | "worker" | "version" => format!("`{name}`"),
                _ => format!("`{name}`: {}", values.iter().cloned().collect::<Vec<_>>().join(", ")),
            })
            .collect();
        writeln!(table, "| `{name}` | {kind} | {} | {} |", labels.join("; "), help.trim_end_matches('.'))
            .expect("a String takes everything");
    }
    table
}

/// Each metric stands in the table with its type, its labels and all values of these, and nothing else does. Those of a session that has ended
/// are there from the start, so an idle process tells all. `INSTA_UPDATE=always` writes it anew.
#[test]
fn the_table_is_complete() {
    let t = Scene::new("").start();
    let families = families(&t.proxy().get("/metrics").text());
    assert!(families.len() > 60 && families.iter().all(|(_, family)| !family.help.is_empty()));
    let written = fs::read_to_string(TABLE).expect("docs/metrics.md");
    let (above, found) = written.split_at(written.find(BEGIN).expect("the table"));
    let wanted = table(&families);
    if env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        fs::write(TABLE, format!("{above}{wanted}")).expect("room");
        return;
    }
    assert!(found == wanted, "{TABLE} is not what /metrics says: INSTA_UPDATE=always writes it anew\n{wanted}");
}
