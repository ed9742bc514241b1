//! Fills page cache and frees it again: memory that holds data, and that nobody uses.
//!
//! Options: `mib`, `content` (`random`, `text`, or `mixed`, where they take turns MiB by MiB), `seed`, `churn` (1: does so
//! over and over, and verifies that fresh memory reads as zeros in between). Commands: `report`, `again` (fills and frees once more; without `churn`).

use std::fs::{self, File};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail};
use guest_programs::PAGE_BYTES;
use guest_programs::options::Options;
use guest_programs::pattern::{fill_random, fill_text};
use guest_programs::rng::mix;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::console::tell_failure;
use crate::content::Content;
use crate::shell;

const MOUNT: &str = "/freed";
const PIECE_BYTES: usize = 1 << 20;

/// What is filled.
#[derive(Clone, Copy)]
struct Amount {
    mib: u64,
    content: Content,
}

pub(crate) fn run(mut options: Options) -> Result<()> {
    let mib = options.number("mib", 64)?;
    let amount = Amount { mib, content: Content::parse(&options.word("content", "random"))? };
    let seed = options.number("seed", 1)?;
    let churns = options.number("churn", 0)? == 1;
    options.finish()?;
    fs::create_dir_all(MOUNT).context("Cannot create the mount point")?;
    fill_and_free(amount, seed)?;
    let times = Arc::new(AtomicU64::new(1));
    if churns {
        let times = Arc::clone(&times);
        std::thread::spawn(move || churn(amount, seed, &times));
    }
    println!("ready {mib} MiB freed");
    shell::serve(|words| match words {
        ["report"] => Ok(format!("FREED times={} mib={mib}", times.load(Ordering::Relaxed))),
        ["again"] if !churns => {
            let times = times.fetch_add(1, Ordering::Relaxed) + 1;
            fill_and_free(amount, seed + times)?;
            Ok(format!("FREED times={times} mib={mib}"))
        }
        _ => bail!("Commands: report, and without churn again"),
    })
}

fn churn(amount: Amount, seed: u64, times: &AtomicU64) {
    loop {
        let time = times.fetch_add(1, Ordering::Relaxed);
        if let Err(error) =
            fill_and_free(amount, seed + time).and_then(|()| fresh_is_zero(amount.mib))
        {
            tell_failure(&format!("FREED FAIL {error:#}"));
            return;
        }
    }
}

/// The kernel gives out memory that it freed before, which must read as zeros but for what is written here.
fn fresh_is_zero(mib: u64) -> Result<()> {
    let mut fresh = vec![0u8; mib as usize * PIECE_BYTES];
    for (number, page) in fresh.chunks_exact_mut(PAGE_BYTES).enumerate() {
        page[0] = 1;
        let page = std::hint::black_box(page);
        if let Some(at) = page.iter().skip(1).position(|byte| *byte != 0) {
            bail!("page {number} of fresh memory has {:#x} at {}", page[at + 1], at + 1);
        }
    }
    Ok(())
}

fn fill_and_free(amount: Amount, seed: u64) -> Result<()> {
    let size = format!("size={}m", amount.mib + 1);
    mount(Some("tmpfs"), MOUNT, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
        .context("Cannot mount a tmpfs")?;
    let filled = fill(amount, seed);
    umount2(MOUNT, MntFlags::empty()).context("Cannot unmount the tmpfs")?;
    filled
}

fn fill(amount: Amount, seed: u64) -> Result<()> {
    let mut file = File::create(format!("{MOUNT}/noise")).context("Cannot create the file")?;
    let mut piece = vec![0; PIECE_BYTES];
    for number in 0..amount.mib {
        match amount.content.is_text(number) {
            true => fill_text(mix(seed) ^ number, &mut piece),
            false => fill_random(mix(seed) ^ number, &mut piece),
        }
        file.write_all(&piece).context("Cannot fill the file")?;
    }
    Ok(())
}
