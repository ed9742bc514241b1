//! Memory of a guest whose kernel lies.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fctrans::fuzz::guest(bytes);
});
