//! The two pieces of code that an injected call needs, found in the target's own mappings.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::AttachError;
use crate::procfs::{self, Mapping};

/// `syscall; ret`: makes the call, then goes where the stack says.
const CALL: &[u8] = &[0x0f, 0x05, 0xc3];

/// `mov $15,%rax; syscall`: rt_sigreturn, as glibc's and musl's `__restore_rt` have it.
const RESTORER: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05];

/// Bytes of code that are read at a time.
const WINDOW_BYTES: usize = 1 << 20;

/// Most bytes of code that are searched: a QEMU with its libraries has some 60 MiB.
const SEARCH_BYTES_MAX: u64 = 512 << 20;

/// Addresses of the two pieces in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gadgets {
    /// `syscall; ret`.
    pub(super) call: u64,
    /// `mov $15,%rax; syscall`.
    pub(super) restorer: u64,
}

impl Gadgets {
    /// Looks in vDSO, libc and then all other code.
    pub(super) fn find(pid: i32, memory: &File, mappings: &[Mapping]) -> Result<Self, AttachError> {
        let (mut call, mut restorer) = (None, None);
        let mut left = SEARCH_BYTES_MAX;
        for mapping in procfs::code(mappings) {
            left = match left.checked_sub(mapping.length_bytes()) {
                Some(left) => left,
                None => continue,
            };
            search(memory, mapping, |window, address| {
                call = call.or_else(|| position(window, CALL, address));
                restorer = restorer.or_else(|| position(window, RESTORER, address));
                call.is_some() && restorer.is_some()
            });
            if let (Some(call), Some(restorer)) = (call, restorer) {
                return Ok(Self { call, restorer });
            }
        }
        let what = if call.is_none() { "`syscall; ret`" } else { "`mov $15,%rax; syscall`" };
        Err(AttachError::NoGadget { pid, what })
    }

    /// Whether both are still there.
    pub(super) fn intact(&self, memory: &File) -> bool {
        let holds = |address, code: &[u8]| {
            let mut found = vec![0; code.len()];
            memory.read_exact_at(&mut found, address).is_ok() && found == code
        };
        holds(self.call, CALL) && holds(self.restorer, RESTORER)
    }

    /// Address behind the `syscall` of the call.
    pub(super) fn after_call(&self) -> u64 {
        self.call + 2
    }

    /// Whether a thread with this instruction pointer is still on its way from the call to
    /// rt_sigreturn.
    pub(super) fn holds(&self, rip: u64) -> bool {
        let call = self.call..self.call + CALL.len() as u64;
        let restorer = self.restorer..self.restorer + RESTORER.len() as u64;
        call.contains(&rip) || restorer.contains(&rip)
    }
}

fn position(window: &[u8], code: &[u8], address: u64) -> Option<u64> {
    let at = window.windows(code.len()).position(|part| part == code)?;
    Some(address + at as u64)
}

/// Reads a mapping in windows that overlap by the length of the longest piece; `done` ends it.
fn search(memory: &File, mapping: &Mapping, mut done: impl FnMut(&[u8], u64) -> bool) {
    let overlap = (RESTORER.len() - 1) as u64;
    let mut buffer = vec![0; WINDOW_BYTES];
    let mut address = mapping.start;
    while address < mapping.end {
        let room = usize::try_from(mapping.end - address).unwrap_or(WINDOW_BYTES).min(WINDOW_BYTES);
        let Some(window) = buffer.get_mut(..room) else { return };
        // What cannot be read (pages of a file that was cut short) is passed over.
        if memory.read_exact_at(window, address).is_ok() && done(window, address) {
            return;
        }
        let next = address + room as u64;
        address = if next < mapping.end { next - overlap } else { next };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_both() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        let mappings = procfs::mappings(pid).unwrap();
        let found = Gadgets::find(pid, &memory, &mappings).unwrap();
        assert!(found.intact(&memory));
        assert!(procfs::find(&mappings, found.call).unwrap().execute);
        assert!(procfs::find(&mappings, found.restorer).unwrap().execute);
        assert!(found.holds(found.after_call()) && !found.holds(found.call + 3));
        let nowhere = Gadgets { call: 1, restorer: 1 };
        assert!(!nowhere.intact(&memory));
    }

    #[test]
    fn without_code_the_error_names_what_is_missing() {
        let memory = File::open("/proc/self/mem").unwrap();
        let error = Gadgets::find(1, &memory, &[]).unwrap_err();
        assert!(matches!(error, AttachError::NoGadget { pid: 1, .. }), "{error}");
    }
}
