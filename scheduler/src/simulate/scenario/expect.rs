//! What a file expects of policies, and whether it came out.

use serde::Serialize;

use super::file::{Compare, Expect, Quantity};
use crate::simulate::outcome::{Moved, Outcome};

/// An expectation, and what came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// What was expected, in words.
    pub expected: String,
    /// What came out, in words.
    pub found: String,
    /// Whether that is so.
    pub holds: bool,
}

/// Guest, source, destination out of `GUEST: FROM -> TO`.
pub(super) fn parse_move(said: &str) -> Option<(&str, &str, &str)> {
    let (vm, hosts) = said.split_once(':')?;
    let (from, to) = hosts.split_once("->")?;
    let parts = (vm.trim(), from.trim(), to.trim());
    (!parts.0.is_empty() && !parts.1.is_empty() && !parts.2.is_empty()).then_some(parts)
}

/// Compares outcomes with what is expected.
pub(super) fn judge(expect: &[Expect], compare: &[Compare], outcomes: &[Outcome]) -> Vec<Verdict> {
    let of = |policy: &str| outcomes.iter().find(|outcome| outcome.policy == policy);
    let mut verdicts = vec![];
    for part in expect {
        let Some(outcome) = of(&part.policy) else { continue };
        if let Some(moves) = &part.moves {
            verdicts.push(moved(&part.policy, moves, outcome));
        }
        if !part.grows.is_empty() {
            verdicts.push(grown(part, outcome));
        }
    }
    for part in compare {
        if let (Some(one), Some(other)) = (of(&part.policy), of(&part.against)) {
            verdicts.push(compared(part, one, other));
        }
    }
    verdicts
}

fn moved(policy: &str, moves: &[String], outcome: &Outcome) -> Verdict {
    let words = |moved: &Moved| format!("{}: {} -> {}", moved.vm, moved.from, moved.to);
    let found: Vec<String> = outcome.moves.iter().map(words).collect();
    let expected: Vec<String> = moves
        .iter()
        .filter_map(|said| parse_move(said))
        .map(|(vm, from, to)| format!("{vm}: {from} -> {to}"))
        .collect();
    let list =
        |moves: &[String]| if moves.is_empty() { "nothing".into() } else { moves.join(", ") };
    Verdict {
        expected: format!("{policy} moves {}", list(&expected)),
        found: list(&found),
        holds: found == expected,
    }
}

fn grown(part: &Expect, outcome: &Outcome) -> Verdict {
    let grown = outcome.resizes.iter().filter(|resized| resized.to_mib > resized.from_mib);
    let found: Vec<String> = grown.map(|resized| resized.vm.clone()).collect();
    Verdict {
        expected: format!("{} gives memory to {} first", part.policy, part.grows.join(", ")),
        found: found.join(", "),
        holds: found.starts_with(&part.grows),
    }
}

fn compared(part: &Compare, one: &Outcome, other: &Outcome) -> Verdict {
    let (low, high) = part.percent;
    let quantity = match part.quantity {
        Quantity::Response => "response time",
        Quantity::Talk => "traffic",
        Quantity::Cpu => "CPU in use",
        Quantity::Network => "network in use",
        Quantity::Overload => "overload",
    };
    let of = part.of.as_deref().unwrap_or("all");
    let measured = part.measured.map(|percent| format!(" (measured: {percent:+.1} %)"));
    let expected = format!(
        "{quantity} of {of} with {} against {}: {low:+.0} to {high:+.0} %{}",
        part.policy,
        part.against,
        measured.unwrap_or_default()
    );
    let values = (value(part, one), value(part, other));
    match values {
        (Some(one), Some(other)) if other > 0.0 || one <= 0.0 => {
            let percent = if other > 0.0 { (one / other - 1.0) * 100.0 } else { 0.0 };
            let found = format!("{percent:+.1} % ({one:.3} for {other:.3})");
            Verdict { expected, found, holds: (low..=high).contains(&percent) }
        }
        _ => Verdict { expected, found: "there is no such figure".into(), holds: false },
    }
}

fn value(part: &Compare, outcome: &Outcome) -> Option<f64> {
    let is_meant = |name: &str| part.of.as_deref().is_none_or(|of| of == name);
    let services = outcome.services.iter().filter(|service| is_meant(&service.name));
    let hosts = outcome.hosts.iter().filter(|host| is_meant(&host.name));
    let values: Vec<f64> = match part.quantity {
        Quantity::Response => services.filter_map(|service| service.response_ms).collect(),
        Quantity::Talk => services.map(|service| service.talk_mbit).collect(),
        Quantity::Cpu => hosts.map(|host| host.cpu_share).collect(),
        Quantity::Network => hosts.map(|host| host.network_share).collect(),
        Quantity::Overload => vec![outcome.overload_s],
    };
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
