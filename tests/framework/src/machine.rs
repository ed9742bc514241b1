//! Whether this machine's processors are there for those who want to measure something.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// How long processors are kept busy to see whether they are there.
const TRIAL: Duration = Duration::from_secs(1);

/// Pause between two trials.
const PAUSE: Duration = Duration::from_secs(5);

/// Less than this share of the processors' time means that others use them: here, or, as stolen time, beside this machine.
/// Idle guests use some.
const SHARE_MIN: f64 = 0.7;

/// Waits until this machine gives most of its processors, but not for longer than `patience`: then it says so and lets
/// the caller go on.
///
/// # Errors
/// /proc/stat cannot be read.
pub fn wait_for_processors(patience: Duration) -> Result<()> {
    let began = Instant::now();
    loop {
        let share = share_given()?;
        if share >= SHARE_MIN {
            return Ok(());
        }
        let percent = share * 100.0;
        if began.elapsed() >= patience {
            eprintln!("This machine gives {percent:.0} % of its processors: figures will be off");
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// The share of all processors' time that threads get that want all of it.
fn share_given() -> Result<f64> {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let (began, stolen_before_s) = (Instant::now(), stolen_s()?);
    let spinning: Vec<_> = (0..count).map(|_| std::thread::spawn(spin)).collect();
    let ran_s: f64 = spinning.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum();
    let all_s = began.elapsed().as_secs_f64() * count as f64;
    Ok((ran_s - (stolen_s()? - stolen_before_s)) / all_s)
}

/// Uses a processor and returns how much of it there was, in seconds.
fn spin() -> f64 {
    let began = Instant::now();
    while began.elapsed() < TRIAL {
        std::hint::spin_loop();
    }
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock.now().map_or(0.0, |ran| ran.tv_sec() as f64 + ran.tv_nsec() as f64 / 1e9)
}

/// Time that a hypervisor gave others while this machine's processors wanted it, in seconds of one processor.
fn stolen_s() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    stolen_ticks(&text)
        .map(|ticks| ticks as f64 / 100.0)
        .context("/proc/stat does not tell of stolen time")
}

/// Ticks of 10 ms, in the eighth column.
fn stolen_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    line.split_whitespace().nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_read() {
        let stat = "cpu  10 0 20 300 4 0 1 55 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(stolen_ticks(stat), Some(55));
        assert_eq!(stolen_ticks("cpu  10 0\n"), None);
    }

    #[test]
    fn a_share_is_one() {
        let share = share_given().unwrap();
        assert!((0.01..=1.05).contains(&share), "{share}");
    }
}
