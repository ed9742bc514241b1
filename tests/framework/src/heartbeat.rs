//! The guest's heartbeat (ttyS1), each line stamped with the host's clock when it arrives.
//!
//! A line of the guest is `HB <sequence> <guest monotonic us> <nonce>`. The host's clock counts,
//! since the guest's stands still while the guest is stopped. Invariant: beats are in the order of
//! arrival, and their time is that of the read which completed the line.

use std::io::{ErrorKind, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait::{self, monotonic_us};

/// One beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Host CLOCK_MONOTONIC at arrival, microseconds.
    pub at_us: u64,
    /// Counts beats since the guest's program started.
    pub sequence: u64,
    /// Guest CLOCK_MONOTONIC when the line was made, microseconds.
    pub guest_us: u64,
    /// Drawn by the guest's program at its start: names one run of one guest.
    pub nonce: u32,
}

/// Parses one line.
#[must_use]
pub fn parse(line: &str, at_us: u64) -> Option<Beat> {
    let mut words = line.strip_prefix("HB ")?.split(' ');
    let sequence = words.next()?.parse().ok()?;
    let guest_us = words.next()?.parse().ok()?;
    let nonce = words.next().filter(|word| word.len() == 8)?;
    let nonce = u32::from_str_radix(nonce, 16).ok()?;
    words.next().is_none().then_some(Beat { at_us, sequence, guest_us, nonce })
}

/// What arrived on one port.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// The beats.
    pub beats: Vec<Beat>,
    /// A first line that is no beat, and its time: the rest of one that began at another QEMU.
    pub head: Option<(String, u64)>,
    /// Bytes after the last line: the beginning of one that may be finished at another QEMU.
    pub tail: String,
    /// Other lines: failures that the checkers report, or garbage.
    pub others: Vec<String>,
    lines: u64,
}

impl Record {
    /// Takes bytes that arrived at `at_us`.
    pub fn add(&mut self, bytes: &[u8], at_us: u64) {
        self.tail.push_str(&String::from_utf8_lossy(bytes));
        while let Some((line, rest)) = self.tail.split_once('\n') {
            let line = line.trim_end_matches('\r').to_owned();
            self.tail = rest.to_owned();
            self.lines += 1;
            match parse(&line, at_us) {
                Some(beat) => self.beats.push(beat),
                None if self.lines == 1 => self.head = Some((line, at_us)),
                None => self.others.push(line),
            }
        }
    }

    /// Reports of failures among the lines.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let head = self.head.iter().map(|(line, _)| line);
        head.chain(&self.others).filter(|line| line.contains("FAIL")).cloned().collect()
    }
}

/// Reads a heartbeat until it is dropped.
#[derive(Debug)]
pub struct Heartbeat {
    record: Arc<Mutex<Record>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_all(mut socket: UnixStream, record: &Mutex<Record>, stop: &AtomicBool) {
    let mut chunk = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        match socket.read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => {
                let at_us = monotonic_us();
                lock(record).add(&chunk[..count], at_us);
            }
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted]
                    .contains(&error.kind()) => {}
            Err(_) => return,
        }
    }
}

impl Heartbeat {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let what = format!("the socket {}", path.display());
        let socket =
            wait::until(&what, Duration::from_secs(10), || Ok(UnixStream::connect(path).ok()))?;
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .context("Cannot set a timeout")?;
        let record = Arc::new(Mutex::new(Record::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (own_record, own_stop) = (Arc::clone(&record), Arc::clone(&stop));
        let thread = std::thread::spawn(move || read_all(socket, &own_record, &own_stop));
        Ok(Self { record, stop, thread: Some(thread) })
    }

    /// All that has arrived so far. Stays readable after QEMU's death.
    #[must_use]
    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// The number of beats so far.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.record).beats.len()
    }

    /// The latest beat.
    #[must_use]
    pub fn last(&self) -> Option<Beat> {
        lock(&self.record).beats.last().copied()
    }

    /// True if a beat arrives within `timeout` from now on: the guest runs.
    #[must_use]
    pub fn beats_within(&self, timeout: Duration) -> bool {
        let start_us = monotonic_us();
        let fresh = || Ok(self.last().is_some_and(|beat| beat.at_us > start_us).then_some(()));
        wait::until("a beat", timeout, fresh).is_ok()
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the reader was printed where it happened.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_only_whole_beats() {
        let beat = parse("HB 12 345 00c0ffee", 9).unwrap();
        assert_eq!(beat, Beat { at_us: 9, sequence: 12, guest_us: 345, nonce: 0x00c0_ffee });
        for bad in ["HB 12 345", "B 12 345 00c0ffee", "HB 12 345 c0ffee", "HB 1 2 00c0ffee x", ""] {
            assert_eq!(parse(bad, 0), None, "{bad}");
        }
    }

    #[test]
    fn keeps_fragments_and_failures() {
        let mut record = Record::default();
        record.add(b"45 00c0ffee\r\nHB 2 50 00c0f", 1);
        record.add(b"fee\nCHECKER FAIL page=1\nHB 3", 2);
        assert_eq!(record.head, Some(("45 00c0ffee".to_owned(), 1)));
        assert_eq!(record.beats, [Beat { at_us: 2, sequence: 2, guest_us: 50, nonce: 0xc0_ffee }]);
        assert_eq!(record.failures(), ["CHECKER FAIL page=1"]);
        assert_eq!(record.tail, "HB 3");
    }

    proptest! {
        #[test]
        fn cuts_between_reads_change_nothing(cuts in prop::collection::vec(1_usize..40, 1..60)) {
            let text: String =
                (1..40).map(|n| format!("HB {n} {} 00c0ffee\n", n * 5000)).collect();
            let mut record = Record::default();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                record.add(now, 0);
                rest = later;
            }
            record.add(rest, 0);
            prop_assert_eq!(record.beats.len(), 39);
            prop_assert!(record.beats.is_sorted_by_key(|beat| beat.sequence));
            prop_assert!(record.tail.is_empty() && record.others.is_empty());
        }
    }
}
