//! Reports of hosts, of which policies make plans.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    scheduler::fuzz::reports(bytes);
});
