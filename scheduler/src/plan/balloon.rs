//! How guests of one host share its memory: who gives, who gets (the DRS thesis, 4.3; Agrawal, IIT Kanpur 2016).
//!
//! ```text
//!   soft idle = max(allocated - max(used, reserve), 0)      free in the guest
//!   hard idle = max(used - max(needed, reserve), 0)         its page cache
//!   entitlement = max * total / sum of max                  where even that is not enough
//! ```
//!
//! Guests of lower priority give first. Invariants: none is taken below its reserve, or given more than the RAM it was
//! started with; one that shows signs of having been squeezed too far gives nothing; in sum, no more is given than is free
//! and taken.

use serde::{Deserialize, Serialize};

use crate::model::{Memory, VmIndex};

/// Amounts below this are left alone, MiB.
const CHANGE_MIB_MIN: f64 = 1.0;

/// When memory is taken and given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonSettings {
    /// A guest that needs more than this share of what it has gets more.
    pub needy_share: f64,
    /// By this share of what it has, it grows; in overload, none gives more than this at once.
    pub step_share: f64,
    /// If less than this share of the host's memory is free, guests give.
    pub free_share_min: f64,
    /// Until so much is free.
    pub free_share: f64,
    /// For so long after a sign of too little memory, a guest gives nothing, in seconds.
    pub back_off_s: f64,
}

impl Default for BalloonSettings {
    fn default() -> Self {
        Self {
            needy_share: 0.9,
            step_share: 0.1,
            free_share_min: 0.1,
            free_share: 0.2,
            back_off_s: 600.0,
        }
    }
}

/// A guest, as far as its memory goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guest {
    /// Which it is.
    pub vm: VmIndex,
    /// Its memory.
    pub memory: Memory,
    /// Guests of higher priority give later, and get earlier.
    pub priority: u8,
    /// Seconds since its kernel last ended a program for lack of memory, if it did.
    pub oom_since_s: Option<f64>,
}

/// The host's memory, MiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Room {
    /// What it has.
    pub total_mib: f64,
    /// What nobody was given.
    pub free_mib: f64,
    /// What a guest that comes will take.
    pub incoming_mib: f64,
}

/// Why a guest gets another amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It lacks memory.
    Needs,
    /// It has memory that is free inside of it.
    SoftIdle,
    /// It has page cache.
    HardIdle,
    /// It has more than its share of a host that has too little for all.
    Entitlement,
}

/// What a guest may use from now on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The guest.
    pub vm: VmIndex,
    /// MiB.
    pub to_mib: f64,
    /// Why.
    pub why: Why,
}

/// Memory that is free inside of a guest and not reserved for it, MiB.
#[must_use]
pub fn soft_idle_mib(memory: &Memory) -> f64 {
    positive(memory.allocated_mib - known(memory.used_mib).max(memory.reserve_mib))
}

/// Page cache that a guest could give up, MiB.
#[must_use]
pub fn hard_idle_mib(memory: &Memory) -> f64 {
    let used_mib = known(memory.used_mib).min(memory.allocated_mib);
    positive(used_mib - known(memory.needed_mib).max(memory.reserve_mib))
}

/// What a guest should get, MiB.
#[must_use]
pub fn need_mib(guest: &Guest, settings: &BalloonSettings) -> f64 {
    let memory = &guest.memory;
    let is_full = memory.needed_mib > settings.needy_share * memory.allocated_mib;
    if is_full || memory.swap_writes_per_s > 0.0 || has_oom_sign(guest, settings) {
        let step_mib = settings.step_share * memory.allocated_mib;
        positive(memory.max_mib - memory.allocated_mib).min(positive(step_mib))
    } else {
        0.0
    }
}

fn has_oom_sign(guest: &Guest, settings: &BalloonSettings) -> bool {
    // A time that is no number counts as just now.
    guest.oom_since_s.is_some_and(|since_s| since_s.total_cmp(&settings.back_off_s).is_lt())
}

/// What is no number may be anything.
fn known(mib: f64) -> f64 {
    if mib.is_nan() { f64::INFINITY } else { mib }
}

/// Zero for what is negative or no number.
fn positive(mib: f64) -> f64 {
    if mib.is_finite() { mib.max(0.0) } else { 0.0 }
}

/// Who gives and who gets: first those that give.
#[must_use]
pub fn decide(room: &Room, guests: &[Guest], settings: &BalloonSettings) -> Vec<Change> {
    let total_mib = positive(room.total_mib);
    let free_mib = if room.free_mib.is_finite() { room.free_mib } else { 0.0 };
    let kept_mib = positive(settings.free_share_min) * total_mib;
    let needs_mib: f64 = guests.iter().map(|guest| need_mib(guest, settings)).sum();
    let needs_mib = needs_mib + positive(room.incoming_mib);
    // Beside the needs, a host that has hardly any free memory gets some.
    let refill_mib = if free_mib < kept_mib {
        positive(positive(settings.free_share) * total_mib - free_mib)
    } else {
        0.0
    };
    let spare_mib = positive(free_mib - kept_mib);
    let mut takings = Takings::new(guests, settings);
    takings.take(positive(needs_mib + refill_mib - spare_mib), soft_idle_mib, Why::SoftIdle);
    let still_mib = positive(needs_mib + refill_mib - spare_mib - takings.sum_mib());
    takings.take(still_mib, hard_idle_mib, Why::HardIdle);
    if takings.sum_mib() + positive(free_mib) < needs_mib {
        takings.take_above_entitlement(total_mib, positive(room.incoming_mib) - positive(free_mib));
    }
    let mut changes = takings.changes();
    let gets_mib = positive(takings.sum_mib() + free_mib - positive(room.incoming_mib));
    changes.extend(give(guests, gets_mib, takings.is_overload, total_mib, settings));
    changes
}

/// What was taken of each guest.
struct Takings<'a> {
    guests: &'a [Guest],
    settings: &'a BalloonSettings,
    taken: Vec<(f64, Option<Why>)>,
    is_overload: bool,
}

impl<'a> Takings<'a> {
    fn new(guests: &'a [Guest], settings: &'a BalloonSettings) -> Self {
        Self { guests, settings, taken: vec![(0.0, None); guests.len()], is_overload: false }
    }

    fn sum_mib(&self) -> f64 {
        self.taken.iter().map(|(mib, _)| mib).sum()
    }

    /// Who can give: not those that lack memory themselves.
    fn can_give(&self, guest: &Guest) -> bool {
        need_mib(guest, self.settings) <= 0.0 && !self.shows_signs(guest)
    }

    /// Whether a guest was squeezed too far already.
    fn shows_signs(&self, guest: &Guest) -> bool {
        guest.memory.swap_writes_per_s > 0.0 || has_oom_sign(guest, self.settings)
    }

    /// Takes as much as is wanted, or there is: all from lower priorities, from the last in proportion to what they have.
    fn take(&mut self, wanted_mib: f64, idle_mib: impl Fn(&Memory) -> f64, why: Why) {
        let mut wanted_mib = wanted_mib;
        let mut priorities: Vec<u8> = self.guests.iter().map(|guest| guest.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        for priority in priorities {
            let gives = |guest: &Guest| {
                let is_asked = guest.priority == priority && self.can_give(guest);
                if is_asked { idle_mib(&guest.memory) } else { 0.0 }
            };
            let idle: Vec<f64> = self.guests.iter().map(gives).collect();
            let all_mib: f64 = idle.iter().sum();
            if wanted_mib < CHANGE_MIB_MIN || all_mib <= 0.0 {
                continue;
            }
            let share = (wanted_mib / all_mib).min(1.0);
            for (taken, idle_mib) in self.taken.iter_mut().zip(idle) {
                if idle_mib > 0.0 {
                    *taken = (taken.0 + share * idle_mib, Some(why));
                }
            }
            wanted_mib -= share * all_mib;
        }
    }

    /// Takes from those that have more than their entitlement, needy or not, a step at most.
    ///
    /// `wanted_mib` is what is wanted beside the guests' needs up to their entitlement.
    fn take_above_entitlement(&mut self, total_mib: f64, wanted_mib: f64) {
        self.is_overload = true;
        let shares = entitlements(self.guests, total_mib);
        let below = self.guests.iter().zip(&shares).map(|(guest, share_mib)| {
            let below_mib = positive(share_mib - guest.memory.allocated_mib);
            below_mib.min(need_mib(guest, self.settings))
        });
        let wanted_mib = wanted_mib + below.sum::<f64>();
        let mut above = vec![];
        for ((guest, share_mib), (taken_mib, _)) in self.guests.iter().zip(shares).zip(&self.taken)
        {
            let memory = &guest.memory;
            let left_mib = memory.allocated_mib - taken_mib;
            let step_mib = positive(self.settings.step_share * memory.allocated_mib - taken_mib);
            let above_mib = positive(left_mib - share_mib.max(memory.reserve_mib)).min(step_mib);
            above.push(if self.shows_signs(guest) { 0.0 } else { above_mib });
        }
        let all_mib: f64 = above.iter().sum();
        let still_mib = positive(wanted_mib - self.sum_mib());
        if all_mib <= 0.0 || still_mib < CHANGE_MIB_MIN {
            return;
        }
        let share = (still_mib / all_mib).min(1.0);
        for (taken, above_mib) in self.taken.iter_mut().zip(above) {
            if above_mib > 0.0 {
                *taken = (taken.0 + share * above_mib, Some(Why::Entitlement));
            }
        }
    }

    /// Forgets what is too little, and says what is left to each that gives.
    fn changes(&mut self) -> Vec<Change> {
        let mut changes = vec![];
        for (guest, taken) in self.guests.iter().zip(&mut self.taken) {
            if let (mib, Some(why)) = *taken
                && mib >= CHANGE_MIB_MIN
            {
                changes.push(Change {
                    vm: guest.vm,
                    to_mib: guest.memory.allocated_mib - mib,
                    why,
                });
            } else {
                taken.0 = 0.0;
            }
        }
        changes
    }
}

/// What each guest is entitled to, by the RAM it was started with.
fn entitlements(guests: &[Guest], total_mib: f64) -> Vec<f64> {
    let max_mib = |guest: &Guest| positive(guest.memory.max_mib);
    let all_mib: f64 = guests.iter().map(max_mib).sum();
    let share = if all_mib > 0.0 { total_mib / all_mib } else { 0.0 };
    guests.iter().map(|guest| max_mib(guest) * share).collect()
}

/// Gives to those that need, those of high priority first; in overload, up to their entitlement.
fn give(
    guests: &[Guest],
    gets_mib: f64,
    is_overload: bool,
    total_mib: f64,
    settings: &BalloonSettings,
) -> Vec<Change> {
    let shares = entitlements(guests, total_mib);
    let mut order: Vec<_> = guests.iter().zip(shares).collect();
    order.sort_by_key(|(guest, _)| (std::cmp::Reverse(guest.priority), guest.vm));
    let mut left_mib = gets_mib;
    let mut changes = vec![];
    for (guest, share_mib) in order {
        let mut mib = need_mib(guest, settings).min(left_mib);
        if is_overload {
            mib = mib.min(positive(share_mib - guest.memory.allocated_mib));
        }
        if mib >= CHANGE_MIB_MIN {
            left_mib -= mib;
            let to_mib = guest.memory.allocated_mib + mib;
            changes.push(Change { vm: guest.vm, to_mib, why: Why::Needs });
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guest(vm: usize, allocated: f64, used: f64, needed: f64) -> Guest {
        let memory = Memory {
            allocated_mib: allocated,
            used_mib: used,
            needed_mib: needed,
            reserve_mib: 200.0,
            max_mib: 4096.0,
            swap_writes_per_s: 0.0,
        };
        Guest { vm: VmIndex(vm), memory, priority: 0, oom_since_s: None }
    }

    fn room(total_mib: f64, free_mib: f64) -> Room {
        Room { total_mib, free_mib, incoming_mib: 0.0 }
    }

    fn decided(room: &Room, guests: &[Guest]) -> Vec<(usize, f64, Why)> {
        let changes = decide(room, guests, &BalloonSettings::default());
        changes.iter().map(|change| (change.vm.0, change.to_mib.round(), change.why)).collect()
    }

    #[test]
    fn idle_memory_is_what_is_above_use_and_reserve() {
        let memory = guest(0, 1000.0, 600.0, 100.0).memory;
        assert_eq!((soft_idle_mib(&memory), hard_idle_mib(&memory)), (400.0, 400.0));
    }

    #[test]
    fn enough_free_memory_is_given_without_taking_any() {
        let guests = [guest(0, 1000.0, 990.0, 950.0), guest(1, 1000.0, 300.0, 250.0)];
        assert_eq!(decided(&room(8000.0, 4000.0), &guests), [(0, 1100.0, Why::Needs)]);
        assert_eq!(decided(&room(8000.0, 4000.0), &guests[1..]), []);
    }

    #[test]
    fn free_pages_are_taken_before_page_cache() {
        let guests = [guest(0, 2000.0, 1990.0, 1950.0), guest(1, 1000.0, 700.0, 250.0)];
        let changes = decided(&room(8000.0, 800.0), &guests);
        assert_eq!(changes, [(1, 800.0, Why::SoftIdle), (0, 2200.0, Why::Needs)]);
        // 300 MiB are free in the guest, 450 page cache.
        let guests = [guest(0, 4000.0, 3990.0, 3950.0), guest(1, 1000.0, 700.0, 250.0)];
        let mut big = guests;
        big[0].memory.max_mib = 8192.0;
        let changes = decided(&room(8000.0, 800.0), &big);
        assert_eq!(changes, [(1, 600.0, Why::HardIdle), (0, 4400.0, Why::Needs)]);
    }

    #[test]
    fn where_there_is_too_little_for_all_shares_decide() {
        // Half each of 4000 MiB: both need what they have, the second has more than its share.
        let mut guests = [guest(0, 1000.0, 990.0, 950.0), guest(1, 3000.0, 2990.0, 2900.0)];
        let changes = decided(&room(4000.0, 0.0), &guests);
        assert_eq!(changes, [(1, 2900.0, Why::Entitlement), (0, 1100.0, Why::Needs)]);
        guests[1].memory.swap_writes_per_s = 1.0;
        assert_eq!(decided(&room(4000.0, 0.0), &guests), [], "a guest that swaps gives nothing");
        guests[1].memory.swap_writes_per_s = 0.0;
        guests[1].memory.reserve_mib = 2950.0;
        let changes = decided(&room(4000.0, 0.0), &guests);
        assert_eq!(changes, [(1, 2950.0, Why::Entitlement), (0, 1050.0, Why::Needs)]);
    }

    #[test]
    fn a_guest_that_ran_out_of_memory_gives_nothing_for_a_while() {
        let mut guests = [guest(0, 1000.0, 300.0, 250.0)];
        guests[0].oom_since_s = Some(10.0);
        guests[0].memory.max_mib = 1000.0;
        assert_eq!(decided(&room(8000.0, 0.0), &guests), []);
        guests[0].oom_since_s = Some(3600.0);
        assert_eq!(decided(&room(8000.0, 0.0), &guests), [(0, 250.0, Why::HardIdle)]);
    }

    #[test]
    fn the_unimportant_give_first() {
        let mut guests = [guest(0, 1000.0, 300.0, 300.0), guest(1, 1000.0, 300.0, 300.0)];
        guests[0].priority = 9;
        let incoming = Room { total_mib: 4000.0, free_mib: 400.0, incoming_mib: 600.0 };
        assert_eq!(decided(&incoming, &guests), [(1, 400.0, Why::SoftIdle)]);
    }

    fn any_guest() -> impl Strategy<Value = Guest> {
        let mib = || prop_oneof![8 => 0.0..5000.0, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY)];
        let flags = (0_u8..3, prop::option::of(0.0..2000.0), any::<bool>());
        (0.0..5000.0, mib(), mib(), mib(), mib(), flags).prop_map(
            |(allocated_mib, used_mib, needed_mib, reserve_mib, max_mib, flags)| {
                let (priority, oom_since_s, swaps) = flags;
                let swap_writes_per_s = if swaps { 10.0 } else { 0.0 };
                let memory = Memory {
                    allocated_mib,
                    used_mib,
                    needed_mib,
                    reserve_mib,
                    max_mib,
                    swap_writes_per_s,
                };
                Guest { vm: VmIndex(0), memory, priority, oom_since_s }
            },
        )
    }

    proptest! {
        #[test]
        fn reserves_maxima_and_the_host_are_respected(
            mut guests in prop::collection::vec(any_guest(), 0..12),
            total_mib in 0.0..40_000.0,
            free_mib in -1000.0..20_000.0,
            incoming_mib in 0.0..3000.0,
        ) {
            for (index, guest) in guests.iter_mut().enumerate() {
                guest.vm = VmIndex(index);
            }
            let room = Room { total_mib, free_mib, incoming_mib };
            let changes = decide(&room, &guests, &BalloonSettings::default());
            let mut sum_mib = 0.0;
            let mut seen = vec![];
            for change in &changes {
                let memory = guests[change.vm.0].memory;
                prop_assert!(!seen.contains(&change.vm), "twice");
                seen.push(change.vm);
                prop_assert!(change.to_mib.is_finite() && change.to_mib >= 0.0);
                sum_mib += change.to_mib - memory.allocated_mib;
                if change.to_mib < memory.allocated_mib {
                    let reserve_mib = memory.reserve_mib;
                    prop_assert!(reserve_mib.is_nan() || change.to_mib >= reserve_mib - 1e-6);
                    prop_assert!(!guests[change.vm.0].oom_since_s.is_some_and(|s| s < 600.0));
                } else {
                    prop_assert!(change.to_mib <= memory.max_mib + 1e-6);
                }
            }
            let given = changes.iter().any(|change| change.why == Why::Needs);
            prop_assert!(!given || sum_mib <= free_mib - incoming_mib + 1e-6);
        }
    }
}
