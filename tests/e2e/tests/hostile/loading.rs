//! A source that misbehaves while the destination loads a guest whose memory is to follow.
//!
//! The rogue has the device state of a real guest and says that all of its memory is missing. Loading
//! looks at the size of an option ROM in that memory, so that QEMU waits for a page which the rogue does not send.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::PATIENCE;
use framework::{Env, Vm, wait};
use migrate_core::batch::{LAST_VERSION, PageRun, RunKind};
use migrate_core::layout::PageIndex;
use migrate_core::page_table::DestinationPages;
use serde_json::json;
use transport::messages::{
    AbortCode, DEVICE_CHUNK_BYTES_MAX, Describe, DeviceState, Intent, Load, MISSING_WORDS_MAX,
    MigrationId, Missing, MissingEnd, Prepare,
};
use transport::{Batch, LaneKind, LaneSender, Message, Offer, Options, UrgentSender, connect};
use xxhash_rust::xxh3::xxh3_64;

use super::{PAGES, Rogue, Target, description, guest, in_turn, load};

/// Longest time from the rogue's word to the receiver's end, with QEMU given up.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// What QEMU saves of a guest beside its memory.
fn device_state() -> Result<Vec<u8>> {
    let mut vm = Vm::boot(&Env::load()?, guest("donor"))?;
    let folder = tempfile::tempdir().context("No folder for the device state")?;
    let file = folder.path().join("state");
    let shared = json!([{ "capability": "x-ignore-shared", "state": true }]);
    let qmp = vm.qmp();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": shared }))?;
    qmp.execute("stop", json!({}))?;
    let uri = format!("exec:cat > {}", file.display());
    qmp.execute("migrate", json!({ "uri": uri }))?;
    wait::until("the device state", PATIENCE, || {
        let status = qmp.execute("query-migrate", json!({}))?["status"].take();
        ensure!(status != "failed", "QEMU saves no device state");
        Ok((status == "completed").then_some(()))
    })?;
    std::fs::read(&file).context("No device state")
}

/// The lane on which the destination asks for what QEMU waits for, or on which that is sent.
enum Urgent {
    Tcp(UrgentSender),
    Quic(LaneSender),
}

impl Urgent {
    async fn send(&mut self, batch: Batch) -> Result<()> {
        match self {
            Self::Tcp(lane) => Ok(lane.send(batch)?),
            Self::Quic(lane) => Ok(lane.send(batch).await?),
        }
    }
}

/// A rogue that was accepted with a guest whose memory is to follow.
async fn follows(target: &Target, lane_kind: LaneKind) -> Result<(Rogue, LaneSender)> {
    let migration = MigrationId([80; 16]);
    let offer = Offer::new("rogue", migration, Intent::Migrate);
    let dead_peer = Duration::from_secs(1);
    let options = Options { lanes: 1, lane_kind, dead_peer, ..Options::default() };
    let mut session = connect(target.addr, &load(&target.rig.source)?, &options, offer).await?;
    let lane = session.lanes.pop().context("No lane")?;
    let mut rogue = Rogue { session, migration };
    rogue.say(Message::Describe(Describe { post_copy: true, ..description() })).await?;
    match rogue.next().await? {
        Message::Accept(accept) if accept.no_post_copy.is_none() => Ok((rogue, lane)),
        other => bail!("Not accepted: {other:?}"),
    }
}

/// Has the destination load `state` without any memory. Returns when QEMU waits for a page, with that.
async fn held_loading(
    rogue: &mut Rogue,
    lane: LaneSender,
    state: &[u8],
) -> Result<(Urgent, PageIndex)> {
    rogue.say(Message::Prepare(Prepare {})).await?;
    let prepared = rogue.next().await?;
    ensure!(matches!(prepared, Message::Prepared(_)), "Not prepared: {prepared:?}");
    let words = vec![u64::MAX; (PAGES / 64) as usize];
    for (words, first_page) in
        words.chunks(MISSING_WORDS_MAX).zip((0..).step_by(64 * MISSING_WORDS_MAX))
    {
        rogue.say(Message::Missing(Missing { first_page, words: words.to_vec() })).await?;
    }
    rogue.say(Message::MissingEnd(MissingEnd { pages: PAGES })).await?;
    for (bytes, offset) in
        state.chunks(DEVICE_CHUNK_BYTES_MAX).zip((0..).step_by(DEVICE_CHUNK_BYTES_MAX))
    {
        rogue.say(Message::DeviceState(DeviceState { offset, bytes: bytes.to_vec() })).await?;
    }
    let (total_bytes, digest) = (state.len() as u64, xxh3_64(state));
    let version_digest = DestinationPages::new(PAGES).digest();
    rogue.say(Message::Load(Load { total_bytes, digest, version_digest })).await?;
    if !lane.has_tcp() {
        return match rogue.next().await? {
            Message::Request(request) => Ok((Urgent::Quic(lane), PageIndex(request.page))),
            other => bail!("Nothing is asked for: {other:?}"),
        };
    }
    let mut lane = lane.into_urgent()?;
    let asked = tokio::task::spawn_blocking(move || (lane.requested(), lane));
    let (page, lane) =
        tokio::time::timeout(PATIENCE, asked).await.context("Nothing asked for")??;
    Ok((Urgent::Tcp(lane), page?))
}

/// Sends what is no content of a page. The destination gives up while the rogue stays and says no more.
async fn misbehave(target: &mut Target, kind: LaneKind, state: &[u8], sent: RunKind) -> Result<()> {
    let (mut rogue, lane) = follows(target, kind).await?;
    let (mut urgent, first) = held_loading(&mut rogue, lane, state).await?;
    ensure!(target.receive.running()?, "The receiver has ended");
    let run = PageRun { first, pages: 1, kind: sent, version: LAST_VERSION };
    let began = Instant::now();
    urgent.send(Batch::plain(vec![run], vec![0xee; run.content_bytes().0], 0)).await?;
    match rogue.next().await? {
        Message::Abort(abort) if abort.code == AbortCode::Protocol => {
            ensure!(abort.text.contains("which is missing"), "{abort:?}");
        }
        other => bail!("Not given up: {other:?}"),
    }
    wait::until("the receiver's end", ENDS_WITHIN, || {
        Ok((!target.receive.running()?).then_some(()))
    })?;
    let said = target.receive.stderr();
    println!("{kind:?}, {sent:?}: {:.1} s\n{said}", began.elapsed().as_secs_f64());
    ensure!(said.contains("peer-misbehaved"), "{said}");
    Ok(())
}

#[test]
fn a_source_that_misbehaves_while_its_guest_is_loaded_keeps_nobody_waiting() -> Result<()> {
    in_turn(|runtime| {
        let state = device_state()?;
        for (kind, sent) in [(LaneKind::Tcp, RunKind::Delta), (LaneKind::Quic, RunKind::Same)] {
            let mut target = Target::start()?;
            let given_up = runtime.block_on(misbehave(&mut target, kind, &state, sent));
            given_up.with_context(|| format!("{kind:?}\nreceive: {}", target.receive.stderr()))?;
            ensure!(target.vm.qmp().run_state().is_err(), "The target's QEMU keeps a guest");
            ensure!(target.receive.wait(PATIENCE)?.code == Some(1), "The receiver's exit code");
        }
        Ok(())
    })
}
