//! Memory servers that join a guest, take more of it, or are drained while it runs.
//!
//! ```text
//!   asked ─► store made on one more server ─► in the journal ─► keeper: it takes pages ─► another is drained
//!      └───► those that there are reserve more ─────────────────────────────────────────────────┘
//! ```

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use migrate_core::remote::{SERVERS_MAX, ServerPhase, ServerStats};
use tokio::sync::oneshot;
use transport::messages::{STORES_MAX, Store};
use transport::pages::PageRequest;

use super::Shared;
use super::keeper::{Joining, Obeyed, Order};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::pager_socket::PagerState;
use crate::stores;

/// Part of what the main host may hold that is reserved beyond what a flush needs.
const SPARE_SHARE: u64 = 16;

/// Begins to move what `from` has to the other servers, `to` among them.
///
/// # Errors
/// If that makes no sense or the other servers have no room: nothing was begun.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    from: SocketAddr,
    to: Option<SocketAddr>,
) -> Result<(), EngineError> {
    check(shared, from, to)?;
    let _alone = shared.ordering.lock().await;
    let drain = check(shared, from, to)?;
    let servers = shared.remote.lock().stats().servers;
    let reserve_pages =
        servers.get(drain).map_or(0, |server| server.reserve_pages.max(server.pages));
    match to.filter(|to| number(shared, *to).is_none()) {
        Some(to) => join(shared, to, reserve_pages).await?,
        None => reserve(shared, reserve_pages, Some(drain), "--to").await?,
    }
    // From here on it is seen to be drained.
    shared.remote.lock().drain(drain);
    shared.order(Order::Part(drain));
    Ok(())
}

/// One more server takes pages of a guest that is about to leave, unless it does already.
///
/// # Errors
/// If it has no room.
pub(super) async fn take_in(shared: &Arc<Shared>, addr: SocketAddr) -> Result<(), EngineError> {
    if number(shared, addr).is_some() {
        return Ok(());
    }
    let stores = shared.split_now().stores;
    let most = stores.iter().map(|store| store.reserve_pages).max().unwrap_or_default();
    join(shared, addr, most).await
}

/// The servers take as much as a flush may bring, and some more.
///
/// # Errors
/// If they have not got the room.
pub(super) async fn reserve_for_flush(shared: &Arc<Shared>) -> Result<(), EngineError> {
    let lacking = || shared.remote.lock().flush_room_lacking();
    let mut before = u64::MAX;
    loop {
        let now = lacking();
        if now == 0 {
            return Ok(());
        }
        if now >= before {
            // With two copies, room on one server alone does not help.
            return Err(EngineError::Misuse {
                what: format!("The memory servers lack room for {now} pages"),
                remedy: "Name another one by --memory".into(),
            });
        }
        before = now;
        let limit = shared.remote.lock().stats().resident_limit_pages.unwrap_or(0);
        // What the guest takes up meanwhile has room as well, so that this is not asked at every look.
        let spare = limit / SPARE_SHARE * u64::from(shared.split.copies);
        if reserve(shared, now + spare, None, "--memory").await.is_err() {
            reserve(shared, lacking(), None, "--memory").await?;
        }
    }
}

/// A host may use the guest's stores from now on.
///
/// # Errors
/// If a server does not let it.
pub(super) async fn grant(shared: &Shared, host: &str) -> Result<(), EngineError> {
    order(shared, |obeyed| Order::Grant(host.to_owned(), obeyed)).await
}

/// Gives the keeper an order and waits until it was carried out.
async fn order(shared: &Shared, order: impl FnOnce(Obeyed) -> Order) -> Result<(), EngineError> {
    let (obeyed, is_obeyed) = oneshot::channel();
    shared.order(order(obeyed));
    is_obeyed.await.map_err(|_ended| over())?
}

/// The servers, but one, keep so many more pages free for the guest together.
async fn reserve(
    shared: &Arc<Shared>,
    pages: u64,
    except: Option<usize>,
    option: &str,
) -> Result<(), EngineError> {
    let (mut left, mut full, mut why) = (pages, BTreeSet::new(), None);
    while left > 0 {
        let servers = shared.remote.lock().stats().servers;
        let is_meant = |(number, server): &(usize, ServerStats)| {
            let is_open = !full.contains(number) && Some(*number) != except;
            is_open && server.state == ServerPhase::Serving
        };
        let servers: Vec<_> = servers.into_iter().enumerate().filter(is_meant).collect();
        if servers.is_empty() {
            break;
        }
        let share = left.div_ceil(servers.len() as u64);
        for (number, server) in servers {
            let share = share.min(left);
            let wanted = server.reserve_pages + share;
            match order(shared, |obeyed| Order::Reserve(number, wanted, obeyed)).await {
                Ok(()) => left -= share,
                Err(error) => {
                    full.insert(number);
                    why = Some(error);
                }
            }
        }
    }
    if left == 0 {
        return Ok(());
    }
    let why = why.map_or_else(|| "there is no other".to_owned(), |error| error.tell());
    Err(EngineError::Misuse {
        what: format!("The memory servers have no room for the guest: {why}"),
        remedy: format!("Name another one by {option}"),
    })
}

/// The number of the server at an address, if it serves the guest.
fn number(shared: &Shared, addr: SocketAddr) -> Option<usize> {
    let stores = shared.stores.read();
    let gone = shared.traffic.gone.lock();
    let is_there = |(server, store): &(usize, &Store)| {
        store.address.parse() == Ok(addr) && !gone.contains(server)
    };
    stores.iter().enumerate().find(is_there).map(|(server, _)| server)
}

/// The number of the server at `from`, if it can be drained.
fn check(shared: &Shared, from: SocketAddr, to: Option<SocketAddr>) -> Result<usize, EngineError> {
    let refuse =
        |what: String, remedy: &str| Err(EngineError::Misuse { what, remedy: remedy.into() });
    if shared.state() != PagerState::Split {
        return refuse(
            format!("The guest's memory is {}", shared.state()),
            "Only what lies on servers for good can be moved between them",
        );
    }
    let Some(drain) = number(shared, from) else {
        return refuse(
            format!("{from} is no memory server of this guest"),
            "Name one that `migrate status` shows",
        );
    };
    if to == Some(from) {
        return refuse(format!("{from} is named twice"), "Name another server by --to");
    }
    let to = to.map(|to| number(shared, to));
    let stats = shared.remote.lock().stats();
    let serving = |server: &usize| {
        stats.servers.get(*server).is_some_and(|server| server.state == ServerPhase::Serving)
    };
    let others = (0..stats.servers.len()).filter(|server| *server != drain).filter(serving).count();
    if let Some(Some(to)) = to.filter(|to| to.is_some_and(|to| !serving(&to))) {
        let address = shared.store(to).map(|store| store.address).unwrap_or_default();
        return refuse(format!("{address} is being drained itself"), "Name another server by --to");
    }
    let joins = usize::from(to == Some(None));
    let copies = usize::from(shared.split.copies);
    if others + joins < copies {
        return refuse(
            format!("Each page is on {copies} servers, and {others} others are left"),
            "Name another memory server by --to",
        );
    }
    Ok(drain)
}

/// Makes a store on one more server, which takes pages from then on.
async fn join(
    shared: &Arc<Shared>,
    addr: SocketAddr,
    reserve_pages: u64,
) -> Result<(), EngineError> {
    let known = shared.split_now().stores;
    if known.len() >= STORES_MAX || shared.stores.read().len() >= SERVERS_MAX {
        return Err(EngineError::Misuse {
            what: format!("The guest has {} memory servers, and can have no more", known.len()),
            remedy: "Name one that it has already".into(),
        });
    }
    let made = on_thread({
        let shared = Arc::clone(shared);
        move || make(&shared, addr, reserve_pages)
    });
    let joining = made.await??;
    let store = joining.store.clone();
    let joined = async {
        if known.iter().any(|known| known.name == store.name) {
            let what = format!("{} serves this guest already", store.name);
            return Err(EngineError::Misuse { what, remedy: "Name another server".into() });
        }
        shared.listed.lock().joining.push(store.clone());
        shared.note().await.map_err(|_ended| over())??;
        order(shared, |obeyed| Order::Join(Box::new(joining), obeyed)).await
    };
    let joined = joined.await;
    if joined.is_err() {
        shared.listed.lock().joining.retain(|joining| joining.id != store.id);
        // First out of the journal: no later pager is to seek a store that is not there.
        if matches!(shared.note().await, Ok(Ok(()))) {
            unmake(shared, store).await;
        }
    }
    joined
}

/// A store that stays, and connections to it. Blocks.
fn make(shared: &Shared, addr: SocketAddr, reserve_pages: u64) -> Result<Joining, EngineError> {
    let (identity, options) = (&shared.identity, &shared.options);
    let address = addr.to_string();
    let place = (address.as_str(), addr);
    let wanted = (shared.vm.as_str(), shared.layout().pages(), reserve_pages);
    let (store, mut for_keeper) = stores::create(place, identity, options, wanted, None)?;
    let for_faults = stores::open(&store, identity, options)?;
    stores::ask(&mut for_keeper, &address, &PageRequest::Keep)?;
    Ok(Joining { store, for_faults, for_keeper })
}

/// Gives a store up that was made in vain.
async fn unmake(shared: &Arc<Shared>, store: Store) {
    let shared = Arc::clone(shared);
    let deleted = on_thread(move || {
        let mut client = stores::open(&store, &shared.identity, &shared.options)?;
        stores::ask(&mut client, &store.address, &PageRequest::Delete)
    });
    if !matches!(deleted.await, Ok(Ok(()))) {
        tracing::warn!("a store that is not needed was not deleted");
    }
}

fn over() -> EngineError {
    EngineError::Misuse {
        what: "The guest is not paged any more".into(),
        remedy: "Look at it with `migrate status`".into(),
    }
}
