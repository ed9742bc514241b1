//! Back-pressure from end to end: bounds what is under way and how fast it leaves.
//!
//! What was handed to the lanes and not yet applied at the destination waits in queues that the
//! last pages have to queue behind, so it is bounded by a window that follows the measured goodput.
//! `--max-bandwidth` is a token bucket in front of it.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time that the bytes under way may take at the measured goodput.
const WINDOW: Duration = Duration::from_millis(60);
const WINDOW_BYTES_MIN: u64 = 2 << 20;
const WINDOW_BYTES_MAX: u64 = 64 << 20;

/// Time whose tokens the bucket holds at most.
const BURST: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct Inner {
    entered_bytes: u64,
    applied_bytes: u64,
    window_bytes: u64,
    /// What the window is bounded by besides.
    window_bytes_max: u64,
    /// What the link carries, if that is known.
    link_bytes_per_s: Option<f64>,
    /// Whether a batch had to wait since the destination last told its progress.
    held_back: bool,
    /// When the bucket will have paid for all that entered.
    paid_until: Instant,
    closed: bool,
}

/// Lets batches through as the destination keeps up.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    bytes_per_s_max: Option<f64>,
}

impl Gate {
    /// An open gate; `bits_per_s_max` is the user's limit.
    pub fn new(bits_per_s_max: Option<u64>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entered_bytes: 0,
                applied_bytes: 0,
                window_bytes: WINDOW_BYTES_MIN,
                window_bytes_max: WINDOW_BYTES_MAX,
                link_bytes_per_s: None,
                held_back: false,
                paid_until: Instant::now(),
                closed: false,
            }),
            changed: Condvar::new(),
            bytes_per_s_max: bits_per_s_max.map(|bits| bits.max(8) as f64 / 8.0),
        }
    }

    /// Waits until `bytes` may leave, and counts them. Blocks. A batch larger than the window passes
    /// when nothing else is under way.
    pub fn enter(&self, bytes: u64) {
        let mut inner = self.lock();
        while !inner.closed {
            let under_way = inner.entered_bytes - inner.applied_bytes;
            if under_way != 0 && under_way + bytes > inner.window_bytes.min(inner.window_bytes_max)
            {
                inner.held_back = true;
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let now = Instant::now();
            let early = inner.paid_until.saturating_duration_since(now);
            if self.bytes_per_s_max.is_some() && early > BURST {
                inner.held_back = true;
                let wait = self.changed.wait_timeout(inner, early - BURST);
                inner = wait.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            inner.paid_until = inner.paid_until.max(now) + self.cost(bytes);
            break;
        }
        inner.entered_bytes += bytes;
    }

    /// Pays for bytes that left another way, beside the window: waits for what the user's limit asks. Says whether the
    /// session goes on. Blocks.
    pub fn pay(&self, bytes: u64) -> bool {
        let mut inner = self.lock();
        inner.paid_until = inner.paid_until.max(Instant::now()) + self.cost(bytes);
        while !inner.closed {
            let early = inner.paid_until.saturating_duration_since(Instant::now());
            if self.bytes_per_s_max.is_none() || early <= BURST {
                return true;
            }
            let wait = self.changed.wait_timeout(inner, early - BURST);
            inner = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// What entered as `entered_bytes` turns out to be `bytes`.
    pub fn correct(&self, entered_bytes: u64, bytes: u64) {
        let mut inner = self.lock();
        inner.entered_bytes = inner.entered_bytes + bytes - entered_bytes;
        let paid = inner.paid_until + self.cost(bytes);
        inner.paid_until = paid.checked_sub(self.cost(entered_bytes)).unwrap_or(paid);
        self.changed.notify_all();
    }

    /// Time in which the user's limit allows `bytes`.
    fn cost(&self, bytes: u64) -> Duration {
        let seconds = self.bytes_per_s_max.map(|rate| bytes as f64 / rate);
        Duration::from_secs_f64(seconds.unwrap_or_default())
    }

    /// Counts bytes that leave at once, whatever is under way: a guest waits for them.
    pub fn pass(&self, bytes: u64) {
        self.lock().entered_bytes += bytes;
    }

    /// Bounds what is under way beyond what the goodput allows.
    pub fn limit_window(&self, bytes_max: u64) {
        self.lock().window_bytes_max = bytes_max;
        self.changed.notify_all();
    }

    /// The destination applied `applied_bytes` in total. Returns what is still under way and whether
    /// anything had to wait since the last call, or nothing if more was applied than ever
    /// left: the peer misbehaves.
    pub fn applied(&self, applied_bytes: u64) -> Option<(u64, bool)> {
        let mut inner = self.lock();
        let under_way = inner.entered_bytes.checked_sub(applied_bytes)?;
        inner.applied_bytes = inner.applied_bytes.max(applied_bytes);
        let held_back = std::mem::take(&mut inner.held_back);
        self.changed.notify_all();
        Some((under_way, held_back))
    }

    /// Adapts the window to the measured goodput.
    pub fn set_goodput(&self, bytes_per_s: f64) {
        let window = (bytes_per_s * WINDOW.as_secs_f64()) as u64;
        self.lock().window_bytes = window.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        self.changed.notify_all();
    }

    /// Keeps what the link carries, for [`Self::link_bytes_per_s`].
    pub fn set_link(&self, bytes_per_s: Option<f64>) {
        self.lock().link_bytes_per_s = bytes_per_s;
    }

    /// Bytes a second that the link carries, if that is known.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.lock().link_bytes_per_s
    }

    /// Bytes that left in total, and those of them not yet applied.
    pub fn bytes(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.entered_bytes, inner.entered_bytes - inner.applied_bytes)
    }

    /// Lets everything through from now on: the session is over.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn what_is_under_way_is_bounded() {
        let gate = Arc::new(Gate::new(None));
        gate.enter(WINDOW_BYTES_MIN);
        let passed = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (gate, passed) = (Arc::clone(&gate), Arc::clone(&passed));
            move || {
                gate.enter(1);
                passed.store(true, Ordering::SeqCst);
            }
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!passed.load(Ordering::SeqCst));
        assert_eq!(gate.applied(WINDOW_BYTES_MIN), Some((0, true)));
        thread.join().unwrap();
        assert!(passed.load(Ordering::SeqCst));
        assert_eq!(gate.applied(u64::MAX), None, "more applied than sent");
    }

    #[test]
    fn what_entered_can_be_corrected() {
        let gate = Gate::new(Some(80_000_000));
        let start = Instant::now();
        gate.enter(WINDOW_BYTES_MIN);
        gate.correct(WINDOW_BYTES_MIN, 1000);
        assert_eq!(gate.bytes(), (1000, 1000));
        gate.enter(1000);
        gate.correct(1000, 3000);
        assert_eq!(gate.bytes(), (4000, 4000));
        // 2 MiB at 10 MB/s would be 200 ms.
        gate.enter(1000);
        assert!(start.elapsed() < Duration::from_millis(150), "{:?}", start.elapsed());
    }

    #[test]
    fn what_leaves_another_way_is_paid_for_and_does_not_wait_for_a_session_that_is_over() {
        let gate = Gate::new(Some(80_000_000));
        let start = Instant::now();
        assert!((0..10).all(|_| gate.pay(100_000)));
        assert!(start.elapsed() >= Duration::from_millis(60), "{:?}", start.elapsed());
        assert_eq!(gate.bytes(), (0, 0));
        gate.close();
        assert!(!gate.pay(1 << 40));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn the_rate_is_kept() {
        let gate = Gate::new(Some(80_000_000));
        let start = Instant::now();
        let mut waits = 0;
        for _ in 0..20 {
            gate.enter(100_000);
            let (entered, _) = gate.bytes();
            let (_, held_back) = gate.applied(entered).unwrap();
            waits += u32::from(held_back);
        }
        // Otherwise the goodput of a link that is faster than the limit could not be told.
        assert!(waits >= 10, "{waits}");
        // 2 MB at 10 MB/s are 200 ms, less the burst.
        assert!(start.elapsed() >= Duration::from_millis(160), "{:?}", start.elapsed());
    }
}
