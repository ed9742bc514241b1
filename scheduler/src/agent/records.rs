//! What an agent has begun and not ended, in files, so that the next one knows of it.
//!
//! ```text
//!   STATE/moves/GUEST/record.json       and what the engine that moves it prints
//!   STATE/arrivals/GUEST/record.json    and what the engine that awaits it prints
//! ```
//!
//! Invariant: of one guest there is at most one record of a kind, whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::child;
use crate::api::control::ApiError;

const RECORD: &str = "record.json";

/// The records of one kind.
#[derive(Debug, Clone)]
pub struct Records {
    root: PathBuf,
}

impl Records {
    /// Of guests that move from here.
    #[must_use]
    pub fn of_moves(state: &Path) -> Self {
        Self { root: state.join("moves") }
    }

    /// Of guests that are expected here.
    #[must_use]
    pub fn of_arrivals(state: &Path) -> Self {
        Self { root: state.join("arrivals") }
    }

    /// Where a guest's record and all that belongs to it lie.
    #[must_use]
    pub fn folder(&self, guest: &str) -> PathBuf {
        self.root.join(child::file_name(guest))
    }

    /// All that can be read, by their guests' names; of the others the log tells.
    #[must_use]
    pub fn all<T: DeserializeOwned>(&self) -> Vec<T> {
        let Ok(folders) = fs::read_dir(&self.root) else { return vec![] };
        let mut folders: Vec<PathBuf> = folders.flatten().map(|entry| entry.path()).collect();
        folders.sort();
        let read = |folder: PathBuf| {
            let record = child::read(&folder.join(RECORD));
            if record.is_none() {
                tracing::warn!(folder = %folder.display(), "No record of what was begun: remove it");
            }
            record
        };
        folders.into_iter().filter_map(read).collect()
    }

    /// Whether there is one of a guest.
    #[must_use]
    pub fn has(&self, guest: &str) -> bool {
        self.folder(guest).join(RECORD).exists()
    }

    /// Keeps one, and makes its folder.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`]: it cannot be written.
    pub fn keep(&self, guest: &str, record: &impl Serialize) -> Result<(), ApiError> {
        let folder = self.folder(guest);
        let kept =
            fs::create_dir_all(&folder).and_then(|()| child::write(&folder.join(RECORD), record));
        kept.map_err(|error| ApiError::unavailable(format!("{}: {error}", folder.display())))
    }

    /// Removes one, with all that belongs to it.
    pub fn forget(&self, guest: &str) {
        let folder = self.folder(guest);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(folder = %folder.display(), %error, "A record that has ended stays");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_kept_listed_and_forgotten() {
        let state = tempfile::tempdir().unwrap();
        let moves = Records::of_moves(state.path());
        assert_eq!(moves.all::<String>(), Vec::<String>::new());
        for guest in ["b/../x", "a", ".."] {
            moves.keep(guest, &guest).unwrap();
        }
        assert_eq!(moves.all::<String>(), ["..", "a", "b/../x"]);
        assert!(moves.has("a") && !Records::of_arrivals(state.path()).has("a"));
        moves.forget("a");
        assert!(!moves.has("a"));
        moves.forget("a");
    }

    #[test]
    fn what_cannot_be_kept_is_said() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join("moves"), "a file").unwrap();
        let kept = Records::of_moves(state.path()).keep("a", &"a");
        assert!(matches!(kept, Err(ApiError::Unavailable { .. })), "{kept:?}");
    }
}
