//! `migrate demo`: a small guest moves between two QEMUs on this machine, by the same commands that
//! a user would type.

mod pulse;
mod stage;

use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use self::pulse::Pulse;
use self::stage::{Place, Stage};
use crate::args::DemoArgs;
use crate::cancel;

/// Longest time for the guest to boot.
const BOOT_WITHIN: Duration = Duration::from_secs(120);

/// Longest time for a migration.
const MOVE_WITHIN: Duration = Duration::from_secs(300);

pub(super) async fn run(args: &DemoArgs) -> ExitCode {
    let done = tokio::select! {
        done = demo(args) => done,
        () = cancel::requested() => Err(anyhow::anyhow!("cancelled; both QEMUs are gone")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}

async fn demo(args: &DemoArgs) -> Result<()> {
    let stage = Stage::new(args)?;
    println!(
        "A Linux guest of {} MiB that writes and checks its memory all the time moves {} times\n\
         between two QEMUs on this machine, over QUIC with mutual TLS 1.3.\n",
        args.memory_mib, args.moves
    );
    let began = Instant::now();
    for words in [vec!["pki", "init", "pki"], vec!["pki", "issue", "pki", "host-a"]] {
        run_to_end(stage.command(&words)).await?;
    }
    run_to_end(stage.command(&["pki", "issue", "pki", "host-b"])).await?;
    let mut here = stage.boot(false).await?;
    let mut pulse = Pulse::default();
    pulse.listen(&here.heartbeat())?;
    here.wait_ready(BOOT_WITHIN).await?;
    println!("the guest has booted ({:.1} s, QEMU under TCG)\n", began.elapsed().as_secs_f64());
    for turn in 1..=args.moves {
        // The last move compares every page, which takes a little of everybody's time.
        let verify = turn == args.moves;
        println!("move {turn} of {}", args.moves);
        here = move_once(&stage, here, &mut pulse, verify, args.json).await?;
    }
    here.check_clean()?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (beats, lost) = pulse.count()?;
    println!(
        "the same guest is still running: {beats} heartbeats from outside, {lost} lost, \
         its memory checker found nothing wrong"
    );
    Ok(())
}

/// One migration by the commands, and what it was like from outside.
async fn move_once(
    stage: &Stage,
    mut here: Place,
    pulse: &mut Pulse,
    verify: bool,
    json: bool,
) -> Result<Place> {
    let there = stage.boot(true).await?;
    pulse.listen(&there.heartbeat())?;
    let qmp = there.qmp();
    let mut receive = stage.command(&[
        "receive",
        "--once",
        "--listen",
        "127.0.0.1:0",
        "--qmp",
        &qmp,
        "--identity",
        "pki/host-b",
        "--journal",
        "journal",
    ]);
    let (mut receiver, addr) = listening(&mut receive).await?;
    let qmp = here.qmp();
    let mut words = vec!["send", "--qmp", &qmp, "--to", &addr, "--identity", "pki/host-a"];
    words.extend(["--journal", "journal", "--json"]);
    if verify {
        words.push("--verify");
    }
    println!("  $ migrate {}", words.join(" "));
    let mut send = stage.command(&words);
    let sent = tokio::time::timeout(MOVE_WITHIN, send.stderr(Stdio::inherit()).output())
        .await
        .context("The migration takes too long")?
        .context("`migrate send` cannot be run")?;
    let report: Value =
        serde_json::from_slice(&sent.stdout).context("`migrate send` printed no report")?;
    if json {
        println!("{report}");
    }
    if report["outcome"] != "completed" {
        bail!("the guest did not move: {}", report["error"]["message"]);
    }
    tokio::time::timeout(MOVE_WITHIN, receiver.wait()).await.context("receive does not end")??;
    here.wait_exit().await?;
    let outage_ms = pulse.outage_ms(Duration::from_secs(10)).await?;
    tell(&report, outage_ms);
    Ok(there)
}

fn tell(report: &Value, outage_ms: f64) {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let mib = |name: &str| number(&report["bytes"][name]) / f64::from(1 << 20);
    println!("  total      {:>8.2} s", number(&report["total_ms"]) / 1e3);
    println!("  outage     {outage_ms:>8.0} ms   seen from outside by a heartbeat every 5 ms");
    println!("  downtime   {:>8.1} ms   as the engine measured it", number(&report["downtime_ms"]));
    println!(
        "  memory     {:>8.0} MiB  of which {:.0} MiB in use, {:.0} MiB over the wire, {} rounds",
        mib("ram"),
        mib("populated"),
        mib("wire"),
        report["rounds"].as_array().map_or(0, Vec::len)
    );
    if let Some(pages) = report["verify"]["pages"].as_u64() {
        println!("  verified   {pages:>8} pages, {} differ", report["verify"]["mismatches"]);
    }
    println!();
}

async fn run_to_end(mut command: Command) -> Result<()> {
    let done = command.output().await.context("`migrate` cannot be run")?;
    if !done.status.success() {
        bail!("{}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}

/// Starts `migrate receive` and waits for the address that it listens on.
async fn listening(command: &mut Command) -> Result<(Child, String)> {
    let mut child = command.stderr(Stdio::piped()).spawn().context("`migrate` cannot be run")?;
    let stderr = child.stderr.take().context("`migrate receive` has no stderr")?;
    let mut lines = BufReader::new(stderr).lines();
    let mut said = vec![];
    while let Some(line) = lines.next_line().await.context("`migrate receive` cannot be read")? {
        if let Some(addr) = line.strip_prefix("listening on ") {
            let addr = addr.to_owned();
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Ok((child, addr));
        }
        said.push(line);
    }
    bail!("`migrate receive` ended: {}", said.join("; "))
}

/// A path as an argument.
fn text(path: &Path) -> String {
    path.display().to_string()
}
