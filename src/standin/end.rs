//! Ending the way another process ended.

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

/// How a guest process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Exited(u8),
    Killed(u32),
}

/// Ends this process by `signal`, so that who reaps it sees what it would have
/// seen of the guest process. Returns the shell's code for it where a signal
/// does not end a process.
pub fn by_signal(signal: u32) -> u8 {
    // The guest process dumped core or not; a stand-in has nothing to dump.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if let Some(signal) = i32::try_from(signal)
        .ok()
        .and_then(|n| Signal::try_from(n).ok())
    {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        let _ = unsafe { sigaction(signal, &default) };
        let _ = raise(signal);
        // `raise` left it pending if it is blocked.
        let mut set = SigSet::empty();
        set.add(signal);
        let _ = set.thread_unblock();
    }
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}
