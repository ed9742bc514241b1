//! Would a seccomp filter let a call through? Asked before the call is injected, because a filter's
//! answer may be to kill the process.
//!
//! Classic BPF as the kernel checks it for seccomp (kernel/seccomp.c: seccomp_check_filter); an
//! instruction outside that set makes the answer "kill". Programs cannot loop: jumps go forward.

use libc::sock_filter;

/// `AUDIT_ARCH_X86_64`.
const ARCH_X86_64: u32 = 0xc000_003e;

/// What a filter does with a call, as linux/seccomp.h orders it: the lowest wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    KillProcess,
    KillThread,
    Trap,
    Errno,
    Notify,
    Trace,
    Log,
    Allow,
}

impl Action {
    fn of(value: u32) -> Self {
        match value & 0xffff_0000 {
            0x0000_0000 => Self::KillThread,
            0x0003_0000 => Self::Trap,
            0x0005_0000 => Self::Errno,
            0x7fc0_0000 => Self::Notify,
            0x7ff0_0000 => Self::Trace,
            0x7ffc_0000 => Self::Log,
            0x7fff_0000 => Self::Allow,
            _ => Self::KillProcess,
        }
    }

    /// Whether the call is made and the thread goes on.
    pub(super) fn lets_through(self) -> bool {
        matches!(self, Self::Allow | Self::Log)
    }
}

/// A call as a filter sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) address: u64,
    pub(super) arguments: [u64; 6],
}

impl Call {
    /// `struct seccomp_data` as 32-bit words.
    fn words(&self) -> [u32; 16] {
        let mut words = [0; 16];
        let low = |value: u64| value as u32;
        let high = |value: u64| (value >> 32) as u32;
        let values =
            std::iter::once(self.number as u64 & 0xffff_ffff | u64::from(ARCH_X86_64) << 32)
                .chain(std::iter::once(self.address))
                .chain(self.arguments);
        for (pair, value) in words.chunks_exact_mut(2).zip(values) {
            if let [first, second] = pair {
                (*first, *second) = (low(value), high(value));
            }
        }
        words
    }
}

/// What all filters together do with a call.
pub(super) fn verdict(filters: &[Vec<sock_filter>], call: &Call) -> Action {
    let words = call.words();
    let actions =
        filters.iter().map(|filter| run(filter, &words).map_or(Action::KillProcess, Action::of));
    actions.min().unwrap_or(Action::Allow)
}

/// Runs one program; nothing if it is not a valid one.
fn run(filter: &[sock_filter], data: &[u32; 16]) -> Option<u32> {
    let (mut a, mut x) = (0u32, 0u32);
    let mut memory = [0u32; 16];
    let mut at = 0usize;
    while let Some(instruction) = filter.get(at) {
        let (code, k) = (instruction.code, instruction.k);
        let slot = k as usize;
        at += 1;
        match code {
            0x00 => a = k,
            0x01 => x = k,
            0x20 => a = *data.get(slot / 4).filter(|_| slot.is_multiple_of(4))?,
            0x80 => a = 64,
            0x81 => x = 64,
            0x60 => a = *memory.get(slot)?,
            0x61 => x = *memory.get(slot)?,
            0x02 => *memory.get_mut(slot)? = a,
            0x03 => *memory.get_mut(slot)? = x,
            0x07 => x = a,
            0x87 => a = x,
            0x06 => return Some(k),
            0x16 => return Some(a),
            0x05 => at = at.checked_add(slot)?,
            _ if code & 0x07 == 0x05 => {
                let operand = if code & 0x08 != 0 { x } else { k };
                let holds = match code & 0xf0 {
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds { instruction.jt } else { instruction.jf });
            }
            _ if code & 0x07 == 0x04 => {
                let operand = if code & 0x08 != 0 { x } else { k };
                a = match code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    0x30 => a.checked_div(operand)?,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.checked_shl(operand)?,
                    0x70 => a.checked_shr(operand)?,
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                };
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
        sock_filter { code, jt, jf, k }
    }

    fn call(number: i64) -> Call {
        Call { number, address: 0x7f00_1234_5678, arguments: [1, 2, 3, 4, 5, 0xffff_0000_0001] }
    }

    /// The shape that libseccomp writes: architecture, then a list of denied numbers.
    fn deny(number: u32, action: u32) -> Vec<sock_filter> {
        vec![
            op(0x20, 0, 0, 4),
            op(0x15, 1, 0, ARCH_X86_64),
            op(0x06, 0, 0, 0x8000_0000),
            op(0x20, 0, 0, 0),
            op(0x15, 0, 1, number),
            op(0x06, 0, 0, action),
            op(0x06, 0, 0, 0x7fff_0000),
        ]
    }

    #[test]
    fn the_strictest_filter_wins() {
        let filters = [deny(323, 0x0005_0001), deny(323, 0), deny(3, 0x8000_0000)];
        assert_eq!(verdict(&filters, &call(323)), Action::KillThread);
        assert_eq!(verdict(&filters, &call(3)), Action::KillProcess);
        assert_eq!(verdict(&filters, &call(1)), Action::Allow);
        assert_eq!(verdict(&filters[..1], &call(323)), Action::Errno);
        assert_eq!(verdict(&[], &call(323)), Action::Allow);
        assert_eq!(verdict(&[vec![op(0xffff, 0, 0, 0)]], &call(1)), Action::KillProcess);
    }

    #[test]
    fn arguments_are_found_at_their_places() {
        let last_high = vec![op(0x20, 0, 0, 60), op(0x16, 0, 0, 0)];
        assert_eq!(run(&last_high, &call(1).words()), Some(0xffff));
        let address_low = vec![op(0x20, 0, 0, 8), op(0x16, 0, 0, 0)];
        assert_eq!(run(&address_low, &call(1).words()), Some(0x1234_5678));
    }

    proptest! {
        #[test]
        fn any_program_comes_to_an_end(program in prop::collection::vec(
            (any::<u16>(), any::<u8>(), any::<u8>(), any::<u32>()), 0..60)) {
            let program: Vec<_> =
                program.into_iter().map(|(code, jt, jf, k)| op(code & 0xff, jt, jf, k)).collect();
            let _ = verdict(&[program], &call(323));
        }
    }
}
