//! Who moves which guest, and what a host has promised: no two agents move the same guest, use a host for two migrations
//! at once, or fill a host with more than it has.
//!
//! ```text
//!   free ── begin ──► claimed by an agent ── end ──► free
//!                        │ the agent's lease ends
//!                        ▼
//!                     orphan ── take_over ──► claimed by another, who finds out where the guest is, and ends it
//! ```
//!
//! A claim does not end with its agent's lease: the migration that it stands for may still be under way. Whoever takes it
//! over asks both hosts first. Keys, all values JSON:
//!
//! | key | value | lease |
//! |---|---|---|
//! | `/godwit/agents/HOST` | [`Presence`] | the agent's |
//! | `/godwit/moves/VM` | [`Claim`] | none |
//! | `/godwit/busy/HOST` | name of the guest | none |
//! | `/godwit/promised/HOST` | [`Promise`]s, of guests that are to arrive | none |
//!
//! Invariants: the four entries of a claim are made and removed in one transaction; the promises of a host are changed only
//! by who has seen all of them.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Change, Condition, Entry, Lease, Store, StoreError};
use crate::model::Amounts;

/// Before all keys.
pub const ROOT: &str = "/godwit/";

/// Tries before a change gives up against others' changes.
const TRIES: usize = 8;

/// Most guests that one host is promised.
const PROMISES_MAX: usize = 256;

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Presence {
    /// Its host's name.
    pub host: String,
    /// Where it is asked, as `ADDRESS:PORT`.
    pub api: String,
    /// Its version.
    pub version: String,
}

/// A migration that somebody has begun, or is about to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The guest's name.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// The host whose agent moves it.
    pub agent: String,
    /// What it will take there.
    pub takes: Amounts,
    /// Why, in words.
    pub reason: String,
}

/// What a host keeps free for a guest that is to arrive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promise {
    /// The guest's name.
    pub vm: String,
    /// What it will take.
    pub takes: Amounts,
}

/// Why a migration may not begin, or its claim is not changed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody moves that guest already.
    #[error("{vm} is being moved already, by the agent of {agent}")]
    Taken {
        /// The guest.
        vm: String,
        /// Whose agent does.
        agent: String,
    },
    /// A host takes part in another migration.
    #[error("{host} takes part in the migration of {vm}; one at a time")]
    Busy {
        /// The host.
        host: String,
        /// The guest on its way.
        vm: String,
    },
    /// The destination has promised too much already.
    #[error("{host} has no room for {vm}: {why}")]
    NoRoom {
        /// The host.
        host: String,
        /// The guest.
        vm: String,
        /// What there is too little of.
        why: String,
    },
    /// There is no such claim, or it is another agent's.
    #[error("The move of {vm} is not this agent's: {whose}")]
    NotOurs {
        /// The guest.
        vm: String,
        /// Whose it is.
        whose: String,
    },
    /// Others changed the same entries all the time.
    #[error("Other agents changed the same entries {TRIES} times in a row; try again")]
    Contended,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An agent's view of the claims.
#[derive(Debug, Clone)]
pub struct Claims<S> {
    store: S,
    /// The agent's host.
    agent: String,
}

fn key(kind: &str, name: &str) -> String {
    format!("{ROOT}{kind}/{name}")
}

fn read<T: DeserializeOwned>(entry: &Entry) -> Result<T, StoreError> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| StoreError::Foreign { what: format!("{}: {error}", entry.key) })
}

fn put(key: String, value: &impl Serialize, lease: Option<Lease>) -> Result<Change, StoreError> {
    let value = serde_json::to_vec(value)
        .map_err(|error| StoreError::Foreign { what: format!("{key}: {error}") })?;
    Ok(Change::Put { key, value, lease })
}

/// What an entry must be like at the change, to be as it was read.
fn as_read(key: String, entry: Option<&Entry>) -> Condition {
    match entry {
        Some(entry) => Condition::Unchanged(key, entry.revision),
        None => Condition::Absent(key),
    }
}

impl<S: Store> Claims<S> {
    /// Those of a host's agent.
    pub fn new(store: S, agent: impl Into<String>) -> Self {
        Self { store, agent: agent.into() }
    }

    /// Says that the agent is there, as long as the lease is kept.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn present(&self, presence: &Presence, lease: Lease) -> Result<(), ClaimError> {
        let change = put(key("agents", &self.agent), presence, Some(lease))?;
        self.store.commit(&[], &[change]).await?;
        Ok(())
    }

    /// All migrations that are claimed.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn all(&self) -> Result<Vec<Claim>, ClaimError> {
        let (entries, _) = self.store.list(&key("moves", "")).await?;
        Ok(entries.iter().map(read).collect::<Result<_, _>>()?)
    }

    /// Those whose agents are gone.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn orphans(&self) -> Result<Vec<Claim>, ClaimError> {
        let (agents, _) = self.store.list(&key("agents", "")).await?;
        let mut claims = self.all().await?;
        claims.retain(|claim| {
            let own = key("agents", &claim.agent);
            agents.iter().all(|agent| agent.key != own)
        });
        Ok(claims)
    }

    /// Claims a migration for this agent. `room` is asked with everything that the destination has promised, this guest
    /// included, and says what there would be too little of. May be asked again where it is not known whether the store has
    /// heard it.
    ///
    /// # Errors
    /// Why it may not begin.
    pub async fn begin(
        &self,
        claim: &Claim,
        room: impl Fn(&[Promise]) -> Result<(), String>,
    ) -> Result<(), ClaimError> {
        let Claim { vm, from, to, takes, .. } = claim;
        let claim = Claim { agent: self.agent.clone(), ..claim.clone() };
        let hosts = [key("busy", from), key("busy", to)];
        for _ in 0..TRIES {
            if self.is_begun(&claim).await? {
                return Ok(());
            }
            let promised = key("promised", to);
            let entry = self.store.get(&promised).await?;
            let mut promises: Vec<Promise> =
                entry.as_ref().map(read).transpose()?.unwrap_or_default();
            promises.push(Promise { vm: vm.clone(), takes: *takes });
            let no_room = |why| ClaimError::NoRoom { host: to.clone(), vm: vm.clone(), why };
            if promises.len() > PROMISES_MAX {
                return Err(no_room(format!("it is promised to {PROMISES_MAX} guests")));
            }
            room(&promises).map_err(no_room)?;
            let mut conditions = vec![
                Condition::Absent(key("moves", vm)),
                as_read(promised.clone(), entry.as_ref()),
            ];
            conditions.extend(hosts.iter().cloned().map(Condition::Absent));
            let mut changes =
                vec![put(key("moves", vm), &claim, None)?, put(promised, &promises, None)?];
            for host in &hosts {
                changes.push(put(host.clone(), vm, None)?);
            }
            if self.store.commit(&conditions, &changes).await?.is_some() {
                return Ok(());
            }
        }
        Err(ClaimError::Contended)
    }

    /// Whether this very claim is there: an answer may have been lost.
    async fn is_begun(&self, claim: &Claim) -> Result<bool, ClaimError> {
        if let Some(entry) = self.store.get(&key("moves", &claim.vm)).await? {
            let known: Claim = read(&entry)?;
            if known == *claim {
                return Ok(true);
            }
            return Err(ClaimError::Taken { vm: known.vm, agent: known.agent });
        }
        for host in [&claim.from, &claim.to] {
            if let Some(entry) = self.store.get(&key("busy", host)).await? {
                return Err(ClaimError::Busy { host: host.clone(), vm: read(&entry)? });
            }
        }
        Ok(false)
    }

    /// A migration of this agent has ended, well or not.
    ///
    /// # Errors
    /// [`ClaimError::NotOurs`], and those of the store.
    pub async fn end(&self, vm: &str) -> Result<(), ClaimError> {
        for _ in 0..TRIES {
            let (entry, claim) = self.ours(vm).await?;
            let promised = key("promised", &claim.to);
            let promises = self.store.get(&promised).await?;
            let mut left: Vec<Promise> =
                promises.as_ref().map(read).transpose()?.unwrap_or_default();
            left.retain(|promise| promise.vm != vm);
            let conditions = [
                Condition::Unchanged(entry.key.clone(), entry.revision),
                as_read(promised.clone(), promises.as_ref()),
            ];
            let mut changes = vec![Change::Delete(entry.key)];
            changes.extend([&claim.from, &claim.to].map(|host| Change::Delete(key("busy", host))));
            changes.push(match left.is_empty() {
                true => Change::Delete(promised),
                false => put(promised, &left, None)?,
            });
            if self.store.commit(&conditions, &changes).await?.is_some() {
                return Ok(());
            }
        }
        Err(ClaimError::Contended)
    }

    async fn ours(&self, vm: &str) -> Result<(Entry, Claim), ClaimError> {
        let not_ours = |whose: String| ClaimError::NotOurs { vm: vm.to_owned(), whose };
        let entry = self.store.get(&key("moves", vm)).await?;
        let entry = entry.ok_or_else(|| not_ours("nobody moves it".into()))?;
        let claim: Claim = read(&entry)?;
        if claim.agent != self.agent {
            return Err(not_ours(format!("the agent of {} does", claim.agent)));
        }
        Ok((entry, claim))
    }

    /// Takes over a migration whose agent is gone; of several who try, one does.
    ///
    /// # Errors
    /// [`ClaimError::NotOurs`] if its agent is there, or another one was faster.
    pub async fn take_over(&self, vm: &str) -> Result<Claim, ClaimError> {
        let not_ours = |whose: String| ClaimError::NotOurs { vm: vm.to_owned(), whose };
        let entry = self.store.get(&key("moves", vm)).await?;
        let entry = entry.ok_or_else(|| not_ours("nobody moves it".into()))?;
        let claim: Claim = read(&entry)?;
        let agent = key("agents", &claim.agent);
        let claim = Claim { agent: self.agent.clone(), ..claim };
        let conditions =
            [Condition::Unchanged(entry.key.clone(), entry.revision), Condition::Absent(agent)];
        let change = put(entry.key, &claim, None)?;
        match self.store.commit(&conditions, &[change]).await? {
            Some(_) => Ok(claim),
            None => Err(not_ours("its agent is there, or another one took it over".into())),
        }
    }
}
