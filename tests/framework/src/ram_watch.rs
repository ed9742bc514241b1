//! How much memory a VM's RAM files take, watched continuously.
//!
//! A split guest's main host promises a limit at every moment. So a thread reads the blocks
//! allocated to the files every few milliseconds, from before the guest arrives until it is told to end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::memory::allocated_bytes;
use crate::vm::Vm;

/// Time between two looks.
const STEP: Duration = Duration::from_millis(20);

/// What was seen of RAM files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RamSeen {
    /// The most that was allocated, in bytes.
    pub peak_bytes: u64,
    /// What was allocated at the last look, in bytes.
    pub last_bytes: u64,
    /// How often was looked.
    pub looks: u64,
    /// The longest time between two looks.
    pub longest_gap: Duration,
}

impl RamSeen {
    /// Fails if more was allocated at any look, or if nobody could have seen it.
    ///
    /// # Errors
    /// It was; the text has what was seen.
    pub fn assert_at_most(&self, bytes: u64) -> Result<()> {
        ensure!(self.looks > 1, "Nobody looked: {self:?}");
        ensure!(self.peak_bytes <= bytes, "{self:?}: more than the limit of {bytes} bytes");
        Ok(())
    }
}

/// Watches until it is ended.
#[derive(Debug)]
pub struct RamWatch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<RamSeen>>,
}

impl RamWatch {
    /// Begins to watch a VM's RAM files.
    #[must_use]
    pub fn begin(vm: &Vm) -> Self {
        Self::of(vm.ram_files().to_vec())
    }

    fn of(files: Vec<PathBuf>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let own = Arc::clone(&over);
        let thread = std::thread::spawn(move || watch(&files, &own));
        Self { over, thread }
    }

    /// Ends it.
    ///
    /// # Errors
    /// A file was removed meanwhile.
    pub fn end(self) -> Result<RamSeen> {
        self.over.store(true, Ordering::Relaxed);
        // A panic in the thread was printed where it happened.
        self.thread.join().map_err(|_| anyhow!("The thread that watches RAM files panicked"))?
    }
}

fn watch(files: &[PathBuf], over: &AtomicBool) -> Result<RamSeen> {
    let mut seen = RamSeen::default();
    let mut last = Instant::now();
    loop {
        // Read before the look: one look follows the order to end.
        let is_over = over.load(Ordering::Relaxed);
        seen.last_bytes = allocated_bytes(files)?;
        seen.peak_bytes = seen.peak_bytes.max(seen.last_bytes);
        seen.looks += 1;
        seen.longest_gap = seen.longest_gap.max(last.elapsed());
        last = Instant::now();
        if is_over {
            return Ok(seen);
        }
        std::thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn sees_what_was_allocated_for_a_while() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let watch = RamWatch::of(vec![file.path().to_owned()]);
        file.as_file().write_all_at(&[1; 8192], 32 << 20).unwrap();
        std::thread::sleep(STEP * 5);
        file.as_file().set_len(4096).unwrap();
        std::thread::sleep(STEP * 2);
        let seen = watch.end().unwrap();
        assert_eq!((seen.peak_bytes, seen.last_bytes), (8192, 0));
        assert!(seen.assert_at_most(8192).is_ok() && seen.assert_at_most(8191).is_err());
        assert!(RamSeen { looks: 0, ..seen }.assert_at_most(8192).is_err());
    }

    #[test]
    fn a_file_that_is_gone_is_an_error() {
        let watch = RamWatch::of(vec!["/nonexistent/ram".into()]);
        assert!(watch.end().is_err());
    }
}
