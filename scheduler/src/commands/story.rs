//! `--explain`: what was decided when and why, in the order of time.

use std::fmt::Write as _;

use scheduler::simulate::Outcome;

/// Hotspots told in one line.
const HOTSPOTS_MAX: usize = 5;

/// A run as a story, or what was decided in a period of it.
pub(super) fn story(outcome: &Outcome, period_s: Option<(f64, f64)>) -> String {
    let mut entries: Vec<(f64, u8, String)> = vec![];
    for asked in &outcome.asked {
        for why in asked.hotspots.iter().take(HOTSPOTS_MAX) {
            entries.push((asked.at_s, 0, format!("hotspot: {why}")));
        }
        if let Some(more) = asked.hotspots.len().checked_sub(HOTSPOTS_MAX + 1) {
            entries.push((asked.at_s, 0, format!("hotspot: {} more", more + 1)));
        }
        for note in &asked.notes {
            entries.push((asked.at_s, 3, format!("left: {note}")));
        }
    }
    for moved in &outcome.moves {
        let text = format!(
            "move: {} from {} to {}, {:.0} MiB, {:.1} s: {}",
            moved.vm,
            moved.from,
            moved.to,
            moved.wire_mib,
            moved.end_s - moved.at_s,
            moved.reason
        );
        entries.push((moved.at_s, 1, text));
    }
    for resized in &outcome.resizes {
        let text = format!(
            "memory: {} from {:.0} to {:.0} MiB: {}",
            resized.vm, resized.from_mib, resized.to_mib, resized.reason
        );
        entries.push((resized.at_s, 1, text));
    }
    for refused in &outcome.refused {
        entries.push((refused.at_s, 2, format!("refused: {}: {}", refused.vm, refused.why)));
    }
    entries.retain(|entry| period_s.is_none_or(|(from, until)| (from..until).contains(&entry.0)));
    entries.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
    let mut text = format!("{}:\n", outcome.policy);
    for (at_s, _, entry) in entries {
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {at_s:>8.1} s  {entry}");
    }
    if period_s.is_some() {
        return text;
    }
    for service in &outcome.services {
        let response = service.response_ms.map(|response_ms| format!("{response_ms:.0} ms"));
        let _ = writeln!(
            text,
            "  {}: response {}, {:.1} Mbit/s between its guests",
            service.name,
            response.unwrap_or_else(|| "-".into()),
            service.talk_mbit
        );
    }
    for host in &outcome.hosts {
        let (cpu, network) = (host.cpu_share * 100.0, host.network_share * 100.0);
        let _ =
            writeln!(text, "  {}: CPU {cpu:.1} %, network {network:.1} % on average", host.name);
    }
    text
}
