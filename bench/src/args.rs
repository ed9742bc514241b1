//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use framework::QemuKind;

use crate::mode::Mode;
use crate::workload::Workload;

/// Measures Godwit, and QEMU's own migration beside it, with real guests.
#[derive(Debug, Parser)]
#[command(
    name = "bench",
    about = "Measures Godwit, and QEMU's own migration beside it, with real guests",
    after_help = "The targets and the commands that print them:\n  \
        cargo xtask bench compare --workload idle --repeats 10\n  \
        cargo xtask bench compare --workload writer --repeats 5\n  \
        cargo xtask bench throughput --repeats 5\n  \
        cargo xtask bench attach --count 40"
)]
pub(crate) struct Cli {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Migrates the same guest over a shaped link by Godwit and by QEMU's own modes, in turns.
    Compare(CompareArgs),
    /// Compares Godwit's goodput on an unshaped link with a plain quinn transfer, in turns.
    Throughput(ThroughputArgs),
    /// Measures attaching to QEMU, scanning clean memory, and the engine's tables.
    Attach(AttachArgs),
    /// Writes tables and plots again from what earlier runs recorded.
    Report(ReportArgs),
}

/// What all measurements have in common.
#[derive(Debug, Clone, Args)]
pub(crate) struct CommonArgs {
    /// QEMU of both ends: 7.2 or 10.0.
    #[arg(long, value_name = "VERSION", default_value = "7.2", value_parser = parse_qemu)]
    pub(crate) qemu: QemuKind,
    /// Folder for the results.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
    /// Name of the results' files [default: what was measured].
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Virtual CPUs of the guest.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) smp: u32,
    /// Further argument for `migrate send`; may be repeated.
    #[arg(long = "send-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) send_args: Vec<String>,
    /// Seconds after which a migration is given up and counted as not converged.
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub(crate) limit_s: u64,
}

/// `bench compare`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CompareArgs {
    /// Common options.
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Rate of the link in bits a second, with an optional suffix k, M or G; 0 is unshaped.
    #[arg(long, value_name = "BITS", default_value = "1G", value_parser = parse_rate)]
    pub(crate) link: u64,
    /// The guest's memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(256..=65_536))]
    pub(crate) memory: u64,
    /// What the guest does.
    #[arg(long, value_enum, default_value_t = Workload::Idle)]
    pub(crate) workload: Workload,
    /// Times that every mode is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) repeats: u32,
    /// Modes in the order of their turns.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Mode::ALL)]
    pub(crate) modes: Vec<Mode>,
    /// Channels of multifd.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) channels: u32,
}

/// `bench throughput`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ThroughputArgs {
    /// Common options.
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Incompressible data resident in the guest, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(64..=32_768))]
    pub(crate) resident: u64,
    /// Lanes of Godwit and connections of the plain transfer.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: u16,
    /// Times that the two are measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) repeats: u32,
    /// Free memory to touch before every transfer, in MiB. Where the machine is itself a virtual one
    /// whose host takes free memory back, finding it again costs more than the transfer.
    #[arg(long, value_name = "MIB", default_value_t = 6144, value_parser = clap::value_parser!(u64).range(0..=65_536))]
    pub(crate) touch: u64,
    /// Also migrates over an unshaped veth between two namespaces (without a plain transfer).
    #[arg(long)]
    pub(crate) veth: bool,
    /// The plain transfer, transport's example `bulk` [default: built by cargo].
    #[arg(long, value_name = "BIN")]
    pub(crate) bulk: Option<PathBuf>,
}

/// `bench attach`.
#[derive(Debug, Clone, Args)]
pub(crate) struct AttachArgs {
    /// Common options.
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// The guest's memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(256..=65_536))]
    pub(crate) memory: u64,
    /// Of it, populated by a program in the guest, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(16..=65_000))]
    pub(crate) resident: u64,
    /// Times to attach.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) count: u32,
}

/// `bench report`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArgs {
    /// What earlier runs recorded; tables and plots go beside them.
    #[arg(required = true, value_name = "JSONL")]
    pub(crate) files: Vec<PathBuf>,
}

fn parse_qemu(text: &str) -> Result<QemuKind, String> {
    let found = QemuKind::ALL.into_iter().find(|kind| kind.version() == text);
    found.ok_or_else(|| "there are 7.2 and 10.0".to_owned())
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 1_000),
        Some((at, 'm' | 'M')) => (text.get(..at), 1_000_000),
        Some((at, 'g' | 'G')) => (text.get(..at), 1_000_000_000),
        _ => (Some(text), 1),
    };
    digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(factor))
        .filter(|bits| *bits == 0 || (100_000..=100_000_000_000).contains(bits))
        .ok_or_else(|| "give 0, or a rate from 100k to 100G such as 500M".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rates_have_suffixes() {
        assert_eq!(parse_rate("1G"), Ok(1_000_000_000));
        assert_eq!(parse_rate("0"), Ok(0));
        for bad in ["", "G", "-1", "5k", "9999999999G"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
        assert!(parse_qemu("7.2").is_ok() && parse_qemu("9.0").is_err());
    }
}
