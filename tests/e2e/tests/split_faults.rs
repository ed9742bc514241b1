//! Split guests whose memory servers or pager die.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::split::{OFFER, WORK_PAGES, WORKING_RESIDENT_MIB, at_work};
use e2e::{PATIENCE, Rig, check_alive, free_address, in_turn};
use framework::split::SplitState;
use framework::worker::{self, Phase};
use framework::{NetnsPair, QemuKind, Vm, wait};
use nix::sys::signal::Signal;

/// How long a thread that waits for memory is looked at.
const WAITS: Duration = Duration::from_secs(2);

/// How long servers that say nothing are looked at: several attempts to reach each.
const AWAY: Duration = Duration::from_secs(25);

/// A kernel that does not complain if it stands still for so long.
const PATIENT: [&str; 2] = ["nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1"];

/// A pager that takes servers for dead soon.
const BRIEF: [&str; 2] = ["--dead-peer-s", "1"];

/// Pages to work on over a slow link.
const PAGES_SLOWLY: u64 = 256;

/// What may have been on its way when a pager was killed.
const BARELY_PAGES: u64 = 512;

/// A link over which a page takes more than a millisecond.
const SLOW_BITS_PER_S: u64 = 20_000_000;

#[test]
fn the_next_pager_goes_on_where_one_was_killed() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &[])?;
        for _ in 0..2 {
            split.kill_pager()?;
            // Nobody serves its faults, and no thread goes on with a page of zeros.
            std::thread::sleep(WAITS);
            split.start_pager(&rig)?;
            split.work()?;
        }
        split.works_on()?;
        let mut vm = split.merge_by_two_pagers(&rig, &servers)?;
        worker::check(&mut vm, PATIENCE)?;
        vm.verify_checker(PATIENCE).map(drop)
    })
}

#[test]
fn with_two_copies_a_server_may_die_and_copies_are_made_again() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut servers = rig.memory_servers(&rig.server_identities(3)?, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &["--copies", "2"])?;
        servers.remove(0).kill()?;
        split.works_on()?;
        let whole = rig
            .pager(&split.vm)
            .wait_status("two copies of all", PATIENCE, |status| status.under_copied_pages == 0)?;
        ensure!(whole.state == SplitState::Split && whole.remote() > 0, "{whole:?}");
        // The next pager knows both copies of what was evicted, and of what was copied.
        split.kill_pager()?;
        split.start_pager(&rig)?;
        let next = rig.pager(&split.vm).status()?;
        ensure!(next.under_copied_pages < BARELY_PAGES, "{whole:?}, then {next:?}");
        // Whatever was on it is on the last one as well.
        servers.remove(0).kill()?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

/// While none answers, none is given up for the copies on another, which may be gone.
#[test]
fn of_servers_that_are_all_away_none_is_given_up() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let kind = QemuKind::V10_0;
        let spec = PATIENT.iter().fold(at_work(kind), |spec, word| spec.with(word));
        let source = Vm::boot(&rig.env, spec)?;
        let copies = ["--copies", "2"];
        let mut split = rig.split(source, kind, &servers, WORKING_RESIDENT_MIB, &copies)?;
        split.kill_pager()?;
        split.start_pager_with(&rig, &BRIEF)?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
        split.work()?;
        for server in &mut servers {
            server.engine().signal(Signal::SIGSTOP)?;
        }
        let pager = rig.pager(&split.vm);
        let states = |status: &framework::Status| {
            status.remote_pages.iter().map(|one| one.state.clone()).collect::<Vec<_>>()
        };
        let are_away = |status: &framework::Status| states(status) == ["away", "away"];
        pager.wait_status("that both are away", PATIENCE, are_away)?;
        std::thread::sleep(AWAY);
        let status = pager.status()?;
        ensure!(are_away(&status), "{status:?}");
        // Now one has answered, and the other is given up.
        servers.remove(0).kill()?;
        for server in &mut servers {
            server.engine().signal(Signal::SIGCONT)?;
        }
        let is_one_left = |status: &framework::Status| states(status) == ["lost", "connected"];
        pager.wait_status("that one is left", PATIENCE, is_one_left)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

#[test]
fn a_server_that_is_away_is_waited_for() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut split = rig.split_at_work(&servers, &[])?;
        let server = servers.first_mut().expect("there are two");
        server.engine().signal(Signal::SIGSTOP)?;
        std::thread::sleep(3 * WAITS);
        let server = servers.first_mut().expect("there are two");
        server.engine().signal(Signal::SIGCONT)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

#[test]
fn a_guest_whose_memory_is_lost_stands_still() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let identities = rig.server_identities(2)?;
        let listen = free_address()?;
        let first = identities.0.first().expect("there are two");
        let second = identities.0.last().expect("there are two");
        let servers = [
            rig.memory_server(first, &listen, &OFFER)?,
            rig.memory_server(second, "127.0.0.1:0", &OFFER)?,
        ];
        let split = rig.split_at_work(&servers, &[])?;
        let [dead, other] = servers;
        dead.kill()?;
        let _empty = rig.memory_server(first, &listen, &OFFER)?;
        let pager = rig.pager(&split.vm);
        let lost = |status: &framework::Status| status.state == SplitState::Lost;
        let status = pager.wait_status("that memory is lost", PATIENCE, lost)?;
        ensure!(status.remote_pages.iter().any(|one| one.server == other.address()), "{status:?}");
        // Its heart has stopped, or is about to: whatever it touches next is not there.
        wait::until("that the guest stands still", PATIENCE, || {
            let beats = split.vm.heartbeat().count();
            std::thread::sleep(WAITS);
            Ok((split.vm.heartbeat().count() == beats).then_some(()))
        })
    })
}

/// Servers are at the other end of a link that becomes slow, is cut, and is mended.
#[test]
fn a_main_host_that_is_cut_off_from_its_servers_goes_on_later() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(0)?;
        let start = |(number, identity): (usize, &PathBuf)| {
            let listen = format!("{}:770{number}", NetnsPair::SOURCE);
            rig.memory_server_in(identity, &listen, &OFFER, Some(net.source.name()))
        };
        let identities = rig.server_identities(2)?;
        let servers = identities.0.iter().enumerate().map(start).collect::<Result<Vec<_>>>()?;
        let mut source = Vm::boot(&rig.env, at_work(QemuKind::V10_0))?;
        let mut vm = Vm::start(&rig.env, source.spec().successor("main", QemuKind::V10_0))?;
        let listen = format!("{}:7700", NetnsPair::DESTINATION);
        let receive = rig.receive_in(&vm, &listen, &BRIEF, Some(net.destination.name()))?;
        let over = (&servers[..], WORKING_RESIDENT_MIB);
        let split = rig.start_split_in(&source, &listen, over, &[], net.source.name())?;
        split.wait(PATIENCE)?.success()?;
        check_alive(&mut source, &mut vm)?;
        worker::set_phase(&mut vm, Phase::Hot)?;
        worker::wait_pages(&mut vm, WORK_PAGES, PATIENCE)?;
        net.shape(SLOW_BITS_PER_S)?;
        worker::wait_pages(&mut vm, PAGES_SLOWLY, PATIENCE)?;
        net.shape(0)?;
        net.cut()?;
        let is_away =
            |status: &framework::Status| status.remote_pages.iter().any(|one| one.state == "away");
        rig.pager(&vm).wait_status("that servers are away", PATIENCE, is_away)?;
        std::thread::sleep(WAITS);
        net.mend()?;
        worker::wait_pages(&mut vm, WORK_PAGES, PATIENCE)?;
        worker::set_phase(&mut vm, Phase::Idle)?;
        worker::check(&mut vm, PATIENCE)?;
        vm.verify_checker(PATIENCE)?;
        rig.pager(&vm).merge(PATIENCE)?;
        receive.wait(PATIENCE)?.success().map(drop)
    })
}
