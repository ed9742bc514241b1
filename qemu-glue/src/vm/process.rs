//! QEMU's process, and other processes that can write its memory.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::error::VmError;
use crate::check::Finding;
use crate::procfs;
use crate::qmp::Client;

/// Most findings about foreign writers that are listed.
const WRITERS_MAX: usize = 16;

/// Most processes that are looked at.
const PROCESSES_MAX: usize = 1 << 20;

/// A file that backs guest RAM, by device and inode.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BackingFile {
    pub device: u64,
    pub inode: u64,
    pub block: String,
}

/// QEMU's process, with the threads that run its processors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuProcess {
    /// Its number.
    pub pid: i32,
    /// The threads of its vCPUs as seen from here, in the order in which QEMU lists them. Under TCG without threads of
    /// their own, all vCPUs have the same.
    pub vcpu_threads: Vec<i32>,
}

/// Finds QEMU's process and its vCPUs' threads.
///
/// # Errors
/// [`VmError::NoProcess`] if it is not on this host; a [`VmError`] if QEMU does not answer.
pub async fn process(client: &Client) -> Result<QemuProcess, VmError> {
    let pid = find(client).await?;
    let threads: Vec<i32> =
        client.query_cpus_fast().await?.iter().map(|cpu| cpu.thread_id).collect();
    let search = tokio::task::spawn_blocking(move || vcpu_threads(pid, &threads));
    let vcpu_threads = search.await.map_err(|_| VmError::Interrupted)??;
    Ok(QemuProcess { pid, vcpu_threads })
}

/// Threads that QEMU names, by their numbers as seen from here.
fn vcpu_threads(pid: i32, threads: &[i32]) -> Result<Vec<i32>, VmError> {
    let own = procfs::threads(pid)?;
    let inner = |thread: i32| thread_numbers_of(pid, thread)?.thread.last().copied();
    let seen: HashMap<i32, i32> =
        own.into_iter().filter_map(|thread| Some((inner(thread)?, thread))).collect();
    Ok(threads.iter().filter_map(|thread| seen.get(thread).copied()).collect())
}

/// QEMU's process: the socket's owner if the vCPU threads are its own, else their owner.
pub(super) async fn find(client: &Client) -> Result<i32, VmError> {
    let cpus = client.query_cpus_fast().await?;
    let threads: Vec<i32> = cpus.iter().map(|cpu| cpu.thread_id).collect();
    let peer = client.peer().pid;
    let search = {
        let threads = threads.clone();
        tokio::task::spawn_blocking(move || owner(peer, &threads))
    };
    let found = search.await.map_err(|_| VmError::Interrupted)?;
    found.ok_or(VmError::NoProcess { threads, peer })
}

fn owner(peer: i32, threads: &[i32]) -> Option<i32> {
    if threads.is_empty() {
        return None;
    }
    if peer > 0 && owns_all(peer, threads) {
        return Some(peer);
    }
    let pid = *thread_numbers(*threads.first()?)?.group.first()?;
    owns_all(pid, threads).then_some(pid)
}

/// Whether the process has all these threads, in the numbering of its own process namespace.
fn owns_all(pid: i32, threads: &[i32]) -> bool {
    let Ok(own) = procfs::threads(pid) else { return false };
    let own: HashSet<i32> = own
        .into_iter()
        .filter_map(|thread| thread_numbers_of(pid, thread)?.thread.last().copied())
        .collect();
    threads.iter().all(|thread| own.contains(thread))
}

/// Numbers of a thread in the nested process namespaces, the outermost (ours) first.
#[derive(Debug, Default, PartialEq, Eq)]
struct Numbers {
    group: Vec<i32>,
    thread: Vec<i32>,
}

fn thread_numbers(thread: i32) -> Option<Numbers> {
    numbers(&fs::read_to_string(format!("/proc/{thread}/status")).ok()?)
}

fn thread_numbers_of(pid: i32, thread: i32) -> Option<Numbers> {
    numbers(&fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?)
}

/// The lines `NStgid` and `NSpid` of proc(5)'s status file.
fn numbers(status: &str) -> Option<Numbers> {
    let line = |key: &str| {
        let rest = status.lines().find_map(|line| line.strip_prefix(key))?;
        rest.split_whitespace().map(|number| number.parse().ok()).collect::<Option<Vec<i32>>>()
    };
    Some(Numbers { group: line("NStgid:")?, thread: line("NSpid:")? })
}

/// Processes other than QEMU and this program that have the files mapped for writing. What may
/// not be looked at is passed over.
pub(super) fn other_writers(qemu: i32, files: &[BackingFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let own_program = program(std::process::id().cast_signed());
    let Ok(processes) = fs::read_dir("/proc") else { return findings };
    for entry in processes.flatten().take(PROCESSES_MAX) {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid == qemu || findings.len() >= WRITERS_MAX {
            continue;
        }
        let Some(block) = written_block(pid, files) else { continue };
        if own_program.is_some() && program(pid) == own_program {
            continue;
        }
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        findings.push(Finding::indirect(
            format!(
                "RAM block {block} is also mapped for writing by process {pid} ({})",
                name.trim()
            ),
            "end that process, or use --path stream: what it writes cannot be tracked",
        ));
    }
    findings
}

fn program(pid: i32) -> Option<(u64, u64)> {
    let program = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some((program.dev(), program.ino()))
}

fn written_block(pid: i32, files: &[BackingFile]) -> Option<String> {
    let mappings = procfs::mappings(pid).ok()?;
    mappings.iter().filter(|mapping| mapping.shared && mapping.write).find_map(|mapping| {
        let is = |file: &&BackingFile| file.device == mapping.device && file.inode == mapping.inode;
        files.iter().find(is).map(|file| file.block.clone())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_numbers_are_read() {
        let status = "Name:\tqemu\nTgid:\t700\nNStgid:\t700\t7\nNSpid:\t705\t12\n";
        let expected = Numbers { group: vec![700, 7], thread: vec![705, 12] };
        assert_eq!(numbers(status), Some(expected));
        assert_eq!(numbers("Name:\tx\n"), None);
        assert_eq!(numbers("NStgid:\tx\nNSpid:\t1\n"), None);
    }

    #[test]
    fn a_process_is_found_by_its_threads_alone() {
        let own = std::process::id().cast_signed();
        let threads = procfs::threads(own).unwrap();
        assert_eq!(owner(own, &threads), Some(own));
        assert_eq!(owner(1, &threads), Some(own), "the socket may belong to another process");
        assert_eq!(owner(0, &threads), Some(own));
        assert_eq!(owner(own, &[]), None);
        assert_eq!(vcpu_threads(own, &threads).unwrap(), threads);
        assert_eq!(owner(own, &[1, own]), None, "threads of two processes are no QEMU");
    }
}
