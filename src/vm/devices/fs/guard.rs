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
//! Not at all while the host changes a file, so that each of its changes is seen at
//! once; otherwise, and while only the guest changes it, for a few ticks of the
//! guest's clock ([`known`](super::known)).
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

use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

use super::known::{Author, Changed, Files};
use super::privileges::WithoutFsetid;

/// Files that the guest may keep although nobody uses them, for a new use of the
/// pages it has cached of them; about 5 MiB of memory on the host.
const MAX_IDLE: usize = 8192;

/// Two ticks of a guest's clock of 250 Hz. Its driver rounds the time up to a tick and
/// counts from the next one, so it is over after 12 ms at the latest, and after 20 ms
/// where the clock has 100 Hz. Half of it has the guest look at each directory of a
/// path twice as often, which is a tenth of the requests of a walk; longer ones gain
/// little (under emulation: 50 runs of a 2 MiB program 5.5 s of CPU with zero, 0.4 s
/// with one tick and with 50 ms; `ls -lR` of 2000 files 1.3 s and 0.9 s).
const TRUST: Duration = Duration::from_millis(8);

/// Bits of a mode that a write takes away.
const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// A file system whose requests are checked first.
pub struct Guard<F> {
    inner: F,
    /// The server has a descriptor for each, so it bounds them.
    known: Files,
    handles: AtomicUsize,
    /// Descriptors that are many.
    crowd: usize,
}

impl<F> Guard<F> {
    /// `descriptors` is how many the guest may make this process hold.
    pub fn new(inner: F, descriptors: u64) -> Self {
        Self {
            inner,
            known: Files::default(),
            handles: AtomicUsize::new(0),
            crowd: usize::try_from(descriptors / 2).map_or(MAX_IDLE, |half| half.min(MAX_IDLE)),
        }
    }

    /// How long the guest may use these attributes, and a name that leads to them,
    /// without asking.
    fn trust_in(&self, inode: u64, attr: &fuse::Attr) -> Duration {
        let changed = Changed::of(attr);
        if self.known.is_quiet(inode, changed, SystemTime::now()) {
            TRUST
        } else {
            Duration::ZERO
        }
    }

    /// Completes a reply that names a file in the directory `parent`.
    fn named(&self, parent: u64, mut entry: Entry, author: Author) -> Entry {
        let changed = Changed::of(&entry.attr);
        self.known.named(entry.inode, changed, author);
        let crowded = self.known.len() + self.handles.load(Ordering::Relaxed) >= self.crowd;
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let mount_point = entry.attr.flags & fuse::ATTR_SUBMOUNT != 0;
        let strict = crowded || mount_point || directory && parent == fuse::ROOT_ID;
        entry.attr_timeout = self.trust_in(entry.inode, &entry.attr);
        entry.entry_timeout = if strict {
            Duration::ZERO
        } else {
            entry.attr_timeout
        };
        entry
    }

    /// Counts a handle that may have been closed.
    fn closed(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_ok() {
            self.handles.fetch_sub(1, Ordering::Relaxed);
        }
        result
    }
}

impl<F: FileSystem<Inode = u64>> Guard<F> {
    /// Notes the change time of a file, before or after something `author` has done.
    fn look_at(&self, ctx: Context, inode: u64, author: Author) -> Option<fuse::Attr> {
        let (attr, _) = self.inner.getattr(ctx, inode, None).ok()?;
        self.known.see(inode, Changed::of(&attr), author);
        Some(attr)
    }

    /// Does something for the guest that changes these files, whether it succeeds or
    /// not.
    fn changing<T>(
        &self,
        ctx: Context,
        inodes: &[u64],
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        for inode in inodes {
            self.look_at(ctx, *inode, Author::Anyone);
        }
        let result = change();
        for inode in inodes {
            self.look_at(ctx, *inode, Author::Guest);
        }
        result
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

/// Methods that make something in a directory and whose reply is what they have made;
/// directory and name are the parameters named in front.
macro_rules! makers {
    ($(
        [$parent:ident $name:ident]
        fn $method:ident ($ctx:ident: Context, $($arg:ident: $type:ty),* $(,)?);
    )*) => { $(
        fn $method(&self, $ctx: Context, $($arg: $type),*) -> io::Result<Entry> {
            check($name)?;
            let make = || self.inner.$method($ctx, $($arg),*);
            let entry = self.changing($ctx, &[$parent], make)?;
            Ok(self.named($parent, entry, Author::Guest))
        }
    )* };
}

/// Methods that change the files named in front, after the check of the names behind
/// them.
macro_rules! changes {
    ($(
        [$($inode:ident)* $(; $($name:ident)*)?]
        fn $method:ident ($ctx:ident: Context, $($arg:ident: $type:ty),* $(,)?) -> $result:ty;
    )*) => { $(
        fn $method(&self, $ctx: Context, $($arg: $type),*) -> $result {
            $($(check($name)?;)*)?
            self.changing($ctx, &[$($inode),*], || self.inner.$method($ctx, $($arg),*))
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
        self.known.clear();
        self.handles.store(0, Ordering::Relaxed);
        self.inner.init(capable)
    }

    fn forget(&self, ctx: Context, inode: Ino<F>, count: u64) {
        self.inner.forget(ctx, inode, count);
        self.known.forgotten(inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Ino<F>, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: Context, inode: Ino<F>, handle: Option<Fh<F>>) -> io::Result<Stat> {
        let (attr, _) = self.inner.getattr(ctx, inode, handle)?;
        let trust = self.trust_in(inode, &attr);
        Ok((attr, trust))
    }

    fn lookup(&self, ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let entry = self.inner.lookup(ctx, parent, name)?;
        Ok(self.named(parent, entry, Author::Anyone))
    }

    fn open(
        &self,
        ctx: Context,
        inode: Ino<F>,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<Opened<F>> {
        let open = || {
            let _privileges = WithoutFsetid::when(kill_priv)?;
            self.inner.open(ctx, inode, false, flags)
        };
        let truncates = flags & libc::O_TRUNC as u32 != 0;
        let changed: &[u64] = if truncates { &[inode] } else { &[] };
        let (handle, mut options) = self.changing(ctx, changed, open)?;
        self.handles.fetch_add(1, Ordering::Relaxed);
        // Closing a file that was only read has nothing to report.
        let reads_only = flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
        options.set(OpenOptions::NOFLUSH, reads_only);
        // Without attributes the pages are dropped, which is always right.
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode, handle)
            && self
                .known
                .note_open(inode, Changed::of(&attr), SystemTime::now())
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
        let exclusive = libc::O_EXCL as u32;
        let create = |flags, extensions| {
            self.inner
                .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
        };
        // Asked like this, it says whether the file was there before.
        let made = self.changing(ctx, &[parent], || {
            create(flags | exclusive, extensions.clone())
        });
        let (author, (entry, handle, options)) = match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && flags & exclusive == 0 => {
                (Author::Anyone, create(flags, extensions)?)
            }
            made => (Author::Guest, made?),
        };
        self.handles.fetch_add(1, Ordering::Relaxed);
        Ok((self.named(parent, entry, author), handle, options))
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
        let set = || self.inner.setattr(ctx, inode, attr, handle, valid);
        let (attr, _) = self.changing(ctx, &[inode], set)?;
        let trust = self.trust_in(inode, &attr);
        Ok((attr, trust))
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
        let before = self.look_at(ctx, inode, Author::Anyone);
        // Giving up the capability takes three system calls, which a file without the
        // bits does not need. Bits that the host sets right now are set after the write.
        let kill_priv = kill_priv && before.is_none_or(|attr| attr.mode & SET_ID != 0);
        let written = {
            let _privileges = WithoutFsetid::when(kill_priv)?;
            self.inner.write(
                ctx, inode, handle, from, size, offset, lock_owner, delayed, false, flags,
            )
        };
        self.look_at(ctx, inode, Author::Guest);
        written
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

    fn link(&self, ctx: Context, inode: Ino<F>, parent: Ino<F>, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let link = || self.inner.link(ctx, inode, parent, name);
        let entry = self.changing(ctx, &[inode, parent], link)?;
        Ok(self.named(parent, entry, Author::Anyone))
    }

    fn rename(
        &self,
        ctx: Context,
        from_dir: Ino<F>,
        from: &CStr,
        to_dir: Ino<F>,
        to: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check(from)?;
        check(to)?;
        // The file itself changes as well, for most file systems.
        let file = self
            .inner
            .lookup(ctx, from_dir, from)
            .map(|entry| entry.inode);
        let file = file.ok();
        let changed: Vec<_> = [from_dir, to_dir].into_iter().chain(file).collect();
        let rename = || self.inner.rename(ctx, from_dir, from, to_dir, to, flags);
        let renamed = self.changing(ctx, &changed, rename);
        if let Some(file) = file {
            self.inner.forget(ctx, file, 1);
        }
        renamed
    }

    makers! {
        [parent name] fn symlink(ctx: Context, target: &CStr, parent: Ino<F>, name: &CStr,
            extensions: Extensions);
        [parent name] fn mknod(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, rdev: u32, umask: u32,
            extensions: Extensions);
        [parent name] fn mkdir(ctx: Context, parent: Ino<F>, name: &CStr, mode: u32, umask: u32,
            extensions: Extensions);
    }

    changes! {
        [parent; name] fn unlink(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [parent; name] fn rmdir(ctx: Context, parent: Ino<F>, name: &CStr) -> io::Result<()>;
        [inode] fn fallocate(ctx: Context, inode: Ino<F>, handle: Fh<F>, mode: u32, offset: u64,
            length: u64) -> io::Result<()>;
        [inode] fn setxattr(ctx: Context, inode: Ino<F>, name: &CStr, value: &[u8], flags: u32,
            extra: SetxattrFlags) -> io::Result<()>;
        [inode] fn removexattr(ctx: Context, inode: Ino<F>, name: &CStr) -> io::Result<()>;
        [to] fn copyfilerange(ctx: Context, from: Ino<F>, from_handle: Fh<F>, from_offset: u64,
            to: Ino<F>, to_handle: Fh<F>, to_offset: u64, len: u64, flags: u64)
            -> io::Result<usize>;
    }

    pass! {
        [] fn destroy();
        [] fn readlink(ctx: Context, inode: Ino<F>) -> io::Result<Vec<u8>>;
        [] fn read<W: ZeroCopyWriter>(ctx: Context, inode: Ino<F>, handle: Fh<F>, to: W,
            size: u32, offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        [] fn flush(ctx: Context, inode: Ino<F>, handle: Fh<F>, lock_owner: u64)
            -> io::Result<()>;
        [] fn fsync(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
            -> io::Result<()>;
        [] fn statfs(ctx: Context, inode: Ino<F>) -> io::Result<libc::statvfs64>;
        [] fn getxattr(ctx: Context, inode: Ino<F>, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        [] fn listxattr(ctx: Context, inode: Ino<F>, size: u32) -> io::Result<ListxattrReply>;
        [] fn readdir(ctx: Context, inode: Ino<F>, handle: Fh<F>, size: u32, offset: u64)
            -> io::Result<F::DirIter>;
        [] fn fsyncdir(ctx: Context, inode: Ino<F>, data_only: bool, handle: Fh<F>)
            -> io::Result<()>;
        [] fn access(ctx: Context, inode: Ino<F>, mask: u32) -> io::Result<()>;
        [] fn lseek(ctx: Context, inode: Ino<F>, handle: Fh<F>, offset: u64, whence: u32)
            -> io::Result<u64>;
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
