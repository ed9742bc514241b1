//! The guest's heartbeat, time-stamped from outside: its clock stops while it is stopped.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// One heartbeat: when it arrived, from which QEMU, and its number.
#[derive(Debug, Clone, Copy)]
struct Beat {
    at: Instant,
    place: u32,
    sequence: u64,
}

/// All heartbeats so far.
#[derive(Debug)]
pub(super) struct Pulse {
    sender: mpsc::Sender<Beat>,
    receiver: mpsc::Receiver<Beat>,
    beats: Vec<Beat>,
    places: u32,
}

impl Default for Pulse {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel();
        Self { sender, receiver, beats: vec![], places: 0 }
    }
}

impl Pulse {
    /// Listens to another QEMU's heartbeat port.
    pub(super) fn listen(&mut self, socket: &Path) -> Result<()> {
        let stream = UnixStream::connect(socket).context("The heartbeat port does not open")?;
        let (sender, place) = (self.sender.clone(), self.places);
        self.places += 1;
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let at = Instant::now();
                let Ok(line) = line else { return };
                // A line that was cut by the move has its halves at both places: neither counts.
                let Some(sequence) = sequence(&String::from_utf8_lossy(&line)) else { continue };
                if sender.send(Beat { at, place, sequence }).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Time between the last beat at the previous place and the first at the latest one, less the
    /// beat's own interval, in milliseconds.
    pub(super) async fn outage_ms(&mut self, within: Duration) -> Result<f64> {
        let latest = self.places.saturating_sub(1);
        let began = Instant::now();
        loop {
            self.beats.extend(self.receiver.try_iter());
            let after = self.beats.iter().find(|beat| beat.place == latest);
            let before = self.beats.iter().rfind(|beat| beat.place < latest);
            if let (Some(before), Some(after)) = (before, after) {
                let gap = after.at.saturating_duration_since(before.at).as_secs_f64() * 1e3;
                let beats = after.sequence.saturating_sub(before.sequence).max(1) as f64;
                return Ok((gap - 5.0 * beats).max(0.0));
            }
            if began.elapsed() > within {
                bail!("the guest gives no heartbeat at the destination");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Number of beats, and of those that are missing in between.
    pub(super) fn count(&mut self) -> Result<(usize, u64)> {
        self.beats.extend(self.receiver.try_iter());
        let (Some(first), Some(last)) = (self.beats.first(), self.beats.last()) else {
            bail!("the guest gave no heartbeat");
        };
        let expected = last.sequence - first.sequence + 1;
        Ok((self.beats.len(), expected.saturating_sub(self.beats.len() as u64)))
    }
}

/// The number in a whole line `HB <number> <guest time> <8 digits naming the guest's run>`.
fn sequence(line: &str) -> Option<u64> {
    let mut words = line.strip_prefix("HB ")?.split(' ');
    let number = words.next()?.parse().ok()?;
    let whole = words.nth(1).is_some_and(|nonce| nonce.len() == 8) && words.next().is_none();
    whole.then_some(number)
}
