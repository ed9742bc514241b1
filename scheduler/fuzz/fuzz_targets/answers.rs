//! What the kernel, nftables and QEMU answer.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    scheduler::fuzz::answers(bytes);
});
