//! `migrate move-fragment`: what one memory server has moves to others while the guest runs.
//!
//! ```text
//!   asked ─► [store made on one more server ─► in the journal] ─► ordered of the keeper ─► begun
//! ```

use std::net::SocketAddr;
use std::sync::Arc;

use migrate_core::remote::ServerPhase;
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
/// If that makes no sense or the other server has no room: nothing was begun.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    from: SocketAddr,
    to: Option<SocketAddr>,
) -> Result<(), EngineError> {
    let _one_at_a_time = shared.ordering.lock().await;
    let drain = check(shared, from, to)?;
    let to = match to.filter(|to| number(shared, *to).is_none()) {
        Some(to) => Some(join(shared, to, drain).await?),
        None => None,
    };
    let (begun, is_begun) = oneshot::channel();
    shared.orders.lock().push(Order { drain, to, begun });
    shared.keeper.notify_all();
    is_begun.await.map_err(|_ended| over())?
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
        return refuse(
            format!("The guest has {STORES_MAX} memory servers, which is the most"),
            "Name one that it has already by --to, or leave it out",
        );
    }
    Ok(drain)
}

/// Makes a store on one more server, with as much room as the one has that is drained.
async fn join(
    shared: &Arc<Shared>,
    addr: SocketAddr,
    drain: usize,
) -> Result<Joining, EngineError> {
    let pages = shared.layout().pages();
    let reserve_pages = shared.store(drain).map_or(pages, |store| store.reserve_pages);
    let made = on_thread({
        let shared = Arc::clone(shared);
        move || make(&shared, addr, (pages, reserve_pages))
    });
    let joining = made.await??;
    let mut split = shared.split_now(None);
    if split.stores.iter().any(|store| store.name == joining.store.name) {
        let what = format!("{} serves this guest already", joining.store.name);
        unmake(joining).await;
        return Err(EngineError::Misuse { what, remedy: "Name another server by --to".into() });
    }
    split.stores.push(joining.store.clone());
    match shared.note(split).await {
        Ok(Ok(())) => Ok(joining),
        Ok(Err(error)) => {
            unmake(joining).await;
            Err(error.into())
        }
        Err(_ended) => {
            unmake(joining).await;
            Err(over())
        }
    }
}

/// A store that stays, and connections to it. Blocks.
fn make(
    shared: &Shared,
    addr: SocketAddr,
    (pages, reserve_pages): (u64, u64),
) -> Result<Joining, EngineError> {
    let (identity, options) = (&shared.identity, &shared.options);
    let address = addr.to_string();
    let place = (address.as_str(), addr);
    let wanted = (shared.vm.as_str(), pages, reserve_pages);
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

fn over() -> EngineError {
    EngineError::Misuse {
        what: "The guest is not paged any more".into(),
        remedy: "Look at it with `migrate status`".into(),
    }
}
