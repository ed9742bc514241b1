//! Why a VM could not be examined.

use migrate_core::error::{Classify, ErrorBin};
use thiserror::Error;

use crate::error::ProcError;
use crate::qmp::QmpError;

/// An inventory that could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// The monitor failed or refused.
    #[error("The VM could not be examined through QMP")]
    Qmp(#[from] QmpError),
    /// QEMU's process could not be examined.
    #[error("QEMU's process could not be examined")]
    Process(#[from] ProcError),
    /// The text of a human monitor command has an unknown form.
    #[error("QEMU's answer to {command:?} has a form that this engine does not know: {line:?}")]
    Text {
        /// The command.
        command: &'static str,
        /// The first line that was not understood.
        line: String,
    },
    /// A human monitor command lists more than this engine accepts.
    #[error("QEMU's answer to {command:?} lists more than {limit} entries")]
    TooMany {
        /// The command.
        command: &'static str,
        /// The limit.
        limit: usize,
    },
    /// No process here is this QEMU.
    #[error(
        "QEMU's process was not found (threads {threads:?}, socket held by process {peer}); is it \
         in a container or on another host?"
    )]
    NoProcess {
        /// The vCPU threads as QEMU names them.
        threads: Vec<i32>,
        /// The process that the socket names.
        peer: i32,
    },
    /// The machine's class has another name than all known ones.
    #[error("QEMU names its machine {found}, which is no machine type")]
    MachineType {
        /// The name.
        found: String,
    },
    /// RAM blocks changed while they were examined.
    #[error("The VM's RAM blocks keep changing; is memory being plugged? Try again later")]
    Changing,
    /// The examining task ended early.
    #[error("The examination of QEMU's process was interrupted")]
    Interrupted,
}

impl Classify for VmError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Qmp(error) => error.bin(),
            Self::Process(error) => error.bin(),
            _ => ErrorBin::System,
        }
    }
}
