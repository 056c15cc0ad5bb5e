//! `tidegate doctor`: what this host, container or pod will do to the proxy, and the exact fix.
//!
//! ```text
//! facts.rs   what is there            read from procfs and cgroups, once
//! wishes.rs  what is wanted of it     from the settings; and what tidegate will make of what is there
//! rules.rs   what is thought of it    pure: facts and wishes in, findings out
//! report.rs  how it is told           text for a terminal, JSON for a program
//! ```
//!
//! It reads, and never changes anything: no port is bound and the backend is not called, so that it can run beside a tidegate
//! that is in service. It sees its own namespaces, cgroup and limits, so it must run where tidegate does.

mod facts;
mod report;
mod rules;
#[cfg(test)]
mod tests;
mod wishes;

use serde::Serialize;

pub use self::{facts::Facts, report::Report};
use self::{rules::judge, wishes::Wishes};
use crate::config::Settings;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Clients will be refused, reset or dropped that were meant to be served.
    WillBite,
    /// It can happen.
    Warning,
    /// Worth knowing.
    Note,
    /// As it should be.
    Ok,
}

/// What was looked at, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about. Fixed: programs look for it.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is.
    pub value: String,
    /// What should be.
    pub wanted: String,
    /// Why it matters, in sentences.
    pub why: String,
    /// How it is put right; `None` where there is nothing to do.
    pub fix: Option<Fix>,
}

/// How something is put right: in one of these places.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// Where there is no Kubernetes: a command, or the line of a unit.
    pub command: String,
    /// In Kubernetes: a field of the pod, or whose matter it is when there is none.
    pub pod: String,
    /// In proxy.toml, where that is another way.
    pub setting: Option<String>,
    /// The sysctl that `command` and `pod` set.
    pub sysctl: Option<Sysctl>,
}

/// A sysctl in Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sysctl {
    /// Its dotted name.
    pub name: &'static str,
    /// Who may set it.
    pub kubernetes: Scope,
}

/// Who may set a sysctl in Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Any pod.
    Safe,
    /// A pod, on nodes whose kubelet allows it. Elsewhere the pod is refused.
    Unsafe,
    /// Only the node: it has no value of its own in a pod.
    Node,
}

/// Judges what is there by what the settings want.
pub fn diagnose(facts: &Facts, settings: &Settings) -> Vec<Finding> {
    judge(facts, &Wishes::from(settings))
}
