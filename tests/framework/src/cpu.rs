//! CPU time of processes.

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Seconds of CPU time that a process and its reaped children have used, from /proc/PID/stat.
///
/// # Errors
/// The process is gone.
pub fn seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} has another format"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Ok(ticks as f64 / per_second as f64)
}

/// utime + stime + cutime + cstime. The name, field 2, may hold spaces and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_the_four_fields() {
        let stat = "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 20 0 1";
        assert_eq!(ticks(stat), Some(127));
        assert_eq!(ticks("garbage"), None);
    }

    #[test]
    fn grows_with_work() {
        let pid = std::process::id();
        let before = seconds(pid).unwrap();
        let mut sum = 0_u64;
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 300 {
            sum = std::hint::black_box(sum.wrapping_mul(31) + 1);
        }
        assert!(seconds(pid).unwrap() > before);
        assert!(seconds(u32::MAX).is_err());
    }
}
