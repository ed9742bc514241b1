//! Which codec packs a batch: the one with which the migration goes fastest, by what was measured.
//!
//! Packing and the link work side by side, so a byte of contents takes as long as the slower of the
//! two:
//!
//! ```text
//! time(codec) = max(packing time / packing threads, packed length / link rate)
//! ```
//!
//! Of two that take about as long, the one that packs better is taken.
//!
//! Packing time is the thread's processor time, times what a second of it takes by the clock: where the
//! guest or another task wants the processor, packing takes longer and is chosen less. Contents are told apart by the entropy of a sample, as
//! what looks like noise does not pack; both kinds are measured on their own, and what was not
//! measured for a while is tried again.
//!
//! Invariant: a codec that was measured to be slower than sending as is is used for trials only.

use std::time::Duration;

use crate::codec::Codec;

/// Bytes looked at to tell noise from other contents, and the pieces that they come in.
const SAMPLE_BYTES: usize = 2048;
const SAMPLE_PIECE_BYTES: usize = 32;

/// Bits a byte of a sample from which it counts as noise: noise itself shows 7.9 in 2048 bytes.
const NOISE_BITS: f64 = 7.5;

/// Share of the time that a codec must save to be used.
const WORTHWHILE: f64 = 0.97;

/// Among codecs that are faster than sending as is, half the length is worth a fifth of the time: what
/// is measured varies by as much, and the link has other users.
const SIZE_WEIGHT: f64 = 0.35;

/// While packing takes less than this share of the time, the stream is fed although it gains nothing
/// yet: what repeats it finds only among what went through it.
const IDLE: f64 = 0.5;

/// Weight of the latest measurement, and of one that others of the kind were packed before.
const WEIGHT: f64 = 0.25;
const WEIGHT_AFTER_OTHERS: f64 = 0.7;

/// Weight of the latest batch in what is known of the slowdown.
const SLOWDOWN_WEIGHT: f64 = 0.03;

/// Batches of a kind after which a codec is tried that was not measured meanwhile; twice as many after
/// every trial that did not show it to be the fastest, so that all trials of a long migration together take
/// little of it.
const TRIAL_AFTER: u32 = 64;
const TRIALS_FAILED_MAX: u32 = 16;

/// Zstandard is tried with one batch, as long as its stream is ahead, when LZ4 packs to this share of
/// the length that it had when Zstandard was last used: memory that packs badly is followed by memory
/// of which the stream has seen the like.
const EASIER: f64 = 0.7;

/// Batches of a trial: what the stream gains shows only after some megabytes.
const TRIAL_BATCHES: u32 = 40;

/// A trial ends when a byte takes so many times as long to pack as it takes with the fastest: a stream
/// that is ahead packs faster than one that is not, but not by so much.
const HOPELESS: f64 = 4.0;

/// Batches by which the stream has to be ahead before it is measured. Each batch that does not go
/// through it takes it back by one.
const WARM_BATCHES: u32 = 16;

/// Batches by which it counts as ahead at most.
const WARM_BATCHES_MAX: u32 = 64;

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// What is fastest.
    Auto,
    /// This one, always.
    Always(Codec),
}

/// What is known of a codec with contents of one kind.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// Seconds of packing a byte of contents.
    s_per_byte: f64,
    /// Packed length a byte of contents.
    ratio: f64,
    /// Batches of the kind since it was measured.
    age: u32,
    /// Trials since it was last the fastest.
    trials_failed: u32,
}

impl Known {
    fn assumed(s_per_byte: f64, ratio: f64) -> Self {
        Self { s_per_byte, ratio, age: 0, trials_failed: 0 }
    }

    fn note(&mut self, s_per_byte: f64, ratio: f64) {
        let weight = if self.age > 1 { WEIGHT_AFTER_OTHERS } else { WEIGHT };
        self.s_per_byte += (s_per_byte - self.s_per_byte) * weight;
        self.ratio += (ratio - self.ratio) * weight;
        self.age = 0;
    }

    fn is_due(&self) -> bool {
        self.age > TRIAL_AFTER << self.trials_failed
    }
}

/// Chooses for the batches of one packing thread.
#[derive(Debug)]
pub struct CodecChoice {
    wanted: Wanted,
    threads: f64,
    /// By kind (noise last) and codec, in the order of [`Codec::ALL`].
    known: [[Known; 3]; 2],
    /// The batch that was chosen for last.
    last: (usize, Codec),
    /// A codec being tried with contents of a kind, and for how many batches more.
    trial: Option<(usize, Codec, u32)>,
    /// How far the stream is ahead.
    warm: u32,
    /// Seconds by the clock that packing for a second of processor time takes.
    slowdown: f64,
    /// Seconds that a byte takes with the fastest.
    best_s: f64,
    /// LZ4's ratio when Zstandard was last used, by kind.
    lz4_ratio: [f64; 2],
}

impl CodecChoice {
    /// A choice for one of `threads` packing threads, beginning with what is common.
    pub fn new(wanted: Wanted, threads: usize) -> Self {
        let plain = Known::assumed(0.0, 1.0);
        // Zstandard has the benefit of the doubt until its stream is warm.
        let usual = [plain, Known::assumed(2.5e-9, 0.5), Known::assumed(2e-9, 0.2)];
        let noise = [plain, Known::assumed(1e-9, 1.0), Known::assumed(2e-9, 1.0)];
        Self {
            wanted,
            threads: threads.max(1) as f64,
            known: [usual, noise],
            last: (0, Codec::Plain),
            trial: None,
            warm: 0,
            slowdown: 1.0,
            best_s: f64::INFINITY,
            lz4_ratio: [1.0; 2],
        }
    }

    /// The codec for a batch with these contents; `link_bytes_per_s` is what the link carries, if
    /// that is known.
    pub fn choose(&mut self, content: &[u8], link_bytes_per_s: Option<f64>) -> Codec {
        let kind = usize::from(entropy_bits(content) > NOISE_BITS);
        let codec = match self.wanted {
            Wanted::Always(codec) => codec,
            // Nothing is known of the link before something was sent: most are slow.
            Wanted::Auto => {
                let link = link_bytes_per_s.unwrap_or(50e6);
                let codec = self.decide(kind, link);
                if self.is_easier(kind, codec) { Codec::Zstd } else { codec }
            }
        };
        self.note_use(kind, codec);
        self.warm = match codec {
            Codec::Zstd => (self.warm + 1).min(WARM_BATCHES_MAX),
            _ => self.warm.saturating_sub(1),
        };
        self.last = (kind, codec);
        codec
    }

    /// Packing the batch chosen for last took so long, and so much of the processor.
    pub fn packed(
        &mut self,
        content_bytes: usize,
        packed_bytes: usize,
        took: Duration,
        processor: Duration,
    ) {
        let (kind, codec) = self.last;
        let bytes = content_bytes.max(1) as f64;
        let processor_s = processor.as_secs_f64().max(1e-6);
        let slowdown = (took.as_secs_f64() / processor_s).clamp(1.0, 100.0);
        self.slowdown += (slowdown - self.slowdown) * SLOWDOWN_WEIGHT;
        let s_per_byte = processor_s / bytes;
        if s_per_byte * self.slowdown / self.threads > self.best_s * HOPELESS {
            self.trial = None;
        }
        let measurable = match codec {
            Codec::Plain => false,
            Codec::Lz4 => true,
            Codec::Zstd => self.warm >= WARM_BATCHES,
        };
        let known = self.known.get_mut(kind).and_then(|kind| kind.get_mut(number(codec)));
        if let Some(known) = known.filter(|_| measurable) {
            known.note(s_per_byte, packed_bytes as f64 / bytes);
        }
    }

    /// What LZ4 makes of contents of a kind, as a share of their length.
    fn lz4_ratio_now(&self, kind: usize) -> Option<f64> {
        Some(self.known.get(kind)?.get(number(Codec::Lz4))?.ratio)
    }

    /// Whether contents have changed so that Zstandard, whose stream is ahead, may be better than LZ4.
    fn is_easier(&self, kind: usize, codec: Codec) -> bool {
        let ratios = self.lz4_ratio_now(kind).zip(self.lz4_ratio.get(kind));
        let eased = ratios.is_some_and(|(now, before)| now < before * EASIER);
        eased && codec == Codec::Lz4 && self.warm >= WARM_BATCHES
    }

    fn note_use(&mut self, kind: usize, codec: Codec) {
        let now = self.lz4_ratio_now(kind).filter(|_| codec == Codec::Zstd);
        if let Some((now, ratio)) = now.zip(self.lz4_ratio.get_mut(kind)) {
            *ratio = now;
        }
    }

    /// A trial if one is due or under way, else the fastest.
    fn decide(&mut self, kind: usize, link_bytes_per_s: f64) -> Codec {
        let threads = self.threads / self.slowdown;
        let Some(known) = self.known.get_mut(kind) else { return Codec::Plain };
        let (fastest, best_s) = fastest(known, threads, link_bytes_per_s);
        self.best_s = best_s;
        for (codec, known) in Codec::ALL.into_iter().zip(known.iter_mut()) {
            known.age += 1;
            if codec == fastest {
                known.trials_failed = 0;
            }
        }
        if let Some((_, codec, left)) = self.trial.take_if(|(of, ..)| *of == kind) {
            self.trial = (left > 1).then_some((kind, codec, left - 1));
            return codec;
        }
        for (codec, batches) in [(Codec::Lz4, 1), (Codec::Zstd, TRIAL_BATCHES)] {
            if let Some(known) = known.get_mut(number(codec))
                && known.is_due()
            {
                known.age = 0;
                known.trials_failed = (known.trials_failed + 1).min(TRIALS_FAILED_MAX);
                self.trial = (batches > 1).then_some((kind, codec, batches - 1));
                return codec;
            }
        }
        fastest
    }
}

/// The codec to use for contents of which this is known, and the seconds that a byte takes with it.
fn fastest(known: &[Known; 3], threads: f64, link_bytes_per_s: f64) -> (Codec, f64) {
    let plain_s = 1.0 / link_bytes_per_s.max(1.0);
    let (mut best, mut best_s, mut best_score) = (Codec::Plain, plain_s, plain_s);
    for (codec, known) in Codec::ALL.into_iter().zip(known).skip(1) {
        let packing_s = known.s_per_byte / threads;
        let time_s = packing_s.max(known.ratio * plain_s);
        let score = time_s * known.ratio.max(1e-3).powf(SIZE_WEIGHT);
        let gains_later = codec == Codec::Zstd && packing_s < IDLE * time_s && score <= best_score;
        if (time_s < plain_s * WORTHWHILE && score < best_score) || gains_later {
            (best, best_s, best_score) = (codec, time_s, score);
        }
    }
    (best, best_s)
}

fn number(codec: Codec) -> usize {
    Codec::ALL.iter().position(|other| *other == codec).unwrap_or(0)
}

/// Shannon entropy of a sample's bytes, in bits a byte.
fn entropy_bits(content: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    let step = (content.len() / (SAMPLE_BYTES / SAMPLE_PIECE_BYTES)).max(SAMPLE_PIECE_BYTES);
    let pieces = content.chunks(step).filter_map(|piece| piece.get(..SAMPLE_PIECE_BYTES));
    let mut total = 0.0;
    for byte in pieces.flatten() {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
            total += 1.0;
        }
    }
    let shares = counts.iter().filter(|count| **count > 0).map(|count| f64::from(*count) / total);
    shares.map(|share| -share * share.log2()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    fn text(bytes: usize) -> Vec<u8> {
        b"some words that come again, ".iter().copied().cycle().take(bytes).collect()
    }

    const BATCH: usize = 256 << 10;

    /// Packs `batches` batches with given speeds and ratios of LZ4 and Zstandard; returns how often
    /// each codec was chosen in the second half.
    fn run(content: &[u8], link: f64, lz4: (f64, f64), zstd: (f64, f64), batches: u32) -> [u32; 3] {
        let mut choice = CodecChoice::new(Wanted::Auto, 1);
        let mut chosen = [0; 3];
        for batch in 0..batches {
            let codec = choice.choose(content, Some(link));
            chosen[number(codec)] += u32::from(batch >= batches / 2);
            let (rate, ratio) = match codec {
                Codec::Plain => continue,
                Codec::Lz4 => lz4,
                Codec::Zstd => zstd,
            };
            let took = Duration::from_secs_f64(BATCH as f64 / rate);
            choice.packed(BATCH, (BATCH as f64 * ratio) as usize, took, took / 2);
        }
        chosen
    }

    #[test]
    fn entropy_tells_noise() {
        assert!(entropy_bits(&noise(BATCH)) > NOISE_BITS + 0.3);
        assert!(entropy_bits(&text(BATCH)) < 5.0);
        assert!(entropy_bits(&[]).abs() < 1e-9 && entropy_bits(&[1]).abs() < 1e-9);
    }

    #[test]
    fn a_slow_link_gets_what_packs_best() {
        let [plain, lz4, zstd] = run(&text(BATCH), 12e6, (400e6, 0.5), (200e6, 0.4), 400);
        assert!(zstd > 190 && lz4 < 8 && plain == 0, "{plain} {lz4} {zstd}");
    }

    #[test]
    fn a_fast_link_is_not_slowed_down() {
        let [plain, lz4, zstd] = run(&text(BATCH), 1e9, (400e6, 0.5), (200e6, 0.4), 4000);
        assert!(plain > 1900 && zstd < 41, "{plain} {lz4} {zstd}");
        // A third of the link's rate by Zstandard, twice the rate by LZ4.
        let [plain, lz4, zstd] = run(&text(BATCH), 200e6, (400e6, 0.5), (66e6, 0.4), 400);
        assert!(lz4 > 190, "{plain} {lz4} {zstd}");
    }

    #[test]
    fn noise_is_left_alone_unless_there_is_time() {
        let [plain, ..] = run(&noise(BATCH), 300e6, (900e6, 1.0), (250e6, 1.0), 4000);
        assert!(plain > 1800, "{plain}");
        // Nobody waits for the packing: what repeats may be found later.
        let [_, _, zstd] = run(&noise(BATCH), 100e6, (900e6, 1.0), (400e6, 1.0), 400);
        assert!(zstd > 190, "{zstd}");
        // And if it is found, more time is spent.
        let [_, _, zstd] = run(&noise(BATCH), 300e6, (900e6, 1.0), (400e6, 0.1), 400);
        assert!(zstd > 190, "{zstd}");
    }

    /// Memory that packs badly by either codec is followed by some that the stream knows.
    #[test]
    fn what_gets_easier_goes_back_to_the_stream() {
        let content = text(BATCH);
        let mut choice = CodecChoice::new(Wanted::Auto, 2);
        let mut late = [0; 3];
        for batch in 0..250u32 {
            let codec = choice.choose(&content, Some(147e6));
            late[number(codec)] += u32::from(batch >= 120);
            let dense = (40..65).contains(&batch);
            let (ns_per_byte, ratio) = match (codec, dense) {
                (Codec::Plain, _) => continue,
                (Codec::Lz4, true) => (2.0, 0.6),
                (Codec::Lz4, false) => (0.7, 0.24),
                (Codec::Zstd, true) => (6.5, 0.55),
                (Codec::Zstd, false) => (1.6, 0.03),
            };
            let processor = Duration::from_secs_f64(ns_per_byte * 1e-9 * BATCH as f64);
            choice.packed(BATCH, (BATCH as f64 * ratio) as usize, processor * 2, processor);
        }
        let [plain, lz4, zstd] = late;
        assert!(zstd > 110, "{plain} {lz4} {zstd}");
    }

    #[test]
    fn what_the_user_wants_is_used() {
        let mut choice = CodecChoice::new(Wanted::Always(Codec::Lz4), 2);
        assert_eq!(choice.choose(&noise(BATCH), Some(1e9)), Codec::Lz4);
    }
}
