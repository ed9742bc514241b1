//! Time as an agent counts it: seconds since 1970 that never go backwards, whoever sets the machine's clock.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    began: Instant,
    began_s: f64,
}

impl Clock {
    /// Beginning with the machine's clock.
    #[must_use]
    pub fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { began: Instant::now(), began_s: since.as_secs_f64() }
    }

    /// Now.
    #[must_use]
    pub fn now_s(&self) -> f64 {
        self.began_s + self.began.elapsed().as_secs_f64()
    }
}
