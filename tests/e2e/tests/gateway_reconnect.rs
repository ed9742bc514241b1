//! Gateways that lose each other: the connection is made again and no QEMU notices, or both see a clean end.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::gateways::Gateways;
use e2e::waits::slow;
use e2e::{PATIENCE, Rig, check_alive, in_turn};
use framework::{Engine, NetnsPair, QemuKind, Vm, metrics, wait};
use serde_json::{Value, json};

/// Where the destination's gateway listens.
const LISTEN: &str = "10.77.0.2:7700";

/// Where each gateway tells its metrics.
const METRICS: &str = "127.0.0.1:9900";

/// Times that a link is cut while the guest runs at the source.
const CUTS: usize = 5;

/// What the gateways say of a lost connection, and of one that is there again.
const LOST: &str = "connection lost";
const AGAIN: &str = "going on";

/// Longest time in which gateways that look for each other find each other.
const FOUND_WITHIN: Duration = Duration::from_secs(15);

/// Two hosts with a gateway each.
struct Site {
    rig: Rig,
    net: NetnsPair,
    gateways: Gateways,
    kind: QemuKind,
}

impl Site {
    /// Whose gateways look for each other for so long, and pass guests on as `words` say.
    fn new(kind: QemuKind, reconnect_s: &str, words: &[&str]) -> Result<Self> {
        let (rig, net) = (Rig::new()?, NetnsPair::create(0)?);
        let netns = [Some(net.source.name()), Some(net.destination.name())];
        let both = ["--dead-peer-s", "1", "--reconnect-s", reconnect_s, "--metrics", METRICS];
        let extra = [[&both[..], words].concat(), both.to_vec()];
        let gateways = Gateways::start_in(&rig, LISTEN, netns, [&extra[0], &extra[1]])?;
        Ok(Self { rig, net, gateways, kind })
    }

    /// A guest that changes its memory all the time.
    fn guest(&self) -> Result<Vm> {
        Vm::boot(&self.rig.env, slow(self.kind))
    }

    /// Begins to move it, in a way that does not end by itself.
    fn begin(&self, vm: &mut Vm, capabilities: &[&str]) -> Result<Vm> {
        let limits = json!({ "max-bandwidth": 16 << 20, "downtime-limit": 1 });
        let next = self.gateways.begin(&self.rig, vm, self.kind, capabilities, limits)?;
        self.gateways.until(vm, &["active"])?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(next)
    }

    /// Times that a gateway said something.
    fn said(engine: &Engine, what: &str) -> usize {
        engine.stderr().matches(what).count()
    }

    /// Cuts the link until both gateways have noticed for each of so many connections of the QEMUs, and so long after it;
    /// waits until all of these go on.
    fn cut(&self, connections: usize, pause: Duration) -> Result<()> {
        let ends = [&self.gateways.source, &self.gateways.destination];
        let before = ends.map(|end| [LOST, AGAIN].map(|what| Self::said(end, what)));
        let said = |number: usize| {
            let now = ends.map(|end| Self::said(end, [LOST, AGAIN][number]));
            let all =
                now.iter().zip(&before).all(|(now, before)| now - before[number] >= connections);
            Ok(all.then_some(()))
        };
        self.net.cut()?;
        let noticed = wait::until("both gateways to notice", FOUND_WITHIN, || said(0));
        std::thread::sleep(pause);
        self.net.mend()?;
        let began = Instant::now();
        noticed.with_context(|| self.gateways.said())?;
        let found = wait::until("both gateways to go on", FOUND_WITHIN, || said(1));
        found.with_context(|| self.gateways.said())?;
        println!("connected again {:.1?} after the link was back", began.elapsed());
        Ok(())
    }

    /// What was reported of so many connections of QEMUs that ended.
    fn reports(&self, count: usize) -> Result<Vec<Value>> {
        let lines = wait::until("the reports", PATIENCE, || {
            let text = self.gateways.source.stdout();
            Ok((text.lines().count() >= count).then_some(text))
        });
        let lines = lines.with_context(|| self.gateways.said())?;
        lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// What a metric of both gateways says.
    fn metric(&self, name: &str) -> Result<[Option<u64>; 2]> {
        let mut sums = [None; 2];
        for (netns, sum) in [&self.net.source, &self.net.destination].iter().zip(&mut sums) {
            let asked = netns.spawn(|| metrics::get(METRICS))?;
            let text = asked.join().map_err(|_| anyhow!("Asking for metrics panicked"))??;
            *sum = metrics::sum(&text, name)?;
        }
        Ok(sums)
    }

    /// The guest has moved, all of it, and nobody was told of any trouble.
    fn moved(&self, mut vm: Vm, mut next: Vm) -> Result<()> {
        self.gateways.until(&mut vm, &["completed"])?;
        self.gateways.until(&mut next, &["completed"])?;
        check_alive(&mut vm, &mut next).with_context(|| self.gateways.said())?;
        untroubled([&mut vm, &mut next]).with_context(|| self.gateways.said())?;
        next.verify_checker(PATIENCE).with_context(|| self.gateways.said())?;
        println!("{}", self.gateways.said());
        Ok(())
    }

    /// The guest runs on here after the migration has failed.
    fn stays(&self, vm: &mut Vm, within: Duration) -> Result<()> {
        let failed = wait::until("the end of the migration", within, || {
            let now = vm.qmp().execute("query-migrate", json!({}))?;
            Ok((now["status"] == "failed").then_some(()))
        });
        failed.with_context(|| self.gateways.said())?;
        ensure!(vm.qmp().run_state()? == "running", "The guest does not run");
        ensure!(vm.heartbeat().beats_within(Duration::from_secs(5)), "It must run on");
        Ok(())
    }
}

/// No QEMU said that its migration had failed or was paused.
fn untroubled(ends: [&mut Vm; 2]) -> Result<()> {
    for end in ends {
        while let Some(event) = end.qmp().kept_event("MIGRATION") {
            let status = event["data"]["status"].as_str().unwrap_or_default();
            ensure!(!["failed", "postcopy-paused", "cancelled"].contains(&status), "{event}");
        }
    }
    Ok(())
}

/// Lets pre-copy end.
fn finish(vm: &mut Vm) -> Result<()> {
    let limits = json!({ "max-bandwidth": 1u64 << 33, "downtime-limit": 300 });
    vm.qmp().execute("migrate-set-parameters", limits).map(drop)
}

/// The link is cut again and again while the guest runs at the source.
fn in_pre_copy(kind: QemuKind, words: &[&str]) -> Result<()> {
    in_turn(|| {
        let site = Site::new(kind, "30", words)?;
        let mut vm = site.guest()?;
        let next = site.begin(&mut vm, &[])?;
        for cut in 0..CUTS {
            site.cut(1, Duration::from_millis(700 * cut as u64))?;
            let bytes = |vm: &mut Vm| -> Result<u64> {
                let now = vm.qmp().migration()?;
                ensure!(now["status"] == "active", "{now}");
                Ok(now["ram"]["transferred"].as_u64().unwrap_or_default())
            };
            let before = bytes(&mut vm)?;
            wait::until("pages to travel", PATIENCE, || {
                Ok((bytes(&mut vm)? > before + (4 << 20)).then_some(()))
            })
            .with_context(|| site.gateways.said())?;
        }
        finish(&mut vm)?;
        site.moved(vm, next)?;
        let reports = site.reports(1)?;
        ensure!(reports[0]["outcome"] == "completed", "{reports:?}");
        ensure!(reports[0]["reconnects"] == CUTS, "{reports:?}");
        let metric = site.metric("godwit_gateway_reconnects_total")?;
        ensure!(metric == [Some(CUTS as u64); 2], "{metric:?}");
        Ok(())
    })
}

#[test]
fn a_link_is_cut_in_pre_copy_on_7_2() -> Result<()> {
    in_pre_copy(QemuKind::V7_2, &[])
}

#[test]
fn a_link_is_cut_in_pre_copy_on_10_0() -> Result<()> {
    in_pre_copy(QemuKind::V10_0, &["--compression", "zstd", "--lane-count", "3"])
}

#[test]
fn lanes_over_tcp_and_over_quic_are_made_again() -> Result<()> {
    in_pre_copy(QemuKind::V10_0, &["--lanes", "tcp"])?;
    in_pre_copy(QemuKind::V10_0, &["--lanes", "quic", "--lane-count", "1"])
}

/// The link is cut while the guest runs at the destination without all of its memory.
fn in_post_copy(kind: QemuKind, capabilities: &[&str]) -> Result<()> {
    in_turn(|| {
        let site = Site::new(kind, "30", &[])?;
        let mut vm = site.guest()?;
        let mut next = site.begin(&mut vm, capabilities)?;
        vm.qmp().execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 8 << 20 }))?;
        vm.qmp().execute("migrate-start-postcopy", json!({}))?;
        site.gateways.until(&mut next, &["postcopy-active"])?;
        site.gateways.until(&mut vm, &["postcopy-active"])?;
        // `postcopy-preempt` brings one more.
        let connections = capabilities.len();
        for cut in 0..2 {
            site.cut(connections, Duration::from_millis(1500 * cut))?;
            let now = vm.qmp().migration()?;
            ensure!(now["status"] == "postcopy-active", "Too soon over, or paused: {now}");
        }
        vm.qmp().execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 }))?;
        site.moved(vm, next)?;
        for report in site.reports(connections)? {
            ensure!(report["outcome"] == "completed" && report["reconnects"] == 2, "{report}");
        }
        Ok(())
    })
}

#[test]
fn a_link_is_cut_in_post_copy_on_7_2() -> Result<()> {
    in_post_copy(QemuKind::V7_2, &["postcopy-ram"])
}

#[test]
fn a_link_is_cut_in_post_copy_on_10_0() -> Result<()> {
    in_post_copy(QemuKind::V10_0, &["postcopy-ram"])
}

#[test]
fn a_connection_for_pages_that_are_asked_for_is_made_again() -> Result<()> {
    in_post_copy(QemuKind::V10_0, &["postcopy-ram", "postcopy-preempt"])
}

/// The link stays away, comes back too late, and the guest moves after that.
fn too_long(kind: QemuKind) -> Result<()> {
    in_turn(|| {
        let site = Site::new(kind, "3", &[])?;
        let mut vm = site.guest()?;
        let next = site.begin(&mut vm, &[])?;
        let began = Instant::now();
        site.net.cut()?;
        let stays = site.stays(&mut vm, Duration::from_secs(20));
        let took = began.elapsed();
        let report = site.reports(1)?.remove(0);
        let heard = wait::until("the destination's word", PATIENCE, || {
            let said = site.gateways.destination.stderr();
            Ok(said.contains("did not arrive: The connection was lost").then_some(()))
        });
        site.net.mend()?;
        stays?;
        heard.with_context(|| site.gateways.said())?;
        let error = report["error"].as_str().unwrap_or_default();
        ensure!(error.contains("not made again within 3 s"), "{report}");
        ensure!(took > Duration::from_secs(3), "Over after {took:.1?}");
        println!("over after {took:.1?}: {error}");
        drop(next);
        vm.qmp().clear_events();
        let next = site.begin(&mut vm, &[])?;
        finish(&mut vm)?;
        site.moved(vm, next)
    })
}

#[test]
fn a_link_is_away_for_too_long_on_7_2() -> Result<()> {
    too_long(QemuKind::V7_2)
}

#[test]
fn a_link_is_away_for_too_long_on_10_0() -> Result<()> {
    too_long(QemuKind::V10_0)
}

/// What a gateway knew of a guest is gone with it: nobody waits for long.
#[test]
fn a_gateway_that_is_killed_is_not_waited_for() -> Result<()> {
    in_turn(|| {
        let site = Site::new(QemuKind::V10_0, "60", &[])?;
        let mut vm = site.guest()?;
        let _next = site.begin(&mut vm, &[])?;
        let began = Instant::now();
        let pid = nix::unistd::Pid::from_raw(site.gateways.destination.pid().try_into()?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        site.stays(&mut vm, Duration::from_secs(15))?;
        let report = site.reports(1)?.remove(0);
        let error = report["error"].as_str().unwrap_or_default();
        ensure!(error.contains("Nobody listens"), "{report}");
        println!("over after {:.1?}: {error}", began.elapsed());
        Ok(())
    })
}

/// One that was started anew says that it knows nothing of the guest.
#[test]
fn a_gateway_that_is_started_anew_is_not_taken_for_the_one_before() -> Result<()> {
    in_turn(|| {
        let site = Site::new(QemuKind::V10_0, "60", &[])?;
        let mut vm = site.guest()?;
        let _next = site.begin(&mut vm, &[])?;
        // Before it is asked for, there is another one.
        site.net.cut()?;
        let Site { rig, net, gateways, kind } = site;
        let Gateways { source, destination, out, into } = gateways;
        destination.kill()?;
        let there = rig.destination.display().to_string();
        let destination = anew(&rig.migrate, &there, &into, net.destination.name())?;
        let gateways = Gateways { source, destination, out, into };
        let site = Site { rig, net, gateways, kind };
        site.net.mend()?;
        site.stays(&mut vm, Duration::from_secs(15))?;
        let report = site.reports(1)?.remove(0);
        let error = report["error"].as_str().unwrap_or_default();
        ensure!(error.contains("no stream of this migration waits here"), "{report}");
        println!("{error}");
        Ok(())
    })
}

fn anew(migrate: &Path, identity: &str, into: &Path, netns: &str) -> Result<Engine> {
    let qemu = format!("unix:{}", into.display());
    let words = ["gateway", "destination", "--listen", LISTEN, "--identity", identity];
    let words = [&words[..], &["--qemu", &qemu, "--dead-peer-s", "1"]].concat();
    let mut engine = Engine::start(migrate, &words, Some(netns))?;
    engine.wait_line("listening on ", PATIENCE)?;
    Ok(engine)
}
