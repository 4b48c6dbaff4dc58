use super::*;

use std::cell::Cell;
use std::time::UNIX_EPOCH;

/// A file system that has every file one asks for.
#[derive(Default)]
struct Anything {
    next: Cell<u64>,
    mode: Cell<u32>,
    ctime: Cell<u64>,
    flags: Cell<u32>,
}

impl Anything {
    fn entry(&self) -> Entry {
        self.next.set(self.next.get() + 1);
        Entry {
            inode: 100 + self.next.get(),
            generation: 0,
            attr: fuse::Attr {
                mode: self.mode.get(),
                ctime: self.ctime.get(),
                flags: self.flags.get(),
                ..Default::default()
            },
            attr_timeout: Duration::MAX,
            entry_timeout: Duration::MAX,
        }
    }
}

impl FileSystem for Anything {
    type Inode = u64;
    type Handle = u64;
    type DirIter = NoEntries;

    fn lookup(&self, _: Context, _: u64, _: &CStr) -> io::Result<Entry> {
        Ok(self.entry())
    }

    fn open(&self, _: Context, _: u64, _: bool, _: u32) -> io::Result<Opened<Self>> {
        Ok((Some(1), OpenOptions::empty()))
    }

    fn getattr(&self, _: Context, _: u64, _: Option<u64>) -> io::Result<Stat> {
        Ok((self.entry().attr, Duration::MAX))
    }

    fn release(
        &self,
        _: Context,
        _: u64,
        _: u32,
        _: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }
}

struct NoEntries;

impl virtiofsd::filesystem::DirectoryIterator for NoEntries {
    fn next(&mut self) -> Option<virtiofsd::filesystem::DirEntry<'_>> {
        None
    }
}

const PARENT: u64 = 50;

fn guard() -> Guard<Anything> {
    Guard::new(Anything::default(), 100)
}

fn context() -> Context {
    Context::from(fuse::InHeader::default())
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

#[test]
fn only_plain_names_pass() {
    for name in [c"", c".", c"..", c"../x", c"/etc", c"a/b", c"a/"] {
        assert!(check(name).is_err(), "{name:?}");
    }
    for name in [c"a", c"...", c"..a", c" ", c"\xff\x01"] {
        assert!(check(name).is_ok(), "{name:?}");
    }
}

#[test]
fn every_method_that_takes_a_name_checks_it() {
    let (guard, ctx, bad) = (guard(), context(), c"../../etc/passwd");
    let none = Extensions::default;
    let results = [
        errno(guard.lookup(ctx, 1, bad)),
        errno(guard.symlink(ctx, c"anywhere", 1, bad, none())),
        errno(guard.mknod(ctx, 1, bad, 0, 0, 0, none())),
        errno(guard.mkdir(ctx, 1, bad, 0, 0, none())),
        errno(guard.unlink(ctx, 1, bad)),
        errno(guard.rmdir(ctx, 1, bad)),
        errno(guard.rename(ctx, 1, bad, 1, c"good", 0)),
        errno(guard.rename(ctx, 1, c"good", 1, bad, 0)),
        errno(guard.link(ctx, 1, 1, bad)),
        errno(guard.create(ctx, 1, bad, 0, false, 0, 0, none())),
    ];
    assert_eq!(results, [Some(libc::EINVAL); 10]);
    // Where a link points to is the guest's business: it is never followed here.
    assert_eq!(
        errno(guard.symlink(ctx, bad, 1, c"good", none())),
        Some(libc::ENOSYS)
    );
}

#[test]
fn a_settled_file_is_trusted_for_a_moment_and_a_changing_one_is_not() {
    let guard = guard();
    let entry = guard.lookup(context(), PARENT, c"f").unwrap();
    assert_eq!((entry.entry_timeout, entry.attr_timeout), (TRUST, TRUST));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    guard.inner.ctime.set(now.as_secs());
    let entry = guard.lookup(context(), PARENT, c"f").unwrap();
    assert_eq!(entry.attr_timeout, Duration::ZERO);
    assert_eq!(guard.getattr(context(), 1, None).unwrap().1, Duration::ZERO);
}

#[test]
fn mount_points_are_looked_up_every_time() {
    let guard = guard();
    guard.inner.mode.set(libc::S_IFDIR);
    let in_root = guard.lookup(context(), fuse::ROOT_ID, c"d").unwrap();
    assert_eq!(in_root.entry_timeout, Duration::ZERO);
    let deeper = guard.lookup(context(), PARENT, c"d").unwrap();
    assert_eq!(deeper.entry_timeout, TRUST);
    guard.inner.flags.set(fuse::ATTR_SUBMOUNT);
    let mounted = guard.lookup(context(), PARENT, c"d").unwrap();
    assert_eq!(mounted.entry_timeout, Duration::ZERO);
}

#[test]
fn a_crowd_of_files_is_forgotten_quickly() {
    let guard = guard();
    let mut entries = Vec::new();
    let lookup = || guard.lookup(context(), PARENT, c"f").unwrap();
    // The server may hold 100 descriptors; from 50 on there are many.
    for _ in 0..40 {
        entries.push(lookup());
        guard.open(context(), 1, false, 0).unwrap();
    }
    assert_eq!(entries[10].entry_timeout, TRUST);
    assert_eq!(entries[39].entry_timeout, Duration::ZERO);
    for _ in 0..40 {
        guard
            .release(context(), 1, 0, 1, false, false, None)
            .unwrap();
    }
    let forget = entries.iter().map(|entry| (entry.inode, 1)).collect();
    guard.batch_forget(context(), forget);
    assert_eq!(guard.known.len(), 0);
    assert_eq!(lookup().entry_timeout, TRUST);
}

#[test]
fn pages_of_an_unchanged_file_are_kept() {
    let guard = guard();
    let (inode, ctx) = (
        guard.lookup(context(), PARENT, c"f").unwrap().inode,
        context(),
    );
    let keeps = || {
        let (_, options) = guard.open(ctx, inode, false, 0).unwrap();
        options.contains(OpenOptions::KEEP_CACHE)
    };
    // The first open knows nothing about what the guest has cached.
    assert!(!keeps());
    assert!(keeps());
    guard.inner.ctime.set(1_000);
    assert!(!keeps());
    assert!(keeps());
    // What is forgotten is known no more.
    guard.forget(ctx, inode, 1);
    assert!(!keeps());
    assert!(!keeps());
}

#[test]
fn only_writers_ask_when_they_close() {
    let guard = guard();
    for (flags, asks) in [
        (libc::O_RDONLY, false),
        (libc::O_WRONLY, true),
        (libc::O_RDWR | libc::O_APPEND, true),
    ] {
        let (_, options) = guard.open(context(), 1, false, flags as u32).unwrap();
        assert_eq!(!options.contains(OpenOptions::NOFLUSH), asks);
    }
}
