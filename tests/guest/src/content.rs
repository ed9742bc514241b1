//! What memory is filled with, as options name it.

use anyhow::{Result, bail};

/// Contents.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// English words.
    Text,
    /// Noise.
    Random,
    /// Pages of both in turn.
    Mixed,
}

impl Content {
    /// By its name.
    pub(crate) fn parse(word: &str) -> Result<Self> {
        Ok(match word {
            "text" => Self::Text,
            "random" => Self::Random,
            "mixed" => Self::Mixed,
            other => bail!("Unknown content {other:?}; there are text, random, mixed"),
        })
    }

    /// Whether a page is text.
    pub(crate) fn is_text(self, page: u64) -> bool {
        self == Self::Text || (self == Self::Mixed && page.is_multiple_of(2))
    }
}
