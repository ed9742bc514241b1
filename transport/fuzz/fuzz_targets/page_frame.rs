//! Requests and answers of the page channel, as a peer might send them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    transport::fuzz::page_frame(bytes);
});
