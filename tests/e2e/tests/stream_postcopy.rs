//! Guests that are handed over before their memory is there, by QEMU's own post-copy.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::{recover, small, wait_paused};
use e2e::stage::{End, Stage, Victim, runs};
use e2e::streams::{LISTEN, check_report, stream};
use e2e::watched::Watched;
use e2e::{PATIENCE, Rig, check_alive, free_address, in_turn, with_larger_pages};
use framework::{Backend, Engine, NetnsPair, QemuKind, Qmp, Vm, VmSpec, wait};
use serde_json::json;

/// Whatever dies before the commit, the guest runs at the source.
const BEFORE_THE_COMMIT: [(&str, Victim, End); 8] = [
    ("destination-loaded", Victim::DestinationQemu, End::Source),
    ("destination-loaded", Victim::DestinationEngine, End::Source),
    ("destination-loaded", Victim::Link, End::Source),
    ("destination-loaded", Victim::SourceEngine, End::Source),
    ("destination-loaded", Victim::Interrupt, End::Source),
    ("source-ready", Victim::SourceEngine, End::Source),
    ("source-ready", Victim::DestinationEngine, End::Source),
    ("destination-describing", Victim::DestinationQemu, End::Source),
];

/// Moves a guest from place to place, ahead of its memory.
fn moved(first: QemuKind, places: &[(&str, QemuKind, Backend)]) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, small(first))?;
        for (turn, (mode, kind, backend)) in places.iter().enumerate() {
            let next = vm.spec().successor("next", *kind).backend(backend.clone());
            let words = stream(&["--mode", mode, "--keep-source"]);
            let moved = rig.migrate_from(&mut vm, next, &words);
            let moved =
                moved.with_context(|| format!("move {} by {mode} to {kind:?}", turn + 1))?;
            check_report(&moved.report, "completed")?;
            ensure!(moved.report["mode"] == *mode, "{}", moved.report);
            ensure!(vm.qmp().run_state()? == "postmigrate", "The source is not kept");
            let left = vm.qmp().migration()?;
            let asked_for = left["ram"]["postcopy-requests"].as_u64();
            // By hybrid, the guest may find all that it looks for.
            ensure!(*mode == "hybrid" || asked_for > Some(0), "No page was asked for: {left}");
            println!(
                "{mode} to {kind:?}, {backend:?}: outage {:.0} ms, downtime {:.0} ms, {} missing, {} asked for, {} ms",
                moved.outage_ms,
                moved.report["downtime_ms"].as_f64().unwrap_or_default(),
                moved.report["pages"]["missing"],
                asked_for.unwrap_or_default(),
                moved.report["total_ms"],
            );
            vm = moved.vm;
        }
        vm.verify_checker(PATIENCE).map(drop)
    })
}

/// Ten moves, one of them into shared memory.
fn ten(kind: QemuKind) -> Result<()> {
    let mut places = vec![("post-copy", kind, Backend::Private); 10];
    places[4].2 = Backend::Tmpfs;
    moved(kind, &places)
}

#[test]
fn ten_moves_ahead_of_memory_on_7_2() -> Result<()> {
    ten(QemuKind::V7_2)
}

#[test]
fn ten_moves_ahead_of_memory_on_10_0() -> Result<()> {
    ten(QemuKind::V10_0)
}

#[test]
fn a_guest_moves_ahead_of_its_memory_from_7_2_to_10_0() -> Result<()> {
    let places = [
        ("hybrid", QemuKind::V7_2, Backend::Private),
        ("post-copy", QemuKind::V10_0, Backend::Private),
        ("hybrid", QemuKind::V10_0, Backend::Memfd),
    ];
    moved(QemuKind::V7_2, &places)
}

/// Pre-copy would not end: measurement finds that out, and the guest goes.
#[test]
fn a_guest_that_never_converges_goes_ahead_of_its_memory() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(30_000_000)?;
        let spec = VmSpec::new("busy", QemuKind::V10_0)
            .backend(Backend::Private)
            .with("godwit.writer=fill=40,hot=30,rate=12000,bytes=4096,seed=7")
            .with("godwit.checker=size=8,seed=5");
        let mut vm = Vm::boot(&rig.env, spec)?;
        let mut next = Vm::start(&rig.env, vm.spec().successor("there", QemuKind::V10_0))?;
        let receive = rig.receive_in(&next, LISTEN, &[], Some(net.destination.name()))?;
        let words = stream(&["--compression", "none", "--delta-cache", "0", "--keep-source"]);
        let send = rig.send_in(&vm, LISTEN, &words, Some(net.source.name()))?;
        let sent = send.wait(PATIENCE)?.success().with_context(|| receive.stderr())?;
        receive.wait(PATIENCE)?.success()?;
        let report = sent.json()?;
        check_report(report, "completed")?;
        ensure!(report["mode"] == "hybrid", "{report}");
        println!(
            "{} ({} rounds)",
            report["mode_reason"],
            report["rounds"].as_array().map_or(0, Vec::len)
        );
        check_alive(&mut vm, &mut next)?;
        next.verify_checker(PATIENCE).map(drop)
    })
}

#[test]
fn a_guest_on_7_2_stays_whatever_dies_before_the_commit() -> Result<()> {
    in_turn(|| Stage::of_streams(QemuKind::V7_2, "post-copy")?.play(&BEFORE_THE_COMMIT))
}

#[test]
fn a_guest_on_10_0_stays_whatever_dies_before_the_commit() -> Result<()> {
    in_turn(|| Stage::of_streams(QemuKind::V10_0, "post-copy")?.play(&BEFORE_THE_COMMIT))
}

/// QEMU's post-copy places whole pages, and the engines carry those of 4 KiB.
#[test]
fn larger_pages_are_refused_before_anything_moves() -> Result<()> {
    in_turn(|| {
        let (backends, _huge) = with_larger_pages(vec![]);
        for backend in backends {
            let spec = VmSpec { extra_kib: 0, ..small(QemuKind::V10_0) };
            let mut watched = Watched::boot(spec.clone())?;
            let words = stream(&["--mode", "post-copy"]);
            let larger = watched.next(QemuKind::V10_0).backend(backend.clone());
            watched.refused_by(
                larger,
                &words,
                &["The destination", "pages of", "--mode pre-copy"],
            )?;
            let mut watched = Watched::boot(spec.backend(backend))?;
            // It does not come to a session.
            let nobody = free_address()?;
            watched.refused("larger pages", &["pages of", "--mode pre-copy"], |rig, vm| {
                rig.send(vm, &nobody, &words)?.wait(PATIENCE)
            })?;
        }
        Ok(())
    })
}

/// After the commit a link is cut: both QEMUs wait, are connected again as the engine says, and nothing is lost.
fn recovered(kind: QemuKind) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(0)?;
        let mut vm = Vm::boot(&rig.env, small(kind))?;
        let folder = tempfile::tempdir()?;
        let monitor = folder.path().join("oob.sock");
        let another = format!("unix:{},server=on,wait=off", monitor.display());
        let spec = vm.spec().successor("there", kind).extra(&["-qmp", &another]);
        let mut next = Vm::start(&rig.env, spec)?;
        let mut monitor = Qmp::connect_oob(&monitor, PATIENCE)?;
        let extra = ["--dead-peer-s", "1"];
        let mut receive = rig.receive_in(&next, LISTEN, &extra, Some(net.destination.name()))?;
        let words =
            ["--mode", "post-copy", "--max-bandwidth", "16M", "--dead-peer-s", "1", "--ask-s", "1"];
        let words = stream(&words);
        let send = rig.send_in(&vm, LISTEN, &words, Some(net.source.name()))?;
        wait::until("the guest to run there", PATIENCE, || Ok(runs(&mut next)?.then_some(())))
            .with_context(|| format!("{}\n{}", send.stderr(), receive.stderr()))?;
        net.cut()?;
        let sent = send.wait(PATIENCE)?;
        ensure!(sent.code == Some(3), "{sent:?}");
        wait_paused(&mut vm)?;
        ensure!(vm.qmp().run_state()? != "running", "It runs at the source");
        net.mend()?;
        let (qmp, journal) = (vm.qmp_engine().display().to_string(), rig.journal("source"));
        let resolve = ["resolve", "--json", "--qmp", &qmp, "--journal", &journal];
        let resolve = || Engine::run(&rig.migrate, &resolve, Some(net.source.name()), PATIENCE);
        let told = resolve()?;
        ensure!(told.code == Some(3) && told.stderr.contains("migrate-recover"), "{told:?}");
        let socket = folder.path().join("again");
        recover(&mut vm, &mut monitor, &socket, &socket)?;
        vm.qmp().wait_migration(&["completed"], PATIENCE)?;
        next.qmp().wait_migration(&["completed"], PATIENCE)?;
        receive.wait_stderr("the guest runs here", PATIENCE)?;
        let resolved = resolve()?;
        ensure!(resolved.code == Some(0), "{resolved:?}\n{}", receive.stderr());
        vm.wait_exit(Duration::from_secs(20)).context("The source is not quit")?;
        ensure!(next.heartbeat().beats_within(Duration::from_secs(5)), "No heartbeat");
        next.qmp().execute("query-status", json!({}))?;
        next.verify_checker(PATIENCE).map(drop)
    })
}

#[test]
fn a_broken_move_is_recovered_on_7_2() -> Result<()> {
    recovered(QemuKind::V7_2)
}

#[test]
fn a_broken_move_is_recovered_on_10_0() -> Result<()> {
    recovered(QemuKind::V10_0)
}
