//! Why a guest moves, or none does.

use super::search::{Move, Search};
use crate::model::{HostIndex, HostState, Placement, Resource};

/// Why a guest leaves its host.
pub(super) fn leaves(search: &Search<'_>, step: &Move) -> String {
    let cluster = search.problem.cluster;
    let Move { vm, from, to, worth_s, cost } = step;
    let [source, target] = [from, to].map(|host| &cluster.host(*host).name);
    let taken = search.placement().taken_by(*vm);
    let (resource, there) = (tightest(search, *from), search.outlook.loads_after(*vm, *to).1);
    let capacity = &cluster.host(*to).capacity;
    let then = percent(there.mean.share_of(capacity)[resource]);
    let why = match cluster.host(*from).state {
        HostState::Draining => format!("{source} is to be emptied"),
        _ => format!("{} of {source} is at {}", resource.name(), now(search, *from, resource)),
    };
    format!(
        "{why}: {} ({:.2} cores, {:.0} MiB, {:.0} Mbit/s) goes to {target}, where {} is at {then} then; {:.0} MiB in {:.0} s \
         with {:.0} ms of pause{}",
        cluster.vm(*vm).name,
        taken.cpu_cores,
        taken.memory_mib,
        taken.network_mbit,
        resource.name(),
        cost.wire_mib,
        cost.total_s,
        cost.downtime_ms,
        worth(*worth_s),
    )
}

/// Of the earlier steps of a chain the last one says what they are worth.
fn worth(worth_s: f64) -> String {
    match worth_s > 0.0 {
        true => format!(", worth {worth_s:.0} s of overload"),
        false => ", which makes room for the next".into(),
    }
}

/// Why nothing leaves a host.
pub(super) fn stays(search: &Search<'_>, host: HostIndex, best: Option<Move>) -> String {
    let cluster = search.problem.cluster;
    let resource = tightest(search, host);
    let so_far = format!(
        "{} of {} is at {}",
        resource.name(),
        cluster.host(host).name,
        now(search, host, resource)
    );
    match best {
        Some(Move { vm, to, worth_s, cost, .. }) => format!(
            "{so_far}, and nothing moves: the best would be {} to {}, worth {worth_s:.0} s of overload after what {:.0} MiB cost",
            cluster.vm(vm).name,
            cluster.host(to).name,
            cost.wire_mib,
        ),
        None => format!("{so_far}, and no guest may leave: {}", obstacles(search, host)),
    }
}

/// What keeps its guests, in the order of how often.
fn obstacles(search: &Search<'_>, host: HostIndex) -> String {
    let mut counts: Vec<(String, usize)> = vec![];
    for vm in search.placement().guests(host) {
        for to in search.problem.cluster.host_indices().filter(|to| *to != host) {
            let Err(obstacle) = search.judged(*vm, to) else { continue };
            let words = obstacle.to_string();
            match counts.iter_mut().find(|(known, _)| *known == words) {
                Some((_, count)) => *count += 1,
                None => counts.push((words, 1)),
            }
        }
    }
    counts.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
    let words: Vec<String> =
        counts.into_iter().map(|(words, count)| format!("{words} ({count} times)")).collect();
    if words.is_empty() { "there is none, or nowhere to go".into() } else { words.join(", ") }
}

fn tightest(search: &Search<'_>, host: HostIndex) -> Resource {
    let shares = search.placement().share(host);
    Placement::tightest(&shares, &search.problem.limits.share_max)
}

fn now(search: &Search<'_>, host: HostIndex, resource: Resource) -> String {
    let limit = percent(search.problem.limits.share_max[resource]);
    format!("{} (limit {limit})", percent(search.placement().share(host)[resource]))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}
