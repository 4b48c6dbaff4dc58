//! The relay loop: host stdio on one side, the guest's streams on the other.
//!
//! One thread, one poll(2). Each direction has one buffer, read into only when
//! empty: a slow reader stops exactly its own stream, down to the guest process.
//! Descriptors 0 to 2 are shared with the caller, so they never become
//! non-blocking; writes are sized or flagged so that they cannot block instead.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kuasar_runv_protocol::stream::{Frame, MAX_PRESERVED};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::end::Ending;
use super::pump::Pump;
use super::terminal::Terminal;
use super::{ATTACHED, HAS_STDERR, HAS_STDIN, HAS_STDOUT, Streams, TERMINAL};
use crate::sys::seqpacket::Channel;

/// Signals that concern the stand-in itself and not the guest process.
const NOT_FORWARDED: [Signal; 2] = [Signal::SIGCHLD, Signal::SIGPIPE];

/// See the module's description.
pub struct Relay {
    control: OwnedFd,
    signals: SignalFd,
    /// Keyboard or stdin, towards the guest.
    input: Option<Pump>,
    /// stdout and stderr, or the screen.
    outputs: Vec<Pump>,
    /// Each direction of what is relayed besides stdio.
    further: Vec<Pump>,
    terminal: Option<Terminal>,
    /// The command stays and keeps its end of the channel open.
    attached: bool,
    frame: [u8; Frame::LEN],
    frame_len: usize,
}

impl Relay {
    /// # Errors
    /// As signalfd(2).
    pub fn new(streams: Streams) -> io::Result<Relay> {
        let flags = streams.flags;
        let mut set = SigSet::all();
        for signal in NOT_FORWARDED {
            set.remove(signal);
        }
        SigSet::all().thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;

        let mut guest = streams.guest.into_iter();
        let control = guest.next().ok_or(io::ErrorKind::InvalidInput)?;
        let mut next = |flag: u8| {
            if flags & flag == 0 {
                None
            } else {
                guest.next()
            }
        };
        let input = next(HAS_STDIN).map(|fd| Pump::input(rustix::stdio::stdin(), fd));
        let stdout = next(HAS_STDOUT).map(|fd| (fd, rustix::stdio::stdout()));
        let stderr = next(HAS_STDERR).map(|fd| (fd, rustix::stdio::stderr()));
        let outputs = stdout
            .into_iter()
            .chain(stderr)
            .map(|(guest, host)| Pump::output(guest, host))
            .collect();
        Ok(Relay {
            control,
            signals,
            input,
            outputs,
            further: streams.relayed.into_iter().flat_map(Pump::of).collect(),
            terminal: (flags & TERMINAL != 0).then(Terminal::new),
            attached: flags & ATTACHED != 0,
            frame: [0; Frame::LEN],
            frame_len: 0,
        })
    }

    /// Relays until the guest process has ended and its output is out. While
    /// `creator` is open and has not said that the container is complete, its
    /// end is the end of this stand-in.
    pub fn run(mut self, mut creator: Option<Channel>) -> Ending {
        self.send_window_size();
        let mut ending = None;
        let mut committed = false;
        loop {
            if ending.is_some() && self.outputs.iter().chain(&self.further).all(Pump::is_done) {
                break;
            }
            let ready = self.wait(creator.as_ref(), ending.is_some());
            if ready.signals {
                self.forward_signals();
            }
            if ready.creator {
                let said = creator
                    .as_ref()
                    .is_some_and(|c| matches!(c.recv(std::time::Duration::ZERO), Ok(Some(_))));
                if !said {
                    self.lose_caller();
                    if !committed {
                        return Ending::Killed(libc::SIGKILL.unsigned_abs());
                    }
                }
                committed = true;
                creator = creator.filter(|_| said && self.attached);
            }
            if ready.control {
                ending = self.read_control();
                if ending.is_some() {
                    self.input = None;
                    self.further.retain(|pump| !pump.is_towards_guest());
                    // Their places are others' now.
                    continue;
                }
            }
            if ready.input
                && let Some(input) = &mut self.input
            {
                input.advance();
                if input.is_done() {
                    self.input = None;
                }
            }
            for (index, output) in self.outputs.iter_mut().enumerate() {
                if ready.outputs & (1 << index) != 0 {
                    output.advance();
                }
            }
            for (index, pump) in self.further.iter_mut().enumerate() {
                if ready.broken & (1 << index) != 0 {
                    pump.break_off();
                } else if ready.further & (1 << index) != 0 {
                    pump.advance();
                }
            }
            self.hang_up_unseen_terminal();
        }
        // The loop is left only with an ending.
        ending.unwrap_or(Ending::Killed(libc::SIGKILL.unsigned_abs()))
    }

    /// One poll(2) over everything there is to wait for.
    fn wait(&self, creator: Option<&Channel>, ended: bool) -> Ready {
        #[derive(Clone, Copy)]
        enum Who {
            Signals,
            Creator,
            Control,
            Input,
            Output(usize),
            Further(usize),
            Sink(usize),
        }
        let mut who = vec![Who::Signals];
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.signals.as_fd(),
            PollFlags::IN,
        )];
        let mut add = |name: Who, fd, flags| {
            who.push(name);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        if let Some(creator) = creator {
            add(Who::Creator, creator.as_fd(), PollFlags::IN);
        }
        if !ended {
            add(Who::Control, self.control.as_fd(), PollFlags::IN);
        }
        if let Some((fd, flags)) = self.input.as_ref().and_then(Pump::interest) {
            add(Who::Input, fd, flags);
        }
        for (index, output) in self.outputs.iter().enumerate() {
            if let Some((fd, flags)) = output.interest() {
                add(Who::Output(index), fd, flags);
            }
        }
        for (index, pump) in self.further.iter().enumerate() {
            if let Some((fd, flags)) = pump.interest() {
                add(Who::Further(index), fd, flags);
            }
            if let Some(fd) = pump.watched_sink() {
                add(Who::Sink(index), fd, PollFlags::empty());
            }
        }
        let mut ready = Ready::default();
        if poll(&mut fds, None).is_err() {
            // Interrupted: all signals are blocked, so only a debugger does that.
            return ready;
        }
        for (fd, who) in fds.iter().zip(who) {
            if fd.revents().is_empty() {
                continue;
            }
            match who {
                Who::Signals => ready.signals = true,
                Who::Creator => ready.creator = true,
                Who::Control => ready.control = true,
                Who::Input => ready.input = true,
                Who::Output(index) => ready.outputs |= 1 << index,
                Who::Further(index) => ready.further |= 1 << index,
                Who::Sink(index) => ready.broken |= 1 << index,
            }
        }
        ready
    }

    /// The ending, if the guest has said how or is gone.
    fn read_control(&mut self) -> Option<Ending> {
        let gone = Some(Ending::Killed(libc::SIGKILL.unsigned_abs()));
        match recv(
            &self.control,
            &mut self.frame[self.frame_len..],
            RecvFlags::DONTWAIT,
        ) {
            Ok((0, _)) => return gone,
            Ok((n, _)) => self.frame_len += n,
            Err(Errno::AGAIN | Errno::INTR) => return None,
            Err(_) => return gone,
        }
        if self.frame_len < Frame::LEN {
            return None;
        }
        self.frame_len = 0;
        match Frame::decode(self.frame) {
            // wait(2) has eight bits for a code.
            Ok(Frame::Exited(code)) => Some(Ending::Exited(code.to_le_bytes()[0])),
            Ok(Frame::Killed(signal)) => Some(Ending::Killed(signal)),
            // Not the agent's protocol: nothing it says can be believed.
            Ok(Frame::Signal(_) | Frame::WindowSize { .. } | Frame::Hangup) | Err(_) => gone,
        }
    }

    fn forward_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match (i32::try_from(info.ssi_signo), &mut self.terminal) {
                (Ok(libc::SIGWINCH), Some(_)) => self.send_window_size(),
                // What a hang-up sends here it sends in the guest too.
                (Ok(libc::SIGHUP | libc::SIGCONT), Some(terminal)) if terminal.is_hung_up() => {
                    self.hang_up();
                }
                _ => self.send_frame(Frame::Signal(info.ssi_signo)),
            }
        }
    }

    fn send_window_size(&self) {
        if let Some(size) = self.terminal.as_ref().and_then(Terminal::size) {
            self.send_frame(size);
        }
    }

    /// The command that shows the terminal is gone without a word.
    fn lose_caller(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.restore();
            // Whoever has the terminal now wants the keyboard for himself.
            self.input = None;
            self.hang_up();
        }
    }

    /// A program on a terminal that nobody looks at would wait for ever in its
    /// next write, instead of getting SIGPIPE.
    fn hang_up_unseen_terminal(&mut self) {
        if self.terminal.is_some() && self.outputs.iter().any(Pump::is_broken) {
            self.hang_up();
        }
    }

    /// Hangs the guest's terminal up, once.
    fn hang_up(&mut self) {
        if self.terminal.as_mut().is_some_and(Terminal::first_hang_up) {
            self.send_frame(Frame::Hangup);
        }
    }

    fn send_frame(&self, frame: Frame) {
        // A guest that does not take six bytes is gone or hostile; either way
        // the signal cannot be delivered, as to a process that just ended.
        let _ = send(
            &self.control,
            frame.encode().as_bytes(),
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        );
    }
}

#[derive(Default)]
struct Ready {
    signals: bool,
    creator: bool,
    control: bool,
    input: bool,
    /// One bit per output.
    outputs: u8,
    /// One bit per further pump that can move something.
    further: u128,
    /// One bit per further pump whose sink does not take any more.
    broken: u128,
}

// Each may be a socket with two directions.
const _: () = assert!(2 * MAX_PRESERVED as u32 <= u128::BITS);
