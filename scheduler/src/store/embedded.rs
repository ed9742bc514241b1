//! A store in a file of this machine, which all processes on it may open at the same time (SQLite).
//!
//! Leases count time by the kernel's clock since boot, which no correction of the date changes; what was leased before a
//! reboot has ended. Whoever opens the file ends what is over, in the transaction in which it asks, so that no reader sees
//! an entry whose lease has ended. Watches ask the file whether it has changed, ten times a second.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};
use tokio::sync::mpsc;

use super::{Change, Condition, Entry, Event, Lease, Revision, Store, StoreError, check};

/// How long another process's transaction is waited for.
const BUSY: Duration = Duration::from_secs(5);

/// Pause between two looks of a watch.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Removed entries that are remembered for watches.
const GONE_MAX: i64 = 10_000;

/// Events that wait for a watcher.
const EVENTS: usize = 256;

/// Layout of the file.
const VERSION: i64 = 1;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL,
        boot TEXT NOT NULL, forgotten INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL,
        lease INTEGER) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
    CREATE INDEX IF NOT EXISTS entries_by_revision ON entries (revision);
    CREATE TABLE IF NOT EXISTS leases (lease INTEGER PRIMARY KEY AUTOINCREMENT, ttl_ms INTEGER NOT NULL,
        ends_ms INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS gone (revision INTEGER NOT NULL, key TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS gone_by_revision ON gone (revision);
";

/// The store.
#[derive(Debug, Clone)]
pub struct Embedded {
    connection: Arc<Mutex<Connection>>,
}

fn unavailable(error: impl Into<Box<dyn Error + Send + Sync>>) -> StoreError {
    StoreError::Unavailable { what: error.into().to_string() }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        unavailable(error)
    }
}

impl Embedded {
    /// Opens a store, and makes it if there is none.
    ///
    /// # Errors
    /// [`StoreError::Foreign`] for another version's, [`StoreError::Unavailable`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let at = |error: rusqlite::Error| unavailable(format!("{}: {error}", path.display()));
        let mut connection = Connection::open(path).map_err(at)?;
        connection.busy_timeout(BUSY).map_err(at)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(at)?;
        // What a crash of the machine may lose is what was heard of it a moment ago; the file stays whole.
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(at)?;
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
        let version: i64 =
            transaction.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(at)?;
        if version != 0 && version != VERSION {
            let what = format!("{} has version {version}, not {VERSION}", path.display());
            return Err(StoreError::Foreign { what });
        }
        transaction.execute_batch(TABLES).map_err(at)?;
        transaction.pragma_update(None, "user_version", VERSION).map_err(at)?;
        let state =
            "INSERT OR IGNORE INTO state (one, revision, boot, forgotten) VALUES (1, 0, '', 0)";
        transaction.execute(state, []).map_err(at)?;
        end_those_of_another_boot(&transaction)?;
        transaction.commit().map_err(at)?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)) })
    }

    /// Does something in a transaction that sees no ended lease.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.connection);
        let done = tokio::task::spawn_blocking(move || {
            let mut connection = connection.lock();
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            end_leases(&transaction)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        });
        done.await.map_err(unavailable)?
    }
}

/// Milliseconds since boot.
fn now_ms() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

/// Which boot this is.
fn boot() -> Result<String, StoreError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(unavailable)
}

fn revision(transaction: &Transaction<'_>) -> Result<Revision, StoreError> {
    Ok(transaction.query_row("SELECT revision FROM state", [], |row| row.get(0))?)
}

fn next_revision(transaction: &Transaction<'_>) -> Result<Revision, StoreError> {
    let raised = "UPDATE state SET revision = revision + 1 RETURNING revision";
    Ok(transaction.query_row(raised, [], |row| row.get(0))?)
}

/// Time since another boot says nothing.
fn end_those_of_another_boot(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    if transaction.execute("UPDATE state SET boot = ?1 WHERE boot <> ?1", [boot()?])? > 0 {
        transaction.execute("UPDATE leases SET ends_ms = 0", [])?;
    }
    Ok(())
}

/// Ends what is over.
fn end_leases(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    let mut over = transaction.prepare_cached("SELECT lease FROM leases WHERE ends_ms <= ?1")?;
    let over: Vec<i64> = over.query_map([now_ms()], |row| row.get(0))?.collect::<Result<_, _>>()?;
    over.into_iter().try_for_each(|lease| end(transaction, lease))
}

/// Ends a lease and removes its entries.
fn end(transaction: &Transaction<'_>, lease: i64) -> Result<(), StoreError> {
    transaction.execute("DELETE FROM leases WHERE lease = ?1", [lease])?;
    let mut keys = transaction.prepare_cached("SELECT key FROM entries WHERE lease = ?1")?;
    let keys: Vec<String> = keys.query_map([lease], |row| row.get(0))?.collect::<Result<_, _>>()?;
    if keys.is_empty() {
        return Ok(());
    }
    let revision = next_revision(transaction)?;
    keys.iter().try_for_each(|key| remove(transaction, key, revision))
}

fn remove(transaction: &Transaction<'_>, key: &str, revision: Revision) -> Result<(), StoreError> {
    if transaction.execute("DELETE FROM entries WHERE key = ?1", [key])? == 0 {
        return Ok(());
    }
    transaction
        .execute("INSERT INTO gone (revision, key) VALUES (?1, ?2)", params![revision, key])?;
    let oldest = "SELECT revision FROM gone ORDER BY revision DESC LIMIT 1 OFFSET ?1";
    let oldest: Option<i64> =
        transaction.query_row(oldest, [GONE_MAX], |row| row.get(0)).optional()?;
    if let Some(oldest) = oldest {
        transaction.execute("DELETE FROM gone WHERE revision <= ?1", [oldest])?;
        transaction.execute("UPDATE state SET forgotten = ?1", [oldest])?;
    }
    Ok(())
}

fn find(transaction: &Transaction<'_>, key: &str) -> Result<Option<Entry>, StoreError> {
    let sql = "SELECT key, value, revision FROM entries WHERE key = ?1";
    Ok(transaction.query_row(sql, [key], entry).optional()?)
}

fn entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: row.get(2)? })
}

fn holds(transaction: &Transaction<'_>, condition: &Condition) -> Result<bool, StoreError> {
    Ok(match condition {
        Condition::Absent(key) => find(transaction, key)?.is_none(),
        Condition::Unchanged(key, revision) => {
            find(transaction, key)?.is_some_and(|entry| entry.revision == *revision)
        }
    })
}

fn make(
    transaction: &Transaction<'_>,
    change: &Change,
    revision: Revision,
) -> Result<(), StoreError> {
    let (key, value, lease) = match change {
        Change::Delete(key) => return remove(transaction, key, revision),
        Change::Put { key, value, lease } => (key, value, lease.map(|lease| lease.0)),
    };
    if let Some(lease) = lease {
        let known = "SELECT 1 FROM leases WHERE lease = ?1";
        let known: Option<i64> =
            transaction.query_row(known, [lease], |row| row.get(0)).optional()?;
        known.ok_or(StoreError::LeaseEnded)?;
    }
    let put = "INSERT INTO entries (key, value, revision, lease) VALUES (?1, ?2, ?3, ?4) \
               ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3, lease = ?4";
    transaction.execute(put, params![key, value, revision, lease])?;
    Ok(())
}

/// The first key that does not begin so; nothing if all greater ones do.
fn end_of(prefix: &str) -> Option<String> {
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        if let Some(next) = (last..=char::MAX).nth(1) {
            chars.push(next);
            return Some(chars.into_iter().collect());
        }
    }
    None
}

fn listed(
    transaction: &Transaction<'_>,
    prefix: &str,
    after: Revision,
) -> Result<Vec<Entry>, StoreError> {
    let sql = "SELECT key, value, revision FROM entries \
               WHERE key >= ?1 AND (?2 IS NULL OR key < ?2) AND revision > ?3 ORDER BY key";
    let mut rows = transaction.prepare_cached(sql)?;
    let rows = rows.query_map(params![prefix, end_of(prefix), after], entry)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What happened after a revision, in its order, and the revision by now.
fn happened(
    transaction: &Transaction<'_>,
    prefix: &str,
    after: Revision,
) -> Result<(Vec<Event>, Revision), StoreError> {
    let forgotten: i64 =
        transaction.query_row("SELECT forgotten FROM state", [], |row| row.get(0))?;
    if after < forgotten {
        let what = format!("what happened after revision {after} is forgotten; list anew");
        return Err(StoreError::Unavailable { what });
    }
    let mut events: Vec<Event> =
        listed(transaction, prefix, after)?.into_iter().map(Event::Put).collect();
    let sql = "SELECT key, revision FROM gone WHERE revision > ?1 AND key >= ?2 AND (?3 IS NULL OR key < ?3)";
    let mut rows = transaction.prepare_cached(sql)?;
    let rows = rows.query_map(params![after, prefix, end_of(prefix)], |row| {
        Ok(Event::Gone { key: row.get(0)?, revision: row.get(1)? })
    })?;
    for gone in rows {
        events.push(gone?);
    }
    events.sort_by_key(|event| match event {
        Event::Put(entry) => entry.revision,
        Event::Gone { revision, .. } => *revision,
    });
    Ok((events, revision(transaction)?))
}

impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = key.to_owned();
        self.run(move |transaction| find(transaction, &key)).await
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let prefix = prefix.to_owned();
        let work = move |transaction: &Transaction<'_>| {
            Ok((listed(transaction, &prefix, 0)?, revision(transaction)?))
        };
        self.run(work).await
    }

    async fn commit(
        &self,
        conditions: &[Condition],
        changes: &[Change],
    ) -> Result<Option<Revision>, StoreError> {
        check(changes)?;
        let (conditions, changes) = (conditions.to_vec(), changes.to_vec());
        let work = move |transaction: &Transaction<'_>| {
            for condition in &conditions {
                if !holds(transaction, condition)? {
                    return Ok(None);
                }
            }
            let revision = next_revision(transaction)?;
            changes.iter().try_for_each(|change| make(transaction, change, revision))?;
            Ok(Some(revision))
        };
        self.run(work).await
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let ttl_ms = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2);
        let work = move |transaction: &Transaction<'_>| {
            let ends_ms = now_ms().saturating_add(ttl_ms);
            let sql = "INSERT INTO leases (ttl_ms, ends_ms) VALUES (?1, ?2)";
            transaction.execute(sql, [ttl_ms, ends_ms])?;
            Ok(Lease(transaction.last_insert_rowid()))
        };
        self.run(work).await
    }

    async fn keep(&self, lease: Lease) -> Result<(), StoreError> {
        let work = move |transaction: &Transaction<'_>| {
            let sql = "UPDATE leases SET ends_ms = ?2 + ttl_ms WHERE lease = ?1";
            match transaction.execute(sql, [lease.0, now_ms()])? {
                0 => Err(StoreError::LeaseEnded),
                _ => Ok(()),
            }
        };
        self.run(work).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.run(move |transaction| end(transaction, lease.0)).await
    }

    async fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> Result<mpsc::Receiver<Result<Event, StoreError>>, StoreError> {
        let (queue, events) = mpsc::channel(EVENTS);
        let (store, prefix) = (self.clone(), prefix.to_owned());
        tokio::spawn(async move {
            let mut seen = after;
            while !queue.is_closed() {
                let prefix = prefix.clone();
                let work =
                    move |transaction: &Transaction<'_>| happened(transaction, &prefix, seen);
                let (events, now) = match store.run(work).await {
                    Ok(found) => found,
                    Err(error) => return drop(queue.send(Err(error)).await),
                };
                seen = now;
                for event in events {
                    if queue.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Ok(events)
    }
}
