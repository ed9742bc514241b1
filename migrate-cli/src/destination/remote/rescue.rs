//! Pages a split guest whose pager died.
//!
//! ```text
//!   journal ─► descriptor taken again ─► servers reached ─► what does each hold? ─► paged ─► monitor ─► asked, merged
//! ```
//!
//! Where pages are is found out anew: what the RAM file holds is right, whatever a server has; of what it does not
//! hold, the copies with the highest version are; what no server has was never written or is not used. Copies
//! that are out of date are dropped.
//!
//! QEMU may not answer: a thread of it that waits for a page may hold its main loop up. So pages come first, then the
//! monitor.

use std::sync::Arc;
use std::time::Duration;

use migrate_core::handover::Outcome;
use migrate_core::pageset::PageSet;
use qemu_glue::attach;
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::vm;
use transport::messages::Split;
use transport::pages::wire::DROP_EXTENTS_MAX;
use transport::pages::{Extent, PageAnswer, PageClient, PageRequest};
use transport::{Identity, Listener, Options};

use super::super::answer::Archive;
use super::super::{Paged, page};
use super::{Attached, Reached, RemoteGuest, Watched, check_version};
use crate::args::ReceiveArgs;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::{Journal, PagingEntry};
use crate::source::recover;
use crate::stores;
use crate::tell;

/// Pause between attempts to reach the servers.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Longest wait for QEMU's monitor once the guest is paged again.
const MONITOR_WITHIN: Duration = Duration::from_secs(60);

/// Takes the paging of a guest over and goes on with it to its end.
///
/// # Errors
/// What kept it from that; threads of the guest wait on.
pub async fn rescue(
    args: &ReceiveArgs,
    identity: Identity,
    options: &Options,
    journal: Journal,
    (archive, watched): (&mut Archive, Watched),
) -> Result<Outcome, EngineError> {
    let entry = journal.entry().clone();
    let lost = || EngineError::Internal("the journal does not tell where the memory is".into());
    let common = args.common.clone();
    recover::refuse_gone(&common)?;
    let PagingEntry { remote_fd, regions, split } = entry.paging.clone().ok_or_else(lost)?;
    let split = split.ok_or_else(lost)?;
    let mut listener = Listener::bind(args.listen, &identity, options)?;
    tell!("the guest runs here and part of its memory is elsewhere; reaching the memory servers");
    let dead_peer = options.dead_peer;
    let reached = reach(split, Arc::new(identity), dead_peer).await?;
    let pid = entry.qemu_pid;
    let ram = Arc::new(GuestRam::open(pid, &regions, true)?);
    let uffd = on_thread(move || attach::take_descriptor(pid, remote_fd)).await??;
    let attached = Attached { uffd, remote_fd };
    let remote = RemoteGuest::take_over(entry.vm.clone(), ram, attached, reached).await?;
    tell!("listening on {}", listener.local_addr());
    let client = monitor(args).await?;
    let vm = vm::inventory(&client).await?;
    archive.add(journal);
    // A guest that belongs here, but was not resumed; or one that was about to leave.
    archive.recover(Some(&client), true).await;
    let others = recover::before_leaving(&client, &common).await?;
    let paged = Paged { client: &client, vm: &vm, common, watched, others };
    page(&mut listener, paged, archive, remote).await?;
    Ok(Outcome::Completed)
}

/// Reaches all servers, however long that takes: without them the guest cannot go on.
async fn reach(
    split: Split,
    identity: Arc<Identity>,
    dead_peer: Duration,
) -> Result<Reached, EngineError> {
    loop {
        let (split, identity) = (split.clone(), Arc::clone(&identity));
        let options = Options { dead_peer, ..Options::default() };
        match on_thread(move || Reached::connect(split, identity, options)).await? {
            Err(error @ EngineError::NoStore { .. }) => {
                tell!("{}; trying again", error.tell());
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            reached => return reached,
        }
    }
}

async fn monitor(args: &ReceiveArgs) -> Result<Client, EngineError> {
    let began = tokio::time::Instant::now();
    loop {
        match Client::connect(&args.common.qmp).await {
            Ok(client) => return Ok(client),
            Err(error) if began.elapsed() > MONITOR_WITHIN => return Err(error.into()),
            Err(error) => {
                tracing::info!(%error, "QEMU does not answer yet");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// What servers hold of pages that are not `present`, by server, and the highest version of any. Copies that are out
/// of date are dropped. Blocks.
///
/// # Errors
/// [`EngineError::NoStore`] or what a server says.
pub(super) fn found(
    reached: &mut Reached,
    present: &PageSet,
) -> Result<(Vec<PageSet>, u64), EngineError> {
    let mut newest: Vec<u64> = vec![0; usize::try_from(present.size()).unwrap_or(usize::MAX)];
    let mut listed = vec![];
    for (store, client) in reached.split.stores.iter().zip(&mut reached.for_keeper) {
        let entries = list(client, &store.address)?;
        for (extent, version) in &entries {
            check_version(*version)?;
            for page in extent.iter() {
                let newest = usize::try_from(page).ok().and_then(|page| newest.get_mut(page));
                let newest = newest.ok_or_else(|| {
                    EngineError::Contradiction(format!("that it has page {page}, beyond the guest"))
                })?;
                *newest = (*newest).max(*version);
            }
        }
        listed.push(entries);
    }
    let is_newest = |page: u64, version| {
        usize::try_from(page).ok().and_then(|page| newest.get(page)) == Some(&version)
    };
    // A put whose answer was lost may have gone to another server as well.
    let mut holders: Vec<u8> = vec![0; newest.len()];
    let copies = reached.split.copies;
    let mut is_one_more = |page: u64| {
        let holders = usize::try_from(page).ok().and_then(|page| holders.get_mut(page));
        holders.is_some_and(|holders| {
            *holders = holders.saturating_add(1);
            *holders <= copies
        })
    };
    let mut remote = vec![];
    let stores = reached.split.stores.iter().zip(&mut reached.for_keeper);
    for ((store, client), entries) in stores.zip(listed) {
        let (mut held, mut stale) = (PageSet::new(present.size()), PageSet::new(present.size()));
        for (extent, version) in entries {
            for page in extent.iter() {
                match is_newest(page, version) && !present.contains(page) && is_one_more(page) {
                    true => held.insert(page),
                    false => stale.insert(page),
                }
            }
        }
        for extents in Extent::join(stale.iter()).chunks(DROP_EXTENTS_MAX) {
            stores::ask(client, &store.address, &PageRequest::Drop { extents: extents.to_vec() })?;
        }
        remote.push(held);
    }
    Ok((remote, newest.into_iter().max().unwrap_or(0)))
}

/// All that a store holds, with versions.
fn list(client: &mut PageClient, address: &str) -> Result<Vec<(Extent, u64)>, EngineError> {
    let (mut all, mut next) = (vec![], Some(0));
    while let Some(from_page) = next {
        match stores::call(client, address, &PageRequest::List { from_page })? {
            PageAnswer::Listed { entries, next_page, .. } => {
                all.extend(entries);
                // Whatever the server says, it comes to an end.
                next = next_page.filter(|next| *next > from_page);
            }
            _ => next = None,
        }
    }
    Ok(all)
}
