//! The fuzzers' corpus is handled by a stable build too: nothing panics, and the good ones are good.

#![expect(clippy::unwrap_used, reason = "a corpus that cannot be read fails the test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use scheduler::fuzz;

/// Files are changed at so many places.
const PLACES: usize = 100;

/// Replays a target's files, whole, cut and with bits turned; these are accepted, and no others.
fn replay(target: &str, good: &[&str], run: impl Fn(&[u8]) -> bool) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let (mut accepted, mut files) = (BTreeSet::new(), 0);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        files += 1;
        if run(&bytes) {
            accepted.insert(path.file_name().unwrap().to_string_lossy().into_owned());
        }
        for at in (0..bytes.len()).step_by(1 + bytes.len() / PLACES) {
            run(&bytes[..at]);
            let mut broken = bytes.clone();
            broken[at] ^= 1 << (at % 8);
            run(&broken);
        }
    }
    let good: BTreeSet<String> = good.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(accepted, good, "{target}");
    assert!(files > good.len(), "{target} has a corpus of {files} files, all of them good");
}

#[test]
fn reports() {
    let good = ["no-room", "of-all-ages", "talks-to-nobody", "three-hosts", "two-have-it"];
    replay("reports", &good, |bytes| fuzz::reports(bytes) > 0);
}

#[test]
fn configurations() {
    replay("config", &["example", "least"], fuzz::config);
}

#[test]
fn scenarios() {
    replay("scenario", &["generated", "idc-b", "idc-e"], fuzz::scenario);
}

#[test]
fn answers() {
    let good = ["balloon", "cgroup", "cpu-max", "meminfo", "net-dev", "nft", "pressure", "stat"];
    replay("answers", &good, |bytes| fuzz::answers(bytes) > 0);
}
