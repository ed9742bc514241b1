//! Where the guest's processors are: their control registers.
//!
//! Form: target/i386/cpu-dump.c (`x86_cpu_dump_state`) of QEMU 7.2 and 10.0, which has no machine-readable counterpart.

use super::error::VmError;
use crate::qmp::Client;

const REGISTERS: &str = "info registers -a";

/// Most processors that are read.
const PROCESSORS_MAX: usize = 4096;

/// Longest piece of a line, in characters, that an error repeats.
const QUOTE_CHARS: usize = 40;

/// Paging, 57 bits of addresses, virtual machines (Intel SDM volume 3, 2.5; AMD APM volume 2, 3.1.7).
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// What one processor of the guest has in its control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processor {
    /// CR3: where its page tables are.
    pub cr3: u64,
    /// CR0.PG: whether it uses them. One that was not started yet does not.
    pub is_paging: bool,
    /// CR4.LA57: whether they have five levels.
    pub has_five_levels: bool,
    /// CR4.VMXE or EFER.SVME: whether guests may run within the guest. Then the registers may be those of such a guest.
    pub may_nest: bool,
}

/// Asks for the registers of all processors. Stops none for longer than QEMU needs to read them.
///
/// # Errors
/// A [`VmError`] if QEMU does not answer, or in another form.
pub async fn processors(client: &Client) -> Result<Vec<Processor>, VmError> {
    parse(&client.hmp(REGISTERS).await?)
}

fn parse(text: &str) -> Result<Vec<Processor>, VmError> {
    let mut processors = vec![];
    for line in text.lines() {
        let register = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name))?;
            let unknown = || VmError::Text {
                command: REGISTERS,
                line: value.chars().take(QUOTE_CHARS).collect(),
            };
            Some(u64::from_str_radix(value, 16).map_err(|_| unknown()))
        };
        // On a line of its own, behind the others.
        if let (Some(efer), Some(last)) = (register("EFER="), processors.last_mut()) {
            let last: &mut Processor = last;
            last.may_nest |= efer? & EFER_SVME != 0;
        }
        let registers = [register("CR0="), register("CR3="), register("CR4=")];
        let [Some(cr0), Some(cr3), Some(cr4)] = registers else { continue };
        if processors.len() >= PROCESSORS_MAX {
            return Err(VmError::TooMany { command: REGISTERS, limit: PROCESSORS_MAX });
        }
        let cr4 = cr4?;
        processors.push(Processor {
            cr3: cr3?,
            is_paging: cr0? & CR0_PG != 0,
            has_five_levels: cr4 & CR4_LA57 != 0,
            may_nest: cr4 & CR4_VMXE != 0,
        });
    }
    if processors.is_empty() {
        return Err(VmError::Text { command: REGISTERS, line: "(no CR3)".into() });
    }
    Ok(processors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_registers_of_every_processor_are_read() {
        let text = "\nCPU#0\nRAX=0000000000000000 RBX=ffffffff8261b4c0\nCR0=80050033 CR2=00007f1c CR3=0000000003a10000 CR4=000006f0\n\
            DR0=0\nEFER=0000000000001d01\n\nCPU#1\nCR0=60000010 CR2=0 CR3=00000000 CR4=000036f0\nEFER=0000000000000d01\n\n\
            CPU#2\nCR0=80050033 CR2=0 CR3=00001000 CR4=000006f0\nEFER=0000000000000d01\n";
        let found = parse(text).expect("three processors");
        let processor = |cr3, is_paging, has_five_levels, may_nest| Processor {
            cr3,
            is_paging,
            has_five_levels,
            may_nest,
        };
        let wanted = [
            processor(0x03a1_0000, true, false, true),
            processor(0, false, true, true),
            processor(0x1000, true, false, false),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn another_form_is_an_error() {
        for text in ["", "CR0=1 CR4=2", "CR0=1 CR3=xyz CR4=0", "CR0=1 CR3=0 CR4=?"] {
            assert!(matches!(parse(text), Err(VmError::Text { .. })), "{text}");
        }
        let many = "CR0=0 CR3=0 CR4=0\n".repeat(PROCESSORS_MAX + 1);
        assert!(matches!(parse(&many), Err(VmError::TooMany { .. })));
    }
}
