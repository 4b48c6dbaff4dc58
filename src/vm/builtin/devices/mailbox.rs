//! How the thread of a processor has the device's own thread do something that a
//! processor's thread may not do.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vm::builtin::virtio::registers::QueueSetup;
use crate::vm::devices::vhost_user::lock;

/// The device's thread answers in microseconds, unless the host is in trouble.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The queues are ready, with these features.
    Start(u64, Vec<QueueSetup>),
    /// Nobody touches the queues any more when this is answered.
    Stop,
}

#[derive(Default)]
struct State {
    /// Counts requests: an answer may come when nobody waits for it any more.
    number: u64,
    request: Option<Request>,
    answer: Option<(u64, bool)>,
    closed: bool,
}

pub struct Mailbox {
    state: Mutex<State>,
    answered: Condvar,
    /// Readable when there is a request.
    pub event: EventFd,
}

impl Mailbox {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new() -> io::Result<Mailbox> {
        Ok(Mailbox {
            state: Mutex::default(),
            answered: Condvar::new(),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Waits for the answer; `false` too when there is none. One at a time asks: the
    /// device's registers are locked.
    pub fn ask(&self, request: Request) -> bool {
        let end = Instant::now() + DEADLINE;
        let mut state = lock(&self.state);
        state.number += 1;
        let number = state.number;
        state.request = Some(request);
        state.answer = None;
        // Fails only when the counter is full, that is, when it is set already.
        let _ = self.event.write(1);
        loop {
            if let Some((_, answer)) = state.answer.take_if(|(of, _)| *of == number) {
                return answer;
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                state.request = None;
                return false;
            }
            let waited = self.answered.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Does what is asked for, if anything is.
    pub fn answer(&self, work: impl FnOnce(Request) -> bool) {
        // Fails only when it was not set.
        let _ = self.event.read();
        let taken = {
            let mut state = lock(&self.state);
            let number = state.number;
            state.request.take().map(|request| (number, request))
        };
        // Without the lock: who asks does not wait longer than its deadline.
        if let Some((number, request)) = taken {
            let answer = work(request);
            lock(&self.state).answer = Some((number, answer));
            self.answered.notify_all();
        }
    }

    /// Nobody will answer any more.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.answered.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn requests_are_answered_or_refused_at_the_end() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let asks = mailbox.clone();
        let thread = std::thread::spawn(move || {
            (
                asks.ask(Request::Stop),
                asks.ask(Request::Start(0, Vec::new())),
                asks.ask(Request::Stop),
            )
        });
        for wanted in [Request::Stop, Request::Start(0, Vec::new())] {
            let mut seen = None;
            while seen.is_none() {
                mailbox.answer(|request| {
                    seen = Some(request);
                    true
                });
            }
            assert_eq!(seen, Some(wanted));
        }
        mailbox.close();
        assert_eq!(thread.join().unwrap(), (true, true, false));
        assert!(!mailbox.ask(Request::Stop));
    }
}
