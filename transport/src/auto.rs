//! When lanes leave QUIC for TCP.
//!
//! The rule: as soon as the session's QUIC lanes together have sent
//! [`fast_bits_per_s`](crate::Options::fast_bits_per_s) for [`MEASURED`]. What is counted are UDP
//! bytes that left this host, so that neither buffers nor a short burst are taken for speed. The
//! default is more than a link of 1 Gbit/s carries: there QUIC keeps up and costs a fraction of a
//! core. On faster links the processors may become the limit before the link does, and TCP needs
//! fewer cycles a byte, 0.4 to 0.8 of QUIC's (docs/BENCHMARKS.md). There is no way back: a link that
//! has shown that rate is a fast one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Default of [`fast_bits_per_s`](crate::Options::fast_bits_per_s).
pub const FAST_BITS_PER_S: u64 = 1_200_000_000;

/// Time over which the rate is measured.
pub const MEASURED: Duration = Duration::from_millis(100);

/// Measures a session's lanes and decides once.
#[derive(Debug)]
pub(crate) struct Gauge {
    fast_bits_per_s: u64,
    fast: AtomicBool,
    /// Where the present measurement began: when, and bytes sent until then.
    begun: Mutex<Option<(Instant, u64)>>,
}

impl Gauge {
    pub(crate) fn new(fast_bits_per_s: u64) -> Self {
        Self { fast_bits_per_s, fast: AtomicBool::new(false), begun: Mutex::new(None) }
    }

    /// Whether lanes are to go on over TCP; `sent` says how many bytes have left over QUIC so far
    /// and is called once in [`MEASURED`]. Never waits.
    pub(crate) fn is_fast(&self, now: Instant, sent: impl FnOnce() -> u64) -> bool {
        if self.fast.load(Ordering::Relaxed) {
            return true;
        }
        // Another lane is measuring.
        let Ok(mut begun) = self.begun.try_lock() else { return false };
        let Some((since, before)) = *begun else {
            *begun = Some((now, sent()));
            return false;
        };
        let took = now.saturating_duration_since(since);
        if took < MEASURED {
            return false;
        }
        let sent = sent();
        *begun = Some((now, sent));
        let bits_per_s = sent.saturating_sub(before) as f64 * 8.0 / took.as_secs_f64();
        let fast = bits_per_s >= self.fast_bits_per_s as f64;
        if fast {
            let mbit_per_s = (bits_per_s / 1e6) as u64;
            tracing::info!(mbit_per_s, "The link is fast: lanes go on over TCP");
            self.fast.store(true, Ordering::Relaxed);
        }
        fast
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes in `ms` at `gbit` Gbit/s.
    fn bytes(gbit: u64, ms: u64) -> u64 {
        gbit * ms * 1_000_000 / 8
    }

    #[test]
    fn a_fast_link_is_found_out_once_and_for_all() {
        let gauge = Gauge::new(FAST_BITS_PER_S);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!gauge.is_fast(at(0), || 500));
        assert!(!gauge.is_fast(at(100), || 500 + bytes(1, 100)), "a slow link");
        assert!(!gauge.is_fast(at(150), || panic!("asked too early")));
        // A burst in between is not looked at by itself.
        assert!(!gauge.is_fast(at(300), || 500 + bytes(1, 300)));
        assert!(gauge.is_fast(at(400), || 500 + bytes(1, 300) + bytes(2, 100)));
        assert!(gauge.is_fast(at(9000), || panic!("decided already")));
    }

    #[test]
    fn a_pause_counts_as_slow() {
        let gauge = Gauge::new(FAST_BITS_PER_S);
        let start = Instant::now();
        assert!(!gauge.is_fast(start, || 0));
        assert!(!gauge.is_fast(start + Duration::from_secs(60), || bytes(10, 1000)));
    }
}
