//! What the guest does while it is migrated.

use anyhow::{Result, ensure};
use framework::VmSpec;
use serde::{Deserialize, Serialize};

use super::AccessPhase;

/// A checker that verifies its memory without being a load of its own.
const CHECKER: &str = "godwit.checker=size=8,rate=50,verify=2000,seed=5";

/// Memory of the checker, in MiB.
const CHECKER_MIB: u64 = 8;

/// Memory of the unpacked applications in the guest's root file system, in MiB.
const APPLICATIONS_MIB: u64 = 64;

/// What a writer's memory holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Content {
    /// English words.
    #[default]
    Text,
    /// Noise.
    Random,
    /// Pages of both in turn.
    Mixed,
}

impl Content {
    /// As the writer takes it.
    fn label(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Random => "random",
            Self::Mixed => "mixed",
        }
    }
}

/// A workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Workload {
    /// Nothing but the heartbeat.
    Idle {},
    /// Random pages of a hot area are written at a rate; a checker verifies memory of its own.
    Writer {
        /// Memory that is filled, in MiB.
        fill_mib: u64,
        /// Of it, what is written, in MiB.
        hot_mib: u64,
        /// Pages written a second; 0 is as fast as the guest can.
        pages_per_s: u64,
        /// Bytes written in each page.
        #[serde(default = "bytes")]
        bytes: u64,
        /// 1: all of them alike; K: a share `x` of them gets `x^(1/K)` of the writes.
        #[serde(default = "skew")]
        skew: u64,
        /// What is written.
        #[serde(default)]
        content: Content,
    },
    /// Incompressible data, written once and left alone.
    Resident {
        /// How much, in MiB.
        mib: u64,
    },
    /// Page cache of incompressible data that was filled and freed again.
    Freed {
        /// How much, in MiB.
        mib: u64,
    },
    /// Memory that was filled once, beside page cache that was filled and freed again; a worker that begins with
    /// nothing else to do.
    Worker {
        /// Filled, in MiB.
        fill_mib: u64,
        /// Filled and freed, in MiB.
        #[serde(default)]
        freed_mib: u64,
        /// What both are filled with.
        #[serde(default = "noise")]
        content: Content,
        /// What it reads and writes, in MiB.
        #[serde(default)]
        hot_mib: u64,
        /// What it allocates and frees, in MiB.
        #[serde(default)]
        fresh_mib: u64,
        /// Whether it goes through hot and filled memory in their order, and not at random.
        #[serde(default)]
        is_sequential: bool,
    },
    /// Redis as a cache under redis-benchmark: keys and values are drawn at random, and once
    /// memory is full every new one pushes another out.
    Redis {
        /// `maxmemory` of the server, in MiB.
        #[serde(default = "redis_mib")]
        memory_mib: u64,
        /// Bytes of a value.
        #[serde(default = "redis_value")]
        value_bytes: u64,
        /// Connections of redis-benchmark.
        #[serde(default = "redis_clients")]
        clients: u64,
    },
    /// SQLite in WAL mode on tmpfs: transactions that update random rows with random blobs.
    Sqlite {
        /// Size of the database, in MiB.
        #[serde(default = "sqlite_mib")]
        memory_mib: u64,
        /// Rows that a transaction updates.
        #[serde(default = "sqlite_rows")]
        rows: u64,
    },
    /// `xz -c | xz -dc` of text without end; what comes out is compared with what went in.
    Compress {
        /// Level of xz: 6 takes 94 MiB.
        #[serde(default = "compress_level")]
        level: u64,
    },
}

fn noise() -> Content {
    Content::Random
}

fn bytes() -> u64 {
    64
}

fn skew() -> u64 {
    1
}

fn redis_mib() -> u64 {
    128
}

fn redis_value() -> u64 {
    1020
}

fn redis_clients() -> u64 {
    4
}

fn sqlite_mib() -> u64 {
    64
}

fn sqlite_rows() -> u64 {
    20
}

fn compress_level() -> u64 {
    6
}

impl Workload {
    /// In words.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Idle {} => "nothing but its heartbeat".to_owned(),
            Self::Writer { fill_mib, hot_mib, pages_per_s, bytes, skew, content } => {
                let rate = match pages_per_s {
                    0 => "as fast as it can".to_owned(),
                    rate => format!("{rate} pages a second"),
                };
                let skew = match skew {
                    1 => String::new(),
                    skew => format!(", a share x of which gets x^(1/{skew}) of the writes"),
                };
                format!(
                    "{bytes} bytes in each of random pages of {hot_mib} of {fill_mib} MiB{skew}, {}, \
                     {rate}",
                    content.label()
                )
            }
            Self::Resident { mib } => format!("{mib} MiB of noise, left alone"),
            Self::Freed { mib } => format!("{mib} MiB of noise in the page cache, freed again"),
            Self::Worker { fill_mib, freed_mib, content, hot_mib, fresh_mib, is_sequential } => {
                let order = if *is_sequential { "in order" } else { "at random" };
                format!(
                    "{fill_mib} MiB filled with {} beside {freed_mib} MiB of it freed again, {hot_mib} MiB \
                     that are worked on {order}, {fresh_mib} MiB that are allocated and freed",
                    content.label()
                )
            }
            Self::Redis { memory_mib, value_bytes, clients } => format!(
                "Redis of {memory_mib} MiB under redis-benchmark: {clients} clients, random keys, \
                 values of {value_bytes} bytes"
            ),
            Self::Sqlite { memory_mib, rows } => format!(
                "SQLite of {memory_mib} MiB on tmpfs: transactions of {rows} random rows each"
            ),
            Self::Compress { level } => format!("xz -{level} of text, unpacked and compared"),
        }
    }

    /// Memory that it fills, in MiB.
    pub(super) fn memory_mib(&self) -> u64 {
        let own = match self {
            Self::Idle {} => 0,
            Self::Writer { fill_mib, .. } => fill_mib.saturating_add(CHECKER_MIB),
            Self::Resident { mib } => *mib,
            Self::Freed { mib } => mib.saturating_add(CHECKER_MIB),
            Self::Worker { fill_mib, freed_mib, hot_mib, fresh_mib, .. } => fill_mib
                .saturating_add(*hot_mib)
                .saturating_add(*freed_mib.max(fresh_mib))
                .saturating_add(CHECKER_MIB),
            // Allocators and evicting take their share; WAL and page cache double a database.
            Self::Redis { memory_mib, .. } => memory_mib.saturating_mul(3) / 2,
            Self::Sqlite { memory_mib, .. } => memory_mib.saturating_mul(2),
            // 674 MiB at level 9; see xz(1).
            Self::Compress { level } if *level >= 7 => 800,
            Self::Compress { .. } => 128,
        };
        own.saturating_add(if self.is_application() { APPLICATIONS_MIB + CHECKER_MIB } else { 0 })
    }

    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Idle {} => {}
            Self::Writer { fill_mib, hot_mib, bytes, skew, .. } => {
                ensure!((1..=16).contains(skew), "skew: 1 to 16");
                ensure!(*fill_mib >= 1 && *hot_mib >= 1, "fill_mib and hot_mib are at least 1");
                ensure!(hot_mib <= fill_mib, "hot_mib lies within fill_mib");
                ensure!((1..=4096).contains(bytes), "bytes: 1 to 4096");
            }
            Self::Resident { mib } | Self::Freed { mib } => {
                ensure!(*mib >= 1, "mib is at least 1");
            }
            Self::Worker { fill_mib, .. } => ensure!(*fill_mib >= 1, "fill_mib is at least 1"),
            Self::Redis { memory_mib, value_bytes, clients } => {
                ensure!((16..=8192).contains(memory_mib), "memory_mib: 16 to 8192");
                ensure!((12..=12_000).contains(value_bytes), "value_bytes: 12 to 12000");
                ensure!((1..=50).contains(clients), "clients: 1 to 50");
            }
            Self::Sqlite { memory_mib, rows } => {
                ensure!((8..=2048).contains(memory_mib), "memory_mib: 8 to 2048");
                ensure!((1..=1000).contains(rows), "rows: 1 to 1000");
            }
            Self::Compress { level } => ensure!(*level <= 9, "level: 0 to 9"),
        }
        Ok(())
    }

    /// Whether it is one of Debian's programs, for which the guest needs a larger initramfs.
    pub(crate) fn is_application(&self) -> bool {
        matches!(self, Self::Redis { .. } | Self::Sqlite { .. } | Self::Compress { .. })
    }

    /// Whether the guest has memory for a phase of its worker.
    pub(super) fn has_phase(&self, phase: AccessPhase) -> bool {
        match (self, phase) {
            (Self::Worker { hot_mib, .. }, AccessPhase::Hot) => *hot_mib > 0,
            (Self::Worker { fresh_mib, .. }, AccessPhase::Fresh | AccessPhase::Both) => {
                *fresh_mib > 0
            }
            (Self::Worker { .. }, AccessPhase::Used) => true,
            _ => false,
        }
    }

    /// Whether it is a worker, which may take minutes to fill its memory.
    pub(crate) fn is_worker(&self) -> bool {
        matches!(self, Self::Worker { .. })
    }

    /// Whether the guest verifies its memory.
    pub(crate) fn checks(&self) -> bool {
        !matches!(self, Self::Idle {} | Self::Resident { .. })
    }

    /// Adds the programs to a guest.
    pub(crate) fn give_to(&self, spec: VmSpec) -> VmSpec {
        let spec = match self {
            Self::Worker { freed_mib, content, .. } if *freed_mib > 0 => {
                let content = content.label();
                spec.with(&format!("godwit.freed=mib={freed_mib},content={content},seed=7"))
            }
            _ => spec,
        };
        let program = match self {
            Self::Idle {} => return spec,
            Self::Writer { fill_mib, hot_mib, pages_per_s, bytes, skew, content } => {
                let content = content.label();
                format!(
                    "godwit.writer=fill={fill_mib},hot={hot_mib},rate={pages_per_s},bytes={bytes},\
                     content={content},skew={skew},seed=7"
                )
            }
            Self::Resident { mib } => {
                format!("godwit.writer=fill={mib},hot=1,rate=1,bytes=8,content=random,seed=7")
            }
            Self::Freed { mib } => format!("godwit.freed=mib={mib},seed=7"),
            Self::Worker { fill_mib, content, hot_mib, fresh_mib, is_sequential, .. } => {
                let order = if *is_sequential { "sequential" } else { "random" };
                let content = content.label();
                format!(
                    "godwit.worker=fill_mib={fill_mib},content={content},hot_mib={hot_mib},\
                     fresh_mib={fresh_mib},order={order},phase=idle,seed=7"
                )
            }
            Self::Redis { memory_mib, value_bytes, clients } => format!(
                "godwit.app=kind=redis,memory={memory_mib},value={value_bytes},clients={clients}"
            ),
            Self::Sqlite { memory_mib, rows } => {
                format!("godwit.app=kind=sqlite,memory={memory_mib},rows={rows}")
            }
            Self::Compress { level } => format!("godwit.app=kind=compress,level={level},seed=7"),
        };
        let spec = spec.with(&program);
        if self.checks() { spec.with(CHECKER) } else { spec }
    }
}

#[cfg(test)]
mod tests {
    use framework::QemuKind;

    use super::*;

    fn read(text: &str) -> Result<Workload, toml::de::Error> {
        toml::from_str(text)
    }

    fn words(workload: &Workload) -> String {
        workload.give_to(VmSpec::new("x", QemuKind::V7_2)).cmdline.join(" ")
    }

    #[test]
    fn a_writer_becomes_words_of_the_kernel_command_line() {
        let text = "kind = \"writer\"\nfill_mib = 1000\nhot_mib = 200\npages_per_s = 20000\n";
        let workload = read(text).unwrap();
        let wanted =
            "godwit.writer=fill=1000,hot=200,rate=20000,bytes=64,content=text,skew=1,seed=7";
        assert!(words(&workload).starts_with(wanted), "{}", words(&workload));
        assert!(words(&workload).contains("godwit.checker="));
        assert_eq!(words(&Workload::Idle {}), "");
    }

    #[test]
    fn a_worker_comes_with_what_was_freed_and_has_phases() {
        let text = "kind = \"worker\"\nfill_mib = 300\nfreed_mib = 500\nhot_mib = 20\n";
        let workload = read(text).unwrap();
        let words = words(&workload);
        assert!(words.starts_with("godwit.freed=mib=500,content=random,seed=7 godwit.worker="));
        assert!(words.contains("fill_mib=300,content=random,hot_mib=20,fresh_mib=0,order=random"));
        assert_eq!(workload.memory_mib(), 300 + 500 + 20 + 8);
        assert!(workload.has_phase(AccessPhase::Hot) && workload.has_phase(AccessPhase::Used));
        assert!(!workload.has_phase(AccessPhase::Fresh) && workload.checks());
        assert!(!Workload::Idle {}.has_phase(AccessPhase::Used));
    }

    #[test]
    fn unknown_and_impossible_parameters_are_refused() {
        assert!(read("kind = \"idle\"\nmib = 1\n").unwrap_err().to_string().contains("mib"));
        assert!(read("kind = \"redis\"\nmemory = 1\n").unwrap_err().to_string().contains("memory"));
        assert!(read("kind = \"writre\"\n").unwrap_err().to_string().contains("writer"));
        let hot = "kind = \"writer\"\nfill_mib = 10\nhot_mib = 20\npages_per_s = 1\n";
        assert!(read(hot).unwrap().check().is_err());
        assert!(read("kind = \"compress\"\nlevel = 10\n").unwrap().check().is_err());
    }

    #[test]
    fn applications_need_their_own_initramfs_and_verify() {
        for kind in ["redis", "sqlite", "compress"] {
            let workload = read(&format!("kind = \"{kind}\"\n")).unwrap();
            workload.check().unwrap();
            assert!(workload.is_application() && workload.checks());
            assert!(words(&workload).starts_with(&format!("godwit.app=kind={kind},")));
        }
        assert!(!Workload::Idle {}.is_application());
    }
}
