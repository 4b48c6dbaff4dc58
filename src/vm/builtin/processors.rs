//! The threads of the virtual processors, and how they are stopped.
//!
//! Each thread runs its processor until somebody wants something else. A thread in
//! KVM_RUN is interrupted by a signal; one that is about to enter it would miss the
//! signal, so it is repeated until every thread has answered.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::machine::Board;
use super::ports::Request;
use super::seccomp::{self, Kind};
use super::vcpu::{self, Exit, Trail};
use crate::sys::capabilities::limit_to;
use crate::vm::devices::vhost_user::{lock, panic_text};

/// Time between two signals.
const SIGNAL_PERIOD: Duration = Duration::from_millis(2);

/// What the threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    End,
}

/// What processors report. The first end counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Panic,
    PowerOff,
    Reset,
    /// Where the processor was.
    TripleFault(String),
    Broken(String),
}

struct State {
    wanted: Wanted,
    /// Threads that wait because of a pause.
    paused: usize,
    /// Threads that have not ended.
    alive: usize,
    reports: Vec<Report>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable when there are reports.
    reported: EventFd,
}

/// The threads.
pub struct Processors {
    shared: Arc<Shared>,
    board: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
}

impl Processors {
    /// Starts the threads. `reported` becomes readable when there is a report.
    ///
    /// # Errors
    /// No thread is to be had; those that were started end.
    pub fn start(vcpus: Vec<VcpuFd>, board: &Arc<Board>, reported: EventFd) -> io::Result<Self> {
        handle_signal()?;
        let mut processors = Processors {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    wanted: Wanted::Run,
                    paused: 0,
                    alive: 0,
                    reports: Vec::new(),
                }),
                changed: Condvar::new(),
                reported,
            }),
            board: board.clone(),
            threads: Vec::new(),
        };
        for vcpu in vcpus {
            // Those that run end when this is dropped.
            processors.add(vcpu)?;
        }
        Ok(processors)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Starts the thread of one more.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn add(&mut self, mut vcpu: VcpuFd) -> io::Result<()> {
        let (shared, board) = (self.shared.clone(), self.board.clone());
        lock(&shared.state).alive += 1;
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.threads.len()))
            .stack_size(STACK_SIZE)
            .spawn(move || shared.thread(&mut vcpu, &board));
        match thread {
            Ok(thread) => self.threads.push(thread),
            Err(e) => {
                lock(&self.shared.state).alive -= 1;
                return Err(e);
            }
        }
        Ok(())
    }

    /// Reports since the last call.
    pub fn reports(&self) -> Vec<Report> {
        std::mem::take(&mut lock(&self.shared.state).reports)
    }

    /// Stops all processors; `false` when they have not stopped in time.
    pub fn pause(&self, deadline: Duration) -> bool {
        self.want(Wanted::Pause, deadline, |state| state.paused >= state.alive)
    }

    /// Lets them go on.
    pub fn resume(&self) {
        let mut state = lock(&self.shared.state);
        if state.wanted == Wanted::Pause {
            state.wanted = Wanted::Run;
            self.shared.changed.notify_all();
        }
    }

    /// Ends all threads; `false` when they have not ended in time.
    pub fn end(&mut self, deadline: Duration) -> bool {
        let ended = self.want(Wanted::End, deadline, |state| state.alive == 0);
        if ended {
            for thread in self.threads.drain(..) {
                // It catches its panics.
                let _ = thread.join();
            }
        }
        ended
    }

    fn want(&self, wanted: Wanted, deadline: Duration, done: fn(&State) -> bool) -> bool {
        let start = Instant::now();
        let mut state = lock(&self.shared.state);
        if state.wanted != Wanted::End {
            state.wanted = wanted;
        }
        self.shared.changed.notify_all();
        while !done(&state) {
            if start.elapsed() >= deadline {
                return false;
            }
            for thread in &self.threads {
                // SAFETY: the thread has not been joined, so its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
            }
            let waited = self.shared.changed.wait_timeout(state, SIGNAL_PERIOD);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        if !self.threads.is_empty() && !self.end(Duration::from_secs(2)) {
            log::error!("virtual processors do not end");
        }
    }
}

/// The loop of a processor needs little.
const STACK_SIZE: usize = 256 * 1024;

impl Shared {
    fn thread(&self, vcpu: &mut VcpuFd, board: &Board) {
        let ran = catch_unwind(AssertUnwindSafe(|| {
            confine()?;
            let mut trail = Trail::default();
            loop {
                match self.wanted() {
                    Wanted::Run => self.handle(vcpu::run(vcpu, board, &mut trail)),
                    Wanted::Pause => {
                        self.handle(vcpu::settle(vcpu, board, &mut trail));
                        self.pause(vcpu);
                    }
                    Wanted::End => return Ok::<_, io::Error>(()),
                }
            }
        }));
        match ran {
            Ok(Ok(())) => {}
            Ok(Err(e)) => self.report(Report::Broken(format!("confining it: {e}"))),
            Err(panic) => self.report(Report::Broken(panic_text(&*panic).to_owned())),
        }
        lock(&self.state).alive -= 1;
        self.changed.notify_all();
    }

    fn wanted(&self) -> Wanted {
        lock(&self.state).wanted
    }

    /// Waits as long as the machine is paused.
    fn pause(&self, vcpu: &VcpuFd) {
        // Or the guest takes the gap for a processor that hangs. It fails when the
        // guest does not use the clock.
        let _ = vcpu.kvmclock_ctrl();
        let mut state = lock(&self.state);
        state.paused += 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.paused -= 1;
    }

    fn handle(&self, exit: Exit) {
        match exit {
            Exit::Continue | Exit::Interrupted => {}
            Exit::Request(Request::ReportPanic) => self.report(Report::Panic),
            Exit::Request(Request::PowerOff) => self.finish(Report::PowerOff),
            Exit::Request(Request::Reset) => self.finish(Report::Reset),
            Exit::TripleFault(place) => self.finish(Report::TripleFault(place)),
            Exit::Broken(reason) => self.finish(Report::Broken(reason)),
        }
    }

    fn report(&self, report: Report) {
        lock(&self.state).reports.push(report);
        // Fails only when the counter is full, that is, when it is set already.
        let _ = self.reported.write(1);
    }

    /// A report after which no processor goes on. The others are ended by whoever
    /// reads it.
    fn finish(&self, report: Report) {
        lock(&self.state).wanted = Wanted::End;
        self.report(report);
    }
}

/// The guest is one system call away.
fn confine() -> io::Result<()> {
    limit_to(rustix::thread::CapabilitySet::empty())?;
    seccomp::confine(Kind::Processor)
}

/// The signal that interrupts KVM_RUN.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes the signal do nothing but interrupt.
fn handle_signal() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    // SAFETY: zero is a valid value of the structure; the handler does nothing, and
    // nobody else uses the signal.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        if libc::sigaction(signal(), &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
