//! The signal frame that brings a thread back when the engine dies in the middle.
//!
//! Before any register of the thread is changed, this is written below its stack:
//!
//! ```text
//!  rsp of the thread ->  |  its data                     |  high addresses
//!                        |  red zone, 128 bytes          |
//!                        |  FP/vector state, 64-aligned  |  XSAVE standard form + magic numbers
//!                        |  ucontext                     |  registers as they will be restored
//!  rsp while injected -> |  address of `mov $15,%rax;    |  = return address of the gadget
//!                        |             syscall`          |    `syscall; ret`
//! ```
//!
//! The injected call runs at a `syscall; ret`. If nobody stops the thread behind the `syscall`, the
//! `ret` leads to rt_sigreturn, which restores everything from the frame: the thread goes on where
//! it was, without help.
//!
//! Invariants: the frame holds registers with the system call restart already applied (rt_sigreturn
//! disables the kernel's own); the alternate signal stack is not changed (an impossible one is
//! named, which the kernel refuses and goes on); nothing is written outside the given stack.
//!
//! Source: arch/x86/include/asm/sigframe.h, arch/x86/kernel/signal_64.c and fpu/signal.c.

use libc::user_regs_struct;

use super::cpu;

/// Bytes below the stack pointer that code may use without moving it (System V ABI).
const RED_ZONE_BYTES: u64 = 128;

/// Bytes of `struct ucontext`: flags, link, stack, registers, signal mask.
const UCONTEXT_BYTES: usize = 304;

/// Bytes of stack that must be mapped below the stack pointer beside the frame, for a handler of a
/// signal that comes while the frame is in use.
const RESERVE_BYTES: u64 = 16 << 10;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

/// A mode of the alternate signal stack that does not exist: EINVAL, which rt_sigreturn ignores.
const IMPOSSIBLE_STACK_MODE: u32 = 4;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
const XSTATE_LEGACY_BYTES: usize = 512;
const XSTATE_HEADER_END: usize = 576;
const SOFTWARE_BYTES_AT: usize = 464;

const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
const SYSCALL_INSTRUCTION_BYTES: u64 = 2;
const FUTEX_CMD_MASK: u64 = !(128 | 256);
const FUTEX_WAIT_BITSET: u64 = 9;

/// `cs` of a thread that runs 64-bit code.
pub(super) const USER_CS: u64 = 0x33;

/// The trap flag: single-stepping.
pub(super) const FLAG_TRAP: u64 = 0x100;

/// What is to be written where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// First address; the stack pointer for the injected call.
    pub(super) address: u64,
    /// What to write there.
    pub(super) bytes: Vec<u8>,
}

/// What a frame is made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrameInput<'a> {
    /// Registers as the thread was found.
    pub(super) registers: &'a user_regs_struct,
    /// Signals that it blocks.
    pub(super) signal_mask: u64,
    /// Its extended state from PTRACE_GETREGSET.
    pub(super) extended_state: &'a [u8],
    /// Address of `mov $15,%rax; syscall`.
    pub(super) restorer: u64,
    /// Lowest address of the stack's mapping.
    pub(super) stack_start: u64,
}

/// The registers with which the thread goes on if nobody but the frame brings it back: those with
/// which the kernel would have let it go on (arch/x86/kernel/signal.c: arch_do_signal_or_restart).
pub(super) fn resumed_registers(found: &user_regs_struct) -> user_regs_struct {
    let mut registers = *found;
    let in_call = found.orig_rax as i64 >= 0;
    let restart = in_call.then(|| (found.rax as i64).wrapping_neg());
    let again = match restart {
        Some(ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => true,
        // With an absolute timeout, or none, the call can simply be made again. One with a
        // relative timeout cannot: rt_sigreturn forgets how much was left, so it ends as if by a signal.
        Some(ERESTART_RESTARTBLOCK) => {
            let futex = found.orig_rax == libc::SYS_futex as u64
                && found.rsi & FUTEX_CMD_MASK == FUTEX_WAIT_BITSET;
            // poll takes its timeout as an int; a negative one is none.
            let poll = found.orig_rax == libc::SYS_poll as u64 && found.rdx as u32 >> 31 == 1;
            let same_again = futex || poll;
            if !same_again {
                registers.rax = i64::from(-libc::EINTR) as u64;
            }
            same_again
        }
        _ => false,
    };
    if again {
        registers.rax = found.orig_rax;
        registers.rip = found.rip.wrapping_sub(SYSCALL_INSTRUCTION_BYTES);
    }
    registers.orig_rax = u64::MAX;
    registers
}

/// Lays the frame out.
///
/// # Errors
/// A text if the thread's state or stack does not allow it.
pub(super) fn build(input: &FrameInput<'_>) -> Result<Frame, String> {
    let found = input.registers;
    if found.cs != USER_CS {
        return Err(format!("it runs 32-bit code (cs {:#x})", found.cs));
    }
    let fp_state = fp_state(input.extended_state)?;
    // The kernel may touch as much behind the start as the largest state takes.
    let fp_room = input.extended_state.len() as u64 + 4;
    let below = |address: u64, bytes: u64, align: u64| {
        address.checked_sub(bytes).map(|address| address / align * align)
    };
    let fp_address = below(found.rsp, RED_ZONE_BYTES + fp_room, 64);
    let context_address = fp_address.and_then(|fp| below(fp, UCONTEXT_BYTES as u64, 16));
    let (Some(fp_address), Some(context_address)) = (fp_address, context_address) else {
        return Err(format!("its stack pointer is {:#x}", found.rsp));
    };
    let address = context_address - 8;
    if address < input.stack_start.saturating_add(RESERVE_BYTES) {
        return Err(format!(
            "only {} bytes of stack are left below {:#x}",
            found.rsp.saturating_sub(input.stack_start),
            found.rsp
        ));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(found.rsp - address).unwrap_or(0));
    bytes.extend_from_slice(&input.restorer.to_le_bytes());
    let resumed = resumed_registers(found);
    push_context(&mut bytes, &resumed, input.signal_mask, fp_address);
    let fp_at = usize::try_from(fp_address - address).unwrap_or(bytes.len());
    bytes.resize(fp_at, 0);
    bytes.extend_from_slice(&fp_state);
    Ok(Frame { address, bytes })
}

fn push_context(bytes: &mut Vec<u8>, regs: &user_regs_struct, mask: u64, fp_address: u64) {
    let mut push = |value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    push(UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    push(0); // uc_link
    push(0); // ss_sp
    push(u64::from(IMPOSSIBLE_STACK_MODE)); // ss_flags and padding
    push(0); // ss_size
    for register in [
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
    ] {
        push(register);
    }
    push((regs.cs & 0xffff) | (regs.ss & 0xffff) << 48); // cs, gs, fs, ss
    for _ in 0..4 {
        push(0); // err, trapno, oldmask, cr2
    }
    push(fp_address);
    for _ in 0..8 {
        push(0); // reserved
    }
    push(mask);
}

fn field(state: &[u8], at: usize) -> Option<u64> {
    let bytes = state.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// The extended state as a signal frame has it: cut behind the last component in use, with the
/// software bytes that tell the kernel how long it is.
fn fp_state(state: &[u8]) -> Result<Vec<u8>, String> {
    let short = || format!("its extended state has {} bytes", state.len());
    // The kernel puts the features that it manages into the first software bytes (XCR0).
    let features = field(state, SOFTWARE_BYTES_AT).ok_or_else(short)?;
    let in_use = field(state, XSTATE_LEGACY_BYTES).ok_or_else(short)?;
    let size = (2..63).filter(|bit| in_use & (1 << bit) != 0).map(cpu::component_end).max();
    let size = size.unwrap_or(0).max(XSTATE_HEADER_END);
    let mut bytes = state.get(..size).ok_or_else(short)?.to_vec();
    let size = u32::try_from(size).map_err(|_| short())?;
    let mut software = Vec::with_capacity(48);
    software.extend_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    software.extend_from_slice(&(size + 4).to_le_bytes());
    software.extend_from_slice(&features.to_le_bytes());
    software.extend_from_slice(&size.to_le_bytes());
    software.resize(XSTATE_LEGACY_BYTES - SOFTWARE_BYTES_AT, 0);
    let place = bytes.get_mut(SOFTWARE_BYTES_AT..XSTATE_LEGACY_BYTES).ok_or_else(short)?;
    place.copy_from_slice(&software);
    bytes.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(orig_rax: i64, rax: i64) -> user_regs_struct {
        let mut regs = cpu::zero_registers();
        regs.orig_rax = orig_rax as u64;
        regs.rax = rax as u64;
        regs.rip = 0x1002;
        regs.rsp = 0x7fff_0000_1238;
        regs.cs = USER_CS;
        regs.ss = 0x2b;
        regs.eflags = 0x246;
        regs
    }

    fn state() -> Vec<u8> {
        let mut state = vec![0u8; 2696];
        state[SOFTWARE_BYTES_AT..SOFTWARE_BYTES_AT + 8].copy_from_slice(&7u64.to_le_bytes());
        state[512..520].copy_from_slice(&3u64.to_le_bytes());
        state
    }

    #[test]
    fn restarts_are_applied_as_the_kernel_would() {
        let resumed = |orig, rax| {
            let regs = resumed_registers(&registers(orig, rax));
            (regs.rax as i64, regs.rip, regs.orig_rax as i64)
        };
        assert_eq!(resumed(271, -514), (271, 0x1000, -1));
        assert_eq!(resumed(0, -512), (0, 0x1000, -1));
        assert_eq!(resumed(35, -516), (-4, 0x1002, -1));
        assert_eq!(resumed(-1, -512), (-512, 0x1002, -1));
        assert_eq!(resumed(1, -11), (-11, 0x1002, -1));
        let mut futex = registers(202, -516);
        futex.rsi = 9 | 128 | 256;
        assert_eq!(resumed_registers(&futex).rip, 0x1000);
        let mut poll = registers(7, -516);
        poll.rdx = 0xffff_ffff;
        assert_eq!(resumed_registers(&poll).rip, 0x1000);
        poll.rdx = 20;
        assert_eq!(resumed_registers(&poll).rax as i64, -4);
        futex.rsi = 0x80;
        assert_eq!(resumed_registers(&futex).rax as i64, -4);
    }

    #[test]
    fn the_frame_lies_below_the_red_zone_and_is_aligned() {
        let regs = registers(-1, 5);
        let state = state();
        let input = FrameInput {
            registers: &regs,
            signal_mask: 0x55,
            extended_state: &state,
            restorer: 0xabcd,
            stack_start: regs.rsp - (1 << 20),
        };
        let frame = build(&input).unwrap();
        let end = frame.address + frame.bytes.len() as u64;
        assert!(end <= regs.rsp - RED_ZONE_BYTES);
        assert_eq!(field(&frame.bytes, 0), Some(0xabcd));
        assert_eq!(field(&frame.bytes, 8), Some(7));
        // uc_sigmask is the last field of the context, fpstate the tenth from its end.
        assert_eq!(field(&frame.bytes, 8 + UCONTEXT_BYTES - 8), Some(0x55));
        let fp = field(&frame.bytes, 8 + UCONTEXT_BYTES - 80).unwrap();
        assert_eq!(fp % 64, 0);
        let at = usize::try_from(fp - frame.address).unwrap();
        assert_eq!(frame.bytes[at + 464..at + 468], FP_XSTATE_MAGIC1.to_le_bytes());
        assert_eq!(frame.bytes[at + 576..at + 580], FP_XSTATE_MAGIC2.to_le_bytes());
        assert_eq!(at + 580, frame.bytes.len());
    }

    #[test]
    fn what_cannot_be_framed_is_refused() {
        let state = state();
        let mut regs = registers(-1, 0);
        let stack_start = regs.rsp - (8 << 10);
        let refusal = |registers: &user_regs_struct, extended_state: &[u8]| {
            let restorer = 1;
            let signal_mask = 0;
            let input =
                FrameInput { registers, signal_mask, extended_state, restorer, stack_start };
            build(&input).unwrap_err()
        };
        assert!(refusal(&regs, &state).contains("8192 bytes of stack"));
        assert!(refusal(&regs, &state[..500]).contains("500 bytes"));
        regs.rsp = 100;
        assert!(refusal(&regs, &state).contains("0x64"));
        regs.cs = 0x23;
        assert!(refusal(&regs, &state).contains("32-bit"));
    }
}
