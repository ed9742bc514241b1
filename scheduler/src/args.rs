//! What can be typed, and its help. What it means is in [`crate::commands`].

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Finds hotspots on a cluster's hosts and moves guests away from them.
#[derive(Debug, Parser)]
#[command(name = "godwit-scheduler", version)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a scenario on paper under several policies and compares what comes out.
    Simulate(SimulateArgs),
    /// Runs this host's agent: it sees its load, finds hotspots, and moves guests away from them.
    Agent(AgentArgs),
    /// Says what hotspots there are, what would be done about them now, and why.
    Explain(ExplainArgs),
    /// Shows the web page to a browser on this machine, asking agents with an identity of the cluster's authority.
    Web(WebArgs),
}

/// `godwit-scheduler web`.
#[derive(Debug, Args)]
pub(crate) struct WebArgs {
    /// An agent's address; repeat it for those that are asked when it does not answer.
    #[arg(long, value_name = "HOST:PORT", required = true)]
    pub(crate) agent: Vec<String>,
    /// Directory of the identity to ask with, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
    /// Where the browser finds it: an address of this machine alone. Port 0 chooses one.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
}

/// `godwit-scheduler explain`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    godwit-scheduler explain --agent host-a:7790 --identity /etc/godwit/operator\n  \
    godwit-scheduler explain --agent host-a:7790 --agent host-b:7790 --identity DIR --json\n\n\
    Nothing is done. What each host's agent would do is put together as the agent sees the cluster that answers.\n\
    Exits with 1 if none answers.")]
pub(crate) struct ExplainArgs {
    /// An agent's address; repeat it for those that are asked when it does not answer.
    #[arg(long, value_name = "HOST:PORT", required = true)]
    pub(crate) agent: Vec<String>,
    /// Directory of the identity to ask with, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
    /// Print one JSON object on stdout instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `godwit-scheduler simulate`.
#[derive(Debug, Args)]
#[command(after_help = "A first look:\n  \
    godwit-scheduler simulate scheduler/scenarios/idc-b.toml --explain\n  \
    godwit-scheduler simulate scheduler/scenarios/cluster-200.toml --seeds 3 --svg out.svg\n\n\
    Columns:\n  \
    overload   host-seconds in which more was wanted of CPU, memory, network or disk than the host has\n  \
    moves      migrations; GiB: what they sent; back: guests that returned within 10 minutes\n  \
    grows      changes of guests' memory; refused: steps that could not be done any more\n  \
    mean, p95  users' response times, weighted by requests\n  \
    decide     what a decision took of one core: mean, 99 of 100, longest\n\n\
    Exits with 1 if something that the file expects did not come out, with 2 if the file is wrong. What can be written in \
    a file, and the model behind the figures: docs/SCHEDULER.md.")]
pub(crate) struct SimulateArgs {
    /// The scenario (TOML). Examples: scheduler/scenarios/.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// A policy to run; repeat it to compare several [default: the file's, or all there are].
    #[arg(short, long = "policy", value_name = "NAME")]
    pub(crate) policies: Vec<String>,
    /// With how many seeds, one after the other [default: the file's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) seeds: Option<u64>,
    /// The first of them.
    #[arg(long, value_name = "SEED", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=u64::from(u32::MAX)))]
    pub(crate) first_seed: u64,
    /// How many runs go on at once; 1 for decision times that nothing disturbs [default: one a processor].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) jobs: Option<u16>,
    /// Tell what was decided when and why, with the first seed.
    #[arg(long)]
    pub(crate) explain: bool,
    /// Of that, only what was decided at this time, in seconds from the start.
    #[arg(long, value_name = "SECONDS", requires = "explain")]
    pub(crate) at: Option<f64>,
    /// Print one JSON object on stdout instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep a line of JSON for each run in a file, and take runs from there that were made before; of those no decisions are
    /// told. Delete it when a policy has changed.
    #[arg(long, value_name = "FILE")]
    pub(crate) runs: Option<PathBuf>,
    /// Draw overload-seconds of each policy, and overloaded hosts over time, into a file.
    #[arg(long, value_name = "OUT")]
    pub(crate) svg: Option<PathBuf>,
}

/// `godwit-scheduler agent`.
#[derive(Debug, Args)]
#[command(
    after_help = "A first cluster on one machine, and one of several: docs/SCHEDULER.md.\n\n\
    SIGHUP has it read the file again. SIGTERM and Ctrl-C end it: guests run on, and migrations under way go on; the next \
    agent picks them up."
)]
pub(crate) struct AgentArgs {
    /// What to do (TOML).
    #[arg(long, value_name = "FILE", required_unless_present = "example")]
    pub(crate) config: Option<PathBuf>,
    /// Only say whether the file makes sense.
    #[arg(long)]
    pub(crate) check: bool,
    /// Say what would be done and why, and do nothing but what operators ask for, whatever the file says.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print a file with all keys, their defaults and what they mean, to begin with.
    #[arg(long, conflicts_with_all = ["config", "check"])]
    pub(crate) example: bool,
}
