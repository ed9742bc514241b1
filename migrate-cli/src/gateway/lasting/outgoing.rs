//! One direction of a stream, from who has something to say to whichever session there is.
//!
//! Invariant: what is kept is bounded; whoever has more to say waits, with or without a session.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::retain::{CountError, Retained};

/// Nothing is sent any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// What may be kept.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Weight in bytes from which on nothing more is taken.
    pub bytes: u64,
    /// Items that may wait to be sent.
    pub unsent: usize,
}

#[derive(Debug)]
struct State<T> {
    kept: Retained<T>,
    is_closed: bool,
}

/// Items that leave in order and are kept until the other end has them.
#[derive(Debug)]
pub struct Outgoing<T> {
    bounds: Bounds,
    state: Mutex<State<T>>,
    /// There is something to send.
    work: Notify,
    /// There is room, or it is over.
    room: Notify,
}

impl<T: Clone> Outgoing<T> {
    /// Nothing yet.
    pub fn new(bounds: Bounds) -> Self {
        let state = Mutex::new(State { kept: Retained::default(), is_closed: false });
        Self { bounds, state, work: Notify::new(), room: Notify::new() }
    }

    /// Takes an item that weighs so many bytes, once there is room. Cancel-safe: it is taken or not.
    ///
    /// # Errors
    /// After [`Self::close`].
    pub async fn push(&self, item: T, bytes: u64) -> Result<(), Closed> {
        let mut item = Some(item);
        loop {
            let room = self.room.notified();
            {
                let mut state = self.lock();
                if state.is_closed {
                    return Err(Closed);
                }
                let is_full = state.kept.bytes() >= self.bounds.bytes
                    || state.kept.unsent() >= self.bounds.unsent;
                if !is_full && let Some(item) = item.take() {
                    state.kept.push(item, bytes);
                    drop(state);
                    self.work.notify_one();
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// The next item for the session, once there is one. One caller at a time. Cancel-safe.
    pub async fn next(&self) -> T {
        loop {
            let work = self.work.notified();
            if let Some(item) = self.lock().kept.send_next() {
                self.room.notify_waiters();
                return item;
            }
            work.await;
        }
    }

    /// The other end has taken so many items.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn confirm(&self, count: u64) -> Result<(), CountError> {
        self.lock().kept.confirm(count)?;
        self.room.notify_waiters();
        Ok(())
    }

    /// A new session begins, to an end to which so many items came.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn resume(&self, count: u64) -> Result<(), CountError> {
        self.lock().kept.resume(count)?;
        self.room.notify_waiters();
        Ok(())
    }

    /// Waits until the other end has taken everything.
    ///
    /// # Errors
    /// If that will not be.
    pub async fn all_confirmed(&self) -> Result<(), Closed> {
        loop {
            let room = self.room.notified();
            {
                let state = self.lock();
                match state.kept.is_empty() {
                    true => return Ok(()),
                    false if state.is_closed => return Err(Closed),
                    false => {}
                }
            }
            room.await;
        }
    }

    /// Nothing more is taken; who waits is woken.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.room.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    const BOUNDS: Bounds = Bounds { bytes: 10, unsent: 3 };

    /// Whether something goes on for a while.
    async fn waits(future: impl Future) -> bool {
        tokio::time::timeout(Duration::from_millis(20), future).await.is_err()
    }

    #[tokio::test]
    async fn who_has_more_to_say_waits() {
        let outgoing = Arc::new(Outgoing::new(BOUNDS));
        for item in 1..=3 {
            outgoing.push(item, 4).await.unwrap();
        }
        assert!(waits(outgoing.push(4, 4)).await, "three wait to be sent");
        let pusher = tokio::spawn({
            let outgoing = Arc::clone(&outgoing);
            async move { outgoing.push(4, 4).await }
        });
        assert_eq!([outgoing.next().await, outgoing.next().await], [1, 2]);
        assert!(!pusher.is_finished() && waits(outgoing.push(4, 4)).await, "twelve bytes are kept");
        outgoing.confirm(1).unwrap();
        pusher.await.unwrap().unwrap();
        assert_eq!([outgoing.next().await, outgoing.next().await], [3, 4]);
        assert!(waits(outgoing.next()).await && waits(outgoing.all_confirmed()).await);
        outgoing.resume(2).unwrap();
        assert_eq!([outgoing.next().await, outgoing.next().await], [3, 4]);
        outgoing.confirm(4).unwrap();
        outgoing.all_confirmed().await.unwrap();
        assert!(outgoing.confirm(5).is_err());
    }

    #[tokio::test]
    async fn who_waits_hears_of_the_end() {
        let outgoing = Arc::new(Outgoing::new(BOUNDS));
        outgoing.push(1, 10).await.unwrap();
        let wait = |outgoing: Arc<Outgoing<i32>>| async move { outgoing.push(2, 1).await };
        let pusher = tokio::spawn(wait(Arc::clone(&outgoing)));
        tokio::time::sleep(Duration::from_millis(5)).await;
        outgoing.close();
        assert_eq!(pusher.await.unwrap(), Err(Closed));
        assert_eq!(outgoing.push(3, 1).await, Err(Closed));
        assert_eq!(outgoing.all_confirmed().await, Err(Closed));
    }
}
