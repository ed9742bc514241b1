//! The fuzzers' corpus is handled by a stable build too: nothing panics, and the good ones are good.

#![expect(clippy::unwrap_used, reason = "a corpus that cannot be read fails the test")]

use std::fs;
use std::path::PathBuf;

use qemu_glue::fuzz;

fn replay(target: &str, good: &[&str], run: impl Fn(&[u8]) -> bool) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut accepted = vec![];
    let mut files = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        files += 1;
        if run(&bytes) {
            accepted.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
        // Cut anywhere, and with any bit turned, it must not panic either.
        for at in (0..bytes.len()).step_by(1 + bytes.len() / 200) {
            run(&bytes[..at]);
            let mut broken = bytes.clone();
            broken[at] ^= 1 << (at % 8);
            run(&broken);
        }
    }
    assert!(files > good.len(), "{target} has a corpus of {files} files");
    for name in good {
        assert!(accepted.iter().any(|found| found == name), "{target}: {name} was not accepted");
    }
}

#[test]
fn qmp_lines() {
    replay("qmp_line", &["greeting", "reply", "error", "event"], fuzz::qmp_line);
}

#[test]
fn answers_of_the_monitor() {
    let good = ["7.2-big.ramblock.txt", "10.0-numa.mtree.txt", "gpa2hva"];
    replay("monitor_text", &good, |bytes| fuzz::monitor_text(bytes) > 0);
}

#[test]
fn heads_of_device_state() {
    replay("stream_header", &["good", "other-capability"], fuzz::stream_header);
}

#[test]
fn migration_streams() {
    replay("stream", &["good", "postcopy", "shared", "early"], fuzz::stream);
}

#[test]
fn answers_of_destinations() {
    replay("return_path", &["good", "recovery"], fuzz::return_path);
}
