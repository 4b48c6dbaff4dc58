//! When the guest's clock may differ from the host's.
//!
//! The guest asks for the time when it is told to. It is told after the VM had been
//! stopped, when the host's clock jumps or the host has been asleep (the kernel
//! cancels a timer of the wall clock then, timerfd_create(2)), and now and then
//! because no two clocks run alike.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kuasar_runv_protocol::agent::ClockRequest;
use kuasar_runv_protocol::resources::{ClockAnswer, FromHost, SyncClock};
use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Time between two synchronisations, in seconds. Clocks that differ by 30 parts
/// per million are 9 ms apart then.
const INTERVAL_S: i64 = 300;

/// Readable when it is time to synchronise.
pub(super) struct ClockWatch(OwnedFd);

impl ClockWatch {
    /// # Errors
    /// As timerfd_create(2).
    pub(super) fn new() -> io::Result<ClockWatch> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let watch = ClockWatch(timerfd_create(TimerfdClockId::Realtime, flags)?);
        watch.arm()?;
        Ok(watch)
    }

    fn arm(&self) -> io::Result<()> {
        let now = clock_gettime(ClockId::Realtime);
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: now.tv_sec + INTERVAL_S,
                tv_nsec: now.tv_nsec,
            },
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&self.0, flags, &timer)?;
        Ok(())
    }

    /// Whether it is time; begins the next interval.
    ///
    /// # Errors
    /// As read(2).
    pub(super) fn is_due(&self) -> io::Result<bool> {
        let mut expirations = [0; 8];
        match rustix::io::read(&self.0, &mut expirations) {
            Ok(_) | Err(Errno::CANCELED) => {
                self.arm()?;
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for ClockWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Has the guest ask.
pub(super) fn sync() -> FromHost {
    let mut message = FromHost::new();
    message.set_sync_clock(SyncClock::new());
    message
}

/// The time now, for the guest that asked.
pub(super) fn answer(request: &ClockRequest) -> FromHost {
    let now = clock_gettime(ClockId::Realtime);
    let (seconds, ns) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    let mut message = FromHost::new();
    message.set_clock(ClockAnswer {
        number: request.number,
        realtime_ns: seconds * 1_000_000_000 + ns,
        ..ClockAnswer::new()
    });
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_not_due_at_once() {
        assert!(!ClockWatch::new().unwrap().is_due().unwrap());
    }

    #[test]
    fn an_answer_has_the_number_of_the_question_and_the_time() {
        let request = ClockRequest {
            number: 7,
            ..ClockRequest::new()
        };
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let message = answer(&request);
        assert_eq!(message.clock().number, 7);
        let told = std::time::Duration::from_nanos(message.clock().realtime_ns);
        assert!(told >= since && told - since < std::time::Duration::from_secs(60));
    }
}
