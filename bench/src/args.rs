//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use framework::QemuKind;

use crate::scenario::{Overrides, parse_qemu, parse_rate};

/// Measures Godwit, and QEMU's own migration beside it, with real guests.
#[derive(Debug, Parser)]
#[command(
    name = "bench",
    about = "Measures Godwit, and QEMU's own migration beside it, with real guests",
    args_conflicts_with_subcommands = true,
    after_help = "`bench --scenario NAME` is short for `bench compare --scenario NAME`.\n\n\
        The targets and the commands that print them:\n  \
        cargo xtask bench targets\n  \
        cargo xtask bench --scenario idle\n  \
        cargo xtask bench --scenario writer --scenario writer-text\n  \
        cargo xtask bench throughput --repeats 5\n  \
        cargo xtask bench attach --count 40"
)]
pub(crate) struct Cli {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// `compare` without its name.
    #[command(flatten)]
    pub(crate) compare: CompareArgs,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Migrates the guest of a scenario by Godwit and by QEMU's own modes, in turns.
    Compare(CompareArgs),
    /// Measures all that has a target, and prints one table of what is met.
    Targets(TargetsArgs),
    /// Lists the scenarios of the repository.
    Scenarios,
    /// Compares Godwit's goodput on an unshaped link with a plain quinn transfer, in turns.
    Throughput(ThroughputArgs),
    /// Measures attaching to QEMU, scanning clean memory, and the engine's tables.
    Attach(AttachArgs),
    /// Writes tables and plots again from what earlier runs recorded.
    Report(ReportArgs),
    /// Passes UDP and TCP on with a delay and, for UDP, losses. `compare` starts it by itself.
    Relay(RelayArgs),
}

/// What all measurements have in common.
#[derive(Debug, Clone, Args)]
pub(crate) struct CommonArgs {
    /// QEMU of both ends: 7.2 or 10.0 [default: 7.2, or the scenario's].
    #[arg(long, value_name = "VERSION", value_parser = parse_qemu)]
    pub(crate) qemu: Option<QemuKind>,
    /// Folder for the results.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
    /// Name of the results' files [default: what was measured].
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Virtual CPUs of the guest [default: 1, or the scenario's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) smp: Option<u32>,
    /// Further argument for `migrate send`; may be repeated.
    #[arg(long = "send-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) send_args: Vec<String>,
    /// Seconds after which a migration is given up and counted as not converged [default: 120, or
    /// the scenario's].
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub(crate) limit_s: Option<u64>,
}

impl CommonArgs {
    /// QEMU where no scenario names one.
    pub(crate) fn qemu(&self) -> QemuKind {
        self.qemu.unwrap_or(QemuKind::V7_2)
    }

    /// CPUs where no scenario names them.
    pub(crate) fn smp(&self) -> u32 {
        self.smp.unwrap_or(1)
    }

    /// The limit where no scenario names one.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.limit_s.unwrap_or(120))
    }
}

/// `bench compare`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CompareArgs {
    /// Common options.
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// A scenario of bench/scenarios by its name, or a file; may be repeated.
    #[arg(long = "scenario", value_name = "NAME|FILE")]
    pub(crate) scenarios: Vec<String>,
    /// The same as --scenario, with results called compare-NAME.
    #[arg(long, value_name = "NAME", conflicts_with = "scenarios")]
    pub(crate) workload: Option<String>,
    /// Instead of the scenario's: rate of the link in bits a second, with an optional suffix k, M
    /// or G; 0 is unshaped.
    #[arg(long, value_name = "BITS", value_parser = parse_rate)]
    pub(crate) link: Option<u64>,
    /// Instead of the scenario's: the guest's memory in MiB.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(256..=65_536))]
    pub(crate) memory: Option<u64>,
    /// Instead of the scenario's: times that every mode is measured.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) repeats: Option<u32>,
    /// Instead of all the scenario's: its modes of these names, or further ones.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) modes: Vec<String>,
    /// Instead of the scenario's: channels of multifd.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) channels: Option<u32>,
}

impl CompareArgs {
    /// What is not as in the scenario.
    pub(crate) fn overrides(&self) -> Overrides {
        Overrides {
            memory_mib: self.memory,
            smp: self.common.smp,
            qemu: self.common.qemu,
            rate: self.link,
            repeats: self.repeats,
            limit_s: self.common.limit_s,
            modes: self.modes.clone(),
            channels: self.channels,
        }
    }
}

/// `bench targets`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Runs every scenario of the repository that has targets, then \
    `attach` and `throughput`, one after the other, and says so before it begins. Each writes its results as \
    its own command does; the table of all targets comes last. All of it takes hours: Ctrl-C ends it after \
    the step under way, and --only-missing goes on from there.\n\n\
    A part that fails keeps no other from its turn. The exit code is 0 if all were measured, whether their \
    targets are met or not, and 1 if a part or a migration failed or somebody interrupted.\n\n  \
    cargo xtask bench targets\n  \
    cargo xtask bench targets --only-missing\n  \
    cargo xtask bench targets --scenario idle --scenario attach --repeats 3")]
pub(crate) struct TargetsArgs {
    /// Only this part: a scenario that has targets, `attach` or `throughput`; may be repeated.
    #[arg(long = "scenario", value_name = "NAME")]
    pub(crate) scenarios: Vec<String>,
    /// Instead of the scenarios' and throughput's own: times that every mode is measured.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) repeats: Option<u32>,
    /// Leaves out what the folder already has all measurements of, by whatever sources, none of them
    /// failed; the table shows it, too.
    #[arg(long)]
    pub(crate) only_missing: bool,
    /// Folder for the results.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
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
    /// What earlier runs recorded; tables and plots go beside them [default: all of --out].
    #[arg(value_name = "JSONL")]
    pub(crate) files: Vec<PathBuf>,
    /// Folder of the results, and of report.html.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) out: PathBuf,
}

/// `bench relay`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RelayArgs {
    /// Address and port of both protocols to listen on.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// Where everything goes.
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: SocketAddr,
    /// Delay of each direction in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    pub(crate) delay_ms: f64,
    /// Share of UDP datagrams that are lost, each direction, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    pub(crate) loss_percent: f64,
    /// Seed of the losses.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
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
    fn scenarios_need_no_subcommand() {
        let words = ["bench", "--scenario", "idle", "--scenario", "a.toml", "--link", "100M"];
        let cli = Cli::parse_from(words);
        assert!(cli.command.is_none());
        assert_eq!(cli.compare.scenarios, ["idle", "a.toml"]);
        assert_eq!(cli.compare.overrides().rate, Some(100_000_000));
        let cli = Cli::parse_from(["bench", "compare", "--workload", "idle", "--modes", "a,b"]);
        let Some(Command::Compare(args)) = cli.command else { panic!("{cli:?}") };
        assert_eq!(args.overrides().modes, ["a", "b"]);
        let both = ["bench", "--scenario", "idle", "--workload", "idle"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}
