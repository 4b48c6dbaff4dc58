//! What a shell cannot check, done inside the container by the test binary itself.
//!
//! The tests are static programs, so a copy of the running one works in a rootfs of
//! busybox links. Each test binary has an ignored test `probe::main` that calls
//! [`main`]; [`crate::Bundle::probe`] copies the binary into the rootfs and runs that
//! one test with the name of the check in the environment. A check prints facts
//! (`key=value`); the test on the host compares them.

pub mod sockets;
mod volumes;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;

/// Environment variable with the check and its argument, separated by a blank.
pub const VARIABLE: &str = "KRT_PROBE";

/// Runs the check the environment names; nothing without one.
///
/// # Panics
/// When the check cannot be done at all. What it finds is printed.
pub fn main() {
    let Ok(wanted) = std::env::var(VARIABLE) else {
        return;
    };
    // libtest leaves its line "test ... " open.
    println!();
    let (check, argument) = wanted.split_once(' ').unwrap_or((&wanted, ""));
    match check {
        "files" => files(Path::new(argument)),
        "access-list" => access_list(argument),
        "xattrs" => xattrs(Path::new(argument)),
        "memory" => memory(argument.parse().unwrap()),
        "system-calls" => system_calls(),
        "network" => network(),
        "echo" => crate::network::echo(),
        "ask-by-ipv6" => crate::network::ask_by_ipv6(argument.parse().unwrap()),
        "echo-datagrams" => crate::network::echo_datagrams(argument),
        "one-in-two-places" => volumes::one_in_two_places(argument),
        "huge-pages" => volumes::huge_pages(Path::new(argument)),
        "hold-locks" => volumes::hold_locks(Path::new(argument)),
        "want-locks" => volumes::want_locks(Path::new(argument)),
        "particular-files" => volumes::particular(Path::new(argument)),
        "socket" => sockets::connect(Path::new(argument)),
        "visits" => sockets::visit(Path::new(argument)),
        "vsock" => sockets::vsock(argument.parse().unwrap()),
        "shared-word" => shared_word(Path::new(argument)),
        other => panic!("no probe {other:?}"),
    }
}

fn fact(key: &str, outcome: io::Result<impl std::fmt::Display>) {
    match outcome {
        Ok(value) => println!("{key}={value}"),
        Err(e) => println!("{key}={e}"),
    }
}

/// Everything a program may do with files in `dir`.
fn files(dir: &Path) {
    fact("shared mapping", shared_mapping(&dir.join("mapped")));
    fact("private mapping", private_mapping(&dir.join("private")));
    fact("execute", execute(&dir.join("busybox")));
    fact("unix socket", unix_socket(&dir.join("socket")));
    fact("lock", lock(&dir.join("locked")));
    fact("fallocate", fallocate(&dir.join("allocated")));
    fact("append", append(&dir.join("appended")));
    fact(
        "open and unlinked",
        open_and_unlinked(&dir.join("unlinked")),
    );
    fact("unnamed", unnamed(dir));
    fact("sparse", sparse(&dir.join("sparse")));
    fact("rename exchange", rename_exchange(dir));
}

/// Two processes that map this file count to two and see each other do it.
fn shared_word(path: &Path) {
    use std::sync::atomic::{AtomicU32, Ordering};
    let both = || -> io::Result<bool> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len(4096)?;
        let mapping = Mapping::new(&file, 4096, libc::MAP_SHARED)?;
        // SAFETY: the mapping is large enough and aligned, and everybody who maps
        // the file uses it as an atomic.
        let word = unsafe { &*mapping.address.cast::<AtomicU32>() };
        word.fetch_add(1, Ordering::SeqCst);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while word.load(Ordering::SeqCst) < 2 && std::time::Instant::now() < end {
            thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(word.load(Ordering::SeqCst) == 2)
    };
    fact("both", both());
}

struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(file: &File, len: usize, flags: i32) -> io::Result<Mapping> {
        Mapping::map(file, 0, len, flags)
    }

    /// A shared mapping of a part of the file.
    fn at(file: &File, offset: usize, len: usize) -> io::Result<Mapping> {
        Mapping::map(file, offset, len, libc::MAP_SHARED)
    }

    fn map(file: &File, offset: usize, len: usize, flags: i32) -> io::Result<Mapping> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                flags,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { address, len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has `len` readable and writable bytes, lives as long
        // as `self`, and the file is this process's alone.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.len) }
    }

    fn sync(&self) -> io::Result<()> {
        // SAFETY: address and length are those of the mapping.
        check(unsafe { libc::msync(self.address, self.len, libc::MS_SYNC) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping, which nothing uses any more.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

fn check(rc: i32) -> io::Result<()> {
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn open_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
}

const MAPPED: usize = 256 * 1024;

/// Bytes stored through a shared mapping are read back through the file.
fn shared_mapping(path: &Path) -> io::Result<bool> {
    let file = open_new(path)?;
    file.set_len(MAPPED as u64)?;
    let expected = crate::data::bytes(7, MAPPED);
    let mut mapping = Mapping::new(&file, MAPPED, libc::MAP_SHARED)?;
    mapping.bytes().copy_from_slice(&expected);
    mapping.sync()?;
    Ok(fs::read(path)? == expected)
}

/// Bytes stored through a private mapping stay out of the file.
fn private_mapping(path: &Path) -> io::Result<bool> {
    let file = open_new(path)?;
    file.write_all_at(&[b'a'; 4096], 0)?;
    let mut mapping = Mapping::new(&file, 4096, libc::MAP_PRIVATE)?;
    mapping.bytes().fill(b'b');
    Ok(fs::read(path)? == [b'a'; 4096])
}

fn execute(path: &Path) -> io::Result<String> {
    fs::copy("/bin/busybox", path)?;
    let out = Command::new(path).args(["echo", "ran"]).output()?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn unix_socket(path: &Path) -> io::Result<String> {
    let listener = UnixListener::bind(path)?;
    let server = thread::spawn(move || -> io::Result<()> {
        let (mut peer, _) = listener.accept()?;
        let mut word = [0; 4];
        peer.read_exact(&mut word)?;
        word.reverse();
        peer.write_all(&word)
    });
    let mut client = UnixStream::connect(path)?;
    client.write_all(b"abcd")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    server.join().unwrap()?;
    Ok(answer)
}

fn lock(path: &Path) -> io::Result<bool> {
    let (first, second) = (open_new(path)?, File::open(path)?);
    // SAFETY: flock takes integers.
    check(unsafe { libc::flock(first.as_raw_fd(), libc::LOCK_EX) })?;
    // SAFETY: as above.
    let refused = unsafe { libc::flock(second.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    Ok(refused != 0)
}

fn fallocate(path: &Path) -> io::Result<u64> {
    let file = open_new(path)?;
    // SAFETY: posix_fallocate takes integers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 1 << 20) })?;
    Ok(file.metadata()?.len())
}

fn append(path: &Path) -> io::Result<String> {
    for word in ["one ", "two ", "three"] {
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        file.write_all(word.as_bytes())?;
    }
    fs::read_to_string(path)
}

fn open_and_unlinked(path: &Path) -> io::Result<String> {
    let file = open_new(path)?;
    file.write_all_at(b"still here", 0)?;
    fs::remove_file(path)?;
    let mut text = [0; 10];
    file.read_exact_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn unnamed(dir: &Path) -> io::Result<u64> {
    let mut file = OpenOptions::new();
    let file = file
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(dir)?;
    file.write_all_at(b"data", 0)?;
    Ok(file.metadata()?.len())
}

/// A file of 1 GiB that occupies next to nothing.
fn sparse(path: &Path) -> io::Result<bool> {
    let file = open_new(path)?;
    file.write_all_at(b"end", (1 << 30) - 3)?;
    let data = file.metadata()?;
    Ok(data.len() == 1 << 30 && data.blocks() < 64)
}

fn rename_exchange(dir: &Path) -> io::Result<String> {
    let (a, b) = (dir.join("exchange-a"), dir.join("exchange-b"));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    let (from, to) = (c_path(&a), c_path(&b));
    // SAFETY: both are C strings that outlive the call.
    check(unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    })?;
    Ok(fs::read_to_string(&a)? + &fs::read_to_string(&b)?)
}

fn c_path(path: &Path) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Sets, reads, lists and removes an extended attribute, and reads the one the host
/// has put on `from-host`.
fn xattrs(dir: &Path) {
    let own = dir.join("own");
    fs::write(&own, "").unwrap();
    fact("set", set_xattr(&own, "user.guest", b"from guest"));
    fact("get", get_xattr(&own, "user.guest"));
    fact("from host", get_xattr(&dir.join("from-host"), "user.host"));
    fact("missing", get_xattr(&own, "user.missing"));
}

/// # Errors
/// As setxattr(2).
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<&'static str> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    // SAFETY: the strings are C strings and the value has the length given.
    let rc = unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    check(rc).map(|()| "ok")
}

/// Sets an access list, given in hexadecimal behind the file's name, and reads it.
fn access_list(argument: &str) {
    const NAME: &str = "system.posix_acl_access";
    let (path, hex) = argument.split_once(' ').expect("a file and a list");
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
    let list: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
    let path = Path::new(path);
    fact("set", set_xattr(path, NAME, &list));
    let got = get_xattr_bytes(path, NAME);
    let text = |bytes: Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    fact("get", got.map(text));
}

/// # Errors
/// As getxattr(2).
pub fn get_xattr(path: &Path, name: &str) -> io::Result<String> {
    get_xattr_bytes(path, name).map(|value| String::from_utf8_lossy(&value).into_owned())
}

/// # Errors
/// As getxattr(2).
pub fn get_xattr_bytes(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    let mut value = [0u8; 256];
    // SAFETY: the strings are C strings and the buffer has the length given.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    match usize::try_from(len) {
        Ok(len) => Ok(value[..len].to_vec()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Touches `megabytes` of memory, one at a time.
fn memory(megabytes: usize) {
    let mut held = Vec::new();
    for n in 1..=megabytes {
        let mut block = vec![0u8; 1 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        held.push(block);
        println!("touched={n}");
    }
    println!("all={}", held.len());
}

/// System calls a seccomp filter in the tests treats specially.
fn system_calls() {
    let outcome = |key, rc: libc::c_long| {
        let error = io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or_default();
        println!("{key}={}", if rc < 0 { error } else { 0 });
    };
    // SAFETY: system calls that take integers or nothing.
    unsafe {
        outcome("getppid", libc::syscall(libc::SYS_getppid));
        outcome("sched_yield", libc::syscall(libc::SYS_sched_yield));
        outcome("getpriority 0", libc::syscall(libc::SYS_getpriority, 0, 0));
        outcome("getpriority 2", libc::syscall(libc::SYS_getpriority, 2, 0));
    }
}

/// The loopback interface works.
fn network() {
    let outcome = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| {
        std::net::TcpStream::connect(listener.local_addr()?)?;
        Ok("ok")
    });
    fact("loopback", outcome);
}
