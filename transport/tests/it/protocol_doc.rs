//! Ties `docs/PROTOCOL.md` to the files that define the protocol.

use std::fs;
use std::path::{Path, PathBuf};

use transport::messages::{TYPE_NUMBERS, VERSIONS, message_type};
use xxhash_rust::xxh3::xxh3_64;

/// The files that say what travels, in this order.
const DEFINED_IN: [&str; 4] = ["messages.rs", "messages/split.rs", "wire.rs", "lane_wire.rs"];

fn document() -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "docs", "PROTOCOL.md"].iter().collect();
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_specification_changes_with_the_protocol() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    for file in DEFINED_IN {
        all.extend(fs::read(sources.join(file)).unwrap());
    }
    let now = format!("{:016x}", xxh3_64(&all));
    let document = document();
    let written = document
        .lines()
        .find_map(|line| line.strip_prefix("Fingerprint: `"))
        .and_then(|rest| rest.split('`').next())
        .expect("docs/PROTOCOL.md has a line \"Fingerprint: `...`\"");
    assert_eq!(
        written, now,
        "{DEFINED_IN:?} changed. Bring docs/PROTOCOL.md up to date, add a version if what travels \
         is different, then set its line to: Fingerprint: `{now}`"
    );
}

#[test]
fn the_specification_lists_every_message_with_its_limit() {
    let document = document();
    for number in TYPE_NUMBERS {
        let (name, bytes_max) = message_type(*number).unwrap();
        let row = format!("| {number} | `{name}` | {bytes_max} |");
        assert!(document.contains(&row), "docs/PROTOCOL.md has no row that begins with: {row}");
    }
    for version in VERSIONS {
        let row = format!("| {version} | ");
        assert!(document.contains(&row), "docs/PROTOCOL.md does not list version {version}");
    }
}
