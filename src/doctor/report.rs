//! How findings are told: to a person at a terminal of 100 columns, or to a program.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{Facts, Finding, Fix, Scope, Severity};
use crate::system::Surroundings;

/// Everything that `tidegate doctor` has to say. Displayed, it is for people; serialized, for programs.
#[derive(Debug, Clone)]
pub struct Report {
    facts: Facts,
    /// The worst first.
    findings: Vec<Finding>,
    configuration: Option<String>,
}

const COLUMNS: usize = 100;
/// Behind the severity, and then behind what kind of fix it is.
const INDENT: usize = 11;
const LABEL: usize = 8;

impl Report {
    /// `configuration` is the file that was compared with; `None`: the defaults.
    pub fn new(facts: Facts, mut findings: Vec<Finding>, configuration: Option<String>) -> Self {
        // Stable: those that are as bad stay in the order in which a connection meets them.
        findings.sort_by_key(|finding| finding.severity);
        Self { facts, findings, configuration }
    }

    /// What is not as it should be, the worst first.
    pub fn wrong(mut self) -> Vec<Finding> {
        self.findings.retain(|finding| finding.severity != Severity::Ok);
        self.findings
    }

    /// Whether something will bite.
    pub fn bites(&self) -> bool {
        self.count(Severity::WillBite) > 0
    }

    fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

impl Severity {
    const ALL: [Self; 4] = [Self::WillBite, Self::Warning, Self::Note, Self::Ok];

    fn as_str(self) -> &'static str {
        match self {
            Self::WillBite => "will bite",
            Self::Warning => "warning",
            Self::Note => "note",
            Self::Ok => "ok",
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.facts.surroundings {
            Surroundings::Pod => "in this pod",
            Surroundings::Container => "in this container",
            Surroundings::Host => "on this host",
        };
        let configuration = self.configuration.as_deref().unwrap_or("the defaults");
        wrapped(f, &format!("What tidegate meets {place}, compared with {configuration}:"), 0)?;
        writeln!(f)?;
        for finding in &self.findings {
            let Finding { name, severity, value, wanted, why, fix } = finding;
            let label = severity.as_str();
            let head = if *severity == Severity::Ok {
                format!("{name}: {value}")
            } else {
                format!("{name}: {value}; wanted: {wanted}")
            };
            write!(f, "{label:INDENT$}")?;
            wrapped(f, &head, INDENT)?;
            if *severity == Severity::Ok {
                continue;
            }
            write!(f, "{:INDENT$}", "")?;
            wrapped(f, why, INDENT)?;
            if let Some(fix) = fix {
                write_fix(f, fix, self.facts.surroundings)?;
            }
            writeln!(f)?;
        }
        // A blank line behind those that are ok, too.
        if self.findings.last().is_some_and(|finding| finding.severity == Severity::Ok) {
            writeln!(f)?;
        }
        let counts = Severity::ALL.map(|severity| match (severity, self.count(severity)) {
            (Severity::Warning, 1) => "1 warning".to_owned(),
            (Severity::Warning, count) => format!("{count} warnings"),
            (Severity::Note, count) if count != 1 => format!("{count} notes"),
            (severity, count) => format!("{count} {}", severity.as_str()),
        });
        writeln!(f, "{}", counts.join(", "))
    }
}

fn write_fix(f: &mut fmt::Formatter<'_>, fix: &Fix, surroundings: Surroundings) -> fmt::Result {
    let Fix { command, pod, setting, sysctl } = fix;
    let scope = sysctl.as_ref().map(|sysctl| match sysctl.kubernetes {
        Scope::Safe => "a safe sysctl: any pod may set it".to_owned(),
        Scope::Unsafe => format!("an unsafe sysctl: the kubelet must be told --allowed-unsafe-sysctls={}", sysctl.name),
        Scope::Node => "no pod or container can set it, only the node or host itself".to_owned(),
    });
    let pod = [("pod:", Some(pod)), ("", scope.as_ref())];
    let command = [("fix:", Some(command))];
    let lines = match surroundings {
        Surroundings::Pod => [&pod[..], &command],
        Surroundings::Container | Surroundings::Host => [&command[..], &pod],
    };
    for (label, text) in lines.concat().into_iter().chain([("config:", setting.as_ref())]) {
        if let Some(text) = text {
            write!(f, "{:INDENT$}{label:LABEL$}", "")?;
            wrapped(f, text, INDENT + LABEL)?;
        }
    }
    Ok(())
}

/// Text that goes on at column `indent` in each further line. The first one begins where we are, at the same column.
fn wrapped(f: &mut fmt::Formatter<'_>, text: &str, indent: usize) -> fmt::Result {
    let mut column = indent;
    for (line, text) in text.split('\n').enumerate() {
        for (index, word) in text.split(' ').enumerate() {
            let width = word.chars().count();
            let begins_line = index == 0;
            if (line > 0 && begins_line) || (!begins_line && column + 1 + width > COLUMNS) {
                write!(f, "\n{:indent$}", "")?;
                column = indent;
            } else if !begins_line {
                f.write_str(" ")?;
                column += 1;
            }
            // What comes from the names of files and hosts must not reach the terminal as a command.
            let word: String = word.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            f.write_str(&word)?;
            column += width;
        }
    }
    writeln!(f)
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Counts {
            will_bite: usize,
            warning: usize,
            note: usize,
            ok: usize,
        }
        let counts = Counts {
            will_bite: self.count(Severity::WillBite),
            warning: self.count(Severity::Warning),
            note: self.count(Severity::Note),
            ok: self.count(Severity::Ok),
        };
        let mut report = serializer.serialize_struct("Report", 4)?;
        report.serialize_field("configuration", &self.configuration)?;
        report.serialize_field("counts", &counts)?;
        report.serialize_field("findings", &self.findings)?;
        report.serialize_field("facts", &self.facts)?;
        report.end()
    }
}
