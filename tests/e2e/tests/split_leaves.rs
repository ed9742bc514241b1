//! Split guests that leave for another main host.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::reading::{reading, slow_disk, wait_blocks};
use e2e::split::{EMPTY_WITHIN, NextHost, OFFER, Split, WORKING_RESIDENT_MIB};
use e2e::{PATIENCE, Rig, in_turn};
use framework::split::SplitState;
use framework::worker::{self, Phase};
use framework::{Engine, MemoryServer, QemuKind, Vm, wait};
use nix::sys::signal::Signal;

/// Not within any round.
const NEVER: [&str; 2] = ["--max-downtime-ms", "1"];

/// Blocks of the disk to read at a new host: more than the guest's buffers.
const READ_BLOCKS: u64 = 32_768;

/// Silence that counts as death, ten times the downtime that is allowed, and what busy processors take; less than an answer
/// is waited for otherwise.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(20);

/// Starts `migrate split` on the main host of a guest that is split.
fn start(
    rig: &Rig,
    split: &Split,
    next: &NextHost,
    servers: &[MemoryServer],
    extra: &[&str],
) -> Result<Engine> {
    let (to, mib) = (&next.listen, WORKING_RESIDENT_MIB);
    rig.start_split_from(&split.vm, "destination", to, servers, mib, extra)
}

#[test]
fn a_split_guest_leaves_for_other_hosts_while_it_works() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let (mut servers, third) = rig.servers_and_a_spare()?;
        let split = rig.split_at_work(&servers, &[])?;
        let next = split.next_host(&rig, "host-c", &[])?;
        // The second one stays, the first is drained, the third joins.
        let first = servers.remove(0);
        servers.push(third);
        let left = start(&rig, &split, &next, &servers, &[])?.wait(PATIENCE)?;
        let report = left.json().cloned().with_context(|| left.stderr.clone())?;
        println!("{report}");
        let mut split = split.left(next, report)?;
        first.wait_empty(EMPTY_WITHIN)?;
        first.kill()?;
        split.work()?;
        // The next pager knows of all that.
        split.kill_pager()?;
        split.start_pager(&rig)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

#[test]
fn a_split_guest_is_merged_at_another_host() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let split = rig.split_at_work(&servers, &["--copies", "2"])?;
        let next = split.next_host(&rig, "host-c", &[])?;
        let left = rig.pager(&split.vm).merge_to(&next.listen, PATIENCE)?;
        let report = left.json().cloned().with_context(|| left.stderr.clone())?;
        println!("{report}");
        let mut vm = split.merged(&rig, next, report, &servers)?;
        worker::set_phase(&mut vm, Phase::Idle)?;
        worker::check(&mut vm, PATIENCE)?;
        vm.verify_checker(PATIENCE).map(drop)
    })
}

/// Reads are in flight all the time into pages that are copied to servers, stay, and are written by them once more.
#[test]
fn a_disk_is_read_while_a_split_guest_leaves() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let (image, slow) = slow_disk(&rig)?;
        let kind = QemuKind::V10_0;
        let spec = reading(&image, kind, "none", "native").with("godwit.checker=size=24,seed=5");
        let source = Vm::boot(&rig.env, spec)?;
        slow.add(source.pid())?;
        let downtime = ["--max-downtime-ms", "5000"];
        let split = rig.split(source, kind, &servers, WORKING_RESIDENT_MIB, &downtime)?;
        slow.add(split.vm.pid())?;
        let next = split.next_host(&rig, "host-c", &[])?;
        slow.add(next.vm.pid())?;
        let left = start(&rig, &split, &next, &servers, &downtime)?.wait(PATIENCE)?;
        let report = left.json().cloned().with_context(|| left.stderr.clone())?;
        println!("{report}");
        let mut split = split.left(next, report)?;
        wait_blocks(&mut split.vm, READ_BLOCKS, PATIENCE)?;
        split.merge(&rig, &servers)?.vm.assert_clean()
    })
}

#[test]
fn what_does_not_come_to_pass_leaves_the_guest_where_it_is() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let identities = rig.server_identities(2)?;
        let servers = rig.memory_servers(&identities, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &[])?;
        let pager = |split: &Split| rig.pager(&split.vm).status().map(|status| status.state);
        // Sent as others are.
        let sent = rig.send_from(&split.vm, "destination", "127.0.0.1:1")?.wait(PATIENCE)?;
        ensure!(sent.code == Some(2) && sent.stderr.contains("migrate split"), "{sent:?}");
        // Nobody is there.
        let nobody = rig.pager(&split.vm).merge_to("127.0.0.1:1", PATIENCE)?;
        ensure!(nobody.code == Some(1), "{nobody:?}");
        split.work()?;
        // Ctrl-C.
        let next = split.next_host(&rig, "host-c", &[])?;
        let mut command = start(&rig, &split, &next, &servers, &NEVER)?;
        command.wait_stderr("leaving:", PATIENCE)?;
        command.signal(Signal::SIGINT)?;
        command.wait(PATIENCE)?;
        wait::until("that it stays", PATIENCE, || {
            Ok((pager(&split)? == SplitState::Split).then_some(()))
        })?;
        split.work()?;
        // Its next main host dies.
        let mut next = split.next_host(&rig, "host-d", &[])?;
        let mut command = start(&rig, &split, &next, &servers, &NEVER)?;
        command.wait_stderr("leaving:", PATIENCE)?;
        next.receive.signal(Signal::SIGKILL)?;
        let ended = command.wait(PATIENCE)?;
        ensure!(ended.code == Some(1), "{ended:?}");
        ensure!(pager(&split)? == SplitState::Split, "{ended:?}");
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

/// A guest that stands still for its hand-over does not wait for long for servers that say nothing.
#[test]
fn silent_servers_end_a_hand_over_in_time() -> Result<()> {
    in_turn(|| {
        let rig = Rig::with_failpoints()?;
        let mut servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &[])?;
        let next = split.next_host(&rig, "host-c", &[])?;
        rig.hold("leave-stopped")?;
        let command = start(&rig, &split, &next, &servers, &[])?;
        rig.reached("leave-stopped")?;
        for server in &mut servers {
            server.engine().signal(Signal::SIGSTOP)?;
        }
        let silent = Instant::now();
        rig.release("leave-stopped")?;
        wait::until("that it runs on here", PATIENCE, || {
            Ok((split.vm.qmp().run_state()? == "running").then_some(()))
        })?;
        let stood_still = silent.elapsed();
        println!("ran on after {stood_still:.1?}");
        ensure!(stood_still < GIVEN_UP_WITHIN, "{stood_still:?}");
        for server in &mut servers {
            server.engine().signal(Signal::SIGCONT)?;
        }
        let ended = command.wait(PATIENCE)?;
        ensure!(ended.code == Some(1), "{ended:?}");
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The pager that lets the guest go.
    Pager,
    /// The one that waits for it.
    Next,
}

/// Where the guest is then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Here,
    There,
}

#[test]
fn whoever_dies_meanwhile_one_guest_runs() -> Result<()> {
    use End::{Here, There};
    use Victim::{Next, Pager};
    in_turn(|| {
        let rig = Rig::with_failpoints()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &[])?;
        for (number, (step, victim, end)) in [
            ("leave-flushing", Pager, Here),
            ("leave-stopped", Pager, Here),
            ("leave-flushed", Next, Here),
            ("leave-state-sent", Pager, Here),
            ("destination-loaded", Next, Here),
            ("source-recorded", Pager, There),
            ("source-committed", Pager, There),
            // It has heard that the guest runs there, and did not quit its QEMU.
            ("source-releasing", Pager, There),
        ]
        .into_iter()
        .enumerate()
        {
            println!("{victim:?} is killed at {step}");
            let name = format!("next-{number}");
            let extra = ["--lease-s", "4", "--dead-peer-s", "1"];
            let mut next = split.next_host(&rig, &name, &extra)?;
            rig.hold(step)?;
            let extra = ["--ask-s", "3", "--max-downtime-ms", "2000"];
            let command = start(&rig, &split, &next, &servers, &extra)?;
            rig.reached(step)?;
            match victim {
                Pager => split.kill_pager()?,
                Next => next.receive.signal(Signal::SIGKILL)?,
            }
            rig.release(step)?;
            let ended = command.wait(PATIENCE)?;
            ensure!(ended.code != Some(0), "{ended:?}");
            split = match end {
                There => {
                    // It may run there: no pager serves it here any more.
                    let refused = split.start_pager(&rig).err().context("It was let back")?;
                    let refused = format!("{refused:#}");
                    ensure!(refused.contains("migrate resolve"), "{refused}");
                    let resolved = rig.resolve(&split.vm, "destination", &[])?;
                    ensure!(resolved.code == Some(0), "{resolved:?}");
                    split.has_left(next)?
                }
                Here => {
                    if victim == Pager {
                        split.start_pager(&rig)?;
                    }
                    split
                }
            };
            split.work()?;
        }
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}
