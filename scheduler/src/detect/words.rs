//! Why something is a hotspot, for people.

use super::Metric;
use super::watched::{Reason, Subject, Verdict};
use crate::model::{Cluster, HostIndex, Resource};
use crate::plan::Hotspot;

/// In one sentence, with figures.
pub(super) fn why(
    subject: &Subject<'_>,
    metric: Metric,
    resource: Resource,
    verdict: &Verdict,
) -> String {
    let show = |figure: f64| figure_in_words(metric, figure);
    let limit = show(verdict.threshold);
    let what = what_in_words(subject, metric);
    let sentence = match verdict.reason {
        Reason::Exceeded(exceeded) => format!(
            "{what} is at {}, was above {limit} in {} of the last {} figures, and {} is expected next",
            show(exceeded.current),
            exceeded.above,
            exceeded.of,
            show(exceeded.predicted),
        ),
        Reason::Risen(risen) => {
            let seen = if risen.was_seen { "has risen" } else { "stays high" };
            format!(
                "{what} {seen}: {} on average (above {limit} for {} figures), {} now",
                show(risen.mean),
                risen.high_for,
                show(risen.current),
            )
        }
    };
    match metric {
        Metric::Response | Metric::Drops => {
            format!("{sentence}; of what its host has, {} is tightest", resource.name())
        }
        _ => sentence,
    }
}

fn what_in_words(subject: &Subject<'_>, metric: Metric) -> String {
    let Subject { name, host_name, .. } = subject;
    match metric {
        Metric::Share(resource) => format!("{} of {name}", capitalised(resource.name())),
        Metric::SwapWrites => format!("What {name} on {host_name} writes to its swap"),
        Metric::Steal => format!("Waiting of {name} for processors of {host_name}"),
        Metric::Response => format!("Response time of {name} on {host_name}"),
        Metric::Drops => format!("Share of requests that {name} on {host_name} drops"),
    }
}

fn figure_in_words(metric: Metric, figure: f64) -> String {
    match metric {
        Metric::SwapWrites => format!("{figure:.0} pages/s"),
        Metric::Response | Metric::Drops => format!("{:.0} % of what was promised", figure * 100.0),
        Metric::Share(_) | Metric::Steal => format!("{:.0} %", figure * 100.0),
    }
}

fn capitalised(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Guests that wait for one host's processors are one hotspot: that of the host, if its processors are one already,
/// otherwise that of the guest that waits most. The sentence says how many wait.
pub(super) fn add_waiting(
    found: &mut Vec<Hotspot>,
    cluster: &Cluster,
    host: HostIndex,
    waits: Vec<Hotspot>,
) {
    let count = waits.len();
    let longest = waits.into_iter().reduce(|one, other| {
        if other.current.total_cmp(&one.current).is_gt() { other } else { one }
    });
    let Some(mut longest) = longest else { return };
    let of_host = found.iter_mut().find(|hotspot| {
        hotspot.host == host && hotspot.vm.is_none() && hotspot.resource == Resource::Cpu
    });
    if let Some(hotspot) = of_host {
        let waiting = longest.vm.map_or("", |vm| &cluster.vm(vm).name);
        let (share, most) = (longest.current * 100.0, if count > 1 { ", most" } else { "" });
        let guests =
            if count > 1 { format!("{count} guests wait") } else { "a guest waits".into() };
        hotspot
            .why
            .push_str(&format!("; {guests} for it{most}: {waiting}, {share:.0} % of its time"));
        return;
    }
    if count > 1 {
        longest.why.push_str(&format!("; {} more guests wait there", count - 1));
    }
    found.push(longest);
}
