//! What was sent and may have to be sent again, in order.
//!
//! ```text
//!   taken there │ sent, or there already │ to be sent │◄─ push
//!   dropped     └───────────── kept ─────────────────┘
//! ```
//!
//! Items are counted from 1 on, over all sessions. Invariants: an item is kept until the other end has taken it, so
//! that what waits there is bounded, too; what it says is checked against what was sent, and takes nothing back.

use std::collections::VecDeque;

use thiserror::Error;

use crate::error::EngineError;

/// What the other end says of what came there cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CountError {
    /// More than was sent.
    #[error("that {counted} messages or batches came of {sent} that were sent")]
    Beyond {
        /// What it says.
        counted: u64,
        /// What was sent.
        sent: u64,
    },
    /// Less than it said before.
    #[error("that {counted} messages or batches came, after {confirmed} before")]
    Behind {
        /// What it says.
        counted: u64,
        /// What it said.
        confirmed: u64,
    },
}

impl From<CountError> for EngineError {
    fn from(error: CountError) -> Self {
        Self::Contradiction(error.to_string())
    }
}

/// Items on their way, with their weights in bytes.
#[derive(Debug)]
pub struct Retained<T> {
    items: VecDeque<(T, u64)>,
    /// Items before these, which were confirmed.
    confirmed: u64,
    /// Of these, those that came in earlier sessions or were sent in the present one.
    sent: usize,
    /// The last one that was sent in any session.
    last_sent: u64,
    bytes: u64,
}

impl<T> Default for Retained<T> {
    fn default() -> Self {
        Self { items: VecDeque::new(), confirmed: 0, sent: 0, last_sent: 0, bytes: 0 }
    }
}

impl<T: Clone> Retained<T> {
    /// Takes an item that weighs so many bytes.
    pub fn push(&mut self, item: T, bytes: u64) {
        self.items.push_back((item, bytes));
        self.bytes += bytes;
    }

    /// The next item to be sent in this session, which counts as sent from now on.
    pub fn send_next(&mut self) -> Option<T> {
        let (item, _) = self.items.get(self.sent)?;
        self.sent += 1;
        self.last_sent = self.last_sent.max(self.confirmed + self.sent as u64);
        Some(item.clone())
    }

    /// Items that were not sent in this session.
    pub fn unsent(&self) -> usize {
        self.items.len() - self.sent
    }

    /// Weight of all that is kept, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Nothing is kept: all that was taken was confirmed.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The other end has taken so many items in all.
    ///
    /// # Errors
    /// If it had taken more before, or there are not so many there.
    pub fn confirm(&mut self, count: u64) -> Result<(), CountError> {
        self.check(count, self.confirmed + self.sent as u64)?;
        while self.confirmed < count
            && let Some((_, bytes)) = self.items.pop_front()
        {
            self.confirmed += 1;
            self.sent = self.sent.saturating_sub(1);
            self.bytes -= bytes;
        }
        Ok(())
    }

    /// A new session begins, to an end to which so many items came in all: what follows them is sent again.
    ///
    /// # Errors
    /// If it had taken more before, or was never sent so many.
    pub fn resume(&mut self, count: u64) -> Result<(), CountError> {
        self.check(count, self.last_sent)?;
        self.sent = usize::try_from(count - self.confirmed).unwrap_or(usize::MAX);
        Ok(())
    }

    fn check(&self, counted: u64, sent: u64) -> Result<(), CountError> {
        match self.confirmed {
            _ if counted > sent => Err(CountError::Beyond { counted, sent }),
            confirmed if counted < confirmed => Err(CountError::Behind { counted, confirmed }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Push,
        Send,
        /// One of those under way arrives.
        Arrive,
        /// One that arrived is taken.
        Take,
        /// It is told how many were taken.
        Confirm,
        /// What is under way is lost, and a new session begins.
        Cut,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Push),
            4 => Just(Step::Send),
            3 => Just(Step::Arrive),
            3 => Just(Step::Take),
            1 => Just(Step::Confirm),
            1 => Just(Step::Cut),
        ]
    }

    proptest! {
        /// Whatever is cut when, each item arrives once and in order.
        #[test]
        fn items_arrive_once_and_in_order(steps in prop::collection::vec(step(), 0..400)) {
            let mut kept = Retained::default();
            let (mut pushed, mut taken, mut confirmed) = (0u64, 0u64, 0u64);
            let (mut under_way, mut arrived) = (VecDeque::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Push => {
                        pushed += 1;
                        kept.push(pushed, pushed % 7);
                    }
                    Step::Send => under_way.extend(kept.send_next()),
                    Step::Arrive => arrived.extend(under_way.pop_front()),
                    Step::Take => taken = (taken + 1).min(arrived.len() as u64),
                    Step::Confirm => {
                        confirmed = taken;
                        kept.confirm(taken).unwrap();
                    }
                    Step::Cut => {
                        under_way.clear();
                        kept.resume(arrived.len() as u64).unwrap();
                    }
                }
                let weight: u64 = (confirmed + 1..=pushed).map(|number| number % 7).sum();
                prop_assert_eq!(kept.bytes(), weight);
                let ahead = arrived.len() + under_way.len();
                prop_assert_eq!(kept.unsent(), pushed as usize - ahead);
                prop_assert_eq!(kept.is_empty(), confirmed == pushed);
            }
            while let Some(item) = under_way.pop_front().or_else(|| kept.send_next()) {
                arrived.push(item);
            }
            prop_assert_eq!(arrived, (1..=pushed).collect::<Vec<_>>());
        }

        /// What the other end may say lies between what it said and what it was sent.
        #[test]
        fn counts_are_checked(sent in 0u64..9, taken in 0u64..9, came in 0u64..12, again in 0u64..9) {
            let mut kept = Retained::default();
            (0..10).for_each(|item| kept.push(item, 1));
            (0..sent).for_each(|_| assert!(kept.send_next().is_some()));
            prop_assert_eq!(kept.confirm(taken).is_ok(), taken <= sent);
            let before = if taken <= sent { taken } else { 0 };
            prop_assert_eq!(kept.bytes(), 10 - before);
            prop_assert_eq!(kept.resume(came).is_ok(), (before..=sent).contains(&came));
            if (before..=sent).contains(&came) {
                (0..again).for_each(|_| { kept.send_next(); });
                let now = (came + again).min(10);
                let beyond = CountError::Beyond { counted: now + 1, sent: now };
                prop_assert_eq!(kept.confirm(now + 1), Err(beyond));
                prop_assert_eq!(kept.bytes(), 10 - before);
                kept.confirm(now).unwrap();
                if now > 0 {
                    let behind = CountError::Behind { counted: now - 1, confirmed: now };
                    prop_assert_eq!(kept.resume(now - 1), Err(behind));
                    prop_assert_eq!(kept.confirm(now - 1), Err(behind));
                }
            }
        }
    }
}
