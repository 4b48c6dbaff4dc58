//! The child process that runs the probe's guest, and its deadlines.
//!
//! A process, because a virtual CPU inside a broken KVM can only be stopped by
//! SIGKILL, and even that may take a moment: then a thread is left behind that
//! reaps it. The guest is too slow when it has used up its processor time. On a
//! host so busy that it does not even get that, the answer is `Unknown` and not
//! remembered.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::guest;
use crate::vm::process::wait_readable;

/// What the guest gets.
#[derive(Clone, Copy)]
struct Limits {
    processor: Duration,
    wall: Duration,
}

/// A working KVM needs a few milliseconds.
const LIMITS: Limits = Limits {
    processor: Duration::from_millis(400),
    wall: Duration::from_secs(2),
};
/// How much longer than this process itself the guest may take for the same loop,
/// with making and ending its machine. An emulating KVM takes a thousand times as long.
const SLOWER: u32 = 100;
const LONGEST: Duration = Duration::from_secs(20);
/// How long the killed child is waited for before a thread does it.
const REAP_DEADLINE: Duration = Duration::from_millis(300);
/// Shortest wait between two looks at the child's processor time.
const POLL: Duration = Duration::from_millis(20);
/// Longest reason the child may give, in bytes.
const MAX_REASON: u64 = 1024;

#[derive(Debug)]
pub(super) enum Outcome {
    Works,
    Fails(String),
    /// It would do, but for the time it takes.
    TooSlow(String),
    /// Nothing was found out this time.
    Unknown(String),
}

pub(super) fn run() -> Outcome {
    until_it_is_certain(
        |native| run_in_child(guest::run, limits(native)),
        guest::native_time,
    )
}

/// A machine that is emulated itself has to translate all of KVM when that runs for the first
/// time, and does not get the processor when it wants it: only what is too slow twice is
/// too slow, by the slower of its own times.
fn until_it_is_certain(
    mut probe: impl FnMut(Duration) -> Outcome,
    mut native: impl FnMut() -> Duration,
) -> Outcome {
    let first = native();
    match probe(first) {
        Outcome::TooSlow(_) => probe(first.max(native())),
        outcome => outcome,
    }
}

/// On a machine that is emulated itself, and busy, everything takes longer.
fn limits(native: Duration) -> Limits {
    let processor = (native * SLOWER).clamp(LIMITS.processor, LONGEST);
    Limits {
        processor,
        wall: LIMITS.wall.max(2 * processor),
    }
}

/// Runs `probe` in a child process. `Err` is its reason.
fn run_in_child(probe: fn() -> Result<(), String>, limits: Limits) -> Outcome {
    match spawn(probe) {
        Ok((pid, report)) => {
            let outcome = supervise(pid, &report, limits);
            reap(pid);
            outcome
        }
        Err(e) => Outcome::Unknown(format!("cannot start the probe: {e}")),
    }
}

fn spawn(probe: fn() -> Result<(), String>) -> io::Result<(Pid, OwnedFd)> {
    let (report, child_report) = pipe_with(PipeFlags::CLOEXEC)?;
    let parent = rustix::process::getpid();
    // SAFETY: the child only runs `child`, which does not return. It allocates,
    // which the C library allows after fork even with threads, and it touches no
    // lock of this program.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => child(parent, &child_report, probe),
        pid => {
            let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
            Ok((pid, report))
        }
    }
}

/// The child's side: its answer is what it writes, nothing when it works.
fn child(parent: Pid, report: &OwnedFd, probe: fn() -> Result<(), String>) -> ! {
    // SAFETY: system calls on numbers. The standard descriptors are replaced by
    // the report and everything else is closed, so that this process holds no
    // pipe or socket open that somebody waits for.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent.as_raw_nonzero().get() {
            libc::_exit(1);
        }
        for fd in 0..3 {
            libc::dup2(report.as_raw_fd(), fd);
        }
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
    }
    // Without this a panic's message would be taken for the answer.
    std::panic::set_hook(Box::new(|_| {}));
    let answer = match std::panic::catch_unwind(probe) {
        Ok(Ok(())) => "+".to_owned(),
        Ok(Err(reason)) => format!("-{reason}"),
        Err(_) => "-the probe itself failed".to_owned(),
    };
    // SAFETY: writing memory of this process; _exit ends it without running the
    // parent's exit handlers.
    unsafe {
        libc::write(0, answer.as_ptr().cast(), answer.len());
        libc::_exit(0)
    }
}

fn supervise(pid: Pid, report: &OwnedFd, limits: Limits) -> Outcome {
    let start = Instant::now();
    loop {
        // It cannot use up what is left of its time before this.
        let left = limits.processor.saturating_sub(cpu_time(pid));
        if left.is_zero() {
            return Outcome::TooSlow(format!(
                "it is too slow: what takes 1 ms was not done after {} ms",
                limits.processor.as_millis()
            ));
        }
        if start.elapsed() > limits.wall {
            return Outcome::Unknown("this machine is too busy to find out".into());
        }
        match wait_readable(report.as_fd(), left.max(POLL)) {
            Ok(true) => return read_answer(report),
            Ok(false) => {}
            Err(e) => return Outcome::Unknown(format!("cannot wait for the probe: {e}")),
        }
    }
}

fn read_answer(report: &OwnedFd) -> Outcome {
    let mut answer = Vec::new();
    let mut report = match report.try_clone() {
        Ok(report) => std::fs::File::from(report).take(MAX_REASON),
        Err(e) => return Outcome::Unknown(format!("cannot read the probe: {e}")),
    };
    // One short write: it is there as a whole, or the child has died.
    if let Err(e) = report.read_to_end(&mut answer) {
        return Outcome::Unknown(format!("cannot read the probe: {e}"));
    }
    match answer.as_slice() {
        [b'+'] => Outcome::Works,
        [b'-', reason @ ..] => Outcome::Fails(String::from_utf8_lossy(reason).into()),
        _ => Outcome::Unknown("the probe ended without an answer".into()),
    }
}

/// Processor time of a living child; 0 when it cannot be read.
fn cpu_time(pid: Pid) -> Duration {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both calls write the values their pointers refer to.
    let ok = unsafe {
        libc::clock_getcpuclockid(pid.as_raw_nonzero().get(), &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    if !ok {
        return Duration::ZERO;
    }
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

/// Ends the child and takes its status, in the background if need be.
fn reap(pid: Pid) {
    let wait = move || loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::warn!("cannot reap the KVM probe: {e}");
                return;
            }
            Ok(_) => return,
        }
    };
    if let Err(e) = kill_process(pid, Signal::KILL) {
        log::warn!("cannot kill the KVM probe: {e}");
    }
    let ended = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .map_err(io::Error::from)
        .and_then(|pidfd| wait_readable(pidfd.as_fd(), REAP_DEADLINE));
    match ended {
        Ok(true) => wait(),
        _ => {
            std::thread::spawn(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_passed_on() {
        assert!(matches!(run_in_child(|| Ok(()), LIMITS), Outcome::Works));
        let Outcome::Fails(reason) = run_in_child(|| Err("why".into()), LIMITS) else {
            panic!("no failure");
        };
        assert_eq!(reason, "why");
    }

    #[test]
    fn a_probe_that_breaks_is_not_an_answer_about_kvm() {
        let abort = || -> Result<(), String> { std::process::abort() };
        assert!(matches!(run_in_child(abort, LIMITS), Outcome::Unknown(_)));
    }

    #[test]
    fn an_emulated_machine_gets_more_time() {
        let limit = |native| limits(Duration::from_millis(native)).processor.as_millis();
        assert_eq!([limit(0), limit(1), limit(4)], [400; 3]);
        assert_eq!([limit(20), limit(1000)], [2000, 20_000]);
    }

    #[test]
    fn what_is_too_slow_gets_another_chance_and_no_more() {
        let run = |answers: [Option<&str>; 2]| {
            let (mut asked, mut native) = (Vec::new(), [7, 3].into_iter());
            let outcome = until_it_is_certain(
                |time| {
                    let answer = answers[asked.len()];
                    asked.push(time.as_millis());
                    answer.map_or(Outcome::Works, |slow| Outcome::TooSlow(slow.into()))
                },
                || Duration::from_millis(native.next().unwrap()),
            );
            (asked, format!("{outcome:?}"))
        };
        assert_eq!(run([None, None]), (vec![7], "Works".into()));
        assert_eq!(run([Some("a"), None]), (vec![7, 7], "Works".into()));
        let twice = run([Some("a"), Some("b")]);
        assert_eq!(twice, (vec![7, 7], "TooSlow(\"b\")".into()));
    }

    #[test]
    fn only_a_probe_that_had_the_processor_is_too_slow() {
        let spin = || -> Result<(), String> {
            loop {
                std::hint::spin_loop();
            }
        };
        let sleep = || -> Result<(), String> {
            std::thread::sleep(Duration::from_secs(100));
            Ok(())
        };
        let limits = Limits {
            processor: Duration::from_millis(50),
            wall: Duration::from_secs(10),
        };
        assert!(matches!(run_in_child(spin, limits), Outcome::TooSlow(_)));
        let limits = Limits {
            wall: Duration::from_millis(100),
            ..limits
        };
        assert!(matches!(run_in_child(sleep, limits), Outcome::Unknown(_)));
    }
}
