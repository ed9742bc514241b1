//! What libvirt tells about a migration: `virsh domjobinfo`.

use anyhow::{Context as _, Result};

/// Figures of a migration that is under way or has completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Since its beginning.
    pub elapsed_ms: u64,
    /// The guest's memory, with what devices hold.
    pub memory_bytes: u64,
    /// Sent of it, and sent again.
    pub processed_bytes: u64,
    /// Still to be sent.
    pub remaining_bytes: u64,
    /// Rate of sending, as QEMU sees it.
    pub bytes_per_s: u64,
    /// Rounds over the memory.
    pub rounds: u64,
    /// How long the guest was stopped, or would be.
    pub downtime_ms: Option<u64>,
}

impl Job {
    /// Reads the raw form; `None` if there is no job or its stream has not begun.
    pub(super) fn parse(raw: &str) -> Result<Option<Self>> {
        let find = |key: &str| {
            let mut lines = raw.lines().filter_map(|line| line.split_once(':'));
            let value = lines.find(|(name, _)| *name == key).map(|(_, value)| value.trim().parse());
            value.transpose().with_context(|| format!("{key} is no number in:\n{raw}"))
        };
        // Before QEMU has begun, libvirt tells zeros.
        let Some(memory_bytes) = find("memory_total")?.filter(|&bytes| bytes > 0) else {
            return Ok(None);
        };
        let number = |key: &str| find(key)?.with_context(|| format!("No {key} in:\n{raw}"));
        Ok(Some(Self {
            elapsed_ms: number("time_elapsed")?,
            memory_bytes,
            processed_bytes: number("memory_processed")?,
            remaining_bytes: number("memory_remaining")?,
            // Not told while it is zero.
            bytes_per_s: find("memory_bps")?.unwrap_or(0),
            rounds: number("memory_iteration")?,
            downtime_ms: find("downtime")?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_figures() {
        let raw = "Job type: 2\n\noperation: 5\ntime_elapsed: 1200\nmemory_total: 268967936\n\
                   memory_processed: 1048576\nmemory_remaining: 200000000\n\
                   memory_iteration: 1\ndowntime: 300\n";
        let job = Job::parse(raw).unwrap().unwrap();
        assert_eq!((job.elapsed_ms, job.rounds, job.downtime_ms), (1200, 1, Some(300)));
        assert_eq!((job.processed_bytes, job.remaining_bytes), (1 << 20, 200_000_000));
        assert!(Job::parse(&raw.replace("1200", "soon")).is_err());
        assert!(Job::parse(&raw.replace("memory_iteration", "rounds")).is_err());
        assert_eq!(job.bytes_per_s, 0);
        let rate = Job::parse(&format!("{raw}memory_bps: 700\n")).unwrap().unwrap();
        assert_eq!(rate.bytes_per_s, 700);
    }

    #[test]
    fn no_job_is_none() {
        assert_eq!(Job::parse("Job type: 0\n\n").unwrap(), None);
        let early = "Job type: 2\n\ntime_elapsed: 73\nmemory_total: 0\nmemory_remaining: 0\n";
        assert_eq!(Job::parse(early).unwrap(), None);
    }
}
