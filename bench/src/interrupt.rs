//! Ctrl-C and SIGTERM: a flag that the measurements look at between their steps, so that guests,
//! namespaces and files go by `Drop`. A second signal ends the process at once; what is left then
//! is removed by the next run.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Exit code after a second signal.
const ENDED_AT_ONCE: i32 = 130;

/// Begins to watch.
///
/// # Errors
/// The handlers cannot be installed.
pub(crate) fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start a runtime for signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        let one = |kind| signal(kind).context("Cannot install a signal handler");
        (one(SignalKind::interrupt())?, one(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if ASKED.swap(true, Ordering::Relaxed) {
                    std::process::exit(ENDED_AT_ONCE);
                }
                eprintln!("Ending after this step; once more ends at once");
            }
        });
    });
    Ok(())
}

/// Whether a signal has arrived.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Fails once a signal has arrived.
///
/// # Errors
/// It has.
pub(crate) fn check() -> Result<()> {
    if is_asked() {
        bail!("Interrupted; what was measured so far is in the .jsonl file");
    }
    Ok(())
}
