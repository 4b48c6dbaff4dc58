//! The process of a hypervisor that is not built in.
//!
//! The child waits on a pipe between fork and exec until its pid is recorded, so
//! that whatever dies, somebody knows what to clean. It then gives up everything
//! a hypervisor does not need: inherited descriptors, the environment, the
//! controlling terminal, the right to write to any file system, capabilities, core
//! dumps. It dies with the thread that
//! spawned it.
//!
//! The caller may have threads, so between fork and exec only async-signal-safe
//! calls are made (signal-safety(7)): everything they need is built before.

mod confine;

use std::ffi::{CString, OsString, c_char, c_int};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid,
};

use super::Error;
use confine::{drop_privileges, make_file_systems_read_only, reset_signals};

/// First descriptor number of [`Spawn::fds`] in the child.
pub(super) const FIRST_FD: RawFd = 3;
/// Longest time from the go-ahead until the program executes.
const EXEC_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for a killed process in `Drop`.
const DROP_DEADLINE: Duration = Duration::from_secs(2);

/// What to execute. There is no environment.
pub(super) struct Spawn<'a> {
    pub program: &'a Path,
    /// Without the program's own name.
    pub args: Vec<OsString>,
    pub working_dir: BorrowedFd<'a>,
    /// Standard output and error.
    pub output: BorrowedFd<'a>,
    /// Become descriptors [`FIRST_FD`] and up, in this order.
    pub fds: &'a [BorrowedFd<'a>],
    /// Gives it a mount namespace in which every file system is read-only.
    pub read_only: bool,
}

/// A child process. Killed and reaped when dropped.
pub(super) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts a program; see [`super::Vm::boot`] for `on_spawn`.
    ///
    /// # Errors
    /// `Spawn` or `Record`. No process is left then.
    pub(super) fn spawn(
        spawn: &Spawn<'_>,
        on_spawn: &mut dyn FnMut(i32) -> io::Result<()>,
    ) -> Result<Process, Error> {
        let failed = |step| {
            move |source: io::Error| Error::Spawn {
                path: spawn.program.to_owned(),
                step,
                source,
            }
        };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("pipe")(e.into()));
        let (gate_read, gate_write) = pipe()?;
        let (report_read, report_write) = pipe()?;
        let image = Image::new(spawn, &gate_read, &gate_write, &report_write)
            .map_err(failed("prepare arguments"))?;

        // SAFETY: the child only makes async-signal-safe calls and never returns.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(failed("fork")(io::Error::last_os_error())),
            // SAFETY: this is the child of a fork, and `image` is complete.
            0 => unsafe { image.run() },
            pid => pid,
        };
        drop((gate_read, report_write));
        let process = Process::adopt(pid).map_err(failed("pidfd_open"))?;

        // From here on an early return kills and reaps the child.
        on_spawn(pid).map_err(Error::Record)?;
        let mut gate = std::fs::File::from(gate_write);
        gate.write_all(&[1]).map_err(failed("start"))?;
        match read_report(report_read).map_err(failed("execute"))? {
            None => Ok(process),
            Some((step, source)) => Err(failed(step)(source)),
        }
    }

    fn adopt(pid: i32) -> io::Result<Process> {
        let Some(pid) = Pid::from_raw(pid) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Process {
                pid,
                pidfd,
                status: None,
            }),
            Err(e) => {
                // It waits at the gate, so a plain kill ends it at once.
                if let Err(e) = kill_process(pid, Signal::KILL)
                    .and_then(|()| waitpid(Some(pid), WaitOptions::empty()).map(|_| ()))
                {
                    log::warn!("cannot end the child {pid}: {e}");
                }
                Err(e.into())
            }
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// The status if the process has ended.
    pub(super) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        while self.status.is_none() {
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => self.status = Some(ExitStatus::from_raw(status.as_raw())),
                Ok(None) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(self.status)
    }

    /// Kills the process and waits until it is gone.
    ///
    /// # Errors
    /// `Undead` at the deadline.
    pub(super) fn kill(&mut self, deadline: Duration) -> Result<ExitStatus, Error> {
        let io = |source| Error::Io {
            context: "cannot wait for the hypervisor process",
            source,
        };
        if let Some(status) = self.try_wait().map_err(io)? {
            return Ok(status);
        }
        pidfd_send_signal(&self.pidfd, Signal::KILL).map_err(|e| io(e.into()))?;
        if wait_readable(self.pidfd.as_fd(), deadline).map_err(io)?
            && let Some(status) = self.try_wait().map_err(io)?
        {
            return Ok(status);
        }
        Err(Error::Undead {
            pid: self.pid(),
            seconds: deadline.as_secs(),
        })
    }
}

impl AsFd for Process {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none()
            && let Err(e) = self.kill(DROP_DEADLINE)
        {
            log::warn!("{e}");
        }
    }
}

/// Whether `fd` became readable (or was closed by its peer) before the deadline.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, deadline: Duration) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        // Deadlines are hours at most and fit.
        let timeout = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// What the child says about its way to exec: nothing when it got there.
fn read_report(report: OwnedFd) -> io::Result<Option<(&'static str, io::Error)>> {
    if !wait_readable(report.as_fd(), EXEC_DEADLINE)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(report).read_to_end(&mut bytes)?;
    let Ok([step, errno @ ..]) = <[u8; 5]>::try_from(bytes) else {
        return Ok(None);
    };
    let step = STEPS.get(usize::from(step)).copied().unwrap_or("?");
    Ok(Some((
        step,
        io::Error::from_raw_os_error(i32::from_le_bytes(errno)),
    )))
}

/// Steps of the child that can fail, as its report numbers them.
const STEPS: [&str; 6] = [
    "die with parent",
    "set limits",
    "enter sandbox directory",
    "pass descriptors",
    "execute",
    "make its file systems read-only",
];
const DIE_WITH_PARENT: u8 = 0;
const LIMITS: u8 = 1;
const WORKING_DIR: u8 = 2;
const DESCRIPTORS: u8 = 3;
const EXECUTE: u8 = 4;
const READ_ONLY: u8 = 5;

/// Everything the child needs, in the form the system calls take.
struct Image {
    program: CString,
    // Keeps what `argv` points to.
    _args: Vec<CString>,
    argv: Vec<*const c_char>,
    envp: [*const c_char; 1],
    parent: c_int,
    working_dir: RawFd,
    gate_read: RawFd,
    gate_write: RawFd,
    report: RawFd,
    /// /dev/null, output, output, then the passed ones.
    fds: Vec<RawFd>,
    /// Room for copies of `fds` that are out of the way.
    copies: Vec<std::cell::Cell<RawFd>>,
    // Keeps `fds[0]` open.
    _null: std::fs::File,
    read_only: bool,
}

impl Image {
    fn new(
        spawn: &Spawn<'_>,
        gate_read: &OwnedFd,
        gate_write: &OwnedFd,
        report: &OwnedFd,
    ) -> io::Result<Image> {
        let null = std::fs::File::open("/dev/null")?;
        let program = CString::new(spawn.program.as_os_str().as_bytes())?;
        let mut args = vec![program.clone()];
        for arg in &spawn.args {
            args.push(CString::new(arg.clone().into_vec())?);
        }
        let argv = args.iter().map(|arg| arg.as_ptr());
        let argv = argv.chain([std::ptr::null()]).collect();
        let output = spawn.output.as_raw_fd();
        let fds: Vec<RawFd> = [null.as_raw_fd(), output, output]
            .into_iter()
            .chain(spawn.fds.iter().map(AsRawFd::as_raw_fd))
            .collect();
        Ok(Image {
            program,
            _args: args,
            argv,
            envp: [std::ptr::null()],
            // SAFETY: getpid has no preconditions.
            parent: unsafe { libc::getpid() },
            working_dir: spawn.working_dir.as_raw_fd(),
            gate_read: gate_read.as_raw_fd(),
            gate_write: gate_write.as_raw_fd(),
            report: report.as_raw_fd(),
            copies: vec![std::cell::Cell::new(-1); fds.len()],
            fds,
            _null: null,
            read_only: spawn.read_only,
        })
    }

    /// The child's side.
    ///
    /// # Safety
    /// Only in the child of a fork, whose memory is a copy of the parent's.
    unsafe fn run(&self) -> ! {
        // SAFETY: system calls on descriptors this process owns and on memory
        // `self` keeps alive; nothing allocates or takes a lock.
        unsafe {
            let (step, report) = match self.prepare() {
                Ok(report) => {
                    libc::execve(
                        self.program.as_ptr(),
                        self.argv.as_ptr(),
                        self.envp.as_ptr(),
                    );
                    (EXECUTE, report)
                }
                Err(failure) => failure,
            };
            let [e0, e1, e2, e3] = (*libc::__errno_location()).to_le_bytes();
            let message = [step, e0, e1, e2, e3];
            libc::write(report, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }

    /// Everything before exec. Returns the descriptor for reports.
    ///
    /// # Safety
    /// As [`Image::run`].
    unsafe fn prepare(&self) -> Result<RawFd, (u8, RawFd)> {
        // SAFETY: as in `run`.
        unsafe {
            let check = |result: c_int, step: u8| {
                if result < 0 {
                    Err((step, self.report))
                } else {
                    Ok(result)
                }
            };
            check(
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
                DIE_WITH_PARENT,
            )?;
            // The parent may have died before the signal was set.
            if libc::getppid() != self.parent {
                libc::_exit(127);
            }
            self.wait_at_gate();
            reset_signals();
            libc::setsid();
            libc::umask(0o077);
            let no_core = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            check(
                libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core),
                LIMITS,
            )?;
            check(libc::fchdir(self.working_dir), WORKING_DIR)?;
            if self.read_only {
                // Takes the working directory along into the namespace.
                check(make_file_systems_read_only(), READ_ONLY)?;
            }
            drop_privileges();
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), LIMITS)?;
            self.place_descriptors()
                .map_err(|()| (DESCRIPTORS, self.report))
        }
    }

    /// Returns when the parent has recorded this process; ends it when the
    /// parent gave up or died.
    ///
    /// # Safety
    /// As [`Image::run`].
    unsafe fn wait_at_gate(&self) {
        // SAFETY: as in `run`; `go` has room for the one byte that is read.
        unsafe {
            libc::close(self.gate_write);
            let mut go = 0u8;
            loop {
                match libc::read(self.gate_read, (&raw mut go).cast(), 1) {
                    1 => return,
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    _ => libc::_exit(127),
                }
            }
        }
    }

    /// Puts `fds` at 0 and up, the report descriptor behind them, and closes the
    /// rest. Returns the report's new number.
    ///
    /// # Safety
    /// As [`Image::run`].
    unsafe fn place_descriptors(&self) -> Result<RawFd, ()> {
        // A handful of descriptors, far below the range of RawFd.
        let count = self.fds.len() as RawFd;
        // SAFETY: as in `run`.
        unsafe {
            // Sources may have the numbers of other targets: first move all away.
            for (fd, copy) in self.fds.iter().zip(&self.copies) {
                copy.set(libc::fcntl(*fd, libc::F_DUPFD, count + 1));
                if copy.get() < 0 {
                    return Err(());
                }
            }
            let report = libc::fcntl(self.report, libc::F_DUPFD, count + 1);
            if report < 0 || libc::dup3(report, count, libc::O_CLOEXEC) < 0 {
                return Err(());
            }
            for (target, copy) in (0..).zip(&self.copies) {
                if libc::dup2(copy.get(), target) < 0 {
                    return Err(());
                }
            }
            // Kernel 5.9. `count` is small and positive.
            let first = (count + 1) as libc::c_uint;
            if libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) < 0 {
                return Err(());
            }
            Ok(count)
        }
    }
}

#[cfg(test)]
mod tests;
