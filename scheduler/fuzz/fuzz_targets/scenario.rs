//! A scenario for the simulator.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    scheduler::fuzz::scenario(bytes);
});
