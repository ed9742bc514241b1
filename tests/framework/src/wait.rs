//! Waiting with a limit, and the clock that beats are stamped with.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::time::{ClockId, clock_gettime};

/// Microseconds of the host's CLOCK_MONOTONIC: comparable between processes of one machine.
#[must_use]
pub fn monotonic_us() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000)
}

/// Asks `probe` every few milliseconds until it returns something.
///
/// # Errors
/// `probe` failed, or `timeout` passed; the text then names `what`.
pub fn until<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + timeout;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("Waited {:.1} s in vain for {what}", timeout.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_up_and_says_what_for() {
        let error = until::<()>("rain", Duration::from_millis(20), || Ok(None)).unwrap_err();
        assert!(error.to_string().contains("rain"));
        let mut calls = 0;
        let mut probe = || {
            calls += 1;
            Ok((calls == 3).then_some(calls))
        };
        assert_eq!(until("a third call", Duration::from_secs(5), &mut probe).unwrap(), 3);
    }
}
