//! Deadlines. Generous, because two cores emulate several VMs at once: they catch
//! what hangs, and say nothing about speed.

use std::thread;
use std::time::{Duration, Instant};

/// One call of the runtime, with room for the boot of an emulated VM beside others.
pub const CALL: Duration = Duration::from_secs(120);
/// Something that is about to happen and needs no VM to boot.
pub const SHORT: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(5);

/// Polls until `condition` holds.
///
/// # Panics
/// With `what` when it still does not at the deadline.
pub fn wait_until(what: &str, deadline: Duration, condition: impl FnMut() -> bool) {
    assert!(
        holds_within(deadline, condition),
        "not within {deadline:?}: {what}"
    );
}

/// Whether `condition` comes to hold before the deadline.
pub fn holds_within(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(POLL);
    }
}
