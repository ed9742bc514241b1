//! Migrations of this agent, as people see them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use parking_lot::Mutex;

use crate::api::view::{ENDED_MAX, MoveView};

/// Those under way, and the last ones that ended.
#[derive(Debug, Default)]
pub struct Moves {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    under_way: BTreeMap<String, MoveView>,
    aborted: BTreeSet<String>,
    ended: VecDeque<MoveView>,
}

impl Moves {
    /// One begins, if it has not yet.
    pub fn begin(&self, view: MoveView) {
        self.inner.lock().under_way.entry(view.guest.clone()).or_insert(view);
    }

    /// Changes what is shown of one.
    pub fn update(&self, guest: &str, change: impl FnOnce(&mut MoveView)) {
        if let Some(view) = self.inner.lock().under_way.get_mut(guest) {
            change(view);
        }
    }

    /// One has ended.
    pub fn end(&self, guest: &str, change: impl FnOnce(&mut MoveView)) -> MoveView {
        let mut inner = self.inner.lock();
        let mut view = inner.under_way.remove(guest).unwrap_or_default();
        change(&mut view);
        inner.aborted.remove(guest);
        inner.ended.push_front(view.clone());
        inner.ended.truncate(ENDED_MAX);
        view
    }

    /// One is to be given up: whether there is such a one.
    #[must_use]
    pub fn abort(&self, guest: &str) -> bool {
        let mut inner = self.inner.lock();
        let is_there = inner.under_way.contains_key(guest);
        if is_there {
            inner.aborted.insert(guest.to_owned());
        }
        is_there
    }

    /// Whether one is to be given up.
    #[must_use]
    pub fn is_abort_wanted(&self, guest: &str) -> bool {
        self.inner.lock().aborted.contains(guest)
    }

    /// Whether one is under way.
    #[must_use]
    pub fn is_under_way(&self, guest: &str) -> bool {
        self.inner.lock().under_way.contains_key(guest)
    }

    /// All of them, those under way first.
    #[must_use]
    pub fn all(&self) -> Vec<MoveView> {
        let inner = self.inner.lock();
        inner.under_way.values().chain(&inner.ended).cloned().collect()
    }
}
