//! Why a guest moves, or none does.

use super::chain::Chain;
use super::search::{Move, Search};
use crate::model::HostIndex;
use crate::plan::hot::Hot;
use crate::plan::words::{Refusals, list, shares};

/// Why guests leave a host.
pub(super) fn leaves(search: &Search<'_, '_>, hot: &Hot<'_>, step: &Move) -> String {
    let draft = &search.draft;
    let Move { unit, from, to, worth_s, cost, .. } = step;
    let (name, there) = (draft.unit_name(unit), draft.host_name(*to));
    let talk_mbit = draft.talk_mbit(unit, *to);
    let talk = if talk_mbit > 0.0 {
        format!(", where it talks with guests ({talk_mbit:.0} Mbit/s)")
    } else {
        String::new()
    };
    let then = draft.placement().share(*to);
    format!(
        "{}. {name} to {there}{talk} is worth most: {worth_s:.0} s of overload to be expected beyond its price ({:.0} MiB in \
         {:.1} s, {:.0} ms of pause); {there} has {} now",
        has(search, hot, *from),
        cost.wire_mib,
        cost.total_s,
        cost.downtime_ms,
        shares(&then),
    )
}

/// Why guests change places.
pub(super) fn changes_places(search: &Search<'_, '_>, hot: &Hot<'_>, chain: &Chain) -> String {
    let draft = &search.draft;
    let step =
        |(vm, to): &(_, HostIndex)| format!("{} to {}", draft.name(*vm), draft.host_name(*to));
    let steps: Vec<String> = chain.steps.iter().map(step).collect();
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    format!(
        "{}, and no single move helps. One after the other, {} are worth {:.0} s of overload to be expected beyond their price",
        has(search, hot, hot.host),
        list(&steps),
        chain.worth_s,
    )
}

/// Why nothing leaves a host.
pub(super) fn stays(
    search: &Search<'_, '_>,
    hot: &Hot<'_>,
    best: Option<&Move>,
    refusals: &Refusals,
) -> String {
    let so_far = has(search, hot, hot.host);
    match best {
        Some(Move { unit, to, worth_s, cost, .. }) => format!(
            "{so_far}, and nothing moves: the best would be {} to {}, worth {worth_s:.0} s of overload after what {:.0} MiB cost",
            search.draft.unit_name(unit),
            search.draft.host_name(*to),
            cost.wire_mib,
        ),
        None => format!("{so_far}, and no guest may leave: {refusals}"),
    }
}

/// What is wrong with a host.
fn has(search: &Search<'_, '_>, hot: &Hot<'_>, host: HostIndex) -> String {
    let (at, lack) = (search.draft.host_name(host), search.draft.lack(hot));
    if lack.is_empty() {
        let share = search.draft.placement().share(host);
        format!("{at} is likely to have too much to do soon ({} now)", shares(&share))
    } else {
        format!("{at} has {lack}")
    }
}
