//! Reasons in plain words, with the figures that decided.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use crate::model::{Amounts, Obstacle, Resource};

/// A share as percentage: `85 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Shares of everything that matters: `CPU 50 %, memory 20 %, network 3 %`. Disks are named if they are used.
pub(crate) fn shares(shares: &Amounts) -> String {
    let named = Resource::ALL
        .into_iter()
        .filter(|resource| *resource != Resource::Disk || shares[Resource::Disk] >= 0.005);
    let words = named.map(|resource| format!("{} {}", resource.name(), percent(shares[resource])));
    words.collect::<Vec<_>>().join(", ")
}

/// Names, as people list them: `a, b and c`.
pub(crate) fn list(names: &[&str]) -> String {
    match names {
        [] => "nothing".to_owned(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Why a guest went nowhere, over all hosts that were asked.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    counts: BTreeMap<String, usize>,
}

impl Refusals {
    /// Counts a host that was no destination. That the guest runs there already is no news.
    pub(crate) fn add(&mut self, obstacle: Obstacle) {
        if obstacle != Obstacle::SameHost {
            self.add_words(obstacle.to_string());
        }
    }

    /// Counts a host that was no destination, for a reason that is the policy's own.
    pub(crate) fn add_words(&mut self, words: impl Into<String>) {
        *self.counts.entry(words.into()).or_default() += 1;
    }
}

impl Display for Refusals {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        if self.counts.is_empty() {
            return to.write_str("there is no other host that takes guests");
        }
        for (index, (words, count)) in self.counts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "; " };
            let hosts = if *count == 1 { "host" } else { "hosts" };
            write!(to, "{comma}{count} {hosts}: {words}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.to_string(), "there is no other host that takes guests");
        for resource in [Resource::Cpu, Resource::Memory, Resource::Cpu] {
            refusals.add(Obstacle::Room(resource));
        }
        refusals.add(Obstacle::SameHost);
        let words = "2 hosts: not enough CPU there; 1 host: not enough memory there";
        assert_eq!(refusals.to_string(), words);
    }

    #[test]
    fn names_are_listed() {
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(list(&["a"]), "a");
    }
}
