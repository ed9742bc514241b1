//! Domains of libvirt, in private RAM, boot and migrate between two libvirtds: what a gateway for
//! them is tested on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{PATIENCE, in_turn};
use framework::heartbeat::Record;
use framework::libvirt::{Domain, LibvirtPair, Moved, Way};
use framework::vm::READY_TIMEOUT;
use framework::{Backend, Engine, Env, NetnsPair, Pulse, QemuKind, VmSpec, wait};

/// A guest that writes and checks its memory; small, for it is sent often.
fn busy(name: &str) -> VmSpec {
    VmSpec::new(name, QemuKind::V7_2)
        .memory_mib(192)
        .backend(Backend::Private)
        .with("godwit.writer=fill=24,hot=8,rate=2000,bytes=64,seed=7")
        .with("godwit.checker=size=8,seed=5")
}

/// The guest beats where it is now, and in all the places that it has been it never ran in two at
/// once. Returns the outage of its last move in milliseconds.
fn check_one_runs(stays: &mut Vec<Record>, moved: &Moved<'_>) -> Result<f64> {
    let beats = moved.domain.heartbeat().beats_within(Duration::from_secs(10));
    ensure!(beats, "No heartbeat at the destination: {}", moved.domain.console().tail(10));
    std::thread::sleep(Duration::from_millis(100));
    stays.push(moved.left.heartbeat().record());
    let now = moved.domain.heartbeat().record();
    let records: Vec<&Record> = stays.iter().chain([&now]).collect();
    let pulse = Pulse::of(&records)?;
    pulse.assert_one_runs()?;
    moved.domain.console().assert_clean()?;
    ensure!(moved.domain.state()? == "running", "The domain does not run");
    let last = stays.len() - 1;
    let gap = pulse.handover(last, last + 1).context("The heartbeat shows no hand-over")?;
    Ok(gap.outage_ms())
}

#[test]
fn domains_boot_under_both_daemons() -> Result<()> {
    in_turn(|| {
        let env = Env::load()?;
        let pair = LibvirtPair::start(0)?;
        let mut domains = vec![
            Domain::start(&pair.source, &env, busy("one"))?,
            Domain::start(&pair.destination, &env, busy("two"))?,
        ];
        for domain in &mut domains {
            domain.wait_ready(READY_TIMEOUT)?;
            domain.ports().verify_checker(PATIENCE)?;
            ensure!(domain.state()? == "running", "{:?}", domain.state());
            let memory = domain.qmp("query-memdev")?;
            ensure!(memory[0]["share"] == false, "Its RAM is not private: {memory}");
            let kvm = domain.qmp("query-kvm")?;
            ensure!(kvm["enabled"] == false, "{kvm}");
        }
        ensure!(pair.source.domains()? == ["one"], "{:?}", pair.source.domains());
        ensure!(pair.destination.domains()? == ["two"], "{:?}", pair.destination.domains());
        drop(domains);
        ensure!(pair.source.domains()?.is_empty(), "{:?}", pair.source.domains());
        Ok(())
    })
}

/// Three times there and three times back, by each way.
#[test]
fn a_guest_moves_there_and_back() -> Result<()> {
    in_turn(|| {
        let env = Env::load()?;
        let pair = LibvirtPair::start(0)?;
        let mut domain = Domain::boot(&pair.source, &env, busy("commuter"))?;
        let mut stays = vec![];
        for way in [Way::PeerToPeer, Way::Managed] {
            let mut outages_ms = vec![];
            for to in [&pair.destination, &pair.source].into_iter().cycle().take(6) {
                let from = domain.daemon();
                let mut moved = domain.migrate(to, way, &[])?.arrived(PATIENCE)?;
                outages_ms.push(check_one_runs(&mut stays, &moved)?.round());
                ensure!(from.domains()?.is_empty(), "It left itself behind: {:?}", from.domains());
                moved.domain.ports().verify_checker(PATIENCE)?;
                domain = moved.domain;
            }
            println!("{way:?}: outages in ms: {outages_ms:?}");
        }
        Ok(())
    })
}

/// Over a link of 100 Mbit/s there is time to look at it.
#[test]
fn a_migration_tells_how_far_it_is_and_can_be_called_off() -> Result<()> {
    in_turn(|| {
        let env = Env::load()?;
        let pair = LibvirtPair::start(100_000_000)?;
        let domain = Domain::boot(&pair.source, &env, busy("slow"))?;
        let memory_bytes = domain.spec().memory_mib << 20;
        let (sent_before, _) = pair.net.bytes()?;
        let mut migration = domain.migrate(&pair.destination, Way::PeerToPeer, &[])?;
        let first = migration.wait_sending(PATIENCE)?;
        std::thread::sleep(Duration::from_secs(1));
        let second = migration.job()?.context("No job any more")?;
        let sent = pair.net.bytes()?.0 - sent_before;
        println!("{first:?}\n{second:?}\n{sent} bytes on the link");
        let beats = migration.source().heartbeat().beats_within(Duration::from_secs(10));
        ensure!(beats, "The guest does not run meanwhile");
        ensure!((memory_bytes..memory_bytes + (16 << 20)).contains(&second.memory_bytes));
        ensure!((1..second.memory_bytes).contains(&second.remaining_bytes));
        ensure!(second.processed_bytes > first.processed_bytes, "It stands still");
        ensure!(second.elapsed_ms > first.elapsed_ms && second.rounds == 1);
        // What is in the buffers of sockets was processed and is not on the link.
        let processed = second.processed_bytes;
        ensure!(processed < sent + (8 << 20) && sent < processed + processed / 5 + (1 << 20));

        migration.abort()?;
        let (domain, said) = migration.failed(PATIENCE)?;
        ensure!(said.contains("canceled by client"), "{said}");
        ensure!(domain.state()? == "running", "{:?}", domain.state());
        ensure!(domain.job()?.is_none(), "The job goes on: {:?}", domain.job());
        let gone = || Ok(pair.destination.domains()?.is_empty().then_some(()));
        wait::until("the destination's end of it to go", PATIENCE, gone)?;
        ensure!(domain.heartbeat().beats_within(Duration::from_secs(10)), "The guest is stopped");

        pair.net.shape(0)?;
        let migration = domain.migrate(&pair.destination, Way::PeerToPeer, &[])?;
        let mut moved = migration.arrived(PATIENCE)?;
        check_one_runs(&mut vec![], &moved)?;
        moved.domain.ports().verify_checker(PATIENCE)?;
        let last = moved.domain.last_job()?;
        ensure!(last.remaining_bytes == 0 && last.downtime_ms > Some(0), "{last:?}");
        Ok(())
    })
}

/// Where QEMU's stream is told to go, and where the destination's QEMU listens.
const PORT: &str = "7000";

/// Listens at the source for one connection and passes it on to the destination, and leaves in its
/// folder how it begins and all that comes back.
const RELAY: &str = "cd \"$1\"
{ dd bs=8 count=1 2>/dev/null | tee head; cat; } | busybox nc \"$2\" \"$3\" | tee back";

fn relay(pair: &LibvirtPair, folder: &Path) -> Result<Engine> {
    let (folder, to) = (folder.display().to_string(), NetnsPair::DESTINATION.to_string());
    let words = ["nc", "-l", "-p", PORT, "-e", "sh", "-c", RELAY, "relay", &folder, &to, PORT];
    let relay = Engine::start(Path::new("busybox"), &words, Some(pair.net.source.name()))?;
    wait::until("a relay that listens", PATIENCE, || {
        let listening = pair.net.source.run(&["busybox", "netstat", "-ltn"])?;
        Ok(listening.contains(&format!(":{PORT} ")).then_some(()))
    })?;
    Ok(relay)
}

/// What a gateway needs: the stream is one connection, which goes to whoever `--migrateuri` names. The
/// destination's QEMU listens on the port that it names, at an address of its own.
#[test]
fn the_stream_goes_where_the_caller_says() -> Result<()> {
    in_turn(|| {
        let env = Env::load()?;
        let pair = LibvirtPair::start(0)?;
        let mut domain = Domain::boot(&pair.source, &env, busy("relayed"))?;
        let uri = format!("tcp://{}:{PORT}", NetnsPair::SOURCE);
        let mut stays = vec![];
        for way in [Way::PeerToPeer, Way::Managed] {
            let folder = tempfile::tempdir()?;
            let relay = relay(&pair, folder.path())?;
            let words = ["--migrateuri", &uri];
            let moved = domain.migrate(&pair.destination, way, &words)?.arrived(PATIENCE)?;
            check_one_runs(&mut stays, &moved)?;
            relay.wait(PATIENCE)?.success()?;
            let head = std::fs::read(folder.path().join("head"))?;
            ensure!(head.starts_with(b"QEVM"), "{way:?}: {head:?}");
            let back = std::fs::read(folder.path().join("back"))?;
            ensure!(!back.is_empty(), "{way:?}: no return path");
            println!("{way:?}: {} bytes came back", back.len());
            let back = moved.domain.migrate(&pair.source, way, &[])?.arrived(PATIENCE)?;
            check_one_runs(&mut stays, &back)?;
            domain = back.domain;
        }
        domain.ports().verify_checker(PATIENCE)?;
        Ok(())
    })
}
