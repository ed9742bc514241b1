//! Domains of libvirt, in private RAM, boot and migrate between two libvirtds: what a gateway for
//! them is tested on.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::{PATIENCE, in_turn};
use framework::heartbeat::Record;
use framework::libvirt::{Domain, LibvirtPair, Moved, Way};
use framework::vm::READY_TIMEOUT;
use framework::{Backend, Env, NetnsPair, Pulse, QemuKind, VmSpec, wait};

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
    moved.left.assert_clean()?;
    moved.domain.assert_clean()?;
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
                let moved = domain.migrate(to, way, &[])?.arrived(PATIENCE)?;
                outages_ms.push(check_one_runs(&mut stays, &moved)?.round());
                ensure!(from.domains()?.is_empty(), "It left itself behind: {:?}", from.domains());
                domain = moved.domain;
            }
            domain.ports().verify_checker(PATIENCE)?;
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
        let link_before = pair.net.bytes()?.0 - sent_before;
        let second = migration.job()?.context("No job any more")?;
        let link_after = pair.net.bytes()?.0 - sent_before;
        println!("{first:?}\n{second:?}\n{link_before} to {link_after} bytes on the link");
        let beats = migration.source().heartbeat().beats_within(Duration::from_secs(10));
        ensure!(beats, "The guest does not run meanwhile");
        ensure!((memory_bytes..memory_bytes + (16 << 20)).contains(&second.memory_bytes));
        ensure!((1..second.memory_bytes).contains(&second.remaining_bytes));
        ensure!(second.processed_bytes > first.processed_bytes, "It stands still");
        ensure!(second.elapsed_ms > first.elapsed_ms && second.rounds == 1);
        // What is in the buffers of sockets was processed and is not on the link; headers are.
        let processed = second.processed_bytes;
        ensure!(processed < link_after + (8 << 20), "More than was sent");
        ensure!(link_before < processed + processed / 5 + (1 << 20), "Less than was sent");

        migration.abort()?;
        let (domain, said) = migration.failed(PATIENCE)?;
        // QEMU closes the stream before it notes why, and then may take that for the cause.
        let causes = ["canceled by client", "Broken pipe"];
        ensure!(causes.iter().any(|cause| said.contains(cause)), "{said}");
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

/// What went through a relay.
#[derive(Debug)]
struct Passed {
    /// The stream's first bytes.
    head: Vec<u8>,
    /// Bytes to the destination.
    forth: u64,
    /// Bytes to the source.
    back: u64,
}

/// A relay at the source that passes one connection on to the destination, and the port that it
/// listens on. A second connection is refused.
fn relay(pair: &LibvirtPair) -> Result<(u16, JoinHandle<Result<Passed>>)> {
    let (sender, listens) = channel();
    let work = move || {
        let listener = TcpListener::bind((NetnsPair::SOURCE, 0)).context("No port")?;
        let port = listener.local_addr()?.port();
        sender.send(port)?;
        let (source, _) = listener.accept().context("Nobody comes")?;
        drop(listener);
        let destination = TcpStream::connect((NetnsPair::DESTINATION, port));
        let destination = destination.context("Nobody to pass it on to")?;
        std::thread::scope(|scope| {
            let back = scope.spawn(|| pass_on(&destination, &source));
            let (head, forth) = pass_on(&source, &destination)?;
            let back = back.join().map_err(|_| anyhow!("The way back panicked"))??;
            Ok(Passed { head, forth, back: back.1 })
        })
    };
    let passed = pair.net.source.spawn(work)?;
    Ok((listens.recv().context("The relay does not listen")?, passed))
}

/// Passes on all that comes; returns how it began, and its length.
fn pass_on(mut from: &TcpStream, mut to: &TcpStream) -> Result<(Vec<u8>, u64)> {
    let mut head = vec![0; 8];
    let length = from.read(&mut head)?;
    head.truncate(length);
    to.write_all(&head)?;
    let rest = std::io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)?;
    Ok((head, length as u64 + rest))
}

/// What a gateway needs: the stream is one connection, which goes to whoever `--migrateuri` names. The
/// destination's QEMU listens on the port that it names, at an address of its own.
#[test]
fn the_stream_goes_where_the_caller_says() -> Result<()> {
    in_turn(|| {
        let env = Env::load()?;
        let pair = LibvirtPair::start(0)?;
        let mut domain = Domain::boot(&pair.source, &env, busy("relayed"))?;
        let mut stays = vec![];
        for way in [Way::PeerToPeer, Way::Managed] {
            let (port, passed) = relay(&pair)?;
            let uri = format!("tcp://{}:{port}", NetnsPair::SOURCE);
            let words = ["--migrateuri", &uri];
            let moved = domain.migrate(&pair.destination, way, &words)?.arrived(PATIENCE)?;
            check_one_runs(&mut stays, &moved)?;
            let passed = passed.join().map_err(|_| anyhow!("The relay panicked"))??;
            println!("{way:?}: {passed:?}");
            ensure!(passed.head.starts_with(b"QEVM"), "No stream of QEMU: {passed:?}");
            ensure!(passed.forth > 24 << 20, "The writer's memory is not in it: {passed:?}");
            ensure!(passed.back > 0, "No return path: {passed:?}");
            let back = moved.domain.migrate(&pair.source, way, &[])?.arrived(PATIENCE)?;
            check_one_runs(&mut stays, &back)?;
            domain = back.domain;
        }
        domain.ports().verify_checker(PATIENCE)?;
        Ok(())
    })
}
