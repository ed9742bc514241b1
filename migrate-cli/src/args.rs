//! What can be typed, and its help. What it means is in [`crate::commands`].

mod gateway;
mod top;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use migrate_core::codec::Codec;
use migrate_core::codec_choice::Wanted;
use transport::LaneKind;

pub use self::gateway::{GatewayArgs, GatewayCommand, GatewayDestinationArgs, GatewaySourceArgs};
pub use self::top::TopArgs;
use crate::journal;

/// Moves running QEMU virtual machines between hosts.
#[derive(Debug, Parser)]
#[command(
    name = "migrate",
    version,
    about = "Moves running QEMU virtual machines between hosts",
    after_help = "A first migration:\n  \
        migrate pki init /etc/godwit/pki             once, on one machine\n  \
        migrate pki issue /etc/godwit/pki host-a     an identity a host; copy host-a/ there\n  \
        migrate check --qmp vm.qmp                   on the source: will it work?\n  \
        migrate receive --listen 0.0.0.0:7700 --identity host-b --qmp new.qmp --once\n  \
        migrate send --qmp vm.qmp --to host-b:7700 --identity host-a\n\n\
        `migrate demo` does all of this with a small guest on this machine."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log more: once for decisions, twice for messages. RUST_LOG overrides it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Says what this host and VM can do, and what is missing. Exits with 1 if a migration would fail.
    Check(CheckArgs),
    /// Shows what a guest does with its memory, seen from outside: no agent is needed in it.
    Inspect(InspectArgs),
    /// Makes the certificates by which hosts know each other.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Receives a guest into a QEMU that was started with `-incoming defer`.
    Receive(ReceiveArgs),
    /// Sends a running guest to a host where `migrate receive` waits.
    Send(SendArgs),
    /// Sends a running guest to a host that holds part of its memory; the rest goes to memory servers.
    Split(SplitArgs),
    /// Shows how a guest is doing whose memory is split.
    Status(PagerArgs),
    /// Brings all memory of a split guest to the host on which it runs.
    Merge(MergeArgs),
    /// Moves what one memory server has of a split guest to others.
    MoveFragment(MoveFragmentArgs),
    /// Ends a migration that an engine or a link left unfinished.
    Resolve(ResolveArgs),
    /// Keeps memory of guests that run on other hosts.
    MemoryServer(MemoryServerArgs),
    /// Receives guests and keeps memory of others' guests, as a file says.
    Agent(AgentArgs),
    /// Passes on migrations that QEMU, libvirt or others drive themselves.
    #[command(subcommand)]
    Gateway(GatewayCommand),
    /// Shows hosts, guests, hotspots, migrations and plans of a scheduler's cluster, live.
    Top(TopArgs),
    /// Boots a guest on this machine, migrates it over loopback and prints a report.
    Demo(DemoArgs),
}

/// `migrate check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// QMP socket of the VM to look at; without it only the host is checked.
    #[arg(long, value_name = "SOCK")]
    pub qmp: Option<PathBuf>,
    /// Socket of the preloaded library, where ptrace is not wanted.
    #[arg(long, value_name = "SOCK")]
    pub preload_socket: Option<PathBuf>,
}

/// `migrate inspect`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Reads the guest's memory and nothing else; the guest goes on meanwhile. It needs Linux in the guest \
        (5.4 or later; memory use as `free` shows it: 6.0 or later) and its RAM in a shared file."
)]
pub struct InspectArgs {
    /// QMP socket of the VM. It must be free: a QMP socket serves one client at a time.
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `migrate pki`.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Creates a certificate authority in DIR. Keep its key (ca.key) safe and off the hosts.
    Init {
        /// Directory to create it in.
        dir: PathBuf,
        /// Days until the authority expires.
        #[arg(long, default_value_t = 3650)]
        days: u32,
    },
    /// Issues an identity for a host into DIR/NAME: cert.pem, key.pem and ca.pem.
    Issue {
        /// Directory of the authority.
        dir: PathBuf,
        /// The host's name.
        name: String,
        /// Days until the identity expires.
        #[arg(long, default_value_t = 825)]
        days: u32,
    },
}

/// What sender and receiver have in common.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// QMP socket of the VM. It must be free: a QMP socket serves one client at a time.
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// Directory of this host's identity, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub identity: PathBuf,
    /// Where unfinished migrations are recorded [default: /var/lib/godwit/journal, or under
    /// ~/.local/state for ordinary users].
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Take the peer only if its identity has this name.
    #[arg(long, value_name = "NAME")]
    pub peer: Option<String>,
    /// Seconds of silence after which the peer counts as dead.
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub dead_peer_s: u64,
}

impl CommonArgs {
    /// Silence after which the peer counts as dead.
    pub fn dead_peer(&self) -> Duration {
        Duration::from_secs(self.dead_peer_s)
    }

    /// Where unfinished migrations are recorded.
    pub fn journal_dir(&self) -> PathBuf {
        self.journal.clone().unwrap_or_else(journal::default_dir)
    }
}

/// `migrate receive`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "Memory: some 40 MiB with two lanes, 8 MiB for every further lane, and 1 MiB for each GiB of the \
        guest's RAM."
)]
pub struct ReceiveArgs {
    /// Address and port to listen on: UDP, and TCP for lanes that a source wants over it.
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,
    /// End after the first guest has arrived.
    #[arg(long)]
    pub once: bool,
    /// Address and port for metrics of a split guest that is paged here: HTTP, GET /metrics, in Prometheus' text format.
    /// Whoever reaches it can read them.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
    /// Seconds that a loaded guest waits for the source's commit before it is refused for ever.
    #[arg(long, value_name = "S", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_s: u64,
}

/// How memory is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Pre-copy; hybrid if measurement shows that it would not end within the downtime allowed.
    Auto,
    /// All memory first, then the guest. Can be undone to the last moment.
    PreCopy,
    /// The guest first, its memory on demand. From then on the guest needs both hosts until all of
    /// its memory is over.
    PostCopy,
    /// All memory once, then the guest, then on demand what was written meanwhile.
    Hybrid,
}

/// How the guest is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathChoice {
    /// Direct if `migrate check` finds nothing against it, else stream.
    Auto,
    /// Through the shared file that holds its RAM.
    Direct,
    /// Through QEMU's own stream: any VM. QEMU sends, this engine packs; the order of pages and --verify
    /// are the direct path's. Post-copy is QEMU's own and needs RAM in pages of 4 KiB and userfaultfd for the
    /// destination's QEMU. A connection that is lost in it is not replaced: what to tell both QEMUs is said then.
    Stream,
}

/// In which order pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PageOrder {
    /// Those that are written least often first; what is about to be written again waits.
    Heat,
    /// By their number.
    Number,
}

/// Whether something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// What carries pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lanes {
    /// QUIC, and TCP from the moment on at which QUIC has sent 1.2 Gbit/s for a tenth of a second.
    /// QUIC alone where the destination's TCP port cannot be reached.
    Auto,
    /// QUIC.
    Quic,
    /// TCP with TLS 1.3, the same port number and the same identities: fewer processor cycles, for
    /// links faster than QUIC can drive.
    Tcp,
}

impl Lanes {
    /// What the transport is asked for.
    pub fn kind(self) -> LaneKind {
        match self {
            Self::Auto => LaneKind::Auto,
            Self::Quic => LaneKind::Quic,
            Self::Tcp => LaneKind::Tcp,
        }
    }
}

/// How batches of pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// What is fastest, by the measured rates of the link and of packing.
    Auto,
    /// Not at all.
    None,
    /// LZ4, always.
    Lz4,
    /// Zstandard, a stream a lane with a window of 8 MiB at both ends, always.
    Zstd,
}

impl Compression {
    /// What the engine is asked for.
    pub fn wanted(self) -> Wanted {
        match self {
            Self::Auto => Wanted::Auto,
            Self::None => Wanted::Always(Codec::Plain),
            Self::Lz4 => Wanted::Always(Codec::Lz4),
            Self::Zstd => Wanted::Always(Codec::Zstd),
        }
    }
}

/// `migrate send`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "Memory: some 60 MiB with two lanes, 10 MiB for every further lane, at most 4 MiB for each GiB of \
        the guest's RAM, and what --delta-cache allows of 128 MiB for each GiB that was sent."
)]
pub struct SendArgs {
    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Address and port where `migrate receive` listens.
    #[arg(long, value_name = "ADDR")]
    pub to: String,
    /// How memory is moved.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub mode: Mode,
    /// How the guest is reached.
    #[arg(long, value_enum, default_value_t = PathChoice::Auto)]
    pub path: PathChoice,
    /// Longest acceptable downtime, in milliseconds. The guest is stopped at the lowest predicted
    /// downtime below it; if none comes, the guest stays here. Stopped for ten times as long and
    /// --dead-peer-s besides, it runs on here (not under --verify).
    #[arg(long, value_name = "N", default_value_t = 150, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub max_downtime_ms: u64,
    /// Seconds without a better prediction after which a guest counts as not converging.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub patience_s: u64,
    /// Most bits a second to send, with an optional suffix k, M or G (500M).
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    pub max_bandwidth: Option<u64>,
    /// In which order pages are sent.
    #[arg(long, value_enum, default_value_t = PageOrder::Heat)]
    pub page_order: PageOrder,
    /// How batches of pages are packed.
    #[arg(long, value_enum, default_value_t = Compression::Auto)]
    pub compression: Compression,
    /// Memory for hashes of what was sent, by which only the changed lines of a page are sent again:
    /// 512 bytes a page, 0 for none. Suffixes K, M and G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_bytes)]
    pub delta_cache: u64,
    /// Whether a page that is equal to one already sent travels as a reference to it.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub duplicates: Switch,
    /// Whether memory that the guest does not use is skipped, by a look into its kernel: a Linux from 5.4 on that does
    /// not fill what it frees. Any other guest is moved whole.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub skip_unused: Switch,
    /// Compare every page of both sides while both are stopped, those that were skipped as unused with zeros. Lengthens
    /// the downtime.
    #[arg(long)]
    pub verify: bool,
    /// Print one JSON object on stdout at the end.
    #[arg(long)]
    pub json: bool,
    /// Write progress to this file, too, from its beginning: one JSON object a line, four a second. For programs that
    /// run this one.
    #[arg(long, value_name = "FILE")]
    pub progress_file: Option<PathBuf>,
    /// Leave the source's QEMU paused after success instead of quitting it.
    #[arg(long)]
    pub keep_source: bool,
    /// What carries pages; everything else goes over QUIC.
    #[arg(long, value_enum, default_value_t = Lanes::Auto)]
    pub lanes: Lanes,
    /// Lanes: connections that carry pages side by side [default: one a core, at most 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lane_count: Option<u16>,
    /// Longest plausible direct I/O of the guest's disks, in milliseconds: pages that one may have
    /// filled unseen are compared again after this time. Only with disks that use O_DIRECT.
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = clap::value_parser!(u64).range(100..=120_000))]
    pub direct_io_window_ms: u64,
    /// Socket of the preloaded library, to attach without ptrace.
    #[arg(long, value_name = "SOCK")]
    pub preload_socket: Option<PathBuf>,
    /// Seconds to keep asking the destination after the commit before the outcome is called in
    /// doubt.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub ask_s: u64,
}

/// `migrate split`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "What the guest is likely to need goes to the destination, the rest to the memory servers directly, and \
        what it does not use goes nowhere. From then on it needs the destination and, for each page that is not there, \
        one of the servers that hold it; `migrate receive` stays at the destination as its pager. `migrate merge` there \
        brings everything together again.\n\n\
        On the main host of a guest that is split, the guest leaves for another main host: what only this host has goes to \
        the memory servers, which need room for all that it uses, and the new main host fetches it from there. Servers that \
        are not named then have nothing of it any more, those that are new take part. Of the other options --peer, \
        --resident, --max-downtime-ms, --patience-s, --ask-s and --json count."
)]
pub struct SplitArgs {
    /// The options of `migrate send`.
    #[command(flatten)]
    pub send: SendArgs,
    /// Address and port of a `migrate memory-server`; may be repeated.
    #[arg(long, value_name = "ADDR", required = true)]
    pub memory: Vec<String>,
    /// Most memory of the guest that the destination may hold at any time, with suffix K, M or G [default: half of
    /// the guest's memory].
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub resident: Option<u64>,
    /// On how many memory servers each page is that is not at the destination: with 2, one may be lost.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub copies: u8,
}

/// `migrate status`, and what other commands need that talk to the pager of a split guest.
#[derive(Debug, Clone, Args)]
pub struct PagerArgs {
    /// QMP socket of the VM, as it was given to `migrate receive`. It is not connected to. May be left out where one
    /// split guest runs.
    #[arg(long, value_name = "SOCK")]
    pub qmp: Option<PathBuf>,
    /// The journal directory that was given to `migrate receive`.
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `migrate merge`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "The guest goes on meanwhile. The host needs room for all memory that the guest uses. Interrupted, the \
        command leaves the merge under way; asked again, it shows how far that is. With --to, the guest first leaves for \
        that host, by way of its memory servers, which need room for all that it uses; interrupted before it has left, it \
        stays. `migrate status` there shows how far the merge is."
)]
pub struct MergeArgs {
    /// Which guest.
    #[command(flatten)]
    pub pager: PagerArgs,
    /// Address and port of another host where `migrate receive` listens: the guest goes there and is merged there.
    #[arg(long, value_name = "ADDR")]
    pub to: Option<String>,
    /// With --to: take that host only if its identity has this name.
    #[arg(long, value_name = "NAME", requires = "to")]
    pub peer: Option<String>,
    /// With --to: longest acceptable downtime in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 300, requires = "to", value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub max_downtime_ms: u64,
    /// With --to: seconds without a better prediction of the downtime after which the guest stays.
    #[arg(long, value_name = "S", default_value_t = 30, requires = "to", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub patience_s: u64,
    /// With --to: seconds to keep asking that host after the hand-over before the outcome is called in doubt.
    #[arg(long, value_name = "S", default_value_t = 30, requires = "to", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub ask_s: u64,
}

/// `migrate move-fragment`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "The guest goes on meanwhile. The servers to which pages move reserve room for all that the guest may \
        ever have there, or refuse before anything is moved. Interrupted, the command leaves the move under way; asked \
        again, it shows how far that is."
)]
pub struct MoveFragmentArgs {
    /// Which guest.
    #[command(flatten)]
    pub pager: PagerArgs,
    /// Address and port of the memory server that is to have nothing of the guest any more.
    #[arg(long, value_name = "ADDR")]
    pub from: String,
    /// Address and port of a further memory server. Without it, pages move to those that the guest has.
    #[arg(long, value_name = "ADDR")]
    pub to: Option<String>,
}

/// `migrate resolve`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Run it where an engine died or a `send` ended in doubt (exit code 3). It reads the \
    journal, asks the other end where that is possible, and resumes, releases or discards the guest \
    accordingly. Only with --run-here or --runs-there does it act on your word: use them after you made \
    sure (fencing, a look at the other host) that they are true."
)]
pub struct ResolveArgs {
    /// QMP socket of the VM, as it was given to the command that was interrupted.
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// Where unfinished migrations are recorded.
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// The destination's address, if it changed.
    #[arg(long, value_name = "ADDR")]
    pub to: Option<String>,
    /// Directory of this host's identity, if it moved.
    #[arg(long, value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// The other end does not run the guest and never will: run it here.
    #[arg(long, conflicts_with = "runs_there")]
    pub run_here: bool,
    /// The other end has the guest: release it here.
    #[arg(long)]
    pub runs_there: bool,
    /// Print one JSON object on stdout at the end.
    #[arg(long)]
    pub json: bool,
}

/// `migrate memory-server`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "Memory: what is stored of --capacity, less what compression saves; 1 % of it to find pages by; for each \
        guest up to 14 MiB more; 3 MiB for each connection that is busy.\n\n\
        Whatever --per-host says, one host has at most a quarter of the stores and of the connections that there may be."
)]
pub struct MemoryServerArgs {
    /// Address and TCP port to listen on.
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Directory of this host's identity, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub identity: PathBuf,
    /// Memory that guests may reserve here in all, at most what this machine has available. Suffixes K, M and G.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub capacity: u64,
    /// Memory of --capacity that one host, by the name in its certificate, may reserve for the guests that it brings
    /// here [default: all of --capacity, so that one host can take all of it]. Suffixes K, M and G.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub per_host: Option<u64>,
    /// Whether pages are kept compressed. What that saves is not promised to further guests.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub compress: Switch,
    /// Seconds without a request after which pages of a migration that did not complete are dropped.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub lease_s: u64,
    /// Address and port for metrics: HTTP, GET /metrics, in Prometheus' text format. Whoever reaches it can read them.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
    /// Take hosts only if their identity has this name; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub peer: Vec<String>,
}

/// `migrate agent`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "The file is in TOML. A table for each part, with the options of the command that does the same:\n\n  \
        identity = \"/etc/godwit/pki/host-a\"   # for all parts; a table may name another\n  \
        journal = \"/var/lib/godwit/journal\"   # may be left out\n  \
        metrics = \"127.0.0.1:9700\"            # all parts on one page; may be left out\n\n  \
        [memory-server]                       # `migrate memory-server --help`\n  \
        listen = \"0.0.0.0:7701\"\n  \
        capacity = \"64G\"\n\n  \
        [[receive]]                           # `migrate receive --help`; one for each VM\n  \
        qmp = \"/run/godwit/web.qmp\"\n  \
        listen = \"0.0.0.0:7710\"\n\n\
        A receiver begins when a QEMU that waits makes its QMP socket, and begins again with the next one; a guest that \
        runs there already is left alone. A pager that died is taken up again. On the first Ctrl-C or SIGTERM all parts end \
        that no guest needs; on the second the others too. Pages that the memory server keeps are in this process: merge \
        the guests that need them before it is restarted."
)]
pub struct AgentArgs {
    /// What to do.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// `migrate demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Kernel to boot [made by `cargo xtask setup`].
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Its initial RAM disk with the guest's programs.
    #[arg(long, value_name = "FILE")]
    pub initrd: PathBuf,
    /// QEMU binary to run.
    #[arg(long, value_name = "BIN", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// Directory of QEMU's firmware, if it is not where the binary expects it.
    #[arg(long, value_name = "DIR")]
    pub qemu_data: Option<PathBuf>,
    /// Memory of the guest in MiB.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..=1 << 20))]
    pub memory_mib: u64,
    /// Times to migrate it there and back.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub moves: u32,
    /// Print one JSON object a move on stdout.
    #[arg(long)]
    pub json: bool,
}

fn parse_bits(text: &str) -> Result<u64, String> {
    parse_number(text, 1000)
        .filter(|bits| *bits >= 100_000)
        .ok_or_else(|| "a rate of at least 100k is needed, such as 500M or 1G".to_owned())
}

/// A size in bytes, with an optional suffix that stands for a power of 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    parse_number(text, 1024).ok_or_else(|| "a size is needed, such as 512M, 2G or 0".to_owned())
}

/// A number with an optional suffix k, M or G.
fn parse_number(text: &str, kilo: u64) -> Option<u64> {
    let (digits, power) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (text.get(..at), 1),
        (at, 'm' | 'M') => (text.get(..at), 2),
        (at, 'g' | 'G') => (text.get(..at), 3),
        _ => (Some(text), 0),
    };
    digits?.parse::<u64>().ok()?.checked_mul(kilo.pow(power))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rates_have_suffixes() {
        assert_eq!(parse_bits("500M"), Ok(500_000_000));
        assert_eq!(parse_bits("1G"), Ok(1_000_000_000));
        assert_eq!(parse_bits("250000"), Ok(250_000));
        for bad in ["", "M", "1", "-5M", "99999999999G", "1T"] {
            assert!(parse_bits(bad).is_err(), "{bad}");
        }
        assert_eq!(
            (parse_bytes("0"), parse_bytes("2k"), parse_bytes("1G")),
            (Ok(0), Ok(2048), Ok(1 << 30))
        );
        assert!(parse_bytes("M").is_err() && parse_bytes("lots").is_err());
    }
}
