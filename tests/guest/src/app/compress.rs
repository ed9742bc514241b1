//! `xz -c | xz -dc` of text without end; what comes out is compared with what went in. Options:
//! `level` (of xz: 6 takes 94 MiB), `seed`. An operation is a KiB that was compared.

use std::io::{ErrorKind, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use guest_programs::options::Options;
use guest_programs::pattern::fill_text;

use super::{Progress, load, program};

/// Bytes of text with one seed.
const BLOCK_BYTES: usize = 64 << 10;

/// Numbered blocks of text.
struct Text {
    seed: u64,
    number: u64,
    block: Vec<u8>,
}

impl Text {
    fn new(seed: u64) -> Self {
        Self { seed, number: 0, block: vec![0; BLOCK_BYTES] }
    }

    fn next(&mut self) -> &[u8] {
        fill_text(self.seed.wrapping_add(self.number), &mut self.block);
        self.number += 1;
        &self.block
    }
}

/// A process of the pipe whose end, which must not come, is an error.
struct Stage(Child);

impl Stage {
    fn ended(&mut self) -> anyhow::Error {
        // The pipe breaks a little before the process is gone.
        std::thread::sleep(Duration::from_millis(100));
        match self.0.try_wait() {
            Ok(Some(status)) => anyhow::anyhow!("xz ended with {status}"),
            _ => anyhow::anyhow!("xz has closed its pipe"),
        }
    }
}

fn feed(text: &mut Text, input: &mut ChildStdin, stage: &mut Stage) -> Result<()> {
    match input.write_all(text.next()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(stage.ended()),
        Err(error) => Err(error).context("Cannot feed xz"),
    }
}

fn compare(
    text: &mut Text,
    output: &mut ChildStdout,
    stage: &mut Stage,
    progress: &Progress,
) -> Result<()> {
    let number = text.number;
    let want = text.next();
    let mut got = vec![0; BLOCK_BYTES];
    match output.read_exact(&mut got) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(stage.ended()),
        Err(error) => return Err(error).context("Cannot read from xz"),
    }
    if let Some(at) = want.iter().zip(&got).position(|(want, got)| want != got) {
        bail!("Block {number} of what xz packed and unpacked differs at byte {at}");
    }
    progress.add(BLOCK_BYTES as u64 / 1024);
    Ok(())
}

/// Starts the pipe; the first blocks have passed when it returns.
pub(super) fn start(mut options: Options, progress: &Arc<Progress>) -> Result<()> {
    let level = options.number("level", 6)?;
    let seed = options.number("seed", 1)?;
    options.finish()?;
    ensure!(level <= 9, "level is 0 to 9");
    let mut packing = program("xz")
        .args(["-c", "-T1", &format!("-{level}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start xz")?;
    let (Some(mut input), Some(packed)) = (packing.stdin.take(), packing.stdout.take()) else {
        bail!("No pipes to xz")
    };
    let mut unpacking = program("xz")
        .arg("-dc")
        .stdin(packed)
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start xz")?;
    let Some(mut output) = unpacking.stdout.take() else { bail!("No pipe from xz") };
    let (mut packing, mut unpacking) = (Stage(packing), Stage(unpacking));
    let (mut given, mut wanted) = (Text::new(seed), Text::new(seed));
    load(progress, move |_| feed(&mut given, &mut input, &mut packing));
    load(progress, move |progress| compare(&mut wanted, &mut output, &mut unpacking, progress));
    while progress.operations.load(Ordering::Relaxed) == 0 {
        progress.report("compress")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
