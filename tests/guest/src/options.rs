//! Options on the kernel's command line: `godwit.writer=fill=1000,hot=200,seed=7`.
//!
//! The word before the first `=` names the program, with a suffix after a second dot where several
//! instances run (`godwit.writer.b=...`). The rest is a list of `key=value`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

/// Prefix of the words that belong to the test guest.
pub const PREFIX: &str = "godwit.";

/// One program to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `writer`, or `writer.b` for a second instance.
    pub instance: String,
    /// Its options, unparsed.
    pub options: String,
}

impl Request {
    /// The program: the instance without its suffix.
    #[must_use]
    pub fn program(&self) -> &str {
        self.instance.split('.').next().unwrap_or_default()
    }
}

/// The programs that a kernel command line asks for, in its order.
#[must_use]
pub fn requests(cmdline: &str) -> Vec<Request> {
    let words = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix(PREFIX));
    words
        .map(|word| {
            let (instance, options) = word.split_once('=').unwrap_or((word, ""));
            Request { instance: instance.to_owned(), options: options.to_owned() }
        })
        .collect()
}

/// Options of one program, taken out one by one so that what is left over is known to be wrong.
#[derive(Debug)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// Parses `key=value,key=value`.
    ///
    /// # Errors
    /// A word without `=`, or a key given twice.
    pub fn parse(text: &str) -> Result<Self> {
        let mut map = BTreeMap::new();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let Some((key, value)) = word.split_once('=') else {
                bail!("Option {word:?} has no value; write key=value");
            };
            if map.insert(key.to_owned(), value.to_owned()).is_some() {
                bail!("Option {key} is given twice");
            }
        }
        Ok(Self(map))
    }

    /// A number, or `default` where the key is absent.
    ///
    /// # Errors
    /// The value is not a number.
    pub fn number(&mut self, key: &str, default: u64) -> Result<u64> {
        match self.0.remove(key) {
            None => Ok(default),
            Some(text) => {
                text.parse().with_context(|| format!("Option {key} is not a number: {text:?}"))
            }
        }
    }

    /// A word, or `default` where the key is absent.
    pub fn word(&mut self, key: &str, default: &str) -> String {
        self.0.remove(key).unwrap_or_else(|| default.to_owned())
    }

    /// Ends the parsing.
    ///
    /// # Errors
    /// A key was not asked for: it is misspelt.
    pub fn finish(self) -> Result<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(key) => bail!("Unknown option {key}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_programs_and_instances() {
        let found = requests(
            "console=ttyS0 godwit.writer=fill=8,hot=2 quiet godwit.writer.b godwit.checker=",
        );
        let names: Vec<_> = found.iter().map(|r| (r.program(), r.instance.as_str())).collect();
        assert_eq!(names, [("writer", "writer"), ("writer", "writer.b"), ("checker", "checker")]);
        assert_eq!(found[0].options, "fill=8,hot=2");
    }

    #[test]
    fn takes_options_and_refuses_leftovers() {
        let mut options = Options::parse("fill=8,kind=text,typo=1").unwrap();
        assert_eq!(options.number("fill", 1).unwrap(), 8);
        assert_eq!(options.number("hot", 3).unwrap(), 3);
        assert_eq!(options.word("kind", "random"), "text");
        assert!(options.finish().unwrap_err().to_string().contains("typo"));
    }

    #[test]
    fn refuses_malformed_options() {
        assert!(Options::parse("fill").is_err());
        assert!(Options::parse("a=1,a=2").is_err());
        assert!(Options::parse("fill=x").unwrap().number("fill", 0).is_err());
    }
}
