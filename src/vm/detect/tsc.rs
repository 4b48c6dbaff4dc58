//! Frequency of the host's time stamp counter.
//!
//! Under emulation the guest's counter is the host's, but the guest has to find
//! out its frequency by counting against a timer that a busy host delivers late:
//! then it takes longer, is wrong, and the kernel gives the counter up for a
//! clock with a resolution of milliseconds. So the host measures and tells it.
//!
//! A measurement compares two readings of counter and clock. The first reading
//! since the host booted is kept in `tsc.json`, so that later measurements span
//! seconds to months, cost nothing and are precise.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::record;

/// Span of a measurement without a record. A reading is good to about 50 ns, so
/// this is good to some 25 parts in a million.
const SHORT_SPAN: Duration = Duration::from_millis(2);
/// Shortest span to a recorded reading.
const GOOD_SPAN: Duration = Duration::from_millis(500);

/// Counter and CLOCK_MONOTONIC at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Reading {
    ticks: u64,
    nanoseconds: u64,
}

/// The first reading of a boot of the host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Record {
    boot_id: String,
    /// Seconds the host was suspended until then. The clock stands still
    /// meanwhile, the counter goes on or starts again.
    suspended: u64,
    first: Reading,
}

/// The frequency in kHz, or `None` when the counter is no clock on this machine.
pub fn frequency_khz(cache_dir: &Path) -> Option<u32> {
    if !is_invariant() {
        return None;
    }
    match from_record(cache_dir) {
        Ok(Some(khz)) => Some(khz),
        Ok(None) => measure(),
        Err(e) => {
            log::debug!("measuring the time stamp counter without a record: {e}");
            measure()
        }
    }
}

/// The frequency since the recorded reading, which is made now when there is
/// none for this boot.
fn from_record(dir: &Path) -> io::Result<Option<u32>> {
    let now = Record {
        boot_id: record::boot_id()?,
        suspended: suspended()?,
        first: Reading::now()?,
    };
    let path = dir.join("tsc.json");
    match record::read::<Record>(&path) {
        Ok(old) if old.boot_id == now.boot_id && old.suspended == now.suspended => {
            return Ok(old.first.khz_until(now.first, GOOD_SPAN));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => record::make_dir(dir)?,
        Err(e) => log::debug!("replacing {}: {e}", path.display()),
    }
    record::write(&path, &now)?;
    Ok(None)
}

fn measure() -> Option<u32> {
    let start = Reading::now().ok()?;
    let started = Instant::now();
    // Short enough to spin: a sleep would take longer than asked.
    while started.elapsed() <= SHORT_SPAN {
        std::hint::spin_loop();
    }
    start.khz_until(Reading::now().ok()?, SHORT_SPAN)
}

impl Reading {
    /// The best of a few attempts, the one that took the shortest time.
    fn now() -> io::Result<Reading> {
        let mut best: Option<(u64, Reading)> = None;
        for _ in 0..5 {
            let before = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
            // SAFETY: RDTSC reads a counter.
            let ticks = unsafe { std::arch::x86_64::_rdtsc() };
            let after = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
            let reading = Reading {
                ticks,
                nanoseconds: before.midpoint(after),
            };
            let width = after.saturating_sub(before);
            if best.is_none_or(|(narrowest, _)| width < narrowest) {
                best = Some((width, reading));
            }
        }
        let (_, reading) = best.ok_or(io::ErrorKind::InvalidData)?;
        Ok(reading)
    }

    /// `None` when `later` is not at least `span` later.
    fn khz_until(self, later: Reading, span: Duration) -> Option<u32> {
        let ticks = later.ticks.checked_sub(self.ticks)?;
        let nanoseconds = later.nanoseconds.checked_sub(self.nanoseconds)?;
        if u128::from(nanoseconds) < span.as_nanos() {
            return None;
        }
        let khz = u128::from(ticks) * 1_000_000 / u128::from(nanoseconds.max(1));
        u32::try_from(khz).ok().filter(|&khz| khz > 0)
    }
}

fn nanoseconds(clock: ClockId) -> io::Result<u64> {
    let now = clock_gettime(clock)?;
    // Neither part of these clocks is negative.
    Ok(now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

/// Seconds this host has been suspended since it booted.
fn suspended() -> io::Result<u64> {
    let running = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
    let all = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
    Ok(all.saturating_sub(running) / 1_000_000_000)
}

/// Whether the counter runs at one speed whatever the processor does: CPUID
/// 8000_0007h, EDX bit 8 (AMD APM volume 3, appendix E; the same on Intel).
fn is_invariant() -> bool {
    use std::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx >> 8 & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ_AT_START: u64 = 2_000_000;

    fn reading(seconds: u64, ticks: u64) -> Reading {
        Reading {
            ticks,
            nanoseconds: seconds * 1_000_000_000,
        }
    }

    #[test]
    fn frequency_is_ticks_per_time() {
        let start = reading(10, 5);
        let later = reading(20, 5 + 10_000 * KHZ_AT_START);
        assert_eq!(start.khz_until(later, GOOD_SPAN), Some(2_000_000));
        assert_eq!(later.khz_until(start, GOOD_SPAN), None);
        assert_eq!(start.khz_until(start, GOOD_SPAN), None);
        // Weeks do not overflow.
        let later = reading(10 + 3_000_000, 5 + 3_000_000_000 * KHZ_AT_START);
        assert_eq!(start.khz_until(later, GOOD_SPAN), Some(2_000_000));
    }

    #[test]
    fn a_measurement_agrees_with_the_record() {
        if !is_invariant() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let short = frequency_khz(dir.path()).unwrap();
        std::thread::sleep(GOOD_SPAN);
        let long = from_record(dir.path()).unwrap().unwrap();
        let difference = f64::from(short) / f64::from(long) - 1.0;
        // A scheduler's pause between clock and counter is the worst of it.
        assert!(difference.abs() < 0.01, "{short} kHz, then {long} kHz");
    }

    #[test]
    fn a_record_of_another_boot_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tsc.json");
        let stale = Record {
            boot_id: "another".into(),
            suspended: 0,
            first: reading(0, 0),
        };
        record::write(&path, &stale).unwrap();
        assert_eq!(from_record(dir.path()).unwrap(), None);
        assert_ne!(record::read::<Record>(&path).unwrap(), stale);
    }
}
