//! What stands between the guest's requests and the file server.
//!
//! Five things are decided here, everything else passes through.
//!
//! **Names.** The server hands the names in requests to the host's system calls
//! as they are. Those of a Linux guest are plain file names, but a hostile guest
//! may send `../../etc/passwd`. Such names are refused; that the serving thread
//! has the shared directory as its root is the second line of defence.
//!
//! **Trust.** How long the guest may use a name and its attributes without asking.
//! Not at all while a file changes, so every change the host makes is seen at once;
//! otherwise for the shortest time there is, a tick or two of the guest's clock.
//! Zero would make the guest's driver forget a file, with the pages it has cached of
//! it, as soon as nobody uses it, and every exec would read its program anew.
//!
//! **Descriptors.** The server holds one for every file the guest has looked up and
//! not forgotten, and the guest forgets only when its own memory gets short. When
//! there are many, names are not trusted at all, which makes the guest's driver
//! forget a file as soon as nobody uses it; so walking a large tree neither ends
//! with ENFILE nor makes this process grow.
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

use std::collections::{HashMap, hash_map};
use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

use super::privileges::WithoutFsetid;

/// Coarsest granularity of change times that matters (two seconds on VFAT), and
/// some more.
const SETTLED: Duration = Duration::from_secs(3);

/// Files that the guest may keep although nobody uses them, for a new use of the
/// pages it has cached of them; about 5 MiB of memory on the host.
const MAX_IDLE: usize = 8192;

/// The shortest time that is not zero; the guest's driver rounds it up to a tick.
/// Longer ones gain nothing for exec and little for walks (under emulation: 50
/// runs of a 2 MiB program 5.5 s of CPU with zero, 0.4 s with this and with 50 ms;
/// `ls -lR` of 2000 files 1.3 s and 0.9 s).
const TRUST: Duration = Duration::from_nanos(1);

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

/// What is known about a file that the guest has looked up.
#[derive(Debug, Default)]
struct Known {
    /// Replies that named it and that the guest has not forgotten.
    lookups: u64,
    /// Its change time at the last open, if it was settled.
    opened: Option<Changed>,
}

/// A file system whose requests are checked first.
pub struct Guard<F> {
    inner: F,
    /// The server has a descriptor for each, so it bounds them.
    known: Mutex<HashMap<u64, Known>>,
    handles: AtomicUsize,
    /// Descriptors that are many.
    crowd: usize,
}

impl<F> Guard<F> {
    /// `descriptors` is how many the guest may make this process hold.
    pub fn new(inner: F, descriptors: u64) -> Self {
        Self {
            inner,
            known: Mutex::new(HashMap::new()),
            handles: AtomicUsize::new(0),
            crowd: usize::try_from(descriptors / 2).map_or(MAX_IDLE, |half| half.min(MAX_IDLE)),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the guest may use these attributes, and the name that led to them,
    /// without asking.
    fn trust_in(attr: &fuse::Attr) -> Duration {
        if Changed::of(attr).is_settled(SystemTime::now()) {
            TRUST
        } else {
            Duration::ZERO
        }
    }

    /// Completes a reply that names a file in the directory `parent`.
    fn named(&self, parent: u64, mut entry: Entry) -> Entry {
        let mut known = self.known();
        known.entry(entry.inode).or_default().lookups += 1;
        let crowded = known.len() + self.handles.load(Ordering::Relaxed) >= self.crowd;
        drop(known);
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let mount_point = entry.attr.flags & fuse::ATTR_SUBMOUNT != 0;
        let strict = crowded || mount_point || directory && parent == fuse::ROOT_ID;
        entry.attr_timeout = Self::trust_in(&entry.attr);
        entry.entry_timeout = if strict {
            Duration::ZERO
        } else {
            entry.attr_timeout
        };
        entry
    }

    /// The guest has forgotten `count` replies that named a file.
    fn forgotten(&self, inode: u64, count: u64) {
        if let hash_map::Entry::Occupied(mut known) = self.known().entry(inode) {
            let left = known.get().lookups.saturating_sub(count);
            known.get_mut().lookups = left;
            if left == 0 {
                known.remove();
            }
        }
    }

    /// Counts a handle that may have been closed.
    fn closed(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_ok() {
            self.handles.fetch_sub(1, Ordering::Relaxed);
        }
        result
    }

    /// Notes that a file is opened with this change time; whether the pages that
    /// the guest has cached of it are good.
    fn note_open(&self, inode: u64, changed: Changed, now: SystemTime) -> bool {
        let settled = changed.is_settled(now).then_some(changed);
        let mut known = self.known();
        let Some(known) = known.get_mut(&inode) else {
            return false;
        };
        let before = std::mem::replace(&mut known.opened, settled);
        settled.is_some() && before == settled
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

/// Methods whose reply is a file in a directory; directory and name are the
/// parameters named in front.
macro_rules! entries {
    ($(
        [$parent:ident $name:ident]
        fn $method:ident ($($arg:ident: $type:ty),* $(,)?);
    )*) => { $(
        fn $method(&self, $($arg: $type),*) -> io::Result<Entry> {
            check($name)?;
            let entry = self.inner.$method($($arg),*)?;
            Ok(self.named($parent, entry))
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

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.known().clear();
        self.handles.store(0, Ordering::Relaxed);
        self.inner.init(capable)
    }

    fn forget(&self, ctx: Context, inode: Ino<F>, count: u64) {
        self.inner.forget(ctx, inode, count);
        self.forgotten(inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Ino<F>, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: Context, inode: Ino<F>, handle: Option<Fh<F>>) -> io::Result<Stat> {
        let (attr, _) = self.inner.getattr(ctx, inode, handle)?;
        let trust = Self::trust_in(&attr);
        Ok((attr, trust))
    }

    fn open(
        &self,
        ctx: Context,
        inode: Ino<F>,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<Opened<F>> {
        let (handle, mut options) = {
            let _privileges = WithoutFsetid::when(kill_priv)?;
            self.inner.open(ctx, inode, false, flags)?
        };
        self.handles.fetch_add(1, Ordering::Relaxed);
        // Closing a file that was only read has nothing to report.
        let reads_only = flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
        options.set(OpenOptions::NOFLUSH, reads_only);
        // Without attributes the pages are dropped, which is always right.
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode, handle)
            && self.note_open(inode, Changed::of(&attr), SystemTime::now())
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((handle, options))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Ino<F>,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Fh<F>>, OpenOptions)> {
        check(name)?;
        let created = self
            .inner
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        let (entry, handle, options) = created;
        self.handles.fetch_add(1, Ordering::Relaxed);
        Ok((self.named(parent, entry), handle, options))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Ino<F>,
        attr: fuse::SetattrIn,
        handle: Option<Fh<F>>,
        mut valid: SetattrValid,
    ) -> io::Result<Stat> {
        let _privileges = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
        valid.remove(SetattrValid::KILL_SUIDGID);
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Ino<F>,
        handle: Fh<F>,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let _privileges = WithoutFsetid::when(kill_priv)?;
        self.inner.write(
            ctx, inode, handle, from, size, offset, lock_owner, delayed, false, flags,
        )
    }

    fn release(
        &self,
        ctx: Context,
        inode: Ino<F>,
        flags: u32,
        handle: Fh<F>,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let released = self
            .inner
            .release(ctx, inode, flags, handle, flush, unlock, lock_owner);
        self.closed(released)
    }

    fn opendir(&self, ctx: Context, inode: Ino<F>, flags: u32) -> io::Result<Opened<F>> {
        let opened = self.inner.opendir(ctx, inode, flags)?;
        self.handles.fetch_add(1, Ordering::Relaxed);
        Ok(opened)
    }

    fn releasedir(&self, ctx: Context, inode: Ino<F>, flags: u32, handle: Fh<F>) -> io::Result<()> {
        let released = self.inner.releasedir(ctx, inode, flags, handle);
        self.closed(released)
    }

    entries! {
        [parent name] fn lookup(ctx: Context, parent: Ino<F>, name: &CStr);
        [parent name] fn symlink(ctx: Context, target: &CStr, parent: Ino<F>, name: &CStr,
            extensions: Extensions);
        [parent name] fn mknod(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, rdev: u32, umask: u32,
            extensions: Extensions);
        [parent name] fn mkdir(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, umask: u32,
            extensions: Extensions);
        [parent name] fn link(ctx: Context, inode: Ino<F>, parent: Ino<F>, name: &CStr);
    }

    pass! {
        [] fn destroy();
        [] fn readlink(ctx: Context, inode: Ino<F>) -> io::Result<Vec<u8>>;
        [name] fn unlink(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [name] fn rmdir(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [from to] fn rename(ctx: Context, from_dir: Ino<F>, from: &CStr, to_dir: Ino<F>, to: &CStr,
            flags: u32) -> io::Result<()>;
        [] fn read<W: ZeroCopyWriter>(ctx: Context, inode: Ino<F>, handle: Fh<F>, to: W,
            size: u32, offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        [] fn flush(ctx: Context, inode: Ino<F>, handle: Fh<F>, lock_owner: u64)
            -> io::Result<()>;
        [] fn fsync(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
            -> io::Result<()>;
        [] fn fallocate(ctx: Context, inode: Ino<F>, handle: Fh<F>, mode: u32, offset: u64,
            length: u64) -> io::Result<()>;
        [] fn statfs(ctx: Context, inode: Ino<F>) -> io::Result<libc::statvfs64>;
        [] fn setxattr(ctx: Context, inode: Ino<F>, name: &CStr, value: &[u8], flags: u32,
            extra: SetxattrFlags) -> io::Result<()>;
        [] fn getxattr(ctx: Context, inode: Ino<F>, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        [] fn listxattr(ctx: Context, inode: Ino<F>, size: u32) -> io::Result<ListxattrReply>;
        [] fn removexattr(ctx: Context, inode: Ino<F>, name: &CStr) -> io::Result<()>;
        [] fn readdir(ctx: Context, inode: Ino<F>, handle: Fh<F>, size: u32, offset: u64)
            -> io::Result<F::DirIter>;
        [] fn fsyncdir(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
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
mod tests;
