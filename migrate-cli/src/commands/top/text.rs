//! The picture as plain text, whole.

use scheduler_api::View;

use super::rows::{self, GuestColumn};

/// Everything.
pub(super) fn picture(view: &View) -> String {
    let mut out = rows::head(view) + "\n";
    for warning in rows::warnings(view) {
        out += &format!("! {warning}\n");
    }
    let hosts: Vec<_> = rows::hosts(view)
        .into_iter()
        .map(|host| {
            let [cpu, memory, network, disk] =
                host.shares.map(|share| share.map_or_else(|| "?".to_owned(), rows::percent));
            let notes = if host.is_hot && host.notes.is_empty() {
                "hotspot".to_owned()
            } else if host.is_hot {
                format!("hotspot, {}", host.notes)
            } else {
                host.notes
            };
            [host.name, cpu, memory, network, disk, host.guests.to_string(), notes]
        })
        .collect();
    let titles = ["host", "CPU", "memory", "network", "disk", "guests", "remarks"];
    section(&mut out, "Hosts", &titles, &hosts);
    let guests = rows::guests(view, GuestColumn::Cpu, false);
    section(&mut out, "Guests", &rows::GUEST_TITLES, &guests);
    section(&mut out, "Hotspots", &rows::HOTSPOT_TITLES, &rows::hotspots(view));
    section(&mut out, "Migrations", &rows::MOVE_TITLES, &rows::moves(view));
    if let Some(plan) = &view.plan {
        section(&mut out, "Plan", &rows::PLAN_TITLES, &rows::plan(plan));
        for note in &plan.notes {
            out += &format!("  {}\n", rows::clean(note));
        }
    }
    if !view.remarks.is_empty() {
        out += "\nOdd\n";
    }
    for remark in &view.remarks {
        out += &format!("  {}\n", rows::clean(remark));
    }
    out
}

fn section<const N: usize>(
    out: &mut String,
    title: &str,
    titles: &[&str; N],
    lines: &[[String; N]],
) {
    *out += &format!("\n{title}\n");
    if lines.is_empty() {
        *out += "  none\n";
        return;
    }
    let mut widths = titles.map(|title| title.chars().count());
    for line in lines {
        for (width, text) in widths.iter_mut().zip(line) {
            *width = (*width).max(text.chars().count());
        }
    }
    let titles = titles.map(str::to_owned);
    for line in std::iter::once(&titles).chain(lines) {
        let cells = line.iter().zip(widths).map(|(text, width)| format!("{text:width$}"));
        let text = cells.collect::<Vec<_>>().join("  ");
        *out += &format!("  {}\n", text.trim_end());
    }
}
