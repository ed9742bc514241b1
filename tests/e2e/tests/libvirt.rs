//! Domains of libvirt, in private RAM, migrate between two libvirtds by way of gateways. libvirt
//! drives, as ever, and knows nothing of Godwit.

#[path = "libvirt/gateways.rs"]
mod gateways;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::{BEATS_WITHIN, PATIENCE, in_turn};
use framework::heartbeat::Record;
use framework::libvirt::{Domain, Job, LibvirtPair, Libvirtd, Migration, Moved, Way};
use framework::vm::READY_TIMEOUT;
use framework::{Backend, Env, Pulse, QemuKind, VmSpec, metrics, wait};
use gateways::{End, Gateways, Site, Sockets};

/// The stream goes to the gateway at the own host, and that at the other one reaches the QEMU there.
/// libvirt chooses the port.
const BY_GATEWAY: [&str; 4] = ["--migrateuri", "tcp://127.0.0.1", "--listen-address", "127.0.0.1"];

/// Both ways to drive a migration.
const WAYS: [Way; 2] = [Way::PeerToPeer, Way::Managed];

/// Bits a second of a link over which a migration takes seconds.
const SLOW: u64 = 60_000_000;

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
    let beats = moved.domain.heartbeat().beats_within(BEATS_WITHIN);
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

/// Moves a domain; what its checker says then is for the caller to ask.
fn passed<'a>(
    domain: Domain<'a>,
    to: &'a Libvirtd,
    way: Way,
    words: &[&str],
) -> Result<Domain<'a>> {
    let moved = domain.migrate(to, way, words)?.arrived(PATIENCE)?;
    check_one_runs(&mut vec![], &moved)?;
    Ok(moved.domain)
}

/// Waits until a migration has failed; the guest runs on where it was, and nothing is left of it at
/// the destination. Returns the domain, and what `virsh` said.
fn undone<'a>(migration: Migration<'a>, to: &Libvirtd) -> Result<(Domain<'a>, String)> {
    let (domain, said) = migration.failed(PATIENCE)?;
    ensure!(said.starts_with("error: "), "{said}");
    ensure!(domain.state()? == "running", "{:?}", domain.state());
    ensure!(domain.job()?.is_none(), "The job goes on: {:?}", domain.job());
    ensure!(domain.heartbeat().beats_within(BEATS_WITHIN), "The guest is stopped");
    domain.assert_clean()?;
    let gone = || Ok(to.domains()?.is_empty().then_some(()));
    wait::until("the destination's end of it to go", PATIENCE, gone)?;
    Ok((domain, said))
}

/// The figures of a migration that has completed.
fn check_completed(job: &Job, memory_mib: u64) -> Result<()> {
    let memory_bytes = memory_mib << 20;
    ensure!((memory_bytes..memory_bytes + (16 << 20)).contains(&job.memory_bytes), "{job:?}");
    // What the guest's writer alone has filled, and no more than everything three times.
    ensure!((24 << 20..memory_bytes * 3).contains(&job.processed_bytes), "{job:?}");
    ensure!(job.remaining_bytes == 0 && (2..100).contains(&job.rounds), "{job:?}");
    let downtime_ms = job.downtime_ms.context("No downtime")?;
    ensure!((1..job.elapsed_ms).contains(&downtime_ms), "{job:?}");
    ensure!(job.elapsed_ms < 60_000, "{job:?}");
    // The mean of the rate, more or less.
    let per_s = job.processed_bytes * 1000 / job.elapsed_ms;
    ensure!((per_s / 10..per_s * 10).contains(&job.bytes_per_s), "{job:?}");
    Ok(())
}

/// What everything else is compared with: without gateways.
#[test]
fn domains_boot_and_move_under_both_daemons() -> Result<()> {
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
        drop(domains.pop());
        let mut domain = domains.pop().context("No domain")?;
        for way in WAYS {
            for to in [&pair.destination, &pair.source] {
                domain = passed(domain, to, way, &[])?;
            }
        }
        domain.ports().verify_checker(PATIENCE)?;
        drop(domain);
        ensure!(pair.source.domains()?.is_empty(), "{:?}", pair.source.domains());
        Ok(())
    })
}

/// Five times there and back, in turns by each way.
#[test]
fn ten_moves_through_gateways() -> Result<()> {
    in_turn(|| {
        let site = Site::start(0)?;
        let (there, back) = (site.there(Sockets::Ports)?, site.back(Sockets::Ports)?);
        let mut domain = Domain::boot(&site.pair.source, &site.env, busy("commuter"))?;
        let (mut stays, mut outages_ms) = (vec![], vec![]);
        for turn in 0..5 {
            for (to, gateways) in [(&site.pair.destination, &there), (&site.pair.source, &back)] {
                let (from, way) = (domain.daemon(), WAYS[outages_ms.len() % 3 % 2]);
                let moved = domain.migrate(to, way, &BY_GATEWAY)?.arrived(PATIENCE);
                let mut moved = moved.with_context(|| gateways.said())?;
                outages_ms.push(check_one_runs(&mut stays, &moved)?.round());
                ensure!(from.domains()?.is_empty(), "It left itself behind: {:?}", from.domains());
                moved.domain.ports().verify_checker(PATIENCE)?;
                let job = moved.domain.last_job()?;
                check_completed(&job, moved.domain.spec().memory_mib)?;
                let reports = gateways.reports(turn + 1)?;
                check_passed(&reports[turn], &job)?;
                domain = moved.domain;
            }
        }
        println!("outages in ms: {outages_ms:?}");
        for gateways in [&there, &back] {
            check_metrics(gateways)?;
        }
        Ok(())
    })
}

/// A gateway's report of a guest that came through, beside libvirt's figures.
fn check_passed(report: &serde_json::Value, job: &Job) -> Result<()> {
    ensure!(report["outcome"] == "completed" && report["error"].is_null(), "{report}");
    ensure!(report["ram_bytes"] == job.memory_bytes, "{report} {job:?}");
    let number = |name: &str| report[name].as_u64().with_context(|| format!("No {name}: {report}"));
    let (stream, wire) = (number("stream_bytes")?, number("wire_bytes")?);
    // libvirt counts pages alone.
    let processed = job.processed_bytes;
    ensure!((processed..processed + (2 << 20)).contains(&stream), "{report} {job:?}");
    ensure!((24 << 20..stream * 3 / 4).contains(&wire), "Nothing was saved: {report}");
    Ok(())
}

/// What a pair of gateways tells after five guests have come through.
fn check_metrics(gateways: &Gateways<'_>) -> Result<()> {
    gateways.wait_idle()?;
    for end in [End::Source, End::Destination] {
        let text = gateways.metrics(end)?;
        let completed = text.lines().find(|line| {
            line.starts_with("godwit_gateway_guests_ended_total{") && line.contains("\"completed\"")
        });
        ensure!(completed.is_some_and(|line| line.ends_with(" 5")), "{text}");
        ensure!(metrics::sum(&text, "godwit_gateway_guests_ended_total")? == Some(5), "{text}");
        let wire = metrics::sum(&text, "godwit_gateway_wire_bytes_total")?;
        ensure!(wire.is_some_and(|bytes| bytes > 5 * (24 << 20)), "{text}");
    }
    Ok(())
}

/// A port that the caller names; a name that leads to the gateway at the source and to the host itself at the
/// destination; and Unix sockets. Then two guests at once.
#[test]
fn the_stream_finds_the_gateway() -> Result<()> {
    in_turn(|| {
        let site = Site::start(0)?;
        let (from, to) = (&site.pair.source, &site.pair.destination);
        let mut domain = Domain::boot(from, &site.env, busy("one"))?;
        let there = site.there(Sockets::Ports)?;
        let port = ["--migrateuri", "tcp://127.0.0.1:49230"];
        domain = passed(domain, to, WAYS[0], &port).with_context(|| there.said())?;
        let reports = there.reports(1)?;
        let name = reports[0]["name"].as_str().context("No name")?;
        ensure!(name.starts_with("port 49230,"), "{name}");
        domain = passed(domain, from, WAYS[0], &[])?;
        // The destination's `migration_host`, which is what libvirt makes a URI of.
        from.resolve(&to.migration_name(), "127.0.0.1".parse()?)?;
        for (count, way) in WAYS.into_iter().enumerate() {
            domain = passed(domain, to, way, &[]).with_context(|| there.said())?;
            there.reports(count + 2)?;
            domain = passed(domain, from, way, &[])?;
        }
        drop(there);
        let there = site.there(Sockets::Unix("to-host-b.sock"))?;
        for (count, way) in WAYS.into_iter().enumerate() {
            let unix = ["--migrateuri", "unix:///run/to-host-b.sock"];
            domain = passed(domain, to, way, &unix).with_context(|| there.said())?;
            there.reports(count + 1)?;
            domain = passed(domain, from, way, &[])?;
        }
        drop(there);
        let there = site.there(Sockets::Ports)?;
        let other = Domain::boot(from, &site.env, busy("two"))?;
        let both =
            [domain.migrate(to, WAYS[0], &BY_GATEWAY)?, other.migrate(to, WAYS[0], &BY_GATEWAY)?];
        for migration in both {
            let moved = migration.arrived(PATIENCE).with_context(|| there.said())?;
            check_one_runs(&mut vec![], &moved)?;
            let mut domain = moved.domain;
            domain.ports().verify_checker(PATIENCE)?;
        }
        there.reports(2).map(drop)
    })
}

/// What `virsh domjobinfo` tells three times while a migration sends.
fn watch(migration: &mut Migration<'_>) -> Result<Vec<Job>> {
    let mut jobs = vec![migration.wait_sending(PATIENCE)?];
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(800));
        jobs.push(migration.job()?.context("No job any more")?);
    }
    let beats = migration.source().heartbeat().beats_within(BEATS_WITHIN);
    ensure!(beats, "The guest does not run meanwhile");
    Ok(jobs)
}

/// Over a slow link there is time to look at it.
#[test]
fn a_migration_tells_how_far_it_is_and_can_be_called_off() -> Result<()> {
    in_turn(|| {
        let site = Site::start(SLOW)?;
        let there = site.there(Sockets::Ports)?;
        let to = &site.pair.destination;
        let mut domain = Domain::boot(&site.pair.source, &site.env, busy("slow"))?;
        let memory_bytes = domain.spec().memory_mib << 20;
        for (count, way) in WAYS.into_iter().enumerate() {
            let (sent_before, _) = site.pair.net.bytes()?;
            let mut migration = domain.migrate(to, way, &BY_GATEWAY)?;
            let jobs = watch(&mut migration)?;
            let link = site.pair.net.bytes()?.0 - sent_before;
            println!("{jobs:#?}\n{link} bytes on the link");
            for job in &jobs {
                let memory = memory_bytes..memory_bytes + (16 << 20);
                ensure!(memory.contains(&job.memory_bytes) && job.rounds == 1, "{job:?}");
                ensure!((1..job.memory_bytes).contains(&job.remaining_bytes), "{job:?}");
                ensure!(job.bytes_per_s < 1 << 30, "{job:?}");
            }
            for pair in jobs.windows(2) {
                let [first, second] = [pair[0], pair[1]];
                ensure!(second.processed_bytes > first.processed_bytes, "It stands still");
                ensure!(second.remaining_bytes < first.remaining_bytes, "It stands still");
                ensure!(second.elapsed_ms > first.elapsed_ms && second.bytes_per_s > 0);
            }
            let last = jobs.last().context("No figures")?;
            ensure!(link > 4 << 20, "Nothing is on the link");
            // Packing saves less than two thirds of it; 64 MiB at most are under way.
            ensure!(last.processed_bytes < link * 3 + (72 << 20), "QEMU sees no back-pressure");

            migration.abort()?;
            let (back, said) = undone(migration, to)?;
            // QEMU closes the stream before it notes why, and may take for the cause what a thread met that was writing to it:
            // a broken pipe, a connection that was reset, or no file any more.
            let causes = ["canceled by client", "Unable to write to socket"];
            ensure!(causes.iter().any(|cause| said.contains(cause)), "{said}");
            let report = &there.reports(count + 1)?[count];
            ensure!(report["outcome"] == "failed", "{report}");
            // One of the QEMUs ended its connection; that a lane ended then says nothing.
            let error = report["error"].as_str().context("No reason")?;
            ensure!(error.contains("QEMU") || error.contains("The guest's stream"), "{report}");
            println!("{said}{report}");
            domain = back;
        }
        site.pair.net.shape(0)?;
        let mut domain = passed(domain, to, Way::PeerToPeer, &BY_GATEWAY)?;
        check_completed(&domain.last_job()?, domain.spec().memory_mib)?;
        domain.ports().verify_checker(PATIENCE).map(drop)
    })
}

/// `virsh` fails, the guest runs on; with another gateway in place of the killed one it moves.
#[test]
fn a_killed_gateway_leaves_the_guest_where_it_is() -> Result<()> {
    in_turn(|| {
        let site = Site::start(0)?;
        let mut there = site.there(Sockets::Ports)?;
        let (from, to) = (&site.pair.source, &site.pair.destination);
        let mut domain = Domain::boot(from, &site.env, busy("struck"))?;
        for (way, end) in WAYS.into_iter().zip([End::Source, End::Destination]) {
            site.pair.net.shape(SLOW)?;
            let mut migration = domain.migrate(to, way, &BY_GATEWAY)?;
            migration.wait_sending(PATIENCE)?;
            there.kill(end)?;
            let killed = Instant::now();
            let (back, said) = undone(migration, to).with_context(|| there.said())?;
            println!("{end:?}, {way:?}: {:.1} s; {}", killed.elapsed().as_secs_f64(), said.trim());
            ensure!(killed.elapsed() < Duration::from_secs(20), "It took {:?}", killed.elapsed());
            there.restart(end)?;
            site.pair.net.shape(0)?;
            domain = passed(back, to, way, &BY_GATEWAY).with_context(|| there.said())?;
            domain = passed(domain, from, way, &[])?;
        }
        domain.ports().verify_checker(PATIENCE).map(drop)
    })
}

/// What QEMU would do to its stream by itself is refused while the guest runs at the source.
#[test]
fn a_stream_that_is_not_taken_leaves_the_guest_where_it_is() -> Result<()> {
    in_turn(|| {
        let site = Site::start(0)?;
        let there = site.there(Sockets::Ports)?;
        let to = &site.pair.destination;
        let mut domain = Domain::boot(&site.pair.source, &site.env, busy("packed"))?;
        // XBZRLE begins with the second round; at this rate there are more of them.
        let xbzrle = ["--comp-methods", "xbzrle", "--bandwidth", "20"];
        // QEMU 7.2 does not always survive a multifd migration that fails: `gateway_streams` has its channels without QEMU.
        let refused: [(&[&str], _); 2] =
            [(&["--comp-methods", "mt"], "compress"), (&xbzrle, "xbzrle")];
        let mut known = 0;
        for (words, cause) in refused {
            let words = [words, &BY_GATEWAY].concat();
            let migration = domain.migrate(to, Way::PeerToPeer, &words)?;
            let (back, said) = undone(migration, to).with_context(|| there.said())?;
            domain = back;
            let errors = there.refused(known, cause)?;
            println!("{cause}: {}\n{errors:?}", said.trim());
            // QEMU 7.2 does not bear another migration before all connections of the last have ended.
            there.wait_idle()?;
            known += errors.len();
        }
        let mut domain = passed(domain, to, Way::PeerToPeer, &BY_GATEWAY)?;
        domain.ports().verify_checker(PATIENCE).map(drop)
    })
}
