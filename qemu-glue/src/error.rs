//! What can go wrong between the engine and a QEMU process: /proc, attaching, RAM, tracking.
//!
//! Texts say what failed and where and, where there is one, the remedy. The kernel's own words are
//! in the source of each error and are not repeated.

use std::io;
use std::path::PathBuf;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::{LayoutError, PageIndex};
use thiserror::Error;

/// A question to /proc that was not answered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProcError {
    /// The process (or thread) does not exist any more.
    #[error("Process {pid} does not exist")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// A file of the process could not be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is longer than its named limit.
    #[error("{} is longer than {limit_bytes} bytes, the most that is read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit_bytes: usize,
    },
    /// A file does not have the form that proc(5) describes.
    #[error("{} has a form that is not understood: {line:?}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, shortened.
        line: String,
    },
    /// The process number now belongs to another process.
    #[error("Process {pid} was replaced by another one with the same number")]
    Replaced {
        /// The number.
        pid: i32,
    },
}

impl Classify for ProcError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Gone { .. } | Self::Replaced { .. } => ErrorBin::CallerMisuse,
            _ => ErrorBin::System,
        }
    }
}

/// Why no userfaultfd of QEMU's address space could be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// /proc did not answer.
    #[error("Cannot inspect process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ProcError,
    },
    /// A debugger or another engine traces a thread.
    #[error(
        "Thread {tid} of process {pid} is traced by process {tracer_pid}; end that debugger or \
         engine, then try again"
    )]
    AlreadyTraced {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Who traces it.
        tracer_pid: i32,
    },
    /// The kernel does not let this process trace QEMU.
    #[error(
        "Process {pid} may not be traced from here; run as the same user with \
         kernel.yama.ptrace_scope=0, give the engine CAP_SYS_PTRACE, or start QEMU with \
         libgodwit_preload.so"
    )]
    PtraceDenied {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A ptrace request failed where none should.
    #[error("Cannot {what} thread {tid}")]
    Ptrace {
        /// What was to be done.
        what: &'static str,
        /// The thread.
        tid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A thread did not reach the stop that was waited for.
    #[error("Thread {tid} did not {what} within {timeout_ms} ms")]
    Timeout {
        /// The thread.
        tid: i32,
        /// What it should have done.
        what: &'static str,
        /// How long was waited, in ms.
        timeout_ms: u64,
    },
    /// The thread ended while it was held.
    #[error("Thread {tid} ended while it was being attached to")]
    ThreadExited {
        /// The thread.
        tid: i32,
    },
    /// This thread is in a state in which nothing may be injected; another one may do.
    #[error("Thread {tid} cannot take an injected call: {reason}")]
    Unsuitable {
        /// The thread.
        tid: i32,
        /// Why.
        reason: String,
    },
    /// No thread of the process could take the call.
    #[error("None of the {tried} threads tried in process {pid} could take an injected call")]
    NoThread {
        /// The process.
        pid: i32,
        /// How many were tried.
        tried: usize,
        /// What the last one said.
        #[source]
        last: Option<Box<Self>>,
    },
    /// The instructions needed are not in the process's code.
    #[error(
        "Process {pid} has no {what} in its vDSO, libc or other code; start QEMU with \
         libgodwit_preload.so"
    )]
    NoGadget {
        /// The process.
        pid: i32,
        /// What was looked for.
        what: &'static str,
    },
    /// QEMU itself may not create a userfaultfd.
    #[error(
        "Process {pid} may not create a userfaultfd that sees faults of the kernel; set \
         vm.unprivileged_userfaultfd=1 or give QEMU CAP_SYS_PTRACE"
    )]
    UserfaultfdDenied {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel has no userfaultfd, or a filter of the process hides it.
    #[error("Process {pid} could not create a userfaultfd")]
    Userfaultfd {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The seccomp filter of the process would not let a call through.
    #[error(
        "The seccomp filter of process {pid} does not allow {call} ({action}); start QEMU without \
         that filter or with libgodwit_preload.so and a filter that allows it"
    )]
    Seccomp {
        /// The process.
        pid: i32,
        /// The system call.
        call: &'static str,
        /// What the filter would do.
        action: String,
    },
    /// The descriptor could not be taken over.
    #[error("Cannot take descriptor {remote_fd} over from process {pid}")]
    TakeOver {
        /// The process.
        pid: i32,
        /// Its number there.
        remote_fd: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// QEMU's copy of a descriptor could not be closed.
    #[error("Descriptor {remote_fd} stays open in process {pid}; the next attach closes it")]
    CloseRemote {
        /// The process.
        pid: i32,
        /// Its number there.
        remote_fd: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The socket of the preloaded library did not do what it should.
    #[error("Cannot {what} the preload socket {}", path.display())]
    Preload {
        /// What was to be done.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process than the one asked for answers on the socket.
    #[error(
        "The preload socket {} belongs to process {found}, not to process {expected}; use %p in \
         GODWIT_PRELOAD_SOCKET to give each QEMU a socket of its own",
        path.display()
    )]
    PreloadWrongProcess {
        /// The socket.
        path: PathBuf,
        /// Who answered.
        found: i32,
        /// Who should have.
        expected: i32,
    },
    /// The dedicated thread could not be started or ended without an answer.
    #[error("The thread that traces process {pid} could not do its work")]
    TracerThread {
        /// The process.
        pid: i32,
        /// Why it could not be started; nothing if it ended early.
        #[source]
        source: Option<io::Error>,
    },
}

impl AttachError {
    /// Whether another thread of the same process may still take the call.
    pub(crate) fn another_thread_may_do(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. }
                | Self::ThreadExited { .. }
                | Self::Unsuitable { .. }
                | Self::Proc { source: ProcError::Gone { .. }, .. }
        )
    }
}

impl Classify for AttachError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Proc { source, .. } => source.bin(),
            Self::AlreadyTraced { .. }
            | Self::PtraceDenied { .. }
            | Self::NoGadget { .. }
            | Self::UserfaultfdDenied { .. }
            | Self::Seccomp { .. }
            | Self::PreloadWrongProcess { .. } => ErrorBin::CallerMisuse,
            _ => ErrorBin::System,
        }
    }
}

/// Why guest RAM could not be opened, read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// /proc did not answer.
    #[error("Cannot look up guest RAM of process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ProcError,
    },
    /// The memory of the process may not be read.
    #[error(
        "The memory of process {pid} cannot be opened; run as the user that runs QEMU, or as root"
    )]
    Trace {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The list of blocks makes no layout.
    #[error("The RAM blocks of process {pid} cannot be used")]
    Layout {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: LayoutError,
    },
    /// The address range of a block is not mapped, or not completely.
    #[error(
        "RAM block {block:?}: address {address:#x} of process {pid} is not mapped; was the block \
         unplugged?"
    )]
    NotMapped {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
        /// The first address without a mapping.
        address: u64,
    },
    /// The block is private memory.
    #[error(
        "RAM block {block:?} is private memory of QEMU; start QEMU with \
         -object memory-backend-file,share=on on tmpfs or hugetlbfs, or use the stream path"
    )]
    Private {
        /// The block.
        block: String,
    },
    /// The block lies in a file system whose pages do not stay in memory.
    #[error(
        "RAM block {block:?} is mapped from {path:?}, which is neither tmpfs, hugetlbfs nor memfd \
         (file system type {fs_type:#x}); put it on /dev/shm or hugetlbfs, or use the stream path"
    )]
    WrongFileSystem {
        /// The block.
        block: String,
        /// What /proc/PID/maps names.
        path: String,
        /// `f_type` of statfs(2).
        fs_type: u64,
    },
    /// The block's address range is made of pieces that do not follow one another in one file.
    #[error("RAM block {block:?} is not one piece of one file (at address {address:#x})")]
    Scattered {
        /// The block.
        block: String,
        /// Where the first piece ends.
        address: u64,
    },
    /// The inventory's page size is not the mapping's.
    #[error(
        "RAM block {block:?} has pages of {found_bytes} bytes, {claimed_bytes} were claimed; read \
         the inventory again"
    )]
    PageSize {
        /// The block.
        block: String,
        /// What the caller said, in bytes.
        claimed_bytes: u64,
        /// What the file system says, in bytes.
        found_bytes: u64,
    },
    /// The backing file could not be opened by any way.
    #[error("Cannot open the file behind RAM block {block:?} (mapped from {path:?})")]
    Open {
        /// The block.
        block: String,
        /// What /proc/PID/maps names.
        path: String,
        /// The last answer.
        #[source]
        source: io::Error,
    },
    /// The backing file is shorter than the mapping.
    #[error(
        "The file behind RAM block {block:?} ends at {file_bytes} bytes, {needed_bytes} needed"
    )]
    Short {
        /// The block.
        block: String,
        /// Its length in bytes.
        file_bytes: u64,
        /// End of the block within the file, in bytes.
        needed_bytes: u64,
    },
    /// A page outside the layout, a buffer of a wrong length or one that crosses a block.
    #[error("{pages} pages from {first} on, in {buffer_bytes} bytes, do not lie in one RAM block")]
    OutOfRange {
        /// First page.
        first: PageIndex,
        /// Number of pages.
        pages: u64,
        /// Length of the caller's buffer in bytes; 0 where there is none.
        buffer_bytes: usize,
    },
    /// Opened for reading only.
    #[error("RAM block {block:?} was opened for reading only")]
    ReadOnly {
        /// The block.
        block: String,
    },
    /// An operation on the backing file failed.
    #[error("Cannot {what} RAM block {block:?} at offset {offset_bytes:#x}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// The block.
        block: String,
        /// Offset within the block, in bytes.
        offset_bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Classify for RamError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Proc { source, .. } => source.bin(),
            Self::Trace { .. }
            | Self::NotMapped { .. }
            | Self::Open { .. }
            | Self::Short { .. }
            | Self::Io { .. } => ErrorBin::System,
            _ => ErrorBin::CallerMisuse,
        }
    }
}

/// Why writes to guest RAM could not be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrackError {
    /// The kernel lacks what tracking needs.
    #[error("The kernel lacks {what}; Linux 6.7 or newer is needed, or use the stream path")]
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
    /// The handshake with the userfaultfd failed.
    #[error("The userfaultfd of process {pid} refused the handshake; was it used before?")]
    Handshake {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another userfaultfd owns the mapping.
    #[error(
        "RAM block {block:?} of process {pid} is registered with another userfaultfd; end the \
         other engine, postcopy or background snapshot of this QEMU, then try again"
    )]
    Busy {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
    },
    /// An operation on a block failed.
    #[error("Cannot {what} RAM block {block:?} of process {pid}")]
    Block {
        /// What was to be done.
        what: &'static str,
        /// The block.
        block: String,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A block was unplugged, moved or mapped anew.
    #[error(
        "RAM block {block:?} of process {pid} is no longer mapped as it was when tracking began"
    )]
    Changed {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
    },
    /// The set that was passed has another size than the layout.
    #[error("The page set holds {found} pages, the layout has {expected}")]
    WrongSet {
        /// Size of the set.
        found: u64,
        /// Pages of the layout.
        expected: u64,
    },
    /// The process's page map could not be opened.
    #[error("Cannot open {}; ptrace access to the process is needed", path.display())]
    Pagemap {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// /proc did not answer.
    #[error("Cannot check the mappings of process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ProcError,
    },
}

impl Classify for TrackError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Proc { source, .. } => source.bin(),
            Self::Unsupported { .. } | Self::Busy { .. } | Self::WrongSet { .. } => {
                ErrorBin::CallerMisuse
            }
            _ => ErrorBin::System,
        }
    }
}
