//! The wall clock, kept like the host's.
//!
//! A guest's clock stands still while the machine is stopped or the host sleeps,
//! starts with the whole second of the machine's clock chip, and runs a few parts
//! per million fast or slow. The host says when it may be wrong ([`FromHost`] with
//! `sync_clock`: after a stop, after a jump of its own clock, and now and then), and
//! the guest asks for the time: the answer was right at some moment between the
//! question and its arrival, so the middle is wrong by half of that time at most.
//! Nothing here wakes an idle guest by itself.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::agent::{ClockRequest, Event};
use kuasar_runv_protocol::resources::ClockAnswer;

/// An answer that took no longer than this is good enough.
const GOOD: Duration = Duration::from_millis(4);
/// Most questions of one synchronisation, of which the quickest answer counts.
const QUESTIONS: u32 = 8;
/// Differences below this are left alone, in nanoseconds.
const TOLERATED_NS: i64 = 500_000;
/// A clock that is ahead by less than this is slowed down instead of set back, in
/// nanoseconds: 500 ppm of adjtimex(2) make up for it in 20 s.
const SLEWED_NS: i64 = 10_000_000;

/// What an answer leads to.
#[derive(Debug)]
pub enum Next {
    Ask(Event),
    /// Nanoseconds to move the clock by.
    Shift(i64),
    /// Nanoseconds that a slower clock makes up for.
    Slew(i64),
    Nothing,
}

/// A question that waits for its answer.
#[derive(Debug, Clone, Copy)]
struct Question {
    number: u32,
    asked: i64,
    left: u32,
    /// Half of the round trip and offset of the best answer, in nanoseconds.
    best: Option<(i64, i64)>,
}

/// The state of the synchronisation.
#[derive(Debug, Default)]
pub struct Clock(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    number: u32,
    question: Option<Question>,
    /// The first correction, before anything runs, may set the clock back.
    is_set: bool,
}

impl Clock {
    /// Begins a synchronisation; the question is to be sent. One that has not ended
    /// is forgotten.
    pub fn begin(&self) -> Event {
        let mut state = self.lock();
        state.question = None;
        state.ask(QUESTIONS, None)
    }

    /// Takes an answer, and says what follows from it.
    pub fn answer(&self, answer: &ClockAnswer) -> Next {
        let now = realtime_ns();
        let mut state = self.lock();
        let Some(question) = state.question.take_if(|q| q.number == answer.number) else {
            return Next::Nothing;
        };
        let Ok(hosts) = i64::try_from(answer.realtime_ns) else {
            return Next::Nothing;
        };
        let half = now.saturating_sub(question.asked) / 2;
        let this = (
            half,
            hosts.saturating_sub(question.asked.saturating_add(half)),
        );
        let best = question.best.map_or(this, |best| best.min(this));
        let good_ns = i64::try_from(GOOD.as_nanos() / 2).unwrap_or(0);
        if best.0 > good_ns && question.left > 1 {
            return Next::Ask(state.ask(question.left - 1, Some(best)));
        }
        let first = !std::mem::replace(&mut state.is_set, true);
        match best.1 {
            offset_ns if offset_ns.abs() < TOLERATED_NS => Next::Nothing,
            offset_ns if !first && (-SLEWED_NS..0).contains(&offset_ns) => Next::Slew(offset_ns),
            offset_ns => Next::Shift(offset_ns),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ask(&mut self, left: u32, best: Option<(i64, i64)>) -> Event {
        self.number = self.number.wrapping_add(1);
        let mut event = Event::new();
        event.set_clock(ClockRequest {
            number: self.number,
            ..ClockRequest::new()
        });
        self.question = Some(Question {
            number: self.number,
            asked: realtime_ns(),
            left,
            best,
        });
        event
    }
}

/// Nanoseconds since 1970.
fn realtime_ns() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live timespec; the call only fails for an
    // unknown clock and then leaves zero.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(event: &Event, offset_ns: i64) -> ClockAnswer {
        ClockAnswer {
            number: event.clock().number,
            realtime_ns: u64::try_from(realtime_ns() + offset_ns).unwrap(),
            ..ClockAnswer::new()
        }
    }

    #[test]
    fn a_quick_answer_that_agrees_ends_it() {
        let clock = Clock::default();
        let question = clock.begin();
        assert!(matches!(clock.answer(&answer(&question, 0)), Next::Nothing));
        // Again, or to another question: nothing is asked and nothing set.
        let late = clock.answer(&answer(&question, 1 << 40));
        assert!(matches!(late, Next::Nothing));
    }

    #[test]
    fn slow_answers_are_asked_for_again_and_not_for_ever() {
        let clock = Clock::default();
        let mut question = clock.begin();
        let mut asked = 1;
        loop {
            std::thread::sleep(2 * GOOD);
            let half = i64::try_from(GOOD.as_nanos()).unwrap();
            match clock.answer(&answer(&question, -half)) {
                Next::Ask(next) => question = next,
                _ => break,
            }
            asked += 1;
        }
        assert_eq!(asked, QUESTIONS);
    }

    #[test]
    fn a_clock_is_set_back_only_before_anything_runs_or_when_it_is_far_ahead() {
        const MS: i64 = 1_000_000;
        let clock = Clock::default();
        let next = |offset_ns| {
            let question = clock.begin();
            clock.answer(&answer(&question, offset_ns))
        };
        assert!(matches!(next(-5 * MS), Next::Shift(_)));
        assert!(matches!(next(-5 * MS), Next::Slew(ns) if ns < -4 * MS));
        assert!(matches!(next(5 * MS), Next::Shift(ns) if ns > 4 * MS));
        assert!(matches!(next(-5000 * MS), Next::Shift(ns) if ns < -4990 * MS));
    }

    #[test]
    fn an_impossible_time_is_ignored() {
        let clock = Clock::default();
        let question = clock.begin();
        let answer = ClockAnswer {
            number: question.clock().number,
            realtime_ns: u64::MAX,
            ..ClockAnswer::new()
        };
        assert!(matches!(clock.answer(&answer), Next::Nothing));
    }
}
