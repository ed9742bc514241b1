//! The durable record of a migration at one end.
//!
//! One file a migration and role. Two slots of 8 KiB are written in turn with a sequence
//! number and a checksum, so that an update is one `pwrite` and one `fdatasync` within blocks that
//! exist already, and a torn write leaves the previous record valid. The file and its directory are
//! synced once, on creation, before the guest is touched.
//!
//! Invariant: one process at a time writes a journal. It holds an exclusive lock on the file, which
//! the kernel releases when the process ends in whatever way.
//!
//! ```text
//!   slot 0: magic, sequence, length, checksum, JSON     slot 1: the same
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::handover::{DestinationRecord, SourceRecord};
use qemu_glue::ram::RamRegion;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use transport::messages::Split;
use xxhash_rust::xxh3::xxh3_64;

/// Size of one of the two slots in bytes. An entry is a few hundred bytes.
const SLOT_BYTES: usize = 8192;
const HEADER_BYTES: usize = 32;
const MAGIC: &[u8; 8] = b"GODWIT-J";

/// What a journal says about a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Identity of the migration, in hexadecimal.
    pub migration: String,
    /// Which end, and how far it came.
    pub record: Record,
    /// The VM's QMP socket.
    pub qmp: PathBuf,
    /// The VM's name.
    pub vm: String,
    /// Process of the VM's QEMU.
    pub qemu_pid: i32,
    /// Start time of that process in clock ticks since boot: tells a reused pid.
    pub qemu_start_ticks: u64,
    /// The other end's address.
    pub peer: String,
    /// Directory of the identity in use.
    pub identity: PathBuf,
    /// The name in the other end's certificate, if it is known: nobody else is believed later.
    #[serde(default)]
    pub peer_name: Option<String>,
    /// Whether the guest ran when the migration began.
    pub was_running: bool,
    /// Whether the source's QEMU is to stay, paused, after success.
    #[serde(default)]
    pub keep_source: bool,
    /// Whether the other end is known to know how it ended.
    pub heard: bool,
    /// How QEMU's memory is paged, where pages may be missing (post-copy).
    #[serde(default)]
    pub paging: Option<PagingEntry>,
}

/// What an engine needs to go on with the paging of one that died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagingEntry {
    /// Number of QEMU's own copy of the userfaultfd.
    pub remote_fd: i32,
    /// The RAM blocks: QEMU cannot be asked while its threads wait for pages.
    pub regions: Vec<RamRegion>,
    /// Where the guest's memory is that is not here, if it is split.
    #[serde(default)]
    pub split: Option<Split>,
}

/// Which end a journal belongs to, and its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// This end is the source.
    Source(SourceRecord),
    /// This end is the destination.
    Destination(DestinationRecord),
}

impl Record {
    fn role(self) -> &'static str {
        match self {
            Self::Source(_) => "source",
            Self::Destination(_) => "destination",
        }
    }
}

/// A journal cannot be kept.
#[derive(Debug, Error)]
#[error(
    "The journal {path} cannot be {action}; free space there or choose another place with --journal DIR"
)]
pub struct JournalError {
    path: PathBuf,
    action: &'static str,
    #[source]
    source: io::Error,
}

impl Classify for JournalError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::System
    }
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    sequence: u64,
    entry: Entry,
}

/// A journal that was found on disk.
#[derive(Debug)]
pub enum Found {
    /// Nobody is at work on this migration.
    Free(Journal),
    /// Another process is at work on this migration; what its journal said at the moment.
    Held(Entry),
}

impl Found {
    /// What the journal says.
    pub fn entry(&self) -> &Entry {
        match self {
            Self::Free(journal) => journal.entry(),
            Self::Held(entry) => entry,
        }
    }
}

/// Where journals lie unless the user says otherwise.
pub fn default_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/godwit/journal");
    }
    std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state")))
        .unwrap_or_else(|| PathBuf::from("/tmp"))
        .join("godwit/journal")
}

impl Journal {
    /// Creates the journal of a new migration and makes it durable.
    ///
    /// # Errors
    /// [`JournalError`] with the path and the remedy, for example when the disk is full.
    pub fn create(dir: &Path, entry: Entry) -> Result<Self, JournalError> {
        let path = dir.join(format!("{}-{}.journal", entry.record.role(), entry.migration));
        let fail = |action, source| JournalError { path: path.clone(), action, source };
        fs::create_dir_all(dir).map_err(|error| fail("created", error))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| fail("created", error))?;
        let mut journal = Self { file, path: path.clone(), sequence: 0, entry };
        match journal.write_first(dir) {
            Ok(()) => Ok(journal),
            Err(error) => {
                // Half a journal says nothing and only takes space.
                journal.remove();
                Err(error)
            }
        }
    }

    fn write_first(&mut self, dir: &Path) -> Result<(), JournalError> {
        let path = self.path.clone();
        let fail = |action, source| JournalError { path: path.clone(), action, source };
        self.file.lock().map_err(|error| fail("locked", error))?;
        self.file.write_all_at(&[0; 2 * SLOT_BYTES], 0).map_err(|error| fail("written", error))?;
        self.write()?;
        self.file.sync_all().map_err(|error| fail("synced", error))?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| fail("synced", error))
    }

    /// Opens and locks an existing journal; nothing if the file holds no valid entry.
    ///
    /// # Errors
    /// [`JournalError`] if the file cannot be read, [`Found::Held`] is no error.
    pub fn open(path: &Path) -> Result<Option<Found>, JournalError> {
        Self::open_if(path, |_| true)
    }

    /// The same of a journal that `is_wanted`; others are not locked, which would be in somebody's way.
    fn open_if(
        path: &Path,
        is_wanted: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Found>, JournalError> {
        let fail = |source| JournalError { path: path.to_owned(), action: "read", source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        if !newest(&file).is_some_and(|(_, entry)| is_wanted(&entry)) {
            return Ok(None);
        }
        let held = match file.try_lock() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(error)) => return Err(fail(error)),
        };
        Ok(newest(&file).map(|(sequence, entry)| match held {
            true => Found::Held(entry),
            false => Found::Free(Self { file, path: path.to_owned(), sequence, entry }),
        }))
    }

    /// The journals in a directory that are wanted; files that are none are skipped.
    pub fn list(dir: &Path, is_wanted: impl Fn(&Entry) -> bool) -> Vec<Found> {
        let Ok(files) = fs::read_dir(dir) else { return vec![] };
        files
            .flatten()
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "journal"))
            .filter_map(|path| Self::open_if(&path, &is_wanted).ok().flatten())
            .collect()
    }

    /// What the journal says.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Writes a new record durably.
    ///
    /// # Errors
    /// [`JournalError`]; whether the record reached the disk is then unknown.
    pub fn record(&mut self, record: Record) -> Result<(), JournalError> {
        self.entry.record = record;
        self.write()
    }

    /// Notes whether the guest is to run; durable with the next record.
    pub fn set_was_running(&mut self, was_running: bool) {
        self.entry.was_running = was_running;
    }

    /// Notes how QEMU's memory is paged, and makes that durable.
    ///
    /// # Errors
    /// [`JournalError`] if it cannot be written.
    pub fn set_paging(&mut self, paging: PagingEntry) -> Result<(), JournalError> {
        let before = self.entry.paging.replace(paging);
        let written = self.write();
        if written.is_err() {
            // A later record must not say it either.
            self.entry.paging = before;
        }
        written
    }

    /// Notes that QEMU's memory is not paged any more. Says whether that is durable.
    pub fn end_paging(&mut self) -> bool {
        // Left by a pager that was killed.
        let _none_there = fs::remove_file(self.socket());
        if self.entry.paging.take().is_none() {
            return true;
        }
        let written = self.write();
        if let Err(error) = &written {
            tracing::warn!(%error, "not noted");
        }
        written.is_ok()
    }

    /// Where the pager of the guest is asked, if there is one.
    pub fn socket(&self) -> PathBuf {
        self.path.with_extension("sock")
    }

    /// Notes that the other end knows how it ended. Losing this note does no harm.
    pub fn mark_heard(&mut self) {
        if !self.entry.heard {
            self.entry.heard = true;
            if let Err(error) = self.write() {
                tracing::debug!(%error, "not noted");
            }
        }
    }

    /// Time since the last change.
    pub fn age(&self) -> std::time::Duration {
        let changed = self.file.metadata().and_then(|data| data.modified());
        changed.ok().and_then(|at| at.elapsed().ok()).unwrap_or_default()
    }

    /// Removes the journal: the migration is over and nobody will ask.
    pub fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "journal not removed");
        }
    }

    fn write(&mut self) -> Result<(), JournalError> {
        let fail = |source| JournalError { path: self.path.clone(), action: "written", source };
        self.sequence += 1;
        let bytes = encode(self.sequence, &self.entry).map_err(fail)?;
        let offset = (self.sequence % 2) * SLOT_BYTES as u64;
        self.file.write_all_at(&bytes, offset).map_err(fail)?;
        self.file.sync_data().map_err(fail)
    }
}

fn encode(sequence: u64, entry: &Entry) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(entry)?;
    if body.len() + HEADER_BYTES > SLOT_BYTES {
        return Err(io::Error::other("the entry does not fit its slot: its paths are too long"));
    }
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let mut summed = bytes.clone();
    summed.extend_from_slice(&body);
    bytes.extend_from_slice(&xxh3_64(&summed).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The last entry that was written whole, with its number.
fn newest(file: &File) -> Option<(u64, Entry)> {
    let slots = (0..2).filter_map(|slot| {
        let mut bytes = vec![0; SLOT_BYTES];
        file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64).ok()?;
        decode(&bytes)
    });
    slots.max_by_key(|(sequence, _)| *sequence)
}

fn decode(slot: &[u8]) -> Option<(u64, Entry)> {
    let (head, rest) = slot.split_at_checked(24)?;
    let (sum, rest) = rest.split_at_checked(8)?;
    if head.get(..8)? != MAGIC {
        return None;
    }
    let sequence = u64::from_le_bytes(head.get(8..16)?.try_into().ok()?);
    let length = usize::try_from(u64::from_le_bytes(head.get(16..24)?.try_into().ok()?)).ok()?;
    let body = rest.get(..length)?;
    let summed = [head, body].concat();
    (xxh3_64(&summed).to_le_bytes() == sum).then_some(())?;
    Some((sequence, serde_json::from_slice(body).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            migration: "00ff".into(),
            record: Record::Source(SourceRecord::Moving),
            qmp: "/run/vm.qmp".into(),
            vm: "vm".into(),
            qemu_pid: 1,
            qemu_start_ticks: 2,
            peer: "127.0.0.1:1".into(),
            identity: "/etc/godwit".into(),
            peer_name: None,
            was_running: true,
            keep_source: false,
            heard: false,
            paging: None,
        }
    }

    #[test]
    fn the_newest_record_survives_and_a_torn_one_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), entry()).unwrap();
        journal.record(Record::Source(SourceRecord::HandedOver)).unwrap();
        let path = journal.path.clone();
        let read = || Journal::open(&path).unwrap().unwrap().entry().record;
        assert!(
            matches!(Journal::list(dir.path(), |_| true)[..], [Found::Held(_)]),
            "it is locked"
        );
        assert_eq!(read(), Record::Source(SourceRecord::HandedOver));
        // Sequence 2 lies in slot 0: tear it.
        journal.file.write_all_at(b"torn", 40).unwrap();
        assert_eq!(read(), Record::Source(SourceRecord::Moving));
        journal.file.write_all_at(&[0xff; 2 * SLOT_BYTES], 0).unwrap();
        assert!(Journal::open(&path).unwrap().is_none());
        assert!(Journal::list(dir.path(), |_| true).is_empty());
    }

    #[test]
    fn a_journal_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), entry()).unwrap();
        let path = journal.path.clone();
        assert!(matches!(Journal::open(&path).unwrap(), Some(Found::Held(_))));
        drop(journal);
        assert!(matches!(Journal::open(&path).unwrap(), Some(Found::Free(_))));
    }

    #[test]
    fn entries_of_older_builds_are_read() {
        let mut old = serde_json::to_value(entry()).unwrap();
        old.as_object_mut().unwrap().retain(|key, _| key != "peer_name" && key != "keep_source");
        assert_eq!(serde_json::from_value::<Entry>(old).unwrap(), entry());
    }

    #[test]
    fn a_full_disk_is_told_with_the_remedy() {
        let error = Journal::create(Path::new("/proc/nowhere"), entry()).unwrap_err();
        assert!(error.to_string().contains("--journal"), "{error}");
    }

    #[test]
    fn an_entry_too_long_for_its_slot_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = Entry { vm: "v".repeat(SLOT_BYTES), ..entry() };
        assert!(Journal::create(dir.path(), long).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "half a journal was left");
    }
}
