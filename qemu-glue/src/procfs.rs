//! What /proc says about a process: mappings, threads, states, identity.
//!
//! Invariant: every file is read up to a named limit; nothing that a process can influence (names
//! of mapped files, its own name) is believed beyond its place in the line. Source of the formats:
//! proc(5) and fs/proc/{task_mmu,array,base}.c.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags};

use crate::error::ProcError;

/// Most bytes of /proc/PID/maps that are read: 65,530 mappings (vm.max_map_count) of 1 KiB each.
pub const MAPS_BYTES_MAX: usize = 64 << 20;

/// Most bytes of any other file that are read.
pub const FILE_BYTES_MAX: usize = 64 << 10;

/// Most threads that are listed.
pub const THREADS_MAX: usize = 16_384;

/// Most descriptors that are listed.
pub const DESCRIPTORS_MAX: usize = 65_536;

/// One line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared (`s`) as opposed to private (`p`).
    pub shared: bool,
    /// Offset of `start` in the file, in bytes.
    pub offset_bytes: u64,
    /// Device of the file, as st_dev has it.
    pub device: u64,
    /// Inode of the file; 0 for memory without a file.
    pub inode: u64,
    /// Path or name (`[stack]`, `/dev/shm/ram (deleted)`), as the kernel prints it.
    pub path: String,
}

impl Mapping {
    /// Whether the mapping holds this address.
    pub fn contains(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// Length in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether both map the same file.
    pub fn same_file(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }

    fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let mut field = || {
            rest = rest.trim_start_matches(' ');
            let (first, after) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = after;
            first
        };
        let (start, end) = field().split_once('-')?;
        let perms = field().as_bytes();
        let offset = field();
        let (major, minor) = field().split_once(':')?;
        let inode = field();
        let [read, write, execute, share] = perms.try_into().ok()?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let major = u32::from_str_radix(major, 16).ok()?;
        let minor = u32::from_str_radix(minor, 16).ok()?;
        (start < end).then_some(())?;
        Some(Self {
            start,
            end,
            read: read == b'r',
            write: write == b'w',
            execute: execute == b'x',
            shared: share == b's',
            offset_bytes: u64::from_str_radix(offset, 16).ok()?,
            device: rustix::fs::makedev(major, minor),
            inode: inode.parse().ok()?,
            path: rest.trim_start_matches(' ').to_owned(),
        })
    }
}

/// Reads at most `limit_bytes` of a file of /proc.
fn read_limited(pid: i32, path: &Path, limit_bytes: usize) -> Result<String, ProcError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => ProcError::Gone { pid },
        _ => ProcError::Read { path: path.to_owned(), source },
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit_bytes).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit_bytes {
        return Err(ProcError::TooLong { path: path.to_owned(), limit_bytes });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn malformed(path: &Path, line: &str) -> ProcError {
    ProcError::Malformed { path: path.to_owned(), line: line.chars().take(120).collect() }
}

/// All mappings of a process, in ascending order.
///
/// # Errors
/// [`ProcError`] if the process is gone, may not be looked at, or has too many mappings.
pub fn mappings(pid: i32) -> Result<Vec<Mapping>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = read_limited(pid, &path, MAPS_BYTES_MAX)?;
    if text.is_empty() {
        return Err(ProcError::Gone { pid });
    }
    text.lines().map(|line| Mapping::parse(line).ok_or_else(|| malformed(&path, line))).collect()
}

/// The mapping that holds an address; `mappings` must be in ascending order.
pub fn find(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let after = mappings.partition_point(|mapping| mapping.start <= address);
    mappings.get(after.checked_sub(1)?).filter(|mapping| mapping.contains(address))
}

/// Executable mappings in the order in which to look for instructions: vDSO, libc, the rest.
pub fn code(mappings: &[Mapping]) -> Vec<&Mapping> {
    let rank = |mapping: &Mapping| {
        let name = mapping.path.rsplit('/').next().unwrap_or("");
        match () {
            () if mapping.path == "[vdso]" => 0,
            () if name.starts_with("libc.so") || name.starts_with("libc-") => 1,
            () if name.starts_with("ld-musl") => 1,
            () => 2,
        }
    };
    let mut code: Vec<_> = mappings
        .iter()
        .filter(|mapping| mapping.execute && mapping.read && !mapping.write && !mapping.shared)
        .filter(|mapping| mapping.path == "[vdso]" || mapping.inode != 0)
        .collect();
    code.sort_by_key(|mapping| rank(mapping));
    code
}

/// Fields of /proc/PID/stat after the name, which may hold anything: state is the first.
fn stat_fields(pid: i32, path: &Path) -> Result<Vec<String>, ProcError> {
    let text = read_limited(pid, path, FILE_BYTES_MAX)?;
    let (_, rest) = text.rsplit_once(')').ok_or_else(|| malformed(path, &text))?;
    Ok(rest.split_ascii_whitespace().map(str::to_owned).collect())
}

/// When the process started, in clock ticks since boot. Together with the number it names a
/// process for good: numbers are used again.
///
/// # Errors
/// [`ProcError`] if the process is gone.
pub fn start_time_ticks(pid: i32) -> Result<u64, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let fields = stat_fields(pid, &path)?;
    let text = fields.get(19).map_or("", String::as_str);
    text.parse().map_err(|_| malformed(&path, text))
}

/// State letter of a thread as in proc(5): `R`, `S`, `D`, `T`, `t`, `Z`, `X`.
///
/// # Errors
/// [`ProcError`] if the thread is gone.
pub fn thread_state(pid: i32, tid: i32) -> Result<char, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/stat"));
    let fields = stat_fields(pid, &path)?;
    let state = fields.first().and_then(|field| field.chars().next());
    state.ok_or_else(|| malformed(&path, ""))
}

/// The processor on which a thread ran last; nothing if that cannot be told.
pub fn processor(pid: i32, tid: i32) -> Option<usize> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/stat"));
    stat_fields(pid, &path).ok()?.get(36)?.parse().ok()
}

fn numbers_in(pid: i32, path: &Path, most: usize) -> Result<Vec<i32>, ProcError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => ProcError::Gone { pid },
        _ => ProcError::Read { path: path.to_owned(), source },
    };
    let mut numbers = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)?.take(most) {
        // An entry may vanish while the folder is read.
        let Ok(entry) = entry else { continue };
        if let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// Numbers of the threads, at most [`THREADS_MAX`].
///
/// # Errors
/// [`ProcError`] if the process is gone.
pub fn threads(pid: i32) -> Result<Vec<i32>, ProcError> {
    numbers_in(pid, Path::new(&format!("/proc/{pid}/task")), THREADS_MAX)
}

/// Numbers of the open descriptors, at most [`DESCRIPTORS_MAX`].
///
/// # Errors
/// [`ProcError`] if the process is gone or may not be looked at.
pub fn descriptors(pid: i32) -> Result<Vec<i32>, ProcError> {
    numbers_in(pid, Path::new(&format!("/proc/{pid}/fd")), DESCRIPTORS_MAX)
}

/// The userfaultfds of the process on which UFFDIO_API was never called: left over by an engine
/// that died between creating one and closing QEMU's copy (fs/userfaultfd.c:
/// userfaultfd_show_fdinfo prints the features, whose highest bit says "initialised").
///
/// # Errors
/// [`ProcError`] if the process is gone or may not be looked at.
pub fn unused_userfaultfds(pid: i32) -> Result<Vec<i32>, ProcError> {
    let mut found = Vec::new();
    for fd in descriptors(pid)? {
        let Ok(target) = fs::read_link(format!("/proc/{pid}/fd/{fd}")) else { continue };
        if target.as_os_str() != "anon_inode:[userfaultfd]" {
            continue;
        }
        let path = PathBuf::from(format!("/proc/{pid}/fdinfo/{fd}"));
        let Ok(info) = read_limited(pid, &path, FILE_BYTES_MAX) else { continue };
        let api = info.lines().find_map(|line| line.strip_prefix("API:\t"));
        // "aa:FEATURES:IOCTLS", all hexadecimal.
        if api.and_then(|api| api.split(':').nth(1)) == Some("0") {
            found.push(fd);
        }
    }
    Ok(found)
}

/// What a thread is doing, from /proc/PID/task/TID/syscall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// It is on a processor or about to be.
    Running,
    /// It is blocked in a system call.
    Blocked {
        /// Number of the call; -1 if it is blocked elsewhere (a page fault).
        number: i64,
        /// Its six arguments.
        arguments: [u64; 6],
    },
    /// The kernel does not tell.
    Unknown,
}

/// What a thread is doing right now.
pub fn activity(pid: i32, tid: i32) -> Activity {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/syscall"));
    let Ok(text) = read_limited(pid, &path, FILE_BYTES_MAX) else { return Activity::Unknown };
    parse_activity(&text)
}

fn parse_activity(text: &str) -> Activity {
    let mut fields = text.split_ascii_whitespace();
    let Some(first) = fields.next() else { return Activity::Unknown };
    if first == "running" {
        return Activity::Running;
    }
    let Ok(number) = first.parse() else { return Activity::Unknown };
    let mut arguments = [0; 6];
    if number >= 0 {
        for argument in &mut arguments {
            let field = fields.next().and_then(|field| field.strip_prefix("0x"));
            let Some(value) = field.and_then(|hex| u64::from_str_radix(hex, 16).ok()) else {
                return Activity::Unknown;
            };
            *argument = value;
        }
    }
    Activity::Blocked { number, arguments }
}

/// What /proc/PID/status says of a process or thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// The process that traces it; 0 for nobody.
    pub tracer_pid: i32,
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// Effective capabilities.
    pub capabilities: u64,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of filters.
    pub seccomp_filters: u32,
    /// Whether a shadow stack is on (x86 control-flow enforcement).
    pub shadow_stack: bool,
    /// Blocked signals.
    pub blocked: u64,
    /// Signals pending for the thread.
    pub pending: u64,
}

/// Status of a thread; with `tid == pid` of the process's first thread.
///
/// # Errors
/// [`ProcError`] if the thread is gone or a field cannot be read.
pub fn status(pid: i32, tid: i32) -> Result<Status, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/status"));
    let text = read_limited(pid, &path, FILE_BYTES_MAX)?;
    let mut status = parse_status(&text).ok_or_else(|| malformed(&path, "status"))?;
    if status.tracer_pid != 0 {
        // The kernel names the thread that traces.
        status.tracer_pid = process_of(status.tracer_pid).unwrap_or(status.tracer_pid);
    }
    Ok(status)
}

/// The process that a thread belongs to.
fn process_of(tid: i32) -> Option<i32> {
    let path = PathBuf::from(format!("/proc/{tid}/status"));
    let text = read_limited(tid, &path, FILE_BYTES_MAX).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

fn parse_status(text: &str) -> Option<Status> {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "TracerPid" => status.tracer_pid = value.parse().ok()?,
            "Uid" => {
                for (uid, text) in status.uids.iter_mut().zip(value.split_ascii_whitespace()) {
                    *uid = text.parse().ok()?;
                }
            }
            "CapEff" => status.capabilities = u64::from_str_radix(value, 16).ok()?,
            "Seccomp" => status.seccomp = value.parse().ok()?,
            "Seccomp_filters" => status.seccomp_filters = value.parse().ok()?,
            "SigBlk" => status.blocked = u64::from_str_radix(value, 16).ok()?,
            "SigPnd" => status.pending = u64::from_str_radix(value, 16).ok()?,
            "x86_Thread_features" => status.shadow_stack = value.contains("shstk"),
            _ => {}
        }
    }
    Some(status)
}

/// A process that is known for good: its number, when it started, and a descriptor of it.
#[derive(Debug)]
pub struct Identity {
    pid: i32,
    start_ticks: u64,
    pidfd: rustix::fd::OwnedFd,
}

impl Identity {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// [`ProcError`] if there is no such process.
    pub fn of(pid: i32) -> Result<Self, ProcError> {
        // Pid::from_raw panics on a negative number.
        let number = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let number = number.ok_or(ProcError::Gone { pid })?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())
            .map_err(|_| ProcError::Gone { pid })?;
        // Read after the descriptor exists: if it still is alive then, both mean one process.
        let start_ticks = start_time_ticks(pid)?;
        let identity = Self { pid, start_ticks, pidfd };
        identity.check()?;
        Ok(identity)
    }

    /// The number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it started, in clock ticks since boot.
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// The descriptor (pidfd).
    pub fn pidfd(&self) -> rustix::fd::BorrowedFd<'_> {
        rustix::fd::AsFd::as_fd(&self.pidfd)
    }

    /// Checks that the process still lives under its number.
    ///
    /// # Errors
    /// [`ProcError::Gone`] or [`ProcError::Replaced`].
    pub fn check(&self) -> Result<(), ProcError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A pidfd becomes readable when the process ends.
        if poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
            return Err(ProcError::Gone { pid: self.pid });
        }
        if start_time_ticks(self.pid)? != self.start_ticks {
            return Err(ProcError::Replaced { pid: self.pid });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn own_mappings_hold_own_code_and_stack() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let maps = mappings(pid).unwrap();
        let local = 0u8;
        let stack = find(&maps, std::ptr::from_ref(&local) as u64).unwrap();
        assert!(stack.write && !stack.execute && !stack.shared);
        let code = code(&maps);
        assert_eq!(code.first().unwrap().path, "[vdso]");
        assert!(code.get(1).unwrap().path.contains("libc"));
        assert!(find(&maps, 0).is_none());
    }

    #[test]
    fn a_path_may_hold_blanks() {
        let line =
            "7f00-8000 rw-s 00001000 00:01 42                         /dev/shm/a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.path, "/dev/shm/a b (deleted)");
        assert_eq!((mapping.start, mapping.end, mapping.offset_bytes), (0x7f00, 0x8000, 0x1000));
        assert!(mapping.shared && mapping.write && !mapping.execute);
        assert_eq!((mapping.device, mapping.inode), (1, 42));
        assert_eq!(Mapping::parse("8000-7f00 rw-s 0 00:01 42"), None);
    }

    #[test]
    fn activities_are_told_apart() {
        assert_eq!(parse_activity("running\n"), Activity::Running);
        assert_eq!(
            parse_activity("-1 0x7ffd 0x7f00"),
            Activity::Blocked { number: -1, arguments: [0; 6] }
        );
        let text = "202 0x1 0x80 0x2 0x0 0x0 0xffffffffffffffff 0x7ffe 0x7f11";
        let arguments = [1, 0x80, 2, 0, 0, u64::MAX];
        assert_eq!(parse_activity(text), Activity::Blocked { number: 202, arguments });
        assert_eq!(parse_activity("202 0x1"), Activity::Unknown);
    }

    #[test]
    fn identity_notices_the_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let identity = Identity::of(pid).unwrap();
        identity.check().unwrap();
        assert_eq!(threads(pid).unwrap(), vec![pid]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(identity.check(), Err(ProcError::Gone { .. })));
        assert!(matches!(Identity::of(pid), Err(ProcError::Gone { .. })));
        assert!(matches!(Identity::of(-1), Err(ProcError::Gone { .. })));
    }

    #[test]
    fn status_of_this_thread() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let status = status(pid, pid).unwrap();
        assert_eq!(status.tracer_pid, 0);
        assert_eq!(status.uids.first().copied(), Some(rustix::process::getuid().as_raw()));
    }

    proptest! {
        #[test]
        fn parsers_take_anything(text in "\\PC{0,200}") {
            let _ = Mapping::parse(&text);
            let _ = parse_activity(&text);
            let _ = parse_status(&text);
        }
    }
}
