//! System calls that neither std nor nix offers in the form needed here.
//!
//! Each function is one call with its errno turned into an `io::Error`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;

use nix::sys::signal::{SigSet, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Turns the result of a system call into an `io::Result`.
///
/// # Errors
/// `errno` when the call returned a negative value.
pub fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Time since boot, suspended time included, in microseconds.
#[must_use]
pub fn boottime_us() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live timespec; the call only fails for an
    // unknown clock and then leaves zero.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000
}

/// Memory of the machine, in use and free, in KiB.
///
/// # Errors
/// Of sysinfo(2).
pub fn memory_kib() -> io::Result<u64> {
    // SAFETY: plain data, for which zero is valid.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is valid for the call.
    check(unsafe { libc::sysinfo(&raw mut info) }.into())?;
    Ok((info.totalram * u64::from(info.mem_unit)) >> 10)
}

/// Moves the wall clock by so many nanoseconds, to the microsecond.
///
/// # Errors
/// Of adjtimex(2); `EPERM` without the right to.
pub fn shift_clock(offset_ns: i64) -> io::Result<()> {
    // SAFETY: timex is plain integers, for which zero is valid.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // In microseconds: ADJ_NANO would change what others are told from then on.
    timex.modes = libc::ADJ_SETOFFSET;
    // The part below a second must not be negative.
    let offset_us = offset_ns / 1000;
    timex.time.tv_sec = offset_us.div_euclid(1_000_000);
    timex.time.tv_usec = offset_us.rem_euclid(1_000_000);
    adjust_clock(&mut timex)
}

/// Has the wall clock make up for so many microseconds, by 500 ppm.
///
/// # Errors
/// As [`shift_clock`].
pub fn slew_clock(offset_us: i64) -> io::Result<()> {
    // SAFETY: as above.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
    timex.offset = offset_us;
    adjust_clock(&mut timex)
}

fn adjust_clock(timex: &mut libc::timex) -> io::Result<()> {
    // SAFETY: the struct is valid for the call.
    check(unsafe { libc::adjtimex(timex) }.into())?;
    Ok(())
}

/// A pidfd of a process, close-on-exec as the kernel makes it.
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and returns a new descriptor.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel just made this descriptor for us; descriptors fit RawFd.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal to the process behind a pidfd.
///
/// # Errors
/// `ESRCH` when it has been reaped.
pub fn pidfd_send_signal(pidfd: &impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and means the one of kill(2).
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// Has a thread that wakes this one up go on until its time slice is over
/// (`SCHED_BATCH`, sched(7)), instead of being interrupted. A process that writes
/// fills its pipe in one go then, and each switch moves much. Children are
/// scheduled as usual.
///
/// # Errors
/// Of sched_setscheduler(2).
pub fn let_others_finish() -> io::Result<()> {
    // SAFETY: sched_param is plain integers, for which zero is valid; the policy
    // has no priority.
    check(unsafe {
        let param: libc::sched_param = std::mem::zeroed();
        let policy = libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK;
        libc::sched_setscheduler(0, policy, &raw const param).into()
    })?;
    Ok(())
}

/// What `clone_sibling` returned, and where.
pub enum Cloned {
    /// In the caller: a pidfd of the new process.
    Parent(OwnedFd),
    Child,
}

/// `fork` whose child is a child of the caller's parent.
///
/// # Errors
/// `EAGAIN`, `ENOMEM`.
///
/// # Safety
/// The caller must have a single thread: libc's fork handlers do not run.
pub unsafe fn clone_sibling() -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is the default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // CLONE_PARENT forbids an exit signal: the child inherits the caller's.
    args.flags = (libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    // SAFETY: args outlives the call, has no stack of its own (as in fork), and
    // the caller promised to have one thread.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<libc::clone_args>(),
        )
    })?;
    if result == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a new descriptor of ours.
    Ok(Cloned::Parent(unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// What [`fork_into`] returned, and where.
pub enum Forked {
    /// In the caller: the pid, as the caller's pid namespace counts.
    Parent(i32),
    Child,
}

/// `fork` whose child is born in a cgroup, given by its directory. Moving it
/// there later would make every fork and exit of the machine wait.
///
/// # Errors
/// `EAGAIN` at a limit of the cgroup, `EBUSY` when it may hold no processes,
/// `ENODEV` when it has been removed, `ENOMEM` when the pid namespace has ended.
///
/// # Safety
/// The caller must have a single thread: libc's fork handlers do not run.
pub unsafe fn fork_into(cgroup: Option<&OwnedFd>) -> io::Result<Forked> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: clone_args is plain integers, for which zero is the default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags = CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args outlives the call, has no stack of its own (as in fork), and
    // the caller promised to have one thread.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<libc::clone_args>(),
        )
    })?;
    match i32::try_from(result) {
        Ok(0) => Ok(Forked::Child),
        // Pids are far below 2^31.
        pid => Ok(Forked::Parent(pid.unwrap_or(i32::MAX))),
    }
}

/// Makes descriptor `to` refer to what `from` does, without close-on-exec.
///
/// # Errors
/// `EBADF`, `EBUSY`.
pub fn dup2(from: &impl AsFd, to: RawFd) -> io::Result<()> {
    // SAFETY: plain integers.
    check(unsafe { libc::dup2(from.as_fd().as_raw_fd(), to) }.into())?;
    Ok(())
}

/// The same open file at a number that is not below `first`, close-on-exec.
///
/// # Errors
/// `EMFILE`.
pub fn move_above(fd: OwnedFd, first: RawFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= first {
        return Ok(fd);
    }
    // SAFETY: plain integers.
    let moved = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first) }.into())?;
    // SAFETY: just made for us; descriptors fit RawFd.
    Ok(unsafe { OwnedFd::from_raw_fd(moved as RawFd) })
}

/// Registers a descriptor with the current runtime.
///
/// # Errors
/// Of epoll_ctl(2); `EPERM` for what cannot be waited for, as regular files.
pub fn on_runtime(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is one descriptor for as long as it lives, and nothing
    // here replaces it by another.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// Sets `O_NONBLOCK` on the open file description.
///
/// # Errors
/// `EBADF`.
pub fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: plain integers.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }.into())?;
    // SAFETY: plain integers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags as i32 | libc::O_NONBLOCK) }.into())?;
    Ok(())
}

/// Blocks SIGCHLD in this thread and has it read from a descriptor instead.
///
/// # Errors
/// Of signalfd(2).
pub fn child_signals() -> io::Result<OwnedFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the mask is a valid signal set.
    let fd = check(unsafe { libc::signalfd(-1, mask.as_ref(), flags) }.into())?;
    // SAFETY: just made for us; descriptors fit RawFd.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A blocking pipe, close-on-exec: the end to read from and the one to write to.
///
/// # Errors
/// `EMFILE`, `ENFILE`.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: both were just made for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Asks for a pipe of this capacity. A smaller one works as well.
pub fn set_pipe_size(pipe: &impl AsFd, bytes: libc::c_int) {
    // SAFETY: plain integers.
    unsafe { libc::fcntl(pipe.as_fd().as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
}

/// `SO_VM_SOCKETS_BUFFER_SIZE` and `SO_VM_SOCKETS_BUFFER_MAX_SIZE` of
/// linux/vm_sockets.h.
const VSOCK_BUFFER_SIZE: libc::c_int = 0;
const VSOCK_BUFFER_MAX_SIZE: libc::c_int = 2;

/// Lets a vsock connection have up to `bytes` on their way in either direction. What
/// is no vsock connection, or refuses, stays as it is.
pub fn set_vsock_buffer(connection: &impl AsFd, bytes: u64) {
    for option in [VSOCK_BUFFER_MAX_SIZE, VSOCK_BUFFER_SIZE] {
        // SAFETY: both options take a u64, which outlives the call.
        unsafe {
            libc::setsockopt(
                connection.as_fd().as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const bytes).cast(),
                size_of::<u64>() as libc::socklen_t,
            )
        };
    }
}

/// Bytes that can be read from a pipe at this moment.
///
/// # Errors
/// `ENOTTY` for a descriptor that cannot tell.
pub fn bytes_available(fd: &impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD stores an int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) }.into())?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Runs a task in the background.
///
/// Boxed: tokio's task machinery is then compiled, and under emulation
/// translated, once instead of once per task type.
pub fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    let task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(task);
    tokio::spawn(task);
}

/// `EAGAIN` and its like: try again when the descriptor is ready.
#[must_use]
pub fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
