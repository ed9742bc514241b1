//! The link of a scenario.

use anyhow::{Result, ensure};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Longest delay that a relay is asked for, in milliseconds.
const DELAY_MS_MAX: f64 = 2000.0;

/// What a guest moves over: a veth pair shaped by TBF and, for delay and loss, our relay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinkPart {
    /// Rate in bits a second; 0 is unshaped. In files a text such as `"100M"` or a number.
    #[serde(default = "LinkPart::rate", deserialize_with = "rate")]
    pub(crate) rate: u64,
    /// Delay of each direction, in milliseconds.
    #[serde(default)]
    pub(crate) delay_ms: f64,
    /// Share of UDP datagrams that are lost, each direction, in percent.
    #[serde(default)]
    pub(crate) loss_percent: f64,
    /// Seed of the losses.
    #[serde(default = "LinkPart::seed")]
    pub(crate) seed: u64,
}

impl LinkPart {
    fn rate() -> u64 {
        1_000_000_000
    }

    fn seed() -> u64 {
        1
    }

    /// Whether it needs the relay.
    pub(crate) fn is_relayed(&self) -> bool {
        self.delay_ms > 0.0 || self.loss_percent > 0.0
    }

    /// In words.
    pub(crate) fn shown(&self) -> String {
        let mut text = match self.rate {
            0 => "unshaped".to_owned(),
            bits => format!("{} Mbit/s", bits as f64 / 1e6),
        };
        if self.delay_ms > 0.0 {
            text.push_str(&format!(", {} ms delay each way", self.delay_ms));
        }
        if self.loss_percent > 0.0 {
            text.push_str(&format!(", {} % of UDP datagrams lost", self.loss_percent));
        }
        text
    }

    pub(super) fn check(&self) -> Result<()> {
        ensure!((0.0..=DELAY_MS_MAX).contains(&self.delay_ms), "delay_ms: 0 to {DELAY_MS_MAX}");
        ensure!((0.0..=50.0).contains(&self.loss_percent), "loss_percent: 0 to 50");
        Ok(())
    }
}

impl Default for LinkPart {
    fn default() -> Self {
        Self { rate: Self::rate(), delay_ms: 0.0, loss_percent: 0.0, seed: Self::seed() }
    }
}

/// A rate in bits a second: a number with an optional suffix k, M or G.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 1_000),
        Some((at, 'm' | 'M')) => (text.get(..at), 1_000_000),
        Some((at, 'g' | 'G')) => (text.get(..at), 1_000_000_000),
        _ => (Some(text), 1),
    };
    digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(factor))
        .filter(|bits| *bits == 0 || (100_000..=100_000_000_000).contains(bits))
        .ok_or_else(|| "give 0, or a rate from 100k to 100G such as 500M".to_owned())
}

fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    struct Rate;

    impl de::Visitor<'_> for Rate {
        type Value = u64;

        fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            out.write_str("a rate in bits a second such as \"100M\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            parse_rate(text).map_err(E::custom)
        }

        fn visit_u64<E: de::Error>(self, bits: u64) -> Result<u64, E> {
            self.visit_str(&bits.to_string())
        }

        fn visit_i64<E: de::Error>(self, bits: i64) -> Result<u64, E> {
            self.visit_str(&bits.to_string())
        }
    }

    from.deserialize_any(Rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_suffixes() {
        assert_eq!(parse_rate("1G"), Ok(1_000_000_000));
        assert_eq!(parse_rate("0"), Ok(0));
        for bad in ["", "G", "-1", "5k", "9999999999G"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_has_texts_or_numbers() {
        let read = |text: &str| toml::from_str::<LinkPart>(text);
        assert_eq!(read("rate = \"100M\"").unwrap().rate, 100_000_000);
        assert_eq!(read("rate = 250000").unwrap().rate, 250_000);
        let default = read("").unwrap();
        assert!(!default.is_relayed() && default.shown() == "1000 Mbit/s");
        assert!(read("rate = true").unwrap_err().to_string().contains("bits a second"));
        let slow = read("delay_ms = 20\nloss_percent = 0.5").unwrap();
        assert!(slow.is_relayed() && slow.shown().contains("20 ms"));
        assert!(read("delay_ms = -1").unwrap().check().is_err());
        assert!(read("loss_percent = 90").unwrap().check().is_err());
    }
}
