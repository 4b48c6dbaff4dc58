//! What programs do with files of volumes: locks, holes, direct I/O, and one file
//! seen in two places.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{Mapping, check, fact, open_new};

const PAGE: usize = 4096;

/// `argument` is two directories, separated by a blank, that are the same one.
pub fn one_in_two_places(argument: &str) {
    let (a, b) = argument.split_once(' ').expect("two directories");
    let (a, b) = (Path::new(a).join("shared"), Path::new(b).join("shared"));
    let _ = fs::remove_file(&a);
    fact("same file", same_file(&a, &b));
    fact("mapping", mapping_sees_write(&a, &b));
    fact("two mappings", two_mappings(&a, &b));
    fact("flock", flock_holds(&a, &b));
    fact("record lock", record_lock_holds(&a, &b));
}

fn same_file(a: &Path, b: &Path) -> io::Result<bool> {
    open_new(a)?.set_len(PAGE as u64)?;
    let (a, b) = (fs::metadata(a)?, fs::metadata(b)?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// What is written to the file in one place is in a mapping of it in the other.
fn mapping_sees_write(a: &Path, b: &Path) -> io::Result<bool> {
    let mut mapping = Mapping::new(&open(a)?, PAGE, libc::MAP_SHARED)?;
    let before = mapping.bytes()[0];
    open(b)?.write_all_at(b"w", 0)?;
    Ok(before == 0 && mapping.bytes()[0] == b'w')
}

fn two_mappings(a: &Path, b: &Path) -> io::Result<bool> {
    let mut first = Mapping::new(&open(a)?, PAGE, libc::MAP_SHARED)?;
    let mut second = Mapping::new(&open(b)?, PAGE, libc::MAP_SHARED)?;
    first.bytes()[100] = b'm';
    Ok(second.bytes()[100] == b'm')
}

/// Whether a lock in one place keeps the other from locking.
fn flock_holds(a: &Path, b: &Path) -> io::Result<bool> {
    let (a, b) = (open(a)?, open(b)?);
    // SAFETY: flock takes integers.
    check(unsafe { libc::flock(a.as_raw_fd(), libc::LOCK_EX) })?;
    // SAFETY: as above.
    Ok(unsafe { libc::flock(b.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0)
}

fn record_lock_holds(a: &Path, b: &Path) -> io::Result<bool> {
    let (a, b) = (open(a)?, open(b)?);
    set_record_lock(&a, libc::F_WRLCK)?;
    Ok(set_record_lock(&b, libc::F_RDLCK).is_err())
}

/// A lock of the open file (`F_OFD_SETLK`), which conflicts within a process.
fn set_record_lock(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: flock is plain integers, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_len = 10;
    // SAFETY: the lock outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// What programs that are particular about their files do in `dir`.
pub fn particular(dir: &Path) {
    fact("holes", holes(&dir.join("holes")));
    fact("punched", punched(&dir.join("punched")));
    fact("direct", direct(&dir.join("direct")));
    fact("copied", copied(dir));
    fact("replaced", replaced(dir));
    fact("space", space(dir));
    fact("notified", notified(dir));
}

/// Where the data of a file with a hole in front begins.
fn holes(path: &Path) -> io::Result<i64> {
    let file = open_new(path)?;
    file.write_all_at(b"data", 1 << 20)?;
    // SAFETY: lseek takes integers.
    Ok(unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) })
}

/// Whether a hole reads as zeroes and gives its space back.
fn punched(path: &Path) -> io::Result<bool> {
    let file = open_new(path)?;
    file.write_all_at(&[b'x'; 1 << 20], 0)?;
    file.sync_all()?;
    let before = file.metadata()?.blocks();
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes integers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, 1 << 19) })?;
    let mut first = [b'y'; 16];
    file.read_exact_at(&mut first, 0)?;
    let after = file.metadata()?;
    Ok(first == [0; 16] && after.blocks() < before && after.len() == 1 << 20)
}

#[repr(align(4096))]
struct Aligned([u8; PAGE]);

/// What is written past the page cache is read back past it.
fn direct(path: &Path) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true);
    let file = file.custom_flags(libc::O_DIRECT).open(path)?;
    let written = Aligned([b'd'; PAGE]);
    file.write_all_at(&written.0, 0)?;
    let mut read = Aligned([0; PAGE]);
    file.read_exact_at(&mut read.0, 0)?;
    Ok(read.0 == written.0 && fs::read(path)? == written.0)
}

fn copied(dir: &Path) -> io::Result<bool> {
    let (from, to) = (dir.join("copy-from"), dir.join("copy-to"));
    let expected = crate::data::bytes(9, 300_000);
    fs::write(&from, &expected)?;
    let (source, target) = (File::open(&from)?, open_new(&to)?);
    let mut left = expected.len();
    while left > 0 {
        let none = std::ptr::null_mut();
        let (source, target) = (source.as_raw_fd(), target.as_raw_fd());
        // SAFETY: without offsets the call takes integers.
        let done = unsafe { libc::copy_file_range(source, none, target, none, left, 0) };
        match usize::try_from(done) {
            Ok(0) => break,
            Ok(done) => left -= done,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(fs::read(&to)? == expected)
}

/// The way editors and package managers replace a file: readers see the old or the
/// new contents and never none.
fn replaced(dir: &Path) -> io::Result<bool> {
    let (file, new) = (dir.join("file"), dir.join("file.new"));
    fs::write(&file, "old")?;
    let reader = File::open(&file)?;
    fs::write(&new, "new")?;
    fs::rename(&new, &file)?;
    let mut old = [0; 3];
    reader.read_exact_at(&mut old, 0)?;
    Ok(&old == b"old" && fs::read(&file)? == b"new" && !new.exists())
}

/// Whether statfs(2) says something believable.
fn space(dir: &Path) -> io::Result<bool> {
    let path = super::c_path(dir);
    // SAFETY: statfs is plain integers, for which zero is valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a C string and a structure that outlive the call.
    check(unsafe { libc::statfs(path.as_ptr(), &raw mut found) })?;
    Ok(found.f_blocks > 0 && found.f_bavail <= found.f_blocks && found.f_bsize > 0)
}

/// Whether inotify(7) tells of a change by a process beside it.
fn notified(dir: &Path) -> io::Result<bool> {
    let path = super::c_path(dir);
    // SAFETY: takes flags.
    let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    check(fd.min(0))?;
    // SAFETY: a C string that outlives the call; the descriptor is open.
    check(unsafe { libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_CREATE) }.min(0))?;
    fs::write(dir.join("announced"), "")?;
    let until = Instant::now() + Duration::from_secs(5);
    let mut event = [0u8; 512];
    let heard = loop {
        // SAFETY: the buffer has the length given.
        let len = unsafe { libc::read(fd, event.as_mut_ptr().cast(), event.len()) };
        if len > 0 || Instant::now() > until {
            break len > 0;
        }
        thread::sleep(Duration::from_millis(10));
    };
    // SAFETY: opened above and used by nobody else.
    unsafe { libc::close(fd) };
    Ok(heard)
}

/// Uses three huge pages of 2 MiB, one after the other.
pub fn huge_pages(path: &Path) {
    const HUGE: usize = 2 << 20;
    let file = open_new(path).expect("a file of huge pages");
    file.set_len(3 * HUGE as u64).expect("its size");
    for (page, key) in ["first", "second", "third"].into_iter().enumerate() {
        // Mapping a page reserves it, so that touching it cannot fail.
        let mapped = Mapping::at(&file, page * HUGE, HUGE).map(|mut mapping| {
            mapping.bytes()[0] = 1;
            mapping.bytes()[HUGE - 1] = 1;
            true
        });
        fact(key, mapped);
    }
}

/// Locks a file in both ways until there is a file `end` beside it.
pub fn hold_locks(path: &Path) {
    let held = || -> io::Result<File> {
        let file = open_or_new(path)?;
        // SAFETY: flock takes integers.
        check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) })?;
        set_record_lock(&file, libc::F_WRLCK)?;
        Ok(file)
    };
    let file = held();
    fact(
        "held",
        file.as_ref()
            .map(|_| true)
            .map_err(|e| io::Error::from(e.kind())),
    );
    let end = Instant::now() + Duration::from_secs(60);
    while !path.with_file_name("end").exists() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
}

/// Tries both kinds of lock on a file that somebody else may hold, has them let go, and
/// waits for them.
pub fn want_locks(path: &Path) {
    let is_free = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|()| true),
    };
    let want = || -> io::Result<()> {
        let file = open_or_new(path)?;
        // SAFETY: flock takes integers.
        let tried = check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) });
        fact("flock", is_free(tried));
        fact("record", is_free(set_record_lock(&file, libc::F_WRLCK)));
        drop(file);
        fs::write(path.with_file_name("end"), "")?;
        let file = open_or_new(path)?;
        // SAFETY: as above.
        check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) })?;
        wait_for_record_lock(&file)
    };
    fact("waited", want().map(|()| true));
}

fn open_or_new(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn wait_for_record_lock(file: &File) -> io::Result<()> {
    // SAFETY: flock is plain integers, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the lock outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &raw const lock) })
}
