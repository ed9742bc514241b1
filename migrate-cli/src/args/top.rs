//! What can be typed about watching a cluster.

use std::path::PathBuf;

use clap::Args;

/// `migrate top`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
        migrate top --agent host-a:7710 --identity /etc/godwit/operator\n  \
        migrate top --agent host-a:7710 --agent host-b:7710 --identity DIR --once")]
pub struct TopArgs {
    /// A scheduler's agent; repeat it for those that are asked when it does not answer.
    #[arg(long, value_name = "HOST:PORT", required = true)]
    pub agent: Vec<String>,
    /// Directory of the identity to ask with, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub identity: PathBuf,
    /// Seconds between two questions.
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval_s: u64,
    /// Print everything once as plain text and end; exits with 1 if no agent answers.
    #[arg(long)]
    pub once: bool,
}
