//! Memory servers that join a guest, take more of it, or are drained while it runs.
//!
//! ```text
//!   asked ─► store made on one more server ─► in the journal ─► keeper: it takes pages ─► another is drained
//!      └───► those that there are reserve more ─────────────────────────────────────────────────┘
//! ```

use std::net::SocketAddr;
use std::sync::Arc;

use migrate_core::remote::{ServerPhase, ServerStats};
use tokio::sync::oneshot;
use transport::messages::{STORES_MAX, Store};
use transport::pages::PageRequest;

use super::Shared;
use super::keeper::{Joining, Order};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::pager_socket::PagerState;
use crate::stores;

/// Begins to move what `from` has to the other servers, `to` among them.
///
/// # Errors
/// If that makes no sense or the other servers have no room: nothing was begun.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    from: SocketAddr,
    to: Option<SocketAddr>,
) -> Result<(), EngineError> {
    let _one_at_a_time = shared.ordering.lock().await;
    let drain = check(shared, from, to)?;
    let reserve_pages = shared.store(drain).map_or(0, |store| store.reserve_pages);
    match to.filter(|to| number(shared, *to).is_none()) {
        Some(to) => join(shared, to, reserve_pages).await?,
        None => reserve(shared, reserve_pages, Some(drain), "--to").await?,
    }
    shared.orders.lock().push(Order::Drain(drain));
    // From here on it is seen to be drained.
    shared.remote.lock().drain(drain);
    shared.keeper.notify_all();
    Ok(())
}

/// One more server takes pages of a guest that is about to leave, unless it does already.
///
/// # Errors
/// If it has no room.
pub(super) async fn take_in(shared: &Arc<Shared>, addr: SocketAddr) -> Result<(), EngineError> {
    let _one_at_a_time = shared.ordering.lock().await;
    if number(shared, addr).is_some() {
        return Ok(());
    }
    let stores = shared.split_now(None).stores;
    if stores.len() >= STORES_MAX {
        return Err(too_many());
    }
    let most = stores.iter().map(|store| store.reserve_pages).max().unwrap_or_default();
    join(shared, addr, most).await
}

/// The servers take as much as a flush may bring.
///
/// # Errors
/// If they have not got the room.
pub(super) async fn reserve_for_flush(shared: &Arc<Shared>) -> Result<(), EngineError> {
    let _one_at_a_time = shared.ordering.lock().await;
    let lacking = shared.remote.lock().flush_room_lacking();
    reserve(shared, lacking, None, "--memory").await
}

/// The servers, but one, keep so many more pages free for the guest together.
async fn reserve(
    shared: &Arc<Shared>,
    pages: u64,
    except: Option<usize>,
    option: &str,
) -> Result<(), EngineError> {
    let servers = shared.remote.lock().stats().servers;
    let is_meant = |(number, server): &(usize, ServerStats)| {
        server.state == ServerPhase::Serving && Some(*number) != except
    };
    let mut servers: Vec<_> = servers.into_iter().enumerate().filter(is_meant).collect();
    let (mut left, mut why) = (pages, None);
    while left > 0 {
        let share = left.div_ceil(servers.len().max(1) as u64);
        let Some((number, server)) = servers.pop() else { break };
        let (obeyed, is_obeyed) = oneshot::channel();
        let wanted = server.reserve_pages.max(server.pages + server.stale_pages) + share;
        shared.orders.lock().push(Order::Reserve(number, wanted, obeyed));
        shared.keeper.notify_all();
        match is_obeyed.await.map_err(|_ended| over())? {
            Ok(()) => left -= share.min(left),
            Err(error) => why = Some(error),
        }
    }
    match why.filter(|_| left > 0) {
        Some(error) => Err(EngineError::Misuse {
            what: format!("The memory servers have no room for the guest: {}", error.tell()),
            remedy: format!("Name another one by {option}"),
        }),
        None => Ok(()),
    }
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
            format!("The guest's memory is {}", format!("{:?}", shared.state()).to_lowercase()),
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
    if joins > 0 && shared.split_now(None).stores.len() >= STORES_MAX {
        return Err(too_many());
    }
    Ok(drain)
}

/// Makes a store on one more server, which takes pages from then on.
async fn join(
    shared: &Arc<Shared>,
    addr: SocketAddr,
    reserve_pages: u64,
) -> Result<(), EngineError> {
    let made = on_thread({
        let shared = Arc::clone(shared);
        move || make(&shared, addr, reserve_pages)
    });
    let joining = made.await??;
    let mut split = shared.split_now(None);
    if split.stores.iter().any(|store| store.name == joining.store.name) {
        let what = format!("{} serves this guest already", joining.store.name);
        unmake(joining).await;
        return Err(EngineError::Misuse { what, remedy: "Name another server".into() });
    }
    split.stores.push(joining.store.clone());
    match shared.note(split).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            unmake(joining).await;
            return Err(error.into());
        }
        Err(_ended) => {
            unmake(joining).await;
            return Err(over());
        }
    }
    let (obeyed, is_obeyed) = oneshot::channel();
    shared.orders.lock().push(Order::Join(Box::new(joining), obeyed));
    shared.keeper.notify_all();
    is_obeyed.await.map_err(|_ended| over())?
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
async fn unmake(mut joining: Joining) {
    let address = joining.store.address.clone();
    let deleted =
        on_thread(move || stores::ask(&mut joining.for_keeper, &address, &PageRequest::Delete));
    if !matches!(deleted.await, Ok(Ok(()))) {
        tracing::warn!("a store that is not needed was not deleted");
    }
}

fn too_many() -> EngineError {
    EngineError::Misuse {
        what: format!("The guest has {STORES_MAX} memory servers, which is the most"),
        remedy: "Name one that it has already".into(),
    }
}

fn over() -> EngineError {
    EngineError::Misuse {
        what: "The guest is not paged any more".into(),
        remedy: "Look at it with `migrate status`".into(),
    }
}
