//! Commands of a program: one line in, one line out.

use std::io::BufRead as _;

use anyhow::Result;

/// Answers every line on stdin with what `answer` returns; ends with stdin.
pub(crate) fn serve(mut answer: impl FnMut(&[&str]) -> Result<String>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match answer(&words) {
            Ok(text) => println!("{text}"),
            Err(error) => println!("error {error:#}"),
        }
    }
    Ok(())
}
