//! Ties `docs/PROTOCOL.md` to the files that define the protocol.

use std::fs;
use std::path::{Path, PathBuf};

use transport::messages::{TYPE_NUMBERS, VERSIONS, message_type};
use transport::pages;
use xxhash_rust::xxh3::xxh3_64;

/// The files that say what travels in a session, in this order.
const DEFINED_IN: [&str; 5] =
    ["messages.rs", "messages/split.rs", "messages/stream.rs", "wire.rs", "lane_wire.rs"];

/// Those that say what travels on the page channel.
const PAGES_DEFINED_IN: [&str; 5] = [
    "pages/wire.rs",
    "pages/wire/rules.rs",
    "pages/wire/listed.rs",
    "../../migrate-core/src/store/names.rs",
    "../../migrate-core/src/store/error.rs",
];

fn document() -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "docs", "PROTOCOL.md"].iter().collect();
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The fingerprint of some files, and the one in the document's line that begins with `prefix`.
fn fingerprints(files: &[&str], prefix: &str) -> (String, String) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let all: Vec<u8> =
        files.iter().flat_map(|file| fs::read(sources.join(file)).unwrap()).collect();
    let written = document()
        .lines()
        .find_map(|line| line.strip_prefix(prefix)?.strip_prefix(": `"))
        .and_then(|rest| rest.split('`').next())
        .unwrap_or_else(|| panic!("docs/PROTOCOL.md has a line \"{prefix}: `...`\""))
        .to_owned();
    (format!("{:016x}", xxh3_64(&all)), written)
}

#[test]
fn the_specification_changes_with_the_protocol() {
    let all: [(&[&str], &str); 2] =
        [(&DEFINED_IN, "Fingerprint"), (&PAGES_DEFINED_IN, "Fingerprint of the page channel")];
    for (files, prefix) in all {
        let (now, written) = fingerprints(files, prefix);
        assert_eq!(
            written, now,
            "{files:?} changed. Bring docs/PROTOCOL.md up to date, add a version if what travels \
             is different, then set its line to: {prefix}: `{now}`"
        );
    }
}

#[test]
fn the_specification_lists_every_message_with_its_limit() {
    let document = document();
    for number in TYPE_NUMBERS {
        let (name, bytes_max) = message_type(*number).unwrap();
        let row = format!("| {number} | `{name}` | {bytes_max} |");
        assert!(document.contains(&row), "docs/PROTOCOL.md has no row that begins with: {row}");
    }
    for (name, number) in pages::wire::KINDS {
        let row = format!("| {number} | `{name}` | ");
        assert!(document.contains(&row), "docs/PROTOCOL.md has no row that begins with: {row}");
    }
    for version in VERSIONS {
        let row = format!("| {version} | ");
        assert!(document.contains(&row), "docs/PROTOCOL.md does not list version {version}");
    }
}
