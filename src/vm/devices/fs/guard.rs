//! What stands between the guest's requests and the file server.
//!
//! Four things are decided here, everything else passes through.
//!
//! **Names.** The server hands the names in requests to the host's system calls
//! as they are. Those of a Linux guest are plain file names, but a hostile guest
//! may send `../../etc/passwd`. Such names are refused; that the serving thread
//! has the shared directory as its root is the second line of defence.
//!
//! **Trust.** The guest may use names and attributes for a moment without asking
//! (see [`super::TRUST_EMULATED`]), but only of files that have not changed for
//! a while: while the host changes a file, the guest sees every change at once.
//!
//! **Mount points.** What is mounted in the shared directory while the VM runs, and
//! the directories that the sandbox itself makes and removes at the top of it, must
//! never be mistaken for what was there before. The guest looks them up every
//! time; containers live below them and do not notice.
//!
//! **Cached pages.** When a file is opened, the guest drops the pages it has
//! cached of it unless it is told to keep them. Dropping them always makes every
//! exec read its program and libraries anew, which is most of the cost of a short
//! process; keeping them always would show stale contents. They are kept when the
//! file has not changed since it was last opened, judged by its change time, and
//! only if that was old enough then that no later change can carry the same time.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

/// Coarsest granularity of change times that matters (two seconds on VFAT), and
/// some more.
const SETTLED: Duration = Duration::from_secs(3);

/// Files whose change time is remembered; beyond, some are read anew.
const MAX_REMEMBERED: usize = 4096;

/// A change time, as the file system records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Changed {
    seconds: u64,
    nanoseconds: u32,
}

impl Changed {
    fn of(attr: &fuse::Attr) -> Self {
        Self {
            seconds: attr.ctime,
            nanoseconds: attr.ctimensec,
        }
    }

    /// Whether any change after `now` is sure to have another change time.
    fn is_settled(self, now: SystemTime) -> bool {
        let changed = UNIX_EPOCH
            .checked_add(Duration::new(self.seconds, 0))
            .and_then(|time| time.checked_add(Duration::from_nanos(self.nanoseconds.into())));
        // A time in the future is never settled.
        changed.is_some_and(|time| now.duration_since(time).is_ok_and(|age| age >= SETTLED))
    }
}

/// A file system whose requests are checked first.
pub struct Guard<F> {
    inner: F,
    trust: Duration,
    /// Settled change times at the last open, by inode.
    opened: Mutex<HashMap<u64, Changed>>,
}

impl<F> Guard<F> {
    /// `trust` is how long the guest may use a name or attributes of a settled
    /// file without asking.
    pub fn new(inner: F, trust: Duration) -> Self {
        Self {
            inner,
            trust,
            opened: Mutex::new(HashMap::new()),
        }
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<u64, Changed>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the guest may use these attributes, and the name that led to them,
    /// without asking.
    fn trust_in(&self, attr: &fuse::Attr) -> Duration {
        if Changed::of(attr).is_settled(SystemTime::now()) {
            self.trust
        } else {
            Duration::ZERO
        }
    }

    /// Notes that a file is opened with this change time; whether the pages that
    /// the guest has cached of it are good.
    fn note_open(&self, inode: u64, changed: Changed, now: SystemTime) -> bool {
        let mut opened = self.opened();
        if !changed.is_settled(now) {
            opened.remove(&inode);
            return false;
        }
        if opened.len() >= MAX_REMEMBERED && !opened.contains_key(&inode) {
            opened.clear();
        }
        opened.insert(inode, changed) == Some(changed)
    }
}

/// Refuses what is not the name of an entry in a directory.
fn check(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}

/// Methods that pass through, after the check of the parameters named in front.
macro_rules! pass {
    ($(
        [$($name:ident)*]
        fn $method:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $type:ty),* $(,)?)
        $(-> $result:ty)?;
    )*) => { $(
        fn $method $(<$generic: $bound>)? (&self, $($arg: $type),*) $(-> $result)? {
            $(check($name)?;)*
            self.inner.$method($($arg),*)
        }
    )* };
}

type Ino<F> = <F as FileSystem>::Inode;
type Fh<F> = <F as FileSystem>::Handle;
type Stat = (fuse::Attr, Duration);
type Opened<F> = (Option<Fh<F>>, OpenOptions);

impl<F> FileSystem for Guard<F>
where
    F: FileSystem<Inode = u64>,
    F::Handle: Copy,
{
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: Ino<F>,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<Opened<F>> {
        let (handle, mut options) = self.inner.open(ctx, inode, kill_priv, flags)?;
        // Without attributes the pages are dropped, which is always right.
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode, handle) {
            if self.note_open(inode, Changed::of(&attr), SystemTime::now()) {
                options |= OpenOptions::KEEP_CACHE;
            }
        }
        Ok((handle, options))
    }

    fn lookup(&self, ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let mut entry = self.inner.lookup(ctx, parent, name)?;
        entry.attr_timeout = self.trust_in(&entry.attr);
        entry.entry_timeout = entry.attr_timeout;
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let mount_point = entry.attr.flags & fuse::ATTR_SUBMOUNT != 0;
        if mount_point || directory && parent == fuse::ROOT_ID {
            entry.entry_timeout = Duration::ZERO;
        }
        Ok(entry)
    }

    fn getattr(&self, ctx: Context, inode: Ino<F>, handle: Option<Fh<F>>) -> io::Result<Stat> {
        let (attr, _) = self.inner.getattr(ctx, inode, handle)?;
        let trust = self.trust_in(&attr);
        Ok((attr, trust))
    }

    fn forget(&self, ctx: Context, inode: Ino<F>, count: u64) {
        self.opened().remove(&inode);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Ino<F>, u64)>) {
        let mut opened = self.opened();
        for (inode, _) in &requests {
            opened.remove(inode);
        }
        drop(opened);
        self.inner.batch_forget(ctx, requests);
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.opened().clear();
        self.inner.init(capable)
    }

    pass! {
        [] fn destroy();
        [] fn setattr(ctx: Context, inode: Ino<F>, attr: fuse::SetattrIn, handle: Option<Fh<F>>,
            valid: SetattrValid) -> io::Result<Stat>;
        [] fn readlink(ctx: Context, inode: Ino<F>) -> io::Result<Vec<u8>>;
        [name] fn symlink(ctx: Context, target: &CStr, parent: Ino<F>, name: &CStr,
            extensions: Extensions) -> io::Result<Entry>;
        [name] fn mknod(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, rdev: u32,
            umask: u32, extensions: Extensions) -> io::Result<Entry>;
        [name] fn mkdir(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, umask: u32,
            extensions: Extensions) -> io::Result<Entry>;
        [name] fn unlink(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [name] fn rmdir(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [from to] fn rename(ctx: Context, from_dir: Ino<F>, from: &CStr, to_dir: Ino<F>, to: &CStr,
            flags: u32) -> io::Result<()>;
        [name] fn link(ctx: Context, inode: Ino<F>, parent: Ino<F>, name: &CStr)
            -> io::Result<Entry>;
        [name] fn create(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, kill_priv: bool,
            flags: u32, umask: u32, extensions: Extensions)
            -> io::Result<(Entry, Option<Fh<F>>, OpenOptions)>;
        [] fn read<W: ZeroCopyWriter>(ctx: Context, inode: Ino<F>, handle: Fh<F>, to: W,
            size: u32, offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        [] fn write<R: ZeroCopyReader>(ctx: Context, inode: Ino<F>, handle: Fh<F>, from: R,
            size: u32, offset: u64, lock_owner: Option<u64>, delayed: bool, kill_priv: bool,
            flags: u32) -> io::Result<usize>;
        [] fn flush(ctx: Context, inode: Ino<F>, handle: Fh<F>, lock_owner: u64)
            -> io::Result<()>;
        [] fn fsync(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
            -> io::Result<()>;
        [] fn fallocate(ctx: Context, inode: Ino<F>, handle: Fh<F>, mode: u32, offset: u64,
            length: u64) -> io::Result<()>;
        [] fn release(ctx: Context, inode: Ino<F>, flags: u32, handle: Fh<F>, flush: bool,
            unlock: bool, lock_owner: Option<u64>) -> io::Result<()>;
        [] fn statfs(ctx: Context, inode: Ino<F>) -> io::Result<libc::statvfs64>;
        [] fn setxattr(ctx: Context, inode: Ino<F>, name: &CStr, value: &[u8], flags: u32,
            extra: SetxattrFlags) -> io::Result<()>;
        [] fn getxattr(ctx: Context, inode: Ino<F>, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        [] fn listxattr(ctx: Context, inode: Ino<F>, size: u32) -> io::Result<ListxattrReply>;
        [] fn removexattr(ctx: Context, inode: Ino<F>, name: &CStr) -> io::Result<()>;
        [] fn opendir(ctx: Context, inode: Ino<F>, flags: u32) -> io::Result<Opened<F>>;
        [] fn readdir(ctx: Context, inode: Ino<F>, handle: Fh<F>, size: u32, offset: u64)
            -> io::Result<F::DirIter>;
        [] fn fsyncdir(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
            -> io::Result<()>;
        [] fn releasedir(ctx: Context, inode: Ino<F>, flags: u32, handle: Fh<F>)
            -> io::Result<()>;
        [] fn access(ctx: Context, inode: Ino<F>, mask: u32) -> io::Result<()>;
        [] fn lseek(ctx: Context, inode: Ino<F>, handle: Fh<F>, offset: u64, whence: u32)
            -> io::Result<u64>;
        [] fn copyfilerange(ctx: Context, from: Ino<F>, from_handle: Fh<F>, from_offset: u64,
            to: Ino<F>, to_handle: Fh<F>, to_offset: u64, len: u64, flags: u64)
            -> io::Result<usize>;
        [] fn syncfs(ctx: Context, inode: Ino<F>) -> io::Result<()>;
        [] fn getlk() -> io::Result<()>;
        [] fn setlk() -> io::Result<()>;
        [] fn setlkw() -> io::Result<()>;
        [] fn ioctl() -> io::Result<()>;
        [] fn bmap() -> io::Result<()>;
        [] fn poll() -> io::Result<()>;
        [] fn notify_reply() -> io::Result<()>;
        [] fn tmpfile() -> io::Result<(Entry, Option<Fh<F>>, OpenOptions)>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for name in [c"", c".", c"..", c"../x", c"/etc", c"a/b", c"a/"] {
            assert!(check(name).is_err(), "{name:?}");
        }
        for name in [c"a", c"...", c"..a", c" ", c"\xff\x01"] {
            assert!(check(name).is_ok(), "{name:?}");
        }
    }

    fn at(seconds: u64) -> (Changed, SystemTime) {
        let changed = Changed {
            seconds,
            nanoseconds: 0,
        };
        (changed, UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn pages_of_an_unchanged_file_are_kept() {
        let guard = Guard::new((), Duration::ZERO);
        let (changed, written) = at(1000);
        // The first open knows nothing about what the guest has cached.
        assert!(!guard.note_open(1, changed, written + SETTLED));
        assert!(guard.note_open(1, changed, written + SETTLED));
        let (changed, written) = at(2000);
        assert!(!guard.note_open(1, changed, written + SETTLED));
        assert!(guard.note_open(1, changed, written + SETTLED));
    }

    #[test]
    fn a_change_within_the_granularity_of_time_is_not_missed() {
        let guard = Guard::new((), Duration::ZERO);
        let (changed, written) = at(1000);
        // Opened so soon that a second change could carry the same time.
        assert!(!guard.note_open(1, changed, written));
        assert!(!guard.note_open(1, changed, written + SETTLED));
        // A clock that went backwards settles nothing.
        assert!(!guard.note_open(1, changed, written - SETTLED));
        assert!(!guard.note_open(1, changed, written + SETTLED));
    }

    #[test]
    fn memory_is_bounded() {
        let guard = Guard::new((), Duration::ZERO);
        let (changed, written) = at(1000);
        for inode in 0..3 * MAX_REMEMBERED as u64 {
            guard.note_open(inode, changed, written + SETTLED);
        }
        assert!(guard.opened().len() <= MAX_REMEMBERED);
    }
}
