//! Everything that can end a migration early, in the four bins, and how it is told.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use fctrans::error::IntrospectError;
use migrate_core::codec::CodecError;
use migrate_core::convergence::Stall;
use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::LayoutError;
use migrate_core::postcopy::PostcopyError;
use migrate_core::precopy::OutOfTurn;
use migrate_core::remote::{PlacementError, RemoteError};
use migrate_core::store::StoreError;
use qemu_glue::check::Finding;
use qemu_glue::device_state::DeviceStateError;
use qemu_glue::error::{AttachError, ProcError, RamError, TrackError};
use qemu_glue::pager::PagerError;
use qemu_glue::qmp::QmpError;
use qemu_glue::stream::StreamError;
use qemu_glue::vm::VmError;
use thiserror::Error;
use transport::messages::{AbortCode, RefuseCode, RejectCode};
use transport::{IdentityError, TransportError};

use crate::destination::apply::ApplyError;
use crate::journal::JournalError;
use crate::source::outlet::PumpError;

/// What ended a migration, or kept it from starting.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// QEMU's monitor failed.
    #[error("QEMU's monitor failed")]
    Qmp(#[from] QmpError),
    /// The VM could not be described.
    #[error("The VM cannot be described")]
    Vm(#[from] VmError),
    /// The QEMU process could not be looked at.
    #[error("QEMU's process cannot be looked at")]
    Process(#[from] ProcError),
    /// Nothing can be seen of the guest's kernel.
    #[error("The guest's kernel cannot be looked into")]
    Introspect(#[from] IntrospectError),
    /// The engine could not attach.
    #[error("Cannot attach to QEMU")]
    Attach(#[from] AttachError),
    /// Guest RAM could not be used.
    #[error("The guest's memory cannot be used")]
    Ram(#[from] RamError),
    /// Writes could not be tracked.
    #[error("The guest's writes cannot be tracked")]
    Track(#[from] TrackError),
    /// Device state could not be saved or loaded.
    #[error("The device state cannot be moved")]
    DeviceState(#[from] DeviceStateError),
    /// A part of the device state is not what it was announced to be.
    #[error("The device state is damaged")]
    DamagedState(#[from] CodecError),
    /// The session failed.
    #[error("The session failed")]
    Transport(#[from] TransportError),
    /// Nobody answers where the destination should be.
    #[error("Nobody answers at {addr}: is `{command}` running there, and does UDP get through?")]
    Unreachable {
        /// Where.
        addr: SocketAddr,
        /// What should run there.
        command: &'static str,
        /// What was noticed.
        #[source]
        source: Box<TransportError>,
    },
    /// Pages could not be sent.
    #[error("Pages cannot be sent")]
    Pump(#[from] PumpError),
    /// Pages could not be applied.
    #[error("Pages cannot be applied")]
    Apply(#[from] ApplyError),
    /// The journal could not be kept.
    #[error("The migration cannot be recorded")]
    Journal(#[from] JournalError),
    /// RAM cannot be numbered, or differs.
    #[error(
        "The guest's RAM does not fit: start the destination's QEMU with the source's memory options"
    )]
    Layout(#[from] LayoutError),
    /// A page was asked for or sent that is not missing.
    #[error("The peer lost track of the missing pages")]
    Postcopy(#[from] PostcopyError),
    /// The guest's page faults could not be served.
    #[error("The guest's page faults cannot be served")]
    Pager(#[from] PagerError),
    /// A memory server is not reached, or was lost.
    #[error(
        "The memory server at {address} is not reached: is `migrate memory-server` running there?"
    )]
    NoStore {
        /// Where.
        address: String,
        /// What was noticed.
        #[source]
        source: Box<TransportError>,
    },
    /// A memory server refuses something.
    #[error("The memory server at {address} refuses")]
    StoreRefused {
        /// Where.
        address: String,
        /// Its reason.
        #[source]
        source: StoreError,
    },
    /// The memory servers have too little room.
    #[error("The guest's memory cannot be split")]
    Placement(#[from] PlacementError),
    /// Where pages are contradicts what is done with them.
    #[error("The pages of the split guest were lost track of")]
    Remote(#[from] RemoteError),
    /// A bug: a state machine was called out of turn.
    #[error("The engine lost its way; please report this")]
    OutOfTurn(#[from] OutOfTurn),
    /// `migrate check` would have said so.
    #[error("{}", blockers(.0))]
    Blocked(Vec<Finding>),
    /// The destination does not take the guest.
    #[error("The destination refuses the guest ({code:?}): {text}")]
    Refused {
        /// Why, for programs.
        code: RefuseCode,
        /// Why, in words.
        text: String,
    },
    /// The other end gave up.
    #[error("The other end gave up ({code:?}): {text}")]
    PeerAborted {
        /// Why, for programs.
        code: AbortCode,
        /// Why, in words.
        text: String,
    },
    /// A message came that does not belong here.
    #[error("The peer sent {got} while {wanted} was due")]
    OutOfPlace {
        /// What came.
        got: &'static str,
        /// What was due.
        wanted: &'static str,
    },
    /// Nothing came in time.
    #[error("The peer did not send {wanted} within {seconds} s")]
    TooSlow {
        /// What was due.
        wanted: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// There is nobody to replace a lost session with.
    #[error("Nobody listens at {addr} any more; what was known there of the guest is gone")]
    PeerGone {
        /// Where.
        addr: SocketAddr,
    },
    /// A lost session was not replaced.
    #[error("The connection was lost, and not made again within {seconds} s")]
    ContactLost {
        /// How long was waited.
        seconds: u64,
        /// What was noticed last.
        #[source]
        source: Box<Self>,
    },
    /// A message that contradicts what is known.
    #[error("The peer says {0}")]
    Contradiction(String),
    /// No round will reach the target.
    #[error("{}", stall(.0))]
    NotConverging(Stall),
    /// What was said of the guest's memory does not hold any more.
    #[error(
        "The guest was reset meanwhile, or runs another kernel or guests of its own: memory was left out that it may use; \
         try again, or with --skip-unused off"
    )]
    OtherKernel,
    /// Ctrl-C.
    #[error("Cancelled")]
    Cancelled,
    /// The run state read back is not the one that should be.
    #[error("QEMU is {found} where it should be {wanted}")]
    RunState {
        /// What QEMU says.
        found: String,
        /// What it should say.
        wanted: &'static str,
    },
    /// RAM changed its shape during the migration.
    #[error(
        "The guest's RAM blocks changed during the migration; migrate it again once that is over"
    )]
    RamChanged,
    /// Mismatches under `--verify`.
    #[error("{mismatches} of {pages} pages differ at the destination; please report this")]
    Mismatch {
        /// Pages that differ.
        mismatches: u64,
        /// Pages compared.
        pages: u64,
    },
    /// QEMU takes no guest.
    #[error(
        "QEMU is {state} and does not wait for a guest. Start it with -incoming defer and otherwise the source's options"
    )]
    NotWaiting {
        /// What it is.
        state: String,
    },
    /// Something asked for that cannot be had.
    #[error("{what}. {remedy}")]
    Misuse {
        /// What is wrong.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The pager of a split guest does not do what was asked of it.
    #[error("{text}")]
    PagerRefused {
        /// Why, with the remedy.
        text: String,
        /// Whether it made no sense.
        is_misuse: bool,
    },
    /// An earlier migration is unfinished.
    #[error(
        "An earlier migration of this VM is not over ({migration}); end it with \
         `migrate resolve --qmp {qmp}` first"
    )]
    Unresolved {
        /// Its id.
        migration: String,
        /// The VM's QMP socket.
        qmp: PathBuf,
    },
    /// It is not known which end has the guest.
    #[error(
        "The outcome is in doubt: the guest was handed over, and the destination does not answer. \
         The guest here stays stopped. Make the destination reachable and run `migrate resolve \
         --qmp {qmp}`, or, after making sure that the guest does not run there, add --run-here"
    )]
    InDoubt {
        /// The VM's QMP socket.
        qmp: PathBuf,
    },
    /// The guest runs at the destination, its missing pages are here.
    #[error(
        "The guest runs at the destination and needs memory that is here ({pages} pages at most), \
         but the destination cannot be reached. Its threads wait for that memory. Leave this QEMU \
         as it is, make the destination reachable and run `migrate resolve --qmp {qmp}` here"
    )]
    Unserved {
        /// The VM's QMP socket.
        qmp: PathBuf,
        /// Pages that were not sent.
        pages: u64,
    },
    /// The guest was handed over by its QEMU's post-copy, and the connection is gone.
    #[error(
        "The guest was handed over by post-copy, and the connection is broken: it is at the destination and needs memory \
         that is here. Leave both QEMUs as they are, above all this one. To go on, let the destination's QEMU listen once \
         more, by QMP: {{\"exec-oob\": \"migrate-recover\", \"arguments\": {{\"uri\": \"tcp:0.0.0.0:PORT\"}}}} (its monitor \
         needs the capability oob), then this one send the rest: {{\"execute\": \"migrate\", \"arguments\": {{\"uri\": \
         \"tcp:HOST:PORT\", \"resume\": true}}}}. Once `query-migrate` says completed, run `migrate resolve --qmp {qmp}` here"
    )]
    Stranded {
        /// The VM's QMP socket.
        qmp: PathBuf,
    },
    /// The guest belongs here and does not run.
    #[error(
        "The migration was undone ({why}), but the guest could not be resumed; put that right and \
         run `migrate resolve --qmp {qmp}`"
    )]
    Stuck {
        /// The VM's QMP socket.
        qmp: PathBuf,
        /// What ended the migration.
        why: String,
        /// What kept the guest from running.
        #[source]
        source: Box<Self>,
    },
    /// A QEMU's stream carries what cannot be passed on, or is damaged.
    #[error("QEMU's stream cannot be passed on")]
    Stream(#[from] StreamError),
    /// A QEMU's stream carries what a gateway does not take.
    #[error("QEMU's stream carries {0}")]
    NotTaken(&'static str),
    /// A QEMU that sends or takes a guest by itself is gone.
    #[error("The connection to QEMU failed")]
    QemuSocket(#[source] io::Error),
    /// A task of the engine ended unexpectedly.
    #[error("A part of the engine ended unexpectedly: {0}")]
    Internal(String),
}

impl From<IdentityError> for EngineError {
    fn from(error: IdentityError) -> Self {
        Self::Transport(TransportError::Identity(error))
    }
}

impl Classify for EngineError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Qmp(error) => error.bin(),
            Self::Vm(error) => error.bin(),
            Self::Process(error) => error.bin(),
            Self::Introspect(error) => error.bin(),
            Self::DamagedState(error) => error.bin(),
            Self::Attach(error) => error.bin(),
            Self::Ram(error) => error.bin(),
            Self::Track(error) => error.bin(),
            Self::DeviceState(error) => error.bin(),
            Self::Transport(error) => error.bin(),
            Self::Apply(error) => error.bin(),
            Self::Journal(error) => error.bin(),
            Self::Layout(error) => error.bin(),
            Self::OutOfPlace { .. } | Self::Contradiction(_) => ErrorBin::PeerMisbehaved,
            Self::Refused { .. } => ErrorBin::PeerIncompatible,
            Self::Stream(error) => error.bin(),
            Self::QemuSocket(_) => ErrorBin::System,
            Self::Blocked(_)
            | Self::NotTaken(_)
            | Self::NotConverging(_)
            | Self::OtherKernel
            | Self::Cancelled
            | Self::Misuse { .. }
            | Self::NotWaiting { .. }
            | Self::PagerRefused { is_misuse: true, .. }
            | Self::Unresolved { .. } => ErrorBin::CallerMisuse,
            Self::PeerAborted { code, .. } => match code {
                AbortCode::Protocol => ErrorBin::PeerMisbehaved,
                _ => ErrorBin::System,
            },
            Self::Postcopy(error) => error.bin(),
            Self::Pager(error) => error.bin(),
            Self::Placement(error) => error.bin(),
            Self::Remote(error) => error.bin(),
            Self::NoStore { source, .. } => source.bin(),
            Self::StoreRefused { source, .. } => source.bin(),
            Self::OutOfTurn(_)
            | Self::Pump(_)
            | Self::TooSlow { .. }
            | Self::ContactLost { .. }
            | Self::PeerGone { .. }
            | Self::RunState { .. }
            | Self::RamChanged
            | Self::Mismatch { .. }
            | Self::InDoubt { .. }
            | Self::Unserved { .. }
            | Self::Stranded { .. }
            | Self::Unreachable { .. }
            | Self::Stuck { .. }
            | Self::PagerRefused { is_misuse: false, .. }
            | Self::Internal(_) => ErrorBin::System,
        }
    }
}

impl EngineError {
    /// The error and its causes in one line.
    pub fn tell(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let next = error.to_string();
            if !text.ends_with(&next) {
                let _infallible = write!(text, ": {next}");
            }
            cause = error.source();
        }
        text
    }

    /// What the other end is told.
    pub fn abort_code(&self) -> AbortCode {
        match self {
            Self::Cancelled => AbortCode::Cancelled,
            Self::NotConverging(_) => AbortCode::NotConverging,
            Self::Qmp(_)
            | Self::Vm(_)
            | Self::DeviceState(_)
            | Self::RunState { .. }
            | Self::Stream(_)
            | Self::NotTaken(_)
            | Self::QemuSocket(_) => AbortCode::Qemu,
            Self::Ram(_) | Self::Track(_) | Self::Attach(_) | Self::RamChanged => AbortCode::Memory,
            Self::Mismatch { .. } => AbortCode::Mismatch,
            Self::TooSlow { .. } => AbortCode::Timeout,
            Self::OutOfPlace { .. }
            | Self::Contradiction(_)
            | Self::Apply(_)
            | Self::DamagedState(_) => AbortCode::Protocol,
            _ => AbortCode::Internal,
        }
    }

    /// Whether contact with the peer is gone, so that telling it anything is in vain.
    pub fn is_lost_contact(&self) -> bool {
        matches!(
            self,
            Self::Transport(error) if !matches!(error, TransportError::Rejected { .. })
        ) || matches!(self, Self::ContactLost { .. } | Self::PeerGone { .. })
    }

    /// Whether another attempt at the same may succeed without a change.
    pub fn is_busy(&self) -> bool {
        matches!(
            self,
            Self::Transport(TransportError::Rejected { code: RejectCode::Busy, .. })
                | Self::Refused { code: RefuseCode::Busy, .. }
        )
    }
}

fn blockers(findings: &[Finding]) -> String {
    let mut text = String::from("This VM cannot be migrated");
    for finding in findings {
        let _infallible = write!(text, "; {}", finding.what);
        if let Some(remedy) = &finding.remedy {
            let _infallible = write!(text, " ({remedy})");
        }
    }
    text
}

fn stall(stall: &Stall) -> String {
    format!(
        "The guest does not converge: it dirties {:.1} MB/s, the link carries {:.1} MB/s, and the \
         lowest downtime predicted was {:.0} ms. Allow that with --max-downtime-ms {:.0}, use a \
         faster link, or migrate when the guest is less busy",
        stall.dirty_bytes_per_s / 1e6,
        stall.goodput_bytes_per_s / 1e6,
        stall.best_ms,
        (stall.best_ms * 1.2).ceil(),
    )
}
