//! `migrate memory-server`: keeps pages of guests that run on other hosts.
//!
//! ```text
//!   listener thread ─► a thread a connection ─► requests ─► stores
//!   expiry: stores whose lease has ended ─────────────────────┤
//!   metrics: HTTP, GET /metrics ──────────────────────────────┘
//! ```
//!
//! What may be done to stores is decided in [`migrate_core::store`], what travels is in
//! [`transport::pages`].
//!
//! Invariants: the memory of pages stays within `--capacity`; a client disturbs no other, whatever it
//! sends, and no host takes more than its share of memory, stores and connections; a store that is
//! kept is lost only when this process ends, of which its user is warned.

pub mod connection;
pub mod metrics;
pub mod places;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;
use migrate_core::store::Stores;
use migrate_core::store::stores::StoreInfo;
use tokio::task::JoinHandle;
use transport::pages::PageListenerStop;
use transport::{Identity, Options, PageListener};

use self::connection::accept_all;
use self::metrics::Counters;
use self::places::Places;
use crate::args::{MemoryServerArgs, Switch};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::{cancel, http, tell};

/// Looks for leases that have ended this many times a lease.
const LOOKS_A_LEASE: u32 = 10;

/// Longest time between two such looks.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(1);

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    /// The pages.
    pub stores: Stores,
    /// What is counted.
    pub counters: Counters,
    /// Who is connected.
    pub places: Places,
    /// Names of the hosts whose requests are taken; all of the authority if there are none.
    pub peers: Vec<String>,
    began: Instant,
}

impl Shared {
    /// No stores yet.
    pub fn new(stores: Stores, peers: Vec<String>) -> Self {
        let (counters, places) = (Counters::default(), Places::default());
        Self { stores, counters, places, peers, began: Instant::now() }
    }

    /// Time since the beginning, as the stores want it.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

/// Serves until Ctrl-C; while stores are kept, until the second.
///
/// # Errors
/// What kept it from listening.
pub async fn serve(args: &MemoryServerArgs) -> Result<(), EngineError> {
    let http = http::bind_if(args.metrics).await?;
    let server = start(args)?;
    if let Some(http) = http {
        let shared = server.shared();
        http.begin(move || metrics::text(&shared));
    }
    // Scripts wait for this line.
    tell!("listening on {}", server.addr);
    server.until_cancelled().await;
    Ok(())
}

/// A memory server that serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    stop: PageListenerStop,
    expiry: JoinHandle<()>,
}

/// Begins to serve.
///
/// # Errors
/// What kept it from listening.
pub fn start(args: &MemoryServerArgs) -> Result<Server, EngineError> {
    check_capacity(args.capacity, available_bytes()?)?;
    let per_host = args.per_host.unwrap_or(args.capacity);
    check_per_host(per_host, args.capacity)?;
    let identity = Identity::load(&args.identity)?;
    let listener = PageListener::bind(args.listen, &identity, &Options::default())?;
    let lease = Duration::from_secs(args.lease_s);
    let stores = Stores::new(args.capacity, lease, args.compress == Switch::On);
    let stores = stores.with_per_host(per_host);
    let shared = Arc::new(Shared::new(stores, args.peer.clone()));
    let (addr, stop) = (listener.local_addr(), listener.stop());
    let accepting = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("accept".into())
        .spawn(move || accept_all(&listener, &accepting))
        .map_err(|error| EngineError::Internal(format!("no thread to accept with: {error}")))?;
    let expiry = tokio::spawn(expire(Arc::clone(&shared), lease));
    Ok(Server { addr, shared, stop, expiry })
}

impl Server {
    /// What it keeps.
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Returns at Ctrl-C; while stores are kept, at the second.
    pub async fn until_cancelled(self) {
        let mut requests = cancel::Requests::watch();
        requests.next().await;
        if self.is_needed() {
            requests.next().await;
            tell!("{}", told(&self.shared.stores.list()));
        }
    }

    /// Whether guests cannot go on without it; tells what is stored, and that.
    pub fn is_needed(&self) -> bool {
        let stores = self.shared.stores.list();
        tell!("{}", told(&stores));
        let is_any_kept = stores.iter().any(|store| store.stat.kept);
        if is_any_kept {
            tell!(
                "guests need these pages and cannot run without them: going on. If interrupted again, the \
                 pages are lost; merge the guests first (`migrate merge` on their hosts)"
            );
        }
        is_any_kept
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.stop();
        self.expiry.abort();
    }
}

/// Deletes stores whose lease has ended, for ever.
async fn expire(shared: Arc<Shared>, lease: Duration) {
    let every = (lease / LOOKS_A_LEASE).min(LOOK_EVERY_MAX);
    loop {
        tokio::time::sleep(every).await;
        let looking = Arc::clone(&shared);
        // Giving memory back may take a while.
        let ended = on_thread(move || looking.stores.expire(looking.now())).await;
        for store in ended.unwrap_or_default() {
            shared.counters.expired.add(1);
            tracing::warn!(vm = store.vm, host = store.host, "nothing came for a store: deleted");
        }
    }
}

/// What is stored, for people.
fn told(stores: &[StoreInfo]) -> String {
    let mut text = match stores.len() {
        0 => String::from("nothing is stored"),
        1 => String::from("1 store"),
        count => format!("{count} stores"),
    };
    for store in stores {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let pages = store.stat.stored_pages;
        text.push_str(&format!(
            "\n  {} of {}: {pages} pages, {:.1} MiB in {:.1} MiB, {}",
            store.vm,
            store.host,
            mib(pages * PAGE_BYTES as u64),
            mib(store.stat.stored_bytes),
            if store.stat.kept { "kept" } else { "leased" },
        ));
    }
    text
}

/// Memory that the machine has available, in bytes.
fn available_bytes() -> Result<u64, EngineError> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path)
        .map_err(|error| EngineError::Internal(format!("{path} cannot be read: {error}")))?;
    available(&text).ok_or_else(|| EngineError::Internal(format!("{path} tells no MemAvailable")))
}

fn available(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

fn check_capacity(wanted: u64, available: u64) -> Result<(), EngineError> {
    let misuse = |what: String, remedy: String| Err(EngineError::Misuse { what, remedy });
    if wanted < PAGE_BYTES as u64 {
        let what = format!("--capacity {wanted} has no room for a page");
        return misuse(what, "Give a size such as 8G".into());
    }
    if wanted > available {
        let mib = available >> 20;
        let what =
            format!("--capacity is {} MiB, but this machine has {mib} MiB available", wanted >> 20);
        return misuse(what, format!("Give at most {mib}M, or free memory here first"));
    }
    Ok(())
}

fn check_per_host(wanted: u64, capacity: u64) -> Result<(), EngineError> {
    let fault = match wanted {
        _ if wanted < PAGE_BYTES as u64 => "has no room for a page",
        _ if wanted > capacity => "is more than --capacity",
        _ => return Ok(()),
    };
    let what = format!("--per-host {wanted} {fault}");
    let remedy = format!("Give at most {}M, or leave it out for all of --capacity", capacity >> 20);
    Err(EngineError::Misuse { what, remedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_that_makes_no_sense_is_refused() {
        check_per_host(1 << 30, 1 << 30).unwrap();
        check_per_host(4096, 1 << 30).unwrap();
        let text = check_per_host((1 << 30) + 1, 1 << 30).unwrap_err().to_string();
        assert!(text.contains("more than --capacity") && text.contains("at most 1024M"), "{text}");
        let text = check_per_host(4095, 1 << 30).unwrap_err().to_string();
        assert!(text.contains("no room for a page") && text.contains("leave it out"), "{text}");
    }

    #[test]
    fn a_capacity_that_is_not_there_is_refused() {
        check_capacity(1 << 30, 1 << 30).unwrap();
        let text = check_capacity(2 << 30, 1 << 30).unwrap_err().to_string();
        assert!(text.contains("2048 MiB") && text.contains("at most 1024M"), "{text}");
        let text = check_capacity(100, 1 << 30).unwrap_err().to_string();
        assert!(text.contains("such as 8G"), "{text}");
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:   12 kB\nBuffers: 3 kB\n";
        assert_eq!(available(text), Some(12 * 1024));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert!(available_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn what_is_stored_is_told() {
        assert_eq!(told(&[]), "nothing is stored");
        let stat = migrate_core::store::StoreStat {
            stored_pages: 512,
            stored_bytes: 1 << 20,
            reserve_pages: 1000,
            kept: true,
        };
        let store = StoreInfo {
            store: migrate_core::store::StoreId([1; 16]),
            vm: "web".into(),
            host: "host-a".into(),
            creator: "host-a".into(),
            stat,
            memory_bytes: 2 << 20,
        };
        let text = told(&[store]);
        assert_eq!(text, "1 store\n  web of host-a: 512 pages, 2.0 MiB in 1.0 MiB, kept");
    }
}
