//! The fuzzer's corpus is handled by a stable build too: nothing panics, and what is good is
//! accepted.

use std::fs;
use std::path::PathBuf;

use migrate_core::fuzz;

#[test]
fn the_fuzzers_corpus_is_handled() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/xbzrle");
    let (mut good, mut bad) = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let accepted = fuzz::xbzrle(&bytes);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("good-") {
            assert!(accepted, "{name} is refused");
            good += 1;
        } else if name.starts_with("bad-") {
            assert!(!accepted, "{name} is accepted");
            bad += 1;
        }
        // Cut anywhere, and with any bit turned, it must not panic either.
        for at in 0..bytes.len() {
            fuzz::xbzrle(&bytes[..at]);
            let mut broken = bytes.clone();
            broken[at] ^= 1 << (at % 8);
            fuzz::xbzrle(&broken);
        }
    }
    assert!(good >= 5 && bad >= 5, "a corpus of {good} good and {bad} bad files");
}
