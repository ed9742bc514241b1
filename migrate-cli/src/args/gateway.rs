//! What can be typed about gateways.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Compression, Lanes, parse_bits, parse_bytes};
use crate::gateway::addr::QemuAddr;

/// `migrate gateway`.
#[derive(Debug, Subcommand)]
pub enum GatewayCommand {
    /// Where guests leave: their QEMUs connect here.
    Source(GatewaySourceArgs),
    /// Where guests arrive: connects to the QEMUs that wait for them.
    Destination(GatewayDestinationArgs),
}

/// What both ends of a gateway have in common.
#[derive(Debug, Clone, Args)]
pub struct GatewayArgs {
    /// Directory of this host's identity, made by `migrate pki issue`.
    #[arg(long, value_name = "DIR")]
    pub identity: PathBuf,
    /// Seconds of silence after which the other gateway counts as dead.
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub dead_peer_s: u64,
    /// Seconds for which a lost connection to the other gateway is made again, or waited for, while QEMU waits; 0 for
    /// not at all. Then QEMU sees its connection end.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub reconnect_s: u64,
    /// Address and port for metrics: HTTP, GET /metrics, in Prometheus' text format. Whoever
    /// reaches it can read them.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
    /// Most guests at a time.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub guests_max: u16,
}

/// `migrate gateway source`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "Whoever drives the migration lets QEMU send to this gateway instead of the destination:\n  \
        virsh migrate --live GUEST qemu+ssh://DESTINATION/system --migrateuri tcp://THIS-HOST:49152\n  \
        migrate -d unix:/run/godwit/out.sock        in QEMU's monitor\n\n\
        Leave multifd, xbzrle, compression and TLS of QEMU's own off: the gateways do all of that between them. Switch the \
        capability return-path on at both QEMUs (libvirt does): with it the source's QEMU gives its guest up only when that at \
        the destination has it. If anything fails before, it sees its connection end and lets the guest run on here."
)]
pub struct GatewaySourceArgs {
    /// What both ends have in common.
    #[command(flatten)]
    pub common: GatewayArgs,
    /// Where QEMUs connect: unix:PATH, HOST:PORT or HOST:FIRST-LAST; may be repeated. Of several ports, each leads to the
    /// QEMU that listens on the same one at the destination. Nothing is asked of who connects: use an address that only
    /// this host reaches.
    #[arg(long, value_name = "ADDR", required = true)]
    pub listen: Vec<QemuAddr>,
    /// Who may connect to Unix sockets, as a file's mode. QEMUs that libvirt starts have a user of their own.
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode)]
    pub socket_mode: u32,
    /// Address and port where `migrate gateway destination` listens.
    #[arg(long, value_name = "ADDR")]
    pub to: String,
    /// Take the other gateway only if its identity has this name.
    #[arg(long, value_name = "NAME")]
    pub peer: Option<String>,
    /// How batches of pages are packed.
    #[arg(long, value_enum, default_value_t = Compression::Auto)]
    pub compression: Compression,
    /// Memory a guest for hashes of what was sent, by which only the changed lines of a page are sent again:
    /// 512 bytes a page, 0 for none. Suffixes K, M and G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_bytes)]
    pub delta_cache: u64,
    /// Most bits a second to send for each guest, with an optional suffix k, M or G (500M).
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    pub max_bandwidth: Option<u64>,
    /// What carries pages; everything else goes over QUIC.
    #[arg(long, value_enum, default_value_t = Lanes::Auto)]
    pub lanes: Lanes,
    /// Lanes: connections that carry pages side by side [default: one a core, at most 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lane_count: Option<u16>,
    /// Print one JSON object a guest on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `migrate gateway destination`.
#[derive(Debug, Clone, Args)]
pub struct GatewayDestinationArgs {
    /// What both ends have in common.
    #[command(flatten)]
    pub common: GatewayArgs,
    /// Address and port to listen on, for gateways.
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Where QEMUs wait for guests: unix:PATH, HOST:PORT, or HOST with or without a range of ports [default: 49152-49215, those
    /// of libvirt], for whatever port of these the source's QEMU connected to.
    #[arg(long, value_name = "ADDR")]
    pub qemu: QemuAddr,
    /// Take gateways only if their identity has this name.
    #[arg(long, value_name = "NAME")]
    pub peer: Option<String>,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "a mode of files is needed, such as 600 or 660".into())
}
