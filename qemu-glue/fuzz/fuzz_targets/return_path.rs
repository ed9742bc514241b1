//! What a migration's destination answers, as QEMU might send it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    qemu_glue::fuzz::return_path(bytes);
});
