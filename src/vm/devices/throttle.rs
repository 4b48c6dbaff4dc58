//! Log lines that a guest can cause, held to a bounded rate.

use std::time::{Duration, Instant};

/// Least time between two lines of the same [`Throttle`].
const INTERVAL: Duration = Duration::from_secs(5);

/// Decides whether a line may be logged now.
#[derive(Debug, Default)]
pub struct Throttle {
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// `Some(n)` when the line may be logged, `n` being how many were held back
    /// since the last one.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_one_line_per_interval() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        assert_eq!(throttle.admit_at(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(throttle.admit_at(start), None);
        }
        assert_eq!(throttle.admit_at(start + INTERVAL), Some(1000));
    }
}
