//! Style lints that neither rustfmt nor clippy has: every Rust file begins with a module doc, has at
//! most 1,000 lines, no tabs, no trailing space and no marker of unfinished work.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run::output;

const LINES_MAX: usize = 1000;
/// Put together here so that this file does not find itself.
const MARKERS: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];

fn has_word(line: &str, word: &str) -> bool {
    line.split(|character: char| !character.is_alphanumeric() && character != '_')
        .any(|found| found == word)
}

/// Complaints about one file, each `line: text`.
fn complaints(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
    if !first.is_some_and(|line| line.starts_with("//!")) {
        found.push("1: no module documentation (//!) at the top".to_owned());
    }
    let lines = text.lines().count();
    if lines > LINES_MAX {
        found.push(format!("{lines}: more than {LINES_MAX} lines; split the file"));
    }
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        if line.contains('\t') {
            found.push(format!("{number}: a tab"));
        }
        if line.ends_with(' ') {
            found.push(format!("{number}: trailing space"));
        }
        if let Some(marker) = MARKERS.iter().find(|marker| has_word(line, marker)) {
            found.push(format!("{number}: {marker}: finish it or open an issue"));
        }
    }
    found
}

/// Checks all Rust files that git tracks or would track.
pub(crate) fn tidy(root: &Path) -> Result<()> {
    let list = ["ls-files", "--cached", "--others", "--exclude-standard", "--", "*.rs"];
    let files = output(Command::new("git").current_dir(root).args(list))?;
    let mut count = 0;
    let mut bad = 0;
    for file in files.lines() {
        let path = root.join(file);
        if !path.exists() {
            continue;
        }
        count += 1;
        let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {file}"))?;
        for complaint in complaints(&text) {
            println!("{file}:{complaint}");
            bad += 1;
        }
    }
    if bad > 0 {
        bail!("{bad} complaints in {count} files");
    }
    println!("   {count} files are tidy");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_a_tidy_file() {
        assert!(complaints("//! Purpose.\n\nfn f() {}\n").is_empty());
        assert!(complaints("#![no_std]\n//! Purpose.\n").is_empty());
    }

    #[test]
    fn finds_each_fault() {
        assert_eq!(complaints("fn f() {}\n").len(), 1);
        assert_eq!(complaints("//! P.\n\tx\ny \n").len(), 2);
        assert_eq!(complaints(concat!("//! P.\n// TO", "DO: later\n")).len(), 1);
        assert!(complaints(concat!("//! P.\nlet TO", "DOS = 1;\n")).is_empty());
        assert_eq!(complaints(&format!("//! P.\n{}", "x\n".repeat(1000))).len(), 1);
    }
}
