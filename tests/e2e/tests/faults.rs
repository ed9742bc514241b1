//! Whatever dies at whatever step: at most one guest runs, and what is left can be brought to an end.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::stage::{End, Stage, Victim, runs};
use e2e::{PATIENCE, turn};
use framework::{Engine, Pulse, QemuKind, Vm};

fn table(kind: QemuKind, cases: &[(&'static str, Victim, End)]) -> Result<()> {
    table_in("auto", kind, cases)
}

fn table_in(
    mode: &'static str,
    kind: QemuKind,
    cases: &[(&'static str, Victim, End)],
) -> Result<()> {
    let _turn = turn();
    Stage::new(kind, mode)?.play(cases)
}

#[test]
fn the_source_engine_dies() -> Result<()> {
    let victim = Victim::SourceEngine;
    table(
        QemuKind::V7_2,
        &[
            ("source-attaching", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("source-state-sent", victim, End::Source),
            ("destination-loading", victim, End::Source),
            ("source-ready", victim, End::Source),
            ("source-recording", victim, End::Source),
            // The commit was recorded but not sent: asked in time, the destination still takes it.
            ("source-recorded", victim, End::Destination),
            ("source-committed", victim, End::Destination),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn the_destination_engine_dies() -> Result<()> {
    let victim = Victim::DestinationEngine;
    table(
        QemuKind::V7_2,
        &[
            ("destination-describing", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("destination-loading", victim, End::Source),
            ("destination-loaded", victim, End::Source),
            ("destination-ready", victim, End::Source),
            ("source-ready", victim, End::Source),
            // From here on `send` ends in doubt, until the destination's journal has been asked.
            ("source-recorded", victim, End::Source),
            ("destination-committed", victim, End::Source),
            ("destination-recording", victim, End::Source),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn a_qemu_dies() -> Result<()> {
    let (here, there) = (Victim::SourceQemu, Victim::DestinationQemu);
    table(
        QemuKind::V7_2,
        &[
            ("source-precopy", there, End::Source),
            ("source-stopped", there, End::Source),
            ("destination-loading", there, End::Source),
            ("destination-loaded", there, End::Source),
            ("destination-ready", there, End::Source),
            ("source-recorded", there, End::Source),
            ("destination-committed", there, End::Source),
            ("destination-recording", there, End::SourceByOperator),
            ("destination-recorded", there, End::SourceByOperator),
            // All of the guest is at the destination.
            ("source-recorded", here, End::Destination),
            ("source-committed", here, End::Destination),
            ("source-precopy", here, End::Nowhere),
            ("source-stopped", here, End::Nowhere),
        ],
    )
}

#[test]
fn the_link_is_cut() -> Result<()> {
    let victim = Victim::Link;
    table(
        QemuKind::V7_2,
        &[
            ("destination-describing", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("destination-loaded", victim, End::Source),
            ("source-ready", victim, End::Source),
            // The commit does not arrive and the lease ends meanwhile.
            ("source-recorded", victim, End::Source),
            ("destination-committed", victim, End::Destination),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn ctrl_c_leaves_the_guest_where_it_is() -> Result<()> {
    let victim = Victim::Interrupt;
    table(
        QemuKind::V10_0,
        &[
            ("source-attaching", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("source-state-sent", victim, End::Source),
            ("destination-loading", victim, End::Source),
            // Too late: the destination has the guest's only right to run.
            ("source-recorded", victim, End::Destination),
            ("source-committed", victim, End::Destination),
        ],
    )
}

/// The same where the guest goes ahead of its memory: what dies before the commit costs nothing, what
/// dies after it is taken up again.
#[test]
fn whoever_dies_under_post_copy() -> Result<()> {
    use Victim::{DestinationEngine as There, Interrupt, Link, SourceEngine as Here};
    table_in(
        "post-copy",
        QemuKind::V10_0,
        &[
            ("destination-preparing", Here, End::Source),
            ("destination-preparing", There, End::Source),
            ("source-stopped", Here, End::Source),
            ("source-stopped", There, End::Source),
            ("source-state-sent", Here, End::Source),
            ("destination-paging", There, End::Source),
            ("destination-paging", Link, End::Source),
            ("destination-paging", Interrupt, End::Source),
            ("destination-loaded", There, End::Source),
            ("source-ready", Here, End::Source),
            ("source-recorded", Here, End::Destination),
            ("source-committed", Here, End::Destination),
            ("destination-recorded", Here, End::Destination),
            ("destination-recorded", There, End::Destination),
            ("destination-resumed", There, End::Destination),
            ("source-serving", Here, End::Destination),
            ("source-serving", Interrupt, End::Destination),
        ],
    )
}

/// Moves a guest, leaving its source paused, with one directory of journals for both ends, as on a
/// host that first receives and then sends.
fn sent_on(stage: &mut Stage, journal: &str) -> Result<(Vm, Vm)> {
    let start = stage.guest()?;
    let middle = Vm::start(&stage.rig.env, start.spec().successor("middle", QemuKind::V7_2))?;
    let last = Vm::start(&stage.rig.env, start.spec().successor("last", QemuKind::V7_2))?;
    let (source, destination) = (&stage.rig.source, &stage.rig.destination);
    let engine = |words: &[&str], vm: &Vm, identity: &PathBuf| {
        let (qmp, identity) =
            (vm.qmp_engine().display().to_string(), identity.display().to_string());
        let common = ["--journal", journal, "--qmp", &qmp, "--identity", &identity];
        Engine::start(&stage.rig.migrate, &[words, &common].concat(), None)
    };
    for (hop, next) in [&middle, &last].into_iter().enumerate() {
        let addr = e2e::free_address()?;
        let mut receive = engine(&["receive", "--once", "--listen", &addr], next, destination)?;
        receive.wait_stderr("listening on", PATIENCE)?;
        let words = ["send", "--to", &addr, "--keep-source", "--max-downtime-ms", "2000"];
        let from = if hop == 0 { &start } else { &middle };
        engine(&words, from, source)?.wait(PATIENCE)?.success()?;
        receive.wait(PATIENCE)?.success()?;
    }
    Ok((middle, last))
}

/// The guest came to this host and went on; what the journal says of its arrival resumes it never.
#[test]
fn a_guest_that_moved_on_is_not_resumed_by_the_journal_of_its_arrival() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let journal = stage.rig.journal("both");
    let (mut middle, mut last) = sent_on(&mut stage, &journal)?;
    let qmp = middle.qmp_engine().display().to_string();
    let identity = stage.rig.destination.display().to_string();
    let resolve = ["resolve", "--qmp", &qmp, "--journal", &journal];
    let addr = e2e::free_address()?;
    let receive = ["receive", "--listen", &addr, "--qmp", &qmp, "--journal", &journal];
    let receive = [&receive[..], &["--identity", &identity, "--once"]].concat();
    for words in [&resolve[..], &receive] {
        let done = Engine::run(&stage.rig.migrate, words, None, PATIENCE)?;
        let state = middle.qmp().run_state()?;
        ensure!(state == "postmigrate", "{state} after {words:?}: {done:?}");
    }
    ensure!(runs(&mut last)?, "The guest does not run where it is");
    let records = [middle.heartbeat().record(), last.heartbeat().record()];
    Pulse::of(&[&records[0], &records[1]])?.assert_one_runs()
}

/// The destination need not hear the session's close, of which nothing says that it arrives.
#[test]
fn a_source_that_is_done_keeps_no_destination_waiting() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let (_vms, [mut send, receive]) = stage.held_at("source-done")?;
    // One that had heard nothing would wait 5 s and then stay for two leases.
    receive.wait(Duration::from_secs(10))?.success()?;
    ensure!(send.running()?, "The source has closed its session");
    stage.net.cut()?;
    stage.rig.release("source-done")?;
    send.wait(PATIENCE)?.success().map(drop)
}

/// `resolve` does not decide about a migration that an engine is at work on.
#[test]
fn resolve_keeps_its_hands_off_a_migration_under_way() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let (vms, [send, receive]) = stage.held_at("source-recorded")?;
    for (vm, end) in vms.iter().zip(["source", "destination"]) {
        for extra in [&[][..], &["--run-here"], &["--runs-there"]] {
            let resolved = stage.rig.resolve(vm, end, extra)?;
            ensure!(resolved.code == Some(1), "{end} {extra:?}: {resolved:?}");
            ensure!(resolved.stderr.contains("at work on migration"), "{resolved:?}");
        }
    }
    stage.rig.release("source-recorded")?;
    send.wait(PATIENCE)?.success()?;
    receive.wait(PATIENCE)?.success().map(drop)
}
