//! Answers of the human monitor, as QEMU might give them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    qemu_glue::fuzz::monitor_text(bytes);
});
