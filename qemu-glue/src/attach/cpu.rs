//! What the processor says about the layout of its extended state, and empty registers.
#![expect(unsafe_code, reason = "a structure of integers is zeroed")]

use std::arch::x86_64::__cpuid_count;

use libc::user_regs_struct;

/// CPUID leaf of the extended state.
const XSTATE_LEAF: u32 = 0xd;

/// Where a component of the extended state ends in the standard form, in bytes; `component` is at
/// least 2 (0 and 1 have fixed places).
pub(super) fn component_end(component: u32) -> usize {
    let found = __cpuid_count(XSTATE_LEAF, component);
    (found.eax as usize).saturating_add(found.ebx as usize)
}

/// Registers that are all zero.
pub(super) fn zero_registers() -> user_regs_struct {
    // SAFETY: the structure holds integers only, for which zero is a value.
    unsafe { std::mem::zeroed() }
}
