//! What is known of the files that the guest knows: how often it was told of each, and
//! who has changed it.
//!
//! A file server cannot tell a guest that the host has changed something; it can only
//! say beforehand for how long the guest may go without asking. So the guest is trusted
//! with less where the host has been at work lately. Changes show in a file's change
//! time, and those by the guest itself are told from those by the host: the guest's go
//! through this process, which looks at the change time before and after each. A change
//! time that was not there after the guest's last change is the host's.
//!
//! Where the host's clock for change times is coarse (Linux before 6.13: a tick of the
//! kernel), a change by the host in the tick of one by the guest is taken for the
//! guest's. What depends on this is only whether the host's *next* changes are seen at
//! once or after the shortest time there is; pages that the guest has cached do not
//! depend on it ([`Files::note_open`]).

use std::collections::{HashMap, hash_map};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::fuse;

/// Coarsest granularity of change times that matters (two seconds on VFAT), and
/// some more.
pub const SETTLED: Duration = Duration::from_secs(3);

/// A change time, as the file system records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    pub seconds: u64,
    pub nanoseconds: u32,
}

impl Changed {
    pub fn of(attr: &fuse::Attr) -> Self {
        Self {
            seconds: attr.ctime,
            nanoseconds: attr.ctimensec,
        }
    }

    /// Whether any change after `now` is sure to have another change time.
    pub fn is_settled(self, now: SystemTime) -> bool {
        let changed = UNIX_EPOCH
            .checked_add(Duration::new(self.seconds, 0))
            .and_then(|time| time.checked_add(Duration::from_nanos(self.nanoseconds.into())));
        // A time in the future is never settled.
        changed.is_some_and(|time| now.duration_since(time).is_ok_and(|age| age >= SETTLED))
    }
}

/// Who may have changed a file since it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Author {
    Guest,
    Anyone,
}

/// What is known about a file that the guest has looked up.
#[derive(Debug, Default)]
struct Known {
    /// Replies that named it and that the guest has not forgotten.
    lookups: u64,
    /// Its change time when it was last looked at.
    seen: Option<Changed>,
    /// The last change that may be the host's.
    by_host: Option<Changed>,
    /// Its change time at the last open, if it was settled.
    opened: Option<Changed>,
}

impl Known {
    fn see(&mut self, changed: Changed, author: Author) {
        if author == Author::Anyone && self.seen != Some(changed) {
            self.by_host = Some(changed);
        }
        self.seen = Some(changed);
    }

    fn is_quiet(&self, now: SystemTime) -> bool {
        self.by_host.is_none_or(|changed| changed.is_settled(now))
    }
}

/// The files that the guest knows.
#[derive(Debug, Default)]
pub struct Files(Mutex<HashMap<u64, Known>>);

impl Files {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn clear(&self) {
        self.lock().clear();
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// The guest is told of a file; `author` is the guest when it has just made it.
    pub fn named(&self, inode: u64, changed: Changed, author: Author) {
        let mut files = self.lock();
        let known = files.entry(inode).or_default();
        known.lookups += 1;
        known.see(changed, author);
    }

    /// The guest has forgotten `count` replies that named a file.
    pub fn forgotten(&self, inode: u64, count: u64) {
        if let hash_map::Entry::Occupied(mut known) = self.lock().entry(inode) {
            let left = known.get().lookups.saturating_sub(count);
            known.get_mut().lookups = left;
            if left == 0 {
                known.remove();
            }
        }
    }

    /// A file has this change time, before or after something `author` has done.
    pub fn see(&self, inode: u64, changed: Changed, author: Author) {
        if let Some(known) = self.lock().get_mut(&inode) {
            known.see(changed, author);
        }
    }

    /// Whether the host has left a file alone for long enough, which has this change
    /// time now.
    pub fn is_quiet(&self, inode: u64, changed: Changed, now: SystemTime) -> bool {
        match self.lock().get_mut(&inode) {
            Some(known) => {
                known.see(changed, Author::Anyone);
                known.is_quiet(now)
            }
            None => changed.is_settled(now),
        }
    }

    /// Notes that a file is opened with this change time; whether the pages that
    /// the guest has cached of it are good.
    ///
    /// Whose change it was does not matter: pages may be kept for as long as the guest
    /// likes, so a change that was missed would be missed for ever.
    pub fn note_open(&self, inode: u64, changed: Changed, now: SystemTime) -> bool {
        let settled = changed.is_settled(now).then_some(changed);
        let mut files = self.lock();
        let Some(known) = files.get_mut(&inode) else {
            return false;
        };
        let before = std::mem::replace(&mut known.opened, settled);
        settled.is_some() && before == settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 7;
    /// Long enough for a change time to be settled.
    const OLD: u64 = 1_000;

    fn at(seconds: u64) -> Changed {
        Changed {
            seconds,
            nanoseconds: 0,
        }
    }

    fn time(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn quiet(files: &Files, changed: u64, now: u64) -> bool {
        files.is_quiet(FILE, at(changed), time(now))
    }

    #[test]
    fn a_change_by_the_guest_is_none_by_the_host() {
        let files = Files::default();
        files.named(FILE, at(OLD), Author::Guest);
        assert!(quiet(&files, OLD, OLD));
        files.see(FILE, at(OLD + 1), Author::Guest);
        assert!(quiet(&files, OLD + 1, OLD + 1));
    }

    #[test]
    fn a_change_by_the_host_counts_for_three_seconds() {
        let files = Files::default();
        files.named(FILE, at(OLD), Author::Anyone);
        assert!(!quiet(&files, OLD, OLD + 2));
        assert!(quiet(&files, OLD, OLD + 3));
        assert!(!quiet(&files, OLD + 10, OLD + 10));
        // What the guest does meanwhile neither prolongs nor hides it.
        files.see(FILE, at(OLD + 12), Author::Guest);
        assert!(!quiet(&files, OLD + 12, OLD + 12));
        assert!(quiet(&files, OLD + 12, OLD + 13));
    }

    #[test]
    fn a_change_by_the_host_just_before_one_by_the_guest_is_not_missed() {
        let files = Files::default();
        files.named(FILE, at(OLD), Author::Guest);
        files.see(FILE, at(OLD + 5), Author::Anyone);
        files.see(FILE, at(OLD + 6), Author::Guest);
        assert!(!quiet(&files, OLD + 6, OLD + 6));
        assert!(quiet(&files, OLD + 6, OLD + 8));
    }

    #[test]
    fn a_file_the_guest_does_not_know_is_judged_by_its_age() {
        let files = Files::default();
        files.see(FILE, at(OLD), Author::Guest);
        assert!(!quiet(&files, OLD, OLD + 2));
        assert!(quiet(&files, OLD, OLD + 3));
        assert_eq!(files.len(), 0);
    }

    #[test]
    fn a_change_within_the_granularity_of_time_is_not_missed() {
        let files = Files::default();
        files.named(FILE, at(OLD), Author::Guest);
        let opened = |now| files.note_open(FILE, at(OLD), now);
        // Opened so soon that a second change could carry the same time.
        let written = time(OLD);
        assert!(!opened(written));
        assert!(!opened(written + SETTLED));
        assert!(opened(written + SETTLED));
        // A clock that went backwards settles nothing.
        assert!(!opened(written - SETTLED));
        assert!(!opened(written + SETTLED));
    }
}
