//! Connections that are served: how many there are, in all and of each host.
//!
//! A host is the name in its certificate. Invariants: there are at most [`CONNECTIONS_MAX`], and
//! [`CONNECTIONS_PER_HOST_MAX`] of one host; a place is given back when it is dropped; a host without a
//! connection is not remembered.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use transport::pages::StoreError;

/// Most connections that are served at a time.
pub const CONNECTIONS_MAX: u64 = 1024;

/// Most of them that one host has: a quarter, so that none takes all.
pub const CONNECTIONS_PER_HOST_MAX: u64 = CONNECTIONS_MAX / 4;

/// All places.
#[derive(Debug, Default)]
pub struct Places {
    /// How many a host has, by name.
    taken: Mutex<BTreeMap<String, u64>>,
}

/// The place of a connection, until it is dropped.
#[derive(Debug)]
pub struct Place<'a> {
    places: &'a Places,
    host: String,
}

impl Places {
    /// Takes one for a connection of a host.
    ///
    /// # Errors
    /// [`StoreError::Busy`] or [`StoreError::HostBusy`] if there is none.
    pub fn take(&self, host: &str) -> Result<Place<'_>, StoreError> {
        let mut taken = self.taken.lock();
        if taken.values().sum::<u64>() >= CONNECTIONS_MAX {
            return Err(StoreError::Busy { max: CONNECTIONS_MAX });
        }
        if taken.get(host).copied().unwrap_or(0) >= CONNECTIONS_PER_HOST_MAX {
            return Err(StoreError::HostBusy { max: CONNECTIONS_PER_HOST_MAX });
        }
        *taken.entry(host.to_owned()).or_default() += 1;
        Ok(Place { places: self, host: host.to_owned() })
    }

    /// Hosts with connections, and how many each has.
    pub fn hosts(&self) -> BTreeMap<String, u64> {
        self.taken.lock().clone()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        let left = taken.get(&self.host).map_or(0, |count| count.saturating_sub(1));
        match left {
            0 => taken.remove(&self.host),
            left => taken.insert(std::mem::take(&mut self.host), left),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_host_takes_all_places() {
        let places = Places::default();
        let share = CONNECTIONS_PER_HOST_MAX;
        let mut all = vec![];
        for host in ["a", "b", "c"] {
            all.extend((0..share).map(|_| places.take(host).unwrap()));
            let more = places.take(host).unwrap_err();
            assert_eq!(more, StoreError::HostBusy { max: share });
            assert!(more.to_string().contains("close some"), "{more}");
        }
        assert_eq!(places.hosts().get("a"), Some(&share));
        all.extend((3 * share..CONNECTIONS_MAX).map(|_| places.take("d").unwrap()));
        for host in ["a", "e"] {
            let more = places.take(host).unwrap_err();
            assert_eq!(more, StoreError::Busy { max: CONNECTIONS_MAX });
        }
        all.remove(0);
        assert_eq!(places.take("b").unwrap_err(), StoreError::HostBusy { max: share });
        all.push(places.take("a").unwrap());
        drop(all);
        assert!(places.hosts().is_empty());
    }
}
