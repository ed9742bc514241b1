//! Room for connections: so many in all, and so many of each source.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::server::{CONNECTIONS_MAX, CONNECTIONS_PER_SOURCE_MAX};

type BySource = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// All of it.
#[derive(Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    taken: BySource,
}

impl Default for Places {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(CONNECTIONS_MAX)), taken: BySource::default() }
    }
}

/// A connection's; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    _room: OwnedSemaphorePermit,
    taken: BySource,
    source: IpAddr,
}

impl Places {
    /// Waits until there is room for one more.
    ///
    /// # Errors
    /// None that is known: nobody closes it.
    pub(super) async fn room(&self) -> io::Result<OwnedSemaphorePermit> {
        Arc::clone(&self.all).acquire_owned().await.map_err(io::Error::other)
    }

    /// Gives it to a source, if that has not as much as it may have.
    pub(super) fn take(&self, room: OwnedSemaphorePermit, source: IpAddr) -> Option<Place> {
        let mut taken = self.taken.lock();
        let count = taken.entry(source).or_default();
        if *count >= CONNECTIONS_PER_SOURCE_MAX {
            return None;
        }
        *count += 1;
        Some(Place { _room: room, taken: Arc::clone(&self.taken), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        if let Some(count) = taken.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_leaves_others_room_and_gets_back_what_it_gave() {
        let places = Places::default();
        let [one, other] = [IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2])];
        let mut taken = vec![];
        for _ in 0..CONNECTIONS_PER_SOURCE_MAX {
            taken.push(places.take(places.room().await.unwrap(), one).unwrap());
        }
        assert!(places.take(places.room().await.unwrap(), one).is_none());
        assert!(places.take(places.room().await.unwrap(), other).is_some());
        taken.pop();
        assert!(places.take(places.room().await.unwrap(), one).is_some());
        taken.clear();
        assert!(places.taken.lock().is_empty(), "nobody is remembered for ever");
        assert_eq!(places.all.available_permits(), CONNECTIONS_MAX);
    }
}
