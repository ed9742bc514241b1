//! A source that misbehaves while the destination loads a guest whose memory is to follow.
//!
//! The rogue has the device state of a real guest and says that all of its memory is missing. Loading
//! looks at the size of an option ROM in that memory, so that QEMU waits for a page which the rogue does not send.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{PATIENCE, Rig};
use framework::{Env, Vm, wait};
use migrate_core::batch::{LAST_VERSION, PageRun, RunKind};
use migrate_core::handover::DestinationState;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::DestinationPages;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use transport::messages::{
    AbortCode, Ask, Commit, DEVICE_CHUNK_BYTES_MAX, Describe, DeviceState, Intent, Load,
    MISSING_WORDS_MAX, MigrationId, Missing, MissingEnd, Prepare,
};
use transport::{
    Batch, LaneKind, LaneSender, Message, Offer, Options, TransportError, UrgentSender, close_code,
    connect,
};
use xxhash_rust::xxh3::xxh3_64;

use super::{PAGES, Rogue, Target, description, guest, in_turn, load};

/// Longest time from the rogue's word to the receiver's end, with QEMU given up.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// A guest that was stopped and saved.
struct Donor {
    /// Keeps the memory.
    vm: Vm,
    /// What QEMU saves of it beside its memory.
    state: Vec<u8>,
}

impl Donor {
    /// A page as it was.
    fn page(&self, page: PageIndex) -> Result<Batch> {
        let file = self.vm.ram_files().first().context("No memory")?;
        let mut bytes = vec![0; PAGE_BYTES];
        std::fs::File::open(file)?.read_exact_at(&mut bytes, page.0 * PAGE_BYTES as u64)?;
        let run = PageRun { first: page, pages: 1, kind: RunKind::Raw, version: LAST_VERSION };
        Ok(Batch::plain(vec![run], bytes, 0))
    }
}

fn donor() -> Result<Donor> {
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
    let state = std::fs::read(&file).context("No device state")?;
    Ok(Donor { vm, state })
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

/// Has the destination begin to load `state` without any memory.
async fn say_load(rogue: &mut Rogue, state: &[u8]) -> Result<()> {
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
        let (part_bytes, bytes) = (bytes.len() as u32, bytes.to_vec());
        rogue.say(Message::DeviceState(DeviceState { offset, part_bytes, bytes })).await?;
    }
    let (total_bytes, digest) = (state.len() as u64, xxh3_64(state));
    let version_digest = DestinationPages::new(PAGES).digest();
    rogue.say(Message::Load(Load { total_bytes, digest, version_digest })).await
}

/// As [`say_load`]. Returns when QEMU waits for a page, with that.
async fn held_loading(
    rogue: &mut Rogue,
    lane: LaneSender,
    state: &[u8],
) -> Result<(Urgent, PageIndex)> {
    say_load(rogue, state).await?;
    asked(rogue, lane).await
}

/// Returns when QEMU waits for a page, with that.
async fn asked(rogue: &mut Rogue, lane: LaneSender) -> Result<(Urgent, PageIndex)> {
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
    gives_up(target, &format!("{kind:?}, {sent:?}"), began)
}

/// The receiver ends and says whose fault it is; no guest is left there.
fn gives_up(target: &mut Target, what: &str, began: Instant) -> Result<()> {
    wait::until("the receiver's end", ENDS_WITHIN, || {
        Ok((!target.receive.running()?).then_some(()))
    })?;
    let said = target.receive.stderr();
    println!("{what}: {:.1} s\n{said}", began.elapsed().as_secs_f64());
    ensure!(said.contains("peer-misbehaved"), "{said}");
    ensure!(target.vm.qmp().run_state().is_err(), "The target's QEMU keeps a guest");
    Ok(())
}

/// Sends a frame on the urgent lane whose number was there before. The destination ends the session.
async fn repeat_a_frame(target: &mut Target, donor: &Donor) -> Result<()> {
    let step = "destination-paging";
    target.rig.hold(step)?;
    let (mut rogue, mut lane) = follows(target, LaneKind::Tcp).await?;
    say_load(&mut rogue, &donor.state).await?;
    // From here on the destination's lane is an urgent one. Each kind of sender begins to count at 1.
    target.rig.reached(step)?;
    lane.send(donor.page(PageIndex(PAGES - 1))?).await?;
    target.rig.release(step)?;
    let (mut urgent, first) = asked(&mut rogue, lane).await?;
    let began = Instant::now();
    urgent.send(donor.page(first)?).await?;
    match tokio::time::timeout(ENDS_WITHIN, rogue.session.closer.closed()).await {
        Ok(TransportError::Closed { code: close_code::PROTOCOL, text, .. }) => {
            ensure!(text.contains("sequence number 1 where 2 is due"), "{text}");
        }
        other => bail!("Not given up: {other:?}"),
    }
    gives_up(target, "a repeated frame", began)
}

#[test]
fn a_lane_that_breaks_the_protocol_while_its_guest_is_loaded_is_the_peers_fault() -> Result<()> {
    in_turn(|runtime| {
        let mut target = Target::of(Rig::with_failpoints()?)?;
        let given_up = runtime.block_on(repeat_a_frame(&mut target, &donor()?));
        given_up.with_context(|| format!("receive: {}", target.receive.stderr()))?;
        ensure!(target.receive.wait(PATIENCE)?.code == Some(1), "The receiver's exit code");
        Ok(())
    })
}

/// Sends the pages that loading needs, `first` first, until the guest is loaded.
async fn serve_loading(
    rogue: &mut Rogue,
    lane: &mut LaneSender,
    donor: &Donor,
    first: PageIndex,
) -> Result<()> {
    lane.send(donor.page(first)?).await?;
    loop {
        match rogue.next().await? {
            Message::Request(request) => lane.send(donor.page(PageIndex(request.page))?).await?,
            Message::Progress(_) => {}
            Message::Ready(_) => return Ok(()),
            other => bail!("Not loaded: {other:?}"),
        }
    }
}

/// What a source does when the guest has just become its destination's.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Betrayal {
    /// Sends what is no content of a page, and stays.
    Misbehaves,
    /// Ends the session.
    Leaves,
}

/// Whether the destination's journal says so.
fn is_owned(target: &Target) -> Result<Option<()>> {
    for file in std::fs::read_dir(target.rig.journal("destination"))? {
        if String::from_utf8_lossy(&std::fs::read(file?.path())?).contains("\"owned\"") {
            return Ok(Some(()));
        }
    }
    Ok(None)
}

/// The destination's QEMU does not answer while the guest is to be resumed, as if it waited for a page. The
/// guest stays, and another session is what the destination waits for.
async fn betray(target: &mut Target, donor: &Donor, betrayal: Betrayal) -> Result<()> {
    let (mut rogue, lane) = follows(target, LaneKind::Quic).await?;
    let (urgent, first) = held_loading(&mut rogue, lane, &donor.state).await?;
    let Urgent::Quic(mut lane) = urgent else { bail!("Not over QUIC") };
    serve_loading(&mut rogue, &mut lane, donor, first).await?;
    let qemu = Pid::from_raw(i32::try_from(target.vm.pid())?);
    kill(qemu, Signal::SIGSTOP)?;
    let commit = Commit { migration: rogue.migration, resume: true };
    rogue.say(Message::Commit(commit)).await?;
    wait::until("the destination to own the guest", PATIENCE, || is_owned(target))?;
    let told = match betrayal {
        Betrayal::Misbehaves => {
            let first = PageIndex(PAGES - 1);
            let run = PageRun { first, pages: 1, kind: RunKind::Same, version: LAST_VERSION };
            lane.send(Batch::plain(vec![run], vec![0; run.content_bytes().0], 0)).await?;
            let ended = tokio::time::timeout(ENDS_WITHIN, rogue.session.closer.closed()).await;
            let ended = ended.context("The session goes on")?.to_string();
            ensure!(ended.contains("which is missing"), "{ended}");
            ended
        }
        Betrayal::Leaves => {
            rogue.session.closer.close(1, "gone").await;
            "gone".to_owned()
        }
    };
    target.receive.wait_stderr("waiting for the source to come back", ENDS_WITHIN)?;
    // Whoever asks hears that the guest is here, QEMU still does not answer.
    let offer = Offer::new("rogue", rogue.migration, Intent::Ask);
    let identity = load(&target.rig.source)?;
    let asker = connect(target.addr, &identity, &Options::default(), offer).await?;
    let ask = Ask { migration: rogue.migration };
    asker.control_sender.send(&Message::Ask(ask)).await?;
    let mut asker = Rogue { session: asker, migration: rogue.migration };
    let verdict = asker.next().await?;
    let fetching = DestinationState::Fetching;
    ensure!(matches!(&verdict, Message::Verdict(v) if v.state == fetching), "{verdict:?}");
    kill(qemu, Signal::SIGCONT)?;
    println!("{betrayal:?}: {told}\n{}", target.receive.stderr());
    ensure!(target.receive.running()?, "The receiver has ended");
    let alive = std::fs::exists(format!("/proc/{}", target.vm.pid()))?;
    ensure!(alive, "The destination's QEMU is gone");
    Ok(())
}

#[test]
fn a_source_that_is_lost_while_its_guest_is_resumed_is_waited_for() -> Result<()> {
    in_turn(|runtime| {
        let donor = donor()?;
        for betrayal in [Betrayal::Misbehaves, Betrayal::Leaves] {
            let mut target = Target::start()?;
            let waited = runtime.block_on(betray(&mut target, &donor, betrayal));
            waited
                .with_context(|| format!("{betrayal:?}\nreceive: {}", target.receive.stderr()))?;
        }
        Ok(())
    })
}

#[test]
fn a_source_that_misbehaves_while_its_guest_is_loaded_keeps_nobody_waiting() -> Result<()> {
    in_turn(|runtime| {
        let state = donor()?.state;
        for (kind, sent) in [(LaneKind::Tcp, RunKind::Delta), (LaneKind::Quic, RunKind::Same)] {
            let mut target = Target::start()?;
            let given_up = runtime.block_on(misbehave(&mut target, kind, &state, sent));
            given_up.with_context(|| format!("{kind:?}\nreceive: {}", target.receive.stderr()))?;
            ensure!(target.receive.wait(PATIENCE)?.code == Some(1), "The receiver's exit code");
        }
        Ok(())
    })
}
