//! Split guests whose memory moves from one server to others.

use anyhow::{Result, ensure};
use e2e::split::EMPTY_WITHIN;
use e2e::{PATIENCE, Rig, in_turn};
use framework::worker::{self, Phase};

#[test]
fn a_fragment_moves_to_another_server_while_the_guest_works() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let (mut servers, third) = rig.servers_and_a_spare()?;
        let mut split = rig.split_at_work(&servers, &[])?;
        let left = servers.remove(0);
        let stored = left.stored_pages()?;
        let pager = rig.pager(&split.vm);
        let moved = pager.move_fragment(left.address(), Some(third.address()), PATIENCE)?;
        ensure!(moved.code == Some(0), "{moved:?}");
        ensure!(moved.stderr.contains("MiB are left"), "Nothing was told meanwhile: {moved:?}");
        left.wait_empty(EMPTY_WITHIN)?;
        ensure!(third.stored_pages()? > stored / 4, "{stored} pages, then {}", third.metrics()?);
        left.kill()?;
        servers.push(third);
        split.work()?;
        // The next pager knows of the new server, and does not miss the one that is gone.
        split.kill_pager()?;
        split.start_pager(&rig)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

#[test]
fn both_copies_of_a_fragment_stay_apart() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let (mut servers, third) = rig.servers_and_a_spare()?;
        let mut split = rig.split_at_work(&servers, &["--copies", "2"])?;
        let pager = rig.pager(&split.vm);
        let left = servers.remove(0);
        // One server is left for two copies.
        let refused = pager.move_fragment(left.address(), None, PATIENCE)?;
        ensure!(refused.code == Some(2) && refused.stderr.contains("--to"), "{refused:?}");
        let unknown = pager.move_fragment("127.0.0.1:1", Some(third.address()), PATIENCE)?;
        ensure!(
            unknown.code == Some(2) && unknown.stderr.contains("migrate status"),
            "{unknown:?}"
        );
        third.wait_empty(EMPTY_WITHIN)?;
        let moved = pager.move_fragment(left.address(), Some(third.address()), PATIENCE)?;
        ensure!(moved.code == Some(0), "{moved:?}");
        left.wait_empty(EMPTY_WITHIN)?;
        left.kill()?;
        servers.push(third);
        split.works_on()?;
        // Any one of those that are left has all.
        pager
            .wait_status("two copies of all", PATIENCE, |status| status.under_copied_pages == 0)?;
        servers.remove(0).kill()?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}
