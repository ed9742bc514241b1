//! Will attaching work? Answered without stopping or changing the process.

use std::fs::File;
use std::io::Read;

use crate::check::{Finding, Severity};
use crate::pagemap::Pagemap;
use crate::procfs::{self, Status};
use crate::uffd::{self, Features};

use super::gadget::Gadgets;

/// Numbers of capabilities (include/uapi/linux/capability.h).
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// ELF: 64-bit, and machine x86-64.
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: [u8; 2] = [62, 0];

/// Examines whether a userfaultfd of this process can be had and used; every finding that is no
/// [`Severity::Ok`] has a remedy.
pub fn probe(pid: i32) -> Vec<Finding> {
    let mut findings = kernel();
    let status = match procfs::status(pid, pid) {
        Ok(status) => status,
        Err(error) => {
            findings.push(Finding::blocker(error.to_string(), "name a QEMU process that runs"));
            return findings;
        }
    };
    findings.push(tracers(pid));
    let access = access(pid, &status);
    let may_look = access.severity == Severity::Ok;
    findings.push(access);
    findings.push(userfaultfd_right(&status));
    findings.push(seccomp(&status));
    findings.push(shadow_stack(&status));
    if may_look {
        findings.push(machine(pid));
        findings.push(code(pid));
        findings.extend(left_over(pid));
    }
    findings.push(files());
    findings
}

fn kernel() -> Vec<Finding> {
    let remedy = "boot Linux 6.7 or newer, or use --path stream";
    let scan = if Pagemap::supported() {
        Finding::ok("The kernel has PAGEMAP_SCAN")
    } else {
        Finding::blocker("The kernel has no PAGEMAP_SCAN", remedy)
    };
    let features = match uffd::supported() {
        Ok(found) if found.contains(Features::TRACKING) => {
            Finding::ok("The kernel's userfaultfd can track writes by itself (WP_ASYNC)")
        }
        Ok(found) => Finding::blocker(
            format!("The kernel's userfaultfd lacks WP_ASYNC (features {:#x})", found.bits()),
            remedy,
        ),
        Err(error) => Finding::new(
            Severity::Warning,
            format!("The features of userfaultfd could not be asked for: {error}"),
            "run as root, or set vm.unprivileged_userfaultfd=1",
        ),
    };
    vec![scan, features]
}

fn tracers(pid: i32) -> Finding {
    let threads = procfs::threads(pid).unwrap_or_default();
    let traced = threads.iter().find_map(|tid| {
        let tracer = procfs::status(pid, *tid).ok()?.tracer_pid;
        (tracer != 0).then_some((*tid, tracer))
    });
    match traced {
        None => Finding::ok("No thread is traced by a debugger"),
        Some((tid, tracer)) => Finding::blocker(
            format!("Thread {tid} is traced by process {tracer}"),
            "end that debugger or engine",
        ),
    }
}

/// Opening /proc/PID/mem makes the same check as ptrace (PTRACE_MODE_ATTACH, with Yama).
fn access(pid: i32, status: &Status) -> Finding {
    let Err(error) = File::open(format!("/proc/{pid}/mem")) else {
        return Finding::ok("This process may trace QEMU");
    };
    let own = std::process::id();
    let own = i32::try_from(own).ok().and_then(|own| procfs::status(own, own).ok());
    let own = own.unwrap_or_default();
    let mut causes = Vec::new();
    if own.uids != status.uids {
        let [_, theirs, ..] = status.uids;
        causes.push(format!("run as user {theirs}"));
    }
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match yama.trim() {
        "" | "0" => {}
        "3" => causes.push("reboot with kernel.yama.ptrace_scope below 3".to_owned()),
        _ => causes.push("set kernel.yama.ptrace_scope=0".to_owned()),
    }
    if own.capabilities & 1 << CAP_SYS_PTRACE == 0 {
        causes.push("or give the engine CAP_SYS_PTRACE".to_owned());
    }
    causes.push("or start QEMU with libgodwit_preload.so".to_owned());
    Finding::blocker(format!("This process may not trace QEMU: {error}"), causes.join(", "))
}

fn userfaultfd_right(status: &Status) -> Finding {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let open = sysctl.is_ok_and(|text| text.trim() == "1");
    if open || status.capabilities & 1 << CAP_SYS_PTRACE != 0 {
        return Finding::ok("QEMU may create a userfaultfd that sees faults of the kernel");
    }
    Finding::blocker(
        "QEMU may not create a userfaultfd that sees faults of the kernel",
        "sysctl -w vm.unprivileged_userfaultfd=1, or give QEMU CAP_SYS_PTRACE",
    )
}

fn seccomp(status: &Status) -> Finding {
    match status.seccomp {
        0 => Finding::ok("QEMU has no seccomp filter"),
        1 => Finding::blocker("QEMU is in strict seccomp mode", "start it otherwise"),
        _ if own_capability(CAP_SYS_ADMIN) => Finding::new(
            Severity::Note,
            format!("QEMU has {} seccomp filters", status.seccomp_filters),
            "none needed: attaching asks the filters first and makes no call that they refuse",
        ),
        _ => Finding::blocker(
            "QEMU has seccomp filters, which this process may not read",
            "give the engine CAP_SYS_ADMIN, or start QEMU with libgodwit_preload.so",
        ),
    }
}

fn shadow_stack(status: &Status) -> Finding {
    if status.shadow_stack {
        return Finding::blocker(
            "QEMU runs with a shadow stack",
            "start it with glibc.cpu.x86_shstk=off or with libgodwit_preload.so",
        );
    }
    Finding::ok("QEMU has no shadow stack")
}

fn machine(pid: i32) -> Finding {
    let mut header = [0u8; 20];
    let path = format!("/proc/{pid}/exe");
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    if read.is_ok() && header.get(4) == Some(&ELF_CLASS_64) && header.ends_with(&ELF_MACHINE_X86_64)
    {
        return Finding::ok("QEMU is a 64-bit x86 program");
    }
    Finding::blocker("QEMU is no 64-bit x86 program", "use --path stream")
}

fn code(pid: i32) -> Finding {
    let found = procfs::mappings(pid).ok().zip(File::open(format!("/proc/{pid}/mem")).ok());
    match found.map(|(mappings, memory)| Gadgets::find(pid, &memory, &mappings)) {
        Some(Ok(_)) => Finding::ok("QEMU's libraries have the code that a call needs"),
        Some(Err(error)) => {
            Finding::blocker(error.to_string(), "start QEMU with libgodwit_preload.so")
        }
        None => Finding::blocker("QEMU's code could not be read", "see the other findings"),
    }
}

fn left_over(pid: i32) -> Option<Finding> {
    let count = procfs::unused_userfaultfds(pid).map_or(0, |found| found.len());
    (count > 0).then(|| {
        Finding::new(
            Severity::Note,
            format!("QEMU holds {count} userfaultfds that nobody uses"),
            "none needed: an engine that died left them, the next attach closes them",
        )
    })
}

fn files() -> Finding {
    if own_capability(CAP_SYS_ADMIN) || own_capability(CAP_CHECKPOINT_RESTORE) {
        return Finding::ok("Files without a name that back RAM can be opened");
    }
    Finding::new(
        Severity::Note,
        "RAM files without a name can be opened only while QEMU has a descriptor of them",
        "give the engine CAP_CHECKPOINT_RESTORE if opening guest RAM fails",
    )
}

fn own_capability(number: u32) -> bool {
    let own = i32::try_from(std::process::id()).ok();
    own.and_then(|own| procfs::status(own, own).ok())
        .is_some_and(|status| status.capabilities & 1 << number != 0)
}
