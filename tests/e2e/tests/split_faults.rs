//! Split guests whose memory servers or pager die.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::split::OFFER;
use e2e::{PATIENCE, Rig, free_address, in_turn};
use framework::split::SplitState;
use framework::wait;
use framework::worker::{self, Phase};

/// How long a thread that waits for memory is looked at.
const WAITS: Duration = Duration::from_secs(2);

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
        // Whatever was on it is on the last one as well.
        servers.remove(0).kill()?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
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
        server.engine().signal(nix::sys::signal::Signal::SIGSTOP)?;
        std::thread::sleep(3 * WAITS);
        let server = servers.first_mut().expect("there are two");
        server.engine().signal(nix::sys::signal::Signal::SIGCONT)?;
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
