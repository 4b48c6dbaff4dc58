//! The descriptors that whoever started this process has left open for it.
//!
//! They are told from those this process opens itself by looking at the very
//! beginning: later on, a number that was free may be one of ours.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The first number after stdio.
const FIRST: RawFd = 3;

/// The first number from 3 on that was closed at the beginning.
static END: OnceLock<RawFd> = OnceLock::new();

/// Looks. Must be called before this process opens anything.
pub fn note() {
    END.get_or_init(|| {
        (FIRST..)
            .find(|number| {
                // SAFETY: asks about a number; what is there is not touched.
                let fd = unsafe { BorrowedFd::borrow_raw(*number) };
                fcntl_getfd(fd).is_err()
            })
            .unwrap_or(RawFd::MAX)
    });
}

/// How many there are: their numbers follow stdio's without a gap.
#[must_use]
pub fn count() -> usize {
    let end = END.get().copied().unwrap_or(FIRST);
    usize::try_from(end - FIRST).unwrap_or(0)
}

/// Takes over the first `wanted` of them; fewer if there are not so many. From now on
/// they are closed on exec. To be called once.
#[must_use]
pub fn take(wanted: usize) -> Vec<OwnedFd> {
    (FIRST..)
        .take(wanted.min(count()))
        .map(|number| {
            // SAFETY: it was open before this process opened anything, and nothing
            // else here knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            // Cannot fail for a descriptor that is open.
            let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
            fd
        })
        .collect()
}
