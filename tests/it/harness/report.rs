//! What a failing test prints, so that it need not be run a second time to be understood.

use super::{Board, Lab, Side, lab::Counters, proxy::Proxy, transcript::Transcript};
use std::fmt::Write;

/// Everything known about a scene. Must not panic: it is written while a panic is under way.
pub fn write(
    lab: &Lab,
    baseline: &[Counters; 3],
    proxy: Option<&Proxy>,
    transcripts: &[Board<Transcript>],
    seed: u64,
) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let mut line = |text: String| _ = writeln!(out, "{text}");

    line(format!("---- the scene (TIDEGATE_SEED={seed} repeats its masks)"));
    for transcript in transcripts {
        transcript.read(|t| {
            line(format!("---- {}: {} bytes received", t.label, t.raw.len()));
            for (at, event) in &t.events {
                line(format!("{:>10.3} ms {event:.400?}", at.as_secs_f64() * 1e3));
            }
            match &t.over {
                None => line("              (still under way)".to_owned()),
                Some(Err(panic)) => line(format!("              its script panicked: {panic}")),
                Some(Ok(())) => {}
            }
        });
    }
    line("---- kernel, since the scene began".to_owned());
    for (side, before) in Side::ALL.into_iter().zip(baseline) {
        let exact = if before.is_exact() { "" } else { " (of the whole host)" };
        line(format!("{side:?}{exact}: {:?}", &lab.counters(side) - before));
        for socket in lab.sockets(side) {
            if lab.counts_are_exact() && socket.state != "LISTEN" {
                let orphan = if socket.inode == 0 { " orphaned" } else { "" };
                line(format!("    {} - {} {}{orphan}", socket.local, socket.remote, socket.state));
            }
        }
    }
    if let Some(proxy) = proxy {
        line("---- the proxy's output".to_owned());
        for (at, text) in proxy.printed() {
            line(format!("{:>10.3} ms {text}", at.as_secs_f64() * 1e3));
        }
        match proxy.exit_status() {
            Some(status) => line(format!("---- the proxy has ended: {status}")),
            None => match proxy.admin(&super::Message::get("/metrics")) {
                Ok(response) => {
                    line("---- its metrics that are not zero".to_owned());
                    let text = response.text();
                    // A histogram's buckets would hide the rest.
                    let tells = |l: &&str| !l.starts_with('#') && !l.ends_with(" 0") && !l.contains("_bucket{");
                    for sample in text.lines().filter(tells) {
                        line(sample.to_owned());
                    }
                }
                Err(e) => line(format!("---- no metrics: {e}")),
            },
        }
    }
    out
}
