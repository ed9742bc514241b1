//! A page's delta in XBZRLE, as QEMU or a peer might send it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    migrate_core::fuzz::xbzrle(bytes);
});
