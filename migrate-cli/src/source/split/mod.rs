//! Pages that go to memory servers while the others go to the main host.
//!
//! ```text
//!   round ──┬─► pages for the main host ──► pump ──► lanes
//!           └─► pages for a server ──► its thread ──► its store
//! ```
//!
//! Where a page goes is decided when it is first seen ([`place`](migrate_core::remote::place)); one that is
//! written again moves to the main host as long as there is room, since the guest is using it. No page is ever
//! at both: what moves is dropped on the server.
//!
//! Invariants: a server holds exactly the pages of [`Split::remote`], each as it was last sent; the main host is
//! sent at most as many pages as it may hold.

mod lane;
mod routes;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use migrate_core::encode::PageCounts;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use parking_lot::Mutex;
use qemu_glue::pager::Duty;
use qemu_glue::ram::GuestRam;
use transport::Identity;
use transport::messages::{Message, RemoteEnd, STORES_MAX, Store, Then};
use transport::pages::{PageClient, PageRequest, PageStop};

use self::lane::StoreLane;
use self::routes::Routes;
use super::early;
use super::gate::Gate;
use super::link::Link;
use super::prepare::{self, Guest};
use super::pump::Pump;
use super::unused::Unused;
use crate::args::{Mode, PathChoice, SendArgs, SplitArgs};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::report::{RemoteReport, SplitReport};
use crate::{missing, stores};

/// Longest wait for the destination to reach the memory servers.
const PREPARED_WITHIN: Duration = Duration::from_secs(30);

/// How often the leases of stores are renewed to which nothing is sent.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// Longest time for a server to delete a store.
const DELETE_WITHIN: Duration = Duration::from_secs(5);

/// Bytes from which on a way's rate is measured.
const ENOUGH_BYTES: u64 = 1 << 20;

/// A guest's stores, before it is known what goes there.
#[derive(Debug)]
pub struct Room {
    resident_pages: u64,
    copies: usize,
    direct_io_window_ms: u32,
    ways: Vec<Way>,
}

/// The way to a store, and what is wanted of it while a round has it.
#[derive(Debug)]
struct Way {
    store: Store,
    lane: Mutex<StoreLane>,
    moved: Arc<AtomicU64>,
    stop: PageStop,
}

impl Way {
    fn new(store: Store, client: PageClient, pages: u64) -> Self {
        let (moved, stop) = (Arc::default(), client.stop());
        let lane = StoreLane::new(store.clone(), client, pages, Arc::clone(&moved));
        Self { store, lane: Mutex::new(lane), moved, stop }
    }
}

/// Deletes stores: the guest stays here. A server that does not answer is left to its lease. Blocks.
fn delete(ways: &[Way]) {
    std::thread::scope(|scope| {
        for way in ways {
            let (done, is_done) = mpsc::channel::<()>();
            scope.spawn(move || {
                if is_done.recv_timeout(DELETE_WITHIN) == Err(mpsc::RecvTimeoutError::Timeout) {
                    way.stop.cut();
                }
            });
            scope.spawn(move || {
                way.lane.lock().delete();
                drop(done);
            });
        }
    });
}

impl Room {
    /// Makes the stores. Nothing of the guest is touched.
    ///
    /// # Errors
    /// What keeps a server from it, or options that make no sense; what was made is deleted again.
    pub async fn make(
        asked: &SplitArgs,
        guest: &Guest,
        identity: &Arc<Identity>,
        main: &str,
    ) -> Result<Self, EngineError> {
        Duty::Evict.check(&guest.ram)?;
        let pages = guest.ram.layout().pages();
        let resident_pages = resident_pages(asked, pages)?;
        let (copies, count) = (usize::from(asked.copies), asked.memory.len());
        if copies > count {
            return Err(EngineError::Misuse {
                what: format!("{copies} copies of each page need as many memory servers"),
                remedy: "Name another one by --memory, or use --copies 1".into(),
            });
        }
        if count > STORES_MAX {
            return Err(EngineError::Misuse {
                what: format!("{count} memory servers were named"),
                remedy: format!("Name at most {STORES_MAX}"),
            });
        }
        // All that may ever not be there, spread evenly.
        let elsewhere_pages = pages - routes::least_on_main(resident_pages);
        let reserve_pages = routes::reserve_pages(elsewhere_pages, copies, count);
        let window = prepare::direct_io_window(&asked.send, &guest.vm).unwrap_or_default();
        let direct_io_window_ms = u32::try_from(window.as_millis()).unwrap_or(u32::MAX);
        let mut room = Self { resident_pages, copies, direct_io_window_ms, ways: vec![] };
        for address in &asked.memory {
            match room.add(asked, guest, identity, (address, reserve_pages), main).await {
                Ok(()) => {}
                Err(error) => {
                    let _deleted = on_thread(move || room.delete()).await;
                    return Err(error);
                }
            }
        }
        Ok(room)
    }

    async fn add(
        &mut self,
        asked: &SplitArgs,
        guest: &Guest,
        identity: &Arc<Identity>,
        (address, reserve_pages): (&str, u64),
        main: &str,
    ) -> Result<(), EngineError> {
        let resolved = prepare::resolve_address(address).await?;
        let options = transport::Options {
            dead_peer: asked.send.common.dead_peer(),
            ..transport::Options::default()
        };
        let (identity, address, main) = (Arc::clone(identity), address.to_owned(), main.to_owned());
        let (vm, pages) = (guest.vm.label(), guest.ram.layout().pages());
        let made = on_thread(move || {
            let place = (address.as_str(), resolved);
            stores::create(place, &identity, &options, (&vm, pages, reserve_pages), Some(&main))
        });
        let (store, mut client) = made.await??;
        if self.ways.iter().any(|way| way.store.name == store.name) {
            let what = format!("{} is named twice as a memory server", store.name);
            // Not added, so nobody else would delete it.
            let asked =
                on_thread(move || stores::ask(&mut client, &store.address, &PageRequest::Delete));
            let _told_by_its_lease = asked.await;
            return Err(EngineError::Misuse { what, remedy: "Name each server once".into() });
        }
        self.ways.push(Way::new(store, client, pages));
        Ok(())
    }

    /// Tells the destination of them and waits until it has reached them.
    ///
    /// # Errors
    /// If it cannot, or contact is lost.
    pub async fn tell(&self, link: &mut Link) -> Result<(), EngineError> {
        let split = transport::messages::Split {
            resident_pages: self.resident_pages,
            copies: u8::try_from(self.copies).unwrap_or(1),
            direct_io_window_ms: self.direct_io_window_ms,
            stores: self.ways.iter().map(|way| way.store.clone()).collect(),
            is_moved: false,
            then: Then::default(),
        };
        link.send(Message::Split(split)).await?;
        early::prepared(link, "that it is prepared", PREPARED_WITHIN).await
    }

    /// Deletes the stores. Blocks.
    pub fn delete(self) {
        delete(&self.ways);
    }
}

/// What the main host may hold.
fn resident_pages(asked: &SplitArgs, pages: u64) -> Result<u64, EngineError> {
    let page = migrate_core::layout::PAGE_BYTES as u64;
    let resident = asked.resident.map_or(pages / 2, |bytes| bytes / page);
    let least = routes::RESIDENT_PAGES_MIN;
    if resident < least {
        return Err(EngineError::Misuse {
            what: format!(
                "A guest cannot run with {} MiB on its main host",
                (resident * page) >> 20
            ),
            remedy: format!("Use --resident {}M or more", (least * page) >> 20),
        });
    }
    if resident >= pages {
        return Err(EngineError::Misuse {
            what: "The guest's whole memory may be on the main host".into(),
            remedy: "Use `migrate send`, or a smaller --resident".into(),
        });
    }
    Ok(resident)
}

/// Where pages go, and the ways there.
#[derive(Debug)]
pub struct Split {
    ram: Arc<GuestRam>,
    unused: Option<Arc<Unused>>,
    gate: Arc<Gate>,
    routes: Mutex<Routes>,
    ways: Vec<Way>,
    rate_bytes_per_s: Mutex<Option<f64>>,
    renewed: Mutex<Instant>,
}

impl Split {
    /// Decides where the pages with `data` go. Blocks.
    ///
    /// # Errors
    /// If the servers have too little room, or memory cannot be read.
    pub fn place(
        room: &mut Room,
        ram: Arc<GuestRam>,
        unused: Option<Arc<Unused>>,
        gate: Arc<Gate>,
        data: &PageSet,
    ) -> Result<Self, EngineError> {
        let (in_use, hot) = match &unused {
            Some(unused) => unused.in_use(data)?,
            None => (data.clone(), PageSet::new(data.size())),
        };
        let reserves = room.ways.iter().map(|way| way.store.reserve_pages).collect();
        let routes = Routes::new(&in_use, &hot, room.resident_pages, reserves, room.copies)?;
        let ways = std::mem::take(&mut room.ways);
        let (routes, rate_bytes_per_s) = (Mutex::new(routes), Mutex::default());
        let renewed = Mutex::new(Instant::now());
        Ok(Self { ram, unused, gate, routes, ways, rate_bytes_per_s, renewed })
    }

    /// Sends a round to where its pages go, and waits until the servers have theirs. Blocks.
    ///
    /// # Errors
    /// The first thing that goes wrong on any way; the migration cannot go on then.
    pub fn send(&self, pump: &Pump, mut round: Round) -> Result<PageCounts, EngineError> {
        let shares = self.routes.lock().divide(&mut round, self.unused.as_deref())?;
        let (main, sent) = std::thread::scope(|scope| {
            let sending: Vec<_> = self
                .ways
                .iter()
                .zip(&shares)
                .map(|(way, share)| {
                    let (ram, unused, gate) = (&*self.ram, self.unused.as_deref(), &*self.gate);
                    scope.spawn(move || {
                        let began = Instant::now();
                        let counts = way.lane.lock().send(share, ram, unused, gate)?;
                        Ok::<_, EngineError>((counts, began.elapsed()))
                    })
                })
                .collect();
            let main = pump.send(round).map_err(EngineError::from);
            let panicked = |_| EngineError::Internal("a store's thread panicked".into());
            let sent: Vec<_> = sending
                .into_iter()
                .map(|sent| sent.join().map_err(panicked).and_then(|sent| sent))
                .collect();
            (main, sent)
        });
        let (mut counts, mut rate) = (main?, 0.0);
        for way in sent {
            let (way, took) = way?;
            // Less says nothing about a link.
            if way.wire_bytes >= ENOUGH_BYTES {
                rate += way.wire_bytes as f64 / took.as_secs_f64().max(1e-6);
            }
            counts.add(&way);
        }
        if rate > 0.0 {
            *self.rate_bytes_per_s.lock() = Some(rate);
        }
        Ok(counts)
    }

    /// Whether leases are to be renewed: said once every few seconds.
    pub fn wants_renewal(&self) -> bool {
        let mut renewed = self.renewed.lock();
        let wanted = renewed.elapsed() > RENEW_EVERY;
        if wanted {
            *renewed = Instant::now();
        }
        wanted
    }

    /// Renews the leases of stores that nothing is being sent to. Blocks.
    pub fn keep_alive(&self) {
        for way in &self.ways {
            if let Some(mut lane) = way.lane.try_lock() {
                lane.keep_alive();
            }
        }
    }

    /// Bytes a second that all links together carry, where that to the destination carries `main`.
    pub fn goodput_bytes_per_s(&self, main: Option<f64>) -> Option<f64> {
        let servers = *self.rate_bytes_per_s.lock();
        match (main, servers) {
            (Some(main), Some(servers)) => Some(main + servers),
            (main, servers) => main.or(servers),
        }
    }

    /// Bytes that servers have answered for so far.
    pub fn acknowledged_bytes(&self) -> u64 {
        self.ways.iter().map(|way| way.moved.load(Ordering::Relaxed)).sum()
    }

    /// Tells the destination what lies on which server.
    ///
    /// # Errors
    /// If contact is lost.
    pub async fn tell(&self, link: &Link) -> Result<(), EngineError> {
        for (number, way) in self.ways.iter().enumerate() {
            let (stored, version) = {
                let lane = way.lane.lock();
                (lane.stored().clone(), lane.version())
            };
            for part in missing::parts(&stored) {
                link.send(part).await?;
            }
            let store = u16::try_from(number).unwrap_or(u16::MAX);
            let end = RemoteEnd { store, pages: stored.len(), version };
            link.send(Message::RemoteEnd(end)).await?;
        }
        Ok(())
    }

    /// All pages that lie on servers.
    pub fn remote(&self) -> PageSet {
        let mut all = PageSet::new(self.ram.layout().pages());
        for way in &self.ways {
            all.union_with(way.lane.lock().stored());
        }
        all
    }

    /// The guest is stopped: reads everything back from the servers and compares. Returns how many pages there
    /// were and how many differ. Blocks.
    ///
    /// # Errors
    /// If a server does not answer.
    pub fn verify(&self) -> Result<(u64, u64), EngineError> {
        let mut all = (0, 0);
        for way in &self.ways {
            let (pages, mismatches) = way.lane.lock().verify(&self.ram)?;
            all = (all.0 + pages, all.1 + mismatches);
        }
        Ok(all)
    }

    /// What became of pages, for the report.
    pub fn report(&self) -> SplitReport {
        let on_servers = |way: &Way| {
            let pages = way.lane.lock().stored().len();
            RemoteReport { server: way.store.address.clone(), pages }
        };
        let routes = self.routes.lock();
        SplitReport {
            resident_pages: routes.main_pages(),
            in_use_pages: routes.in_use_pages(),
            to_servers_bytes: self.ways.iter().map(|way| way.lane.lock().wire_bytes()).sum(),
            remote_pages: self.ways.iter().map(on_servers).collect(),
        }
    }

    /// Deletes the stores: the guest stays here. Blocks.
    pub fn delete(&self) {
        delete(&self.ways);
    }
}

/// Refuses what a split guest cannot be moved by.
///
/// # Errors
/// [`EngineError::Misuse`] with the remedy.
pub fn check_asked(args: &SendArgs) -> Result<(), EngineError> {
    let refuse = |what: &str, remedy: &str| {
        Err(EngineError::Misuse { what: what.into(), remedy: remedy.into() })
    };
    match args.mode {
        _ if args.path == PathChoice::Stream => {
            refuse("A guest is split by the direct path only", "Leave --path out")
        }
        Mode::PostCopy | Mode::Hybrid => refuse(
            "A guest is split by pre-copy only",
            "Leave --mode out, or give the guest more time by --max-downtime-ms",
        ),
        Mode::Auto | Mode::PreCopy => Ok(()),
    }
}
