//! What agents tell each other by the store, as this one has heard it last.
//!
//! | key | value | lease |
//! |---|---|---|
//! | `/godwit/agents/HOST` | [`Presence`] | the agent's |
//! | `/godwit/reports/HOST` | [`HostReport`], when it has changed | none |
//! | `/godwit/hotspots/HOST` | [`HotspotView`]s of that host, when they have changed | none |
//! | `/godwit/drained/HOST` | empty: guests are to leave it | none |
//! | `/godwit/moved/VM` | [`Moved`] | none |
//! | `/godwit/moves/VM` and others | see [`claims`](crate::store::claims) | none |
//!
//! A report is written only when it differs from the last one by more than [`CHANGE`] of what the host has: that the agent
//! is there says that it still holds. Invariants: an entry that cannot be read is passed over with a remark and hides no
//! other; everything is as of one revision of the store or later.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use crate::api::view::HotspotView;
use crate::model::{Amounts, Resource};
use crate::profile::{GuestReport, HostReport, Received};
use crate::store::claims::{Claim, Presence, ROOT};
use crate::store::{AnyStore, Entry, Event, Store, StoreError};

/// What figures may differ by, as a share of what the host has, before it is told.
pub const CHANGE: f64 = 0.05;

/// Pause before the store is asked again after it could not be reached.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A guest's last move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moved {
    /// When it ended, by the clock of whoever moved it, seconds since 1970.
    pub at_s: f64,
    /// Where the guest was before.
    pub from: String,
}

/// Everything that was heard.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Agents that are there, by their hosts.
    pub agents: BTreeMap<String, Presence>,
    /// Last reports, by their hosts.
    pub reports: BTreeMap<String, HostReport>,
    /// When they came, where that was seen.
    pub came_at_s: BTreeMap<String, f64>,
    /// When an agent that is gone was there last, by its host.
    pub left_at_s: BTreeMap<String, f64>,
    /// When a host's last migration ended, by the host.
    pub calm_since_s: BTreeMap<String, f64>,
    /// Hotspots, by their hosts.
    pub hotspots: BTreeMap<String, Vec<HotspotView>>,
    /// Hosts that are to be emptied.
    pub drained: BTreeSet<String>,
    /// Migrations that are claimed, by their guests.
    pub claims: BTreeMap<String, Claim>,
    /// Last moves, by their guests.
    pub moved: BTreeMap<String, Moved>,
    /// Entries that cannot be read, by their keys.
    pub foreign: BTreeMap<String, String>,
    /// Why nothing is heard at present.
    pub trouble: Option<String>,
}

impl Heard {
    /// Reports with when each held last. One's own is left out.
    #[must_use]
    pub fn received(&self, own: &str, now_s: f64) -> Vec<Received> {
        let others = self.reports.iter().filter(|(host, _)| *host != own);
        let heard_at_s = |host: &String| {
            let left_at_s = self.left_at_s.get(host).copied().unwrap_or(0.0);
            if self.agents.contains_key(host) { now_s } else { left_at_s }
        };
        others
            .map(|(host, report)| {
                let mut report = report.clone();
                let at_s = heard_at_s(host);
                // It holds until there is another one: what its clock is off by was seen when it came.
                let off_s =
                    self.came_at_s.get(host).map_or(0.0, |came_at_s| report.at_s - came_at_s);
                report.at_s = (at_s + off_s).max(0.0);
                Received { report, at_s }
            })
            .collect()
    }

    fn apply(&mut self, event: Event, now_s: f64) {
        let (key, entry) = match event {
            Event::Put(entry) => (entry.key.clone(), Some(entry)),
            Event::Gone { key, .. } => (key, None),
        };
        let Some((kind, name)) = key.strip_prefix(ROOT).and_then(|key| key.split_once('/')) else {
            return;
        };
        self.foreign.remove(&key);
        let applied = match kind {
            "agents" => {
                let known = set(&mut self.agents, name, entry.as_ref());
                if !self.agents.contains_key(name) {
                    self.left_at_s.insert(name.to_owned(), now_s);
                }
                known
            }
            "reports" => {
                self.came_at_s.insert(name.to_owned(), now_s);
                self.apply_report(name, entry.as_ref())
            }
            "hotspots" => set(&mut self.hotspots, name, entry.as_ref()),
            "moves" => {
                if let Some(claim) = self.claims.get(name).filter(|_| entry.is_none()) {
                    let hosts = [claim.from.clone(), claim.to.clone()];
                    self.calm_since_s.extend(hosts.map(|host| (host, now_s)));
                }
                set(&mut self.claims, name, entry.as_ref())
            }
            "moved" => set(&mut self.moved, name, entry.as_ref()),
            "drained" => {
                match entry {
                    Some(_) => self.drained.insert(name.to_owned()),
                    None => self.drained.remove(name),
                };
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(why) = applied {
            self.foreign
                .insert(key.clone(), format!("The store's entry {key} is passed over: {why}"));
        }
    }

    fn apply_report(&mut self, host: &str, entry: Option<&Entry>) -> Result<(), String> {
        let Some(entry) = entry else {
            self.reports.remove(host);
            return Ok(());
        };
        let report = HostReport::from_json(&entry.value).map_err(|error| error.to_string())?;
        if report.host != host {
            return Err(format!("it is of a host that calls itself {:?}", report.host));
        }
        self.reports.insert(host.to_owned(), report);
        Ok(())
    }
}

fn set<T: DeserializeOwned>(
    all: &mut BTreeMap<String, T>,
    name: &str,
    entry: Option<&Entry>,
) -> Result<(), String> {
    match entry {
        Some(entry) => {
            let value = serde_json::from_slice(&entry.value).map_err(|error| error.to_string())?;
            all.insert(name.to_owned(), value);
        }
        None => {
            all.remove(name);
        }
    }
    Ok(())
}

/// What was heard, kept up to date.
#[derive(Debug, Clone, Default)]
pub struct Board {
    heard: Arc<Mutex<Heard>>,
}

impl Board {
    /// What was heard by now.
    #[must_use]
    pub fn heard(&self) -> Heard {
        self.heard.lock().clone()
    }

    /// Looks at some of it, without copying all.
    pub fn with<T>(&self, look: impl FnOnce(&Heard) -> T) -> T {
        look(&self.heard.lock())
    }

    /// Listens to a store, for ever.
    pub async fn listen(&self, store: AnyStore, clock: Clock) {
        loop {
            let why = match self.listen_once(&store, clock).await {
                Ok(()) => "the store ended what it told".to_owned(),
                Err(error) => error.to_string(),
            };
            self.heard.lock().trouble = Some(why);
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }

    async fn listen_once(&self, store: &AnyStore, clock: Clock) -> Result<(), StoreError> {
        let (entries, revision) = store.list(ROOT).await?;
        let mut events = store.watch(ROOT, revision).await?;
        self.begin(entries, clock.now_s());
        while let Some(event) = events.recv().await {
            let event = event?;
            self.heard.lock().apply(event, clock.now_s());
        }
        Ok(())
    }

    /// What is in the store now; who left meanwhile is known to have.
    fn begin(&self, entries: Vec<Entry>, now_s: f64) {
        let mut heard = self.heard.lock();
        let mut fresh = Heard {
            left_at_s: heard.left_at_s.clone(),
            calm_since_s: heard.calm_since_s.clone(),
            ..Heard::default()
        };
        for entry in entries {
            fresh.apply(Event::Put(entry), now_s);
        }
        // They are of some time before.
        fresh.came_at_s.clear();
        for host in heard.agents.keys().filter(|host| !fresh.agents.contains_key(*host)) {
            fresh.left_at_s.insert(host.clone(), now_s);
        }
        *heard = fresh;
    }
}

/// Whether a report says something else than the last one that was written.
#[must_use]
pub fn has_changed(last: &HostReport, now: &HostReport) -> bool {
    let scale = now.capacity;
    let differ = |one: &Amounts, other: &Amounts| {
        Resource::ALL.into_iter().any(|resource| {
            (one[resource] - other[resource]).abs()
                > CHANGE * scale[resource].max(f64::MIN_POSITIVE)
        })
    };
    if last.boot_id != now.boot_id
        || last.capacity != now.capacity
        || last.troubles != now.troubles
        || last.guests.len() != now.guests.len()
        || differ(&last.used, &now.used)
    {
        return true;
    }
    last.guests.iter().zip(&now.guests).any(|(last, now)| {
        is_another(last, now)
            || differ(&amounts(last), &amounts(now))
            || (last.steal - now.steal).abs() > CHANGE
            || (last.memory.needed_mib - now.memory.needed_mib).abs() > CHANGE * scale.memory_mib
            || have_other_peers(last, now, scale.network_mbit)
    })
}

fn is_another(last: &GuestReport, now: &GuestReport) -> bool {
    (&last.name, &last.uuid, last.state, last.is_migrating, last.vcpus, last.gray_box.is_some())
        != (&now.name, &now.uuid, now.state, now.is_migrating, now.vcpus, now.gray_box.is_some())
        || last.addresses != now.addresses
}

fn amounts(guest: &GuestReport) -> Amounts {
    Amounts {
        cpu_cores: guest.cpu_cores,
        memory_mib: guest.memory.allocated_mib,
        network_mbit: guest.network_mbit,
        disk_mib: guest.disk_mib,
    }
}

fn have_other_peers(last: &GuestReport, now: &GuestReport, network_mbit: f64) -> bool {
    let by_peer = |guest: &GuestReport| -> BTreeMap<String, f64> {
        guest.sent.iter().map(|sent| (sent.to.clone(), sent.mbit)).collect()
    };
    let (last, now) = (by_peer(last), by_peer(now));
    let peers: BTreeSet<&String> = last.keys().chain(now.keys()).collect();
    let to = |all: &BTreeMap<String, f64>, peer: &String| all.get(peer).copied().unwrap_or(0.0);
    peers.into_iter().any(|peer| (to(&last, peer) - to(&now, peer)).abs() > CHANGE * network_mbit)
}
