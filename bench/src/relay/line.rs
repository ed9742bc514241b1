//! The decisions of the relay, without clock and sockets: when something arrives, and whether.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use guest_programs::rng::XorShift;

/// What was sent and has not arrived.
///
/// Invariants: things arrive in the order in which they were sent, each `delay` after it was sent;
/// no more than `bytes_max` bytes are under way.
#[derive(Debug)]
pub(crate) struct DelayLine<T> {
    delay: Duration,
    under_way: VecDeque<(Instant, usize, T)>,
    bytes: usize,
    bytes_max: usize,
}

impl<T> DelayLine<T> {
    /// An empty line.
    pub(crate) fn new(delay: Duration, bytes_max: usize) -> Self {
        Self { delay, under_way: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Sends something; false if there is no room for it.
    pub(crate) fn push(&mut self, now: Instant, bytes: usize, what: T) -> bool {
        if self.bytes.saturating_add(bytes) > self.bytes_max {
            return false;
        }
        self.bytes += bytes;
        self.under_way.push_back((now + self.delay, bytes, what));
        true
    }

    /// The next that has arrived.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<T> {
        let (_, bytes, what) = self.under_way.pop_front_if(|(due, ..)| *due <= now)?;
        self.bytes -= bytes;
        Some(what)
    }

    /// When the next will arrive.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.under_way.front().map(|(due, ..)| *due)
    }
}

/// Draws which datagrams are lost: the same ones for the same seed.
#[derive(Debug)]
pub(crate) struct Losses {
    rng: XorShift,
    /// Of 2^32 draws, so many are losses.
    per_draw: u64,
}

impl Losses {
    /// A share of 0 to 1 is lost.
    pub(crate) fn new(share: f64, seed: u64) -> Self {
        let draws = f64::from(u32::MAX) + 1.0;
        Self { rng: XorShift::new(seed), per_draw: (share.clamp(0.0, 1.0) * draws) as u64 }
    }

    /// Whether the next datagram is lost.
    pub(crate) fn next(&mut self) -> bool {
        self.per_draw > 0 && self.rng.below(1 << 32) < self.per_draw
    }

    /// Of segments of `stride` bytes in a row (the last may be shorter), those that are not lost,
    /// and how many are.
    pub(crate) fn thin(&mut self, contents: &[u8], stride: usize) -> (Vec<u8>, u64) {
        if self.per_draw == 0 {
            return (contents.to_vec(), 0);
        }
        let mut kept = Vec::with_capacity(contents.len());
        let mut lost = 0;
        for segment in contents.chunks(stride.max(1)) {
            if self.next() {
                lost += 1;
            } else {
                kept.extend_from_slice(segment);
            }
        }
        (kept, lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_arrive_in_order_after_the_delay() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut line = DelayLine::new(ms(20), 100);
        assert_eq!(line.next_due(), None);
        assert!(line.push(start, 40, 'a') && line.push(start + ms(5), 40, 'b'));
        assert_eq!(line.next_due(), Some(start + ms(20)));
        assert_eq!(line.pop(start + ms(19)), None);
        assert_eq!(line.pop(start + ms(30)), Some('a'));
        assert_eq!((line.pop(start + ms(30)), line.pop(start + ms(30))), (Some('b'), None));
    }

    #[test]
    fn a_full_line_takes_nothing_until_something_arrived() {
        let start = Instant::now();
        let mut line = DelayLine::new(Duration::ZERO, 100);
        assert!(line.push(start, 60, 1) && !line.push(start, 41, 2) && line.push(start, 40, 3));
        assert_eq!(line.pop(start), Some(1));
        assert!(line.push(start, 60, 4));
    }

    #[test]
    fn losses_follow_the_seed_and_the_share() {
        let draw = |share, seed| {
            let mut losses = Losses::new(share, seed);
            (0..10_000).filter(|_| losses.next()).count()
        };
        assert_eq!((draw(0.0, 1), draw(1.0, 1)), (0, 10_000));
        assert_eq!(draw(0.1, 7), draw(0.1, 7));
        assert!((800..1200).contains(&draw(0.1, 7)), "{}", draw(0.1, 7));
    }

    #[test]
    fn thinning_keeps_whole_segments_and_their_order() {
        let contents: Vec<u8> = (0..25).flat_map(|number| [number; 4]).chain([99, 99]).collect();
        let mut twin = Losses::new(0.3, 5);
        let survivors: Vec<u8> = (0..26).filter(|_| !twin.next()).collect();
        let (kept, lost) = Losses::new(0.3, 5).thin(&contents, 4);
        let seen: Vec<u8> = kept.chunks(4).map(|segment| segment[0]).collect();
        let wanted: Vec<u8> =
            survivors.iter().map(|number| if *number == 25 { 99 } else { *number }).collect();
        assert_eq!(seen, wanted);
        assert_eq!(lost as usize, 26 - survivors.len());
        assert!(lost > 0);
    }
}
