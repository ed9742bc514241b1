//! Figures of applications, read from logs by a rule: one line for each request that was answered or turned away.
//!
//! ```toml
//! [[profile.gray-box]]
//! guest = "web1"
//! file = "/var/log/nginx/web1.log"     # of a balancer on this host, or wherever it can be read from
//! pattern = '" (?<status>\d{3}) .* rt=(?<response_s>[\d.]+)$'
//! promised-response-s = 0.5
//! ```
//!
//! | group in the pattern | what it is |
//! |---|---|
//! | `response_s`, `response_ms`, `response_us` | time from a request to its answer |
//! | `service_s`, `service_ms`, `service_us` | time that the guest was busy with it, if the log has it |
//! | `at_s` | when the request came, seconds since 1970 with their parts, if the log has it |
//! | `status` | HTTP's number: from `dropped-from-status` on the request counts as dropped |
//! | `dropped` | if there is anything, the request counts as dropped |
//!
//! Where a log has no service times, response times stand for them: too long while requests wait. Where it has no
//! arrivals, they are taken to be random (their variance is the square of their mean distance).
//!
//! Invariants: a file is read from where it ended when it was first looked at; one that was replaced or cut is read from
//! its beginning; at most `BYTES_MAX` are read at a time, of lines of `LINE_BYTES_MAX` at most; patterns take time in
//! proportion to what is read.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use regex::{Captures, Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::model::GrayBox;

/// Most bytes that are read of a file at a time; what is more is passed over, and said so.
const BYTES_MAX: u64 = 8 << 20;

/// Longest line that is looked at.
const LINE_BYTES_MAX: usize = 16 << 10;

/// Largest program that a pattern may become, in bytes.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// Longest time that is believed, seconds.
const TIME_MAX_S: f64 = 86_400.0;

const GROUPS: [&str; 9] = [
    "response_s",
    "response_ms",
    "response_us",
    "service_s",
    "service_ms",
    "service_us",
    "at_s",
    "status",
    "dropped",
];

/// A rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// The guest whose application it is.
    pub guest: String,
    /// The log.
    pub file: PathBuf,
    /// How a line is read. Lines that it does not match are passed over.
    pub pattern: Pattern,
    /// From this HTTP status on a request counts as dropped.
    #[serde(default = "first_error")]
    pub dropped_from_status: u32,
    /// Response time that was promised, seconds; 0 if none was.
    #[serde(default)]
    pub promised_response_s: f64,
    /// Share of requests that may be dropped, 0 to 1; 1 if nothing was promised.
    #[serde(default = "all")]
    pub promised_drops: f64,
}

const fn first_error() -> u32 {
    500
}

const fn all() -> f64 {
    1.0
}

/// A pattern with groups that are known.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let built = RegexBuilder::new(&text).size_limit(PATTERN_BYTES_MAX).build();
        let pattern = built.map_err(|error| format!("{text:?} is no pattern: {error}"))?;
        let mut names = pattern.capture_names().flatten();
        if let Some(name) = names.find(|name| !GROUPS.contains(name)) {
            let known = GROUPS.join(", ");
            return Err(format!("{text:?} has an unknown group {name:?}; there are {known}"));
        }
        if !pattern.capture_names().flatten().any(|name| name.starts_with("response_")) {
            return Err(format!("{text:?} has no response time: add (?<response_s>[\\d.]+)"));
        }
        Ok(Self(pattern))
    }
}

/// A log that is followed.
#[derive(Debug)]
pub struct LogProbe {
    rule: Rule,
    place: Option<Place>,
    read_at_s: f64,
    arrived_at_s: Option<f64>,
}

/// Up to where a file was read.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    file: (u64, u64),
    offset: u64,
}

/// What requests of an interval add up to.
#[derive(Debug, Default)]
struct Sums {
    dropped: u64,
    response: Moments,
    service: Moments,
    arrivals: Moments,
}

/// Mean and variance, in one pass (Welford).
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let off = value - self.mean;
        self.mean += off / self.count as f64;
        self.squares += off * (value - self.mean);
    }

    fn variance(&self) -> f64 {
        if self.count > 1 { (self.squares / (self.count - 1) as f64).max(0.0) } else { 0.0 }
    }
}

impl LogProbe {
    /// Nothing is read yet.
    #[must_use]
    pub const fn new(rule: Rule) -> Self {
        Self { rule, place: None, read_at_s: 0.0, arrived_at_s: None }
    }

    /// The guest whose application it is.
    #[must_use]
    pub fn guest(&self) -> &str {
        &self.rule.guest
    }

    /// Forgets how far it was read: the guest is elsewhere.
    pub fn skip(&mut self) {
        (self.place, self.arrived_at_s) = (None, None);
    }

    /// What was logged since the last time; nothing the first time.
    ///
    /// # Errors
    /// In words, if the log cannot be read.
    pub fn read(&mut self, at_s: f64) -> Result<Option<GrayBox>, String> {
        let name = self.rule.file.display().to_string();
        let told = |error: io::Error| format!("{name} cannot be read: {error}");
        let known = self.place.is_some();
        let (text, passed_over_bytes) = self.new_lines().map_err(told)?;
        let (seconds, before_s) = (at_s - self.read_at_s, self.read_at_s);
        self.read_at_s = at_s;
        if !known || seconds <= 0.0 || before_s > at_s {
            return Ok(None);
        }
        let mut sums = Sums::default();
        for line in text.split(|byte| *byte == b'\n').filter(|line| line.len() <= LINE_BYTES_MAX) {
            self.add(&String::from_utf8_lossy(line), &mut sums);
        }
        if passed_over_bytes > 0 {
            return Err(format!("{name} grows too fast: {passed_over_bytes} bytes were not read"));
        }
        Ok(Some(self.figures(&sums, seconds)))
    }

    /// Whole lines that are new, and how much was passed over.
    fn new_lines(&mut self) -> io::Result<(Vec<u8>, u64)> {
        let mut file = File::open(&self.rule.file)?;
        let metadata = file.metadata()?;
        let (identity, length) = ((metadata.dev(), metadata.ino()), metadata.len());
        let begin = match self.place {
            None => length,
            Some(place) if place.file == identity && place.offset <= length => place.offset,
            Some(_) => 0,
        };
        let passed_over = (length - begin).saturating_sub(BYTES_MAX);
        file.seek(SeekFrom::Start(begin + passed_over))?;
        let mut text = vec![];
        file.take(BYTES_MAX).read_to_end(&mut text)?;
        // A line that is being written is read next time.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        text.truncate(whole);
        self.place = Some(Place { file: identity, offset: begin + passed_over + whole as u64 });
        Ok((text, passed_over))
    }

    fn add(&mut self, line: &str, sums: &mut Sums) {
        let Some(found) = self.rule.pattern.0.captures(line) else { return };
        if let Some(at_s) = number(&found, "at_s", 1.0, f64::MAX) {
            let before_s = self.arrived_at_s.replace(at_s);
            // Logs are in the order of answers: requests may have overtaken each other.
            let distance_s = before_s.map(|before_s| (at_s - before_s).abs());
            if let Some(distance_s) = distance_s.filter(|distance_s| *distance_s <= TIME_MAX_S) {
                sums.arrivals.add(distance_s);
            }
        }
        let status = found.name("status").and_then(|text| text.as_str().parse::<u32>().ok());
        let is_dropped = found.name("dropped").is_some_and(|text| !text.is_empty());
        if is_dropped || status.is_some_and(|status| status >= self.rule.dropped_from_status) {
            sums.dropped += 1;
            return;
        }
        let Some(response_s) = time_s(&found, ["response_s", "response_ms", "response_us"]) else {
            return;
        };
        sums.response.add(response_s);
        let service_s = time_s(&found, ["service_s", "service_ms", "service_us"]);
        sums.service.add(service_s.unwrap_or(response_s));
    }

    fn figures(&self, sums: &Sums, seconds: f64) -> GrayBox {
        let requests_per_s = (sums.response.count + sums.dropped) as f64 / seconds;
        let random_s2 =
            if requests_per_s > 0.0 { 1.0 / (requests_per_s * requests_per_s) } else { 0.0 };
        let has_arrivals = sums.arrivals.count > 1;
        GrayBox {
            served_per_s: sums.response.count as f64 / seconds,
            dropped_per_s: sums.dropped as f64 / seconds,
            response_s: sums.response.mean,
            service_s: sums.service.mean,
            arrival_variance_s2: if has_arrivals { sums.arrivals.variance() } else { random_s2 },
            service_variance_s2: sums.service.variance(),
            promised_response_s: self.rule.promised_response_s,
            promised_drops: self.rule.promised_drops,
        }
    }
}

fn number(found: &Captures<'_>, name: &str, unit: f64, most: f64) -> Option<f64> {
    let value = found.name(name)?.as_str().parse::<f64>().ok()? * unit;
    (0.0..=most).contains(&value).then_some(value)
}

fn time_s(found: &Captures<'_>, names: [&str; 3]) -> Option<f64> {
    let units = [1.0, 1e-3, 1e-6];
    names.iter().zip(units).find_map(|(name, unit)| number(found, name, unit, TIME_MAX_S))
}

#[cfg(test)]
mod tests;
