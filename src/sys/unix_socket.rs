//! Unix sockets whose path may be longer than a socket address can hold.
//!
//! `sockaddr_un` has room for 107 bytes of path (unix(7)), while a state
//! directory under a long `--root` with a 64-digit id needs more. A socket is
//! therefore always named relative to an open directory, through
//! `/proc/self/fd/<dir>/<name>`: the kernel resolves the link to the directory
//! itself, so the length of the directory's own path does not matter, and a
//! directory that has been replaced meanwhile cannot redirect the call.

use std::io::{self, Read};
use std::mem::{offset_of, size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};

/// How many connections may wait to be accepted; the kernel lowers it to
/// `net.core.somaxconn`.
const BACKLOG: libc::c_int = 4096;

/// How long [`connect`] waits for room in the listener's queue.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens a directory for [`bind`] and [`connect`].
///
/// # Errors
/// As open(2).
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

/// A path of `name` in `dir` that fits a socket address while `dir` is open.
#[must_use]
pub fn short_path(dir: &impl AsFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_fd().as_raw_fd()).into()
}

/// Creates the socket `name` in `dir`, mode 0600, and listens on it.
///
/// # Errors
/// `AddrInUse` when the name exists, `InvalidInput` when the name is empty, too
/// long or not a plain file name, and whatever bind(2) answers.
pub fn bind(dir: impl AsFd, name: &str) -> io::Result<UnixListener> {
    let address = Address::new(&dir, name)?;
    let socket = socket(0)?;
    // The mode of the file is that of the socket's inode at the time of bind(2).
    // SAFETY: the descriptor is open; the call touches no memory of ours.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    // SAFETY: the pointer and the length describe the address, which outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr(), address.len) })?;
    // SAFETY: the descriptor is open; the call touches no memory of ours.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(UnixListener::from(socket))
}

/// Connects to the socket `name` in `dir`; the stream is in blocking mode.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` when nobody listens, `WouldBlock` when the
/// listener accepted nobody for ten seconds, `InvalidInput` for a bad name.
pub fn connect(dir: impl AsFd, name: &str) -> io::Result<UnixStream> {
    connect_at(&Address::new(&dir, name)?)
}

fn connect_at(address: &Address) -> io::Result<UnixStream> {
    let stream = UnixStream::from(socket(0)?);
    // connect(2) on a unix socket only ever waits for room in the backlog, and
    // that wait is bounded by the send time-out.
    stream.set_write_timeout(Some(CONNECT_TIMEOUT))?;
    loop {
        match connect_once(&stream, address) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => {
                done?;
                break;
            }
        }
    }
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// Connects to a socket that was opened with `O_PATH`; the stream is in blocking mode.
///
/// # Errors
/// As [`connect`].
pub fn connect_to(socket_file: &impl AsFd) -> io::Result<UnixStream> {
    let path = format!("/proc/self/fd/{}", socket_file.as_fd().as_raw_fd());
    connect_at(&Address::of_path(Path::new(&path))?)
}

/// Connects to the socket `name` in `dir` without ever waiting; the stream is in
/// non-blocking mode.
///
/// # Errors
/// As [`connect`]; `WouldBlock` as soon as the listener's queue is full.
pub fn connect_nonblocking(dir: impl AsFd, name: &str) -> io::Result<UnixStream> {
    let address = Address::new(&dir, name)?;
    let socket = socket(libc::SOCK_NONBLOCK)?;
    connect_once(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

/// Whether a socket that was opened with `O_PATH` takes datagrams. Whoever listens on
/// another kind does not notice; one that nobody listens on does not say.
///
/// # Errors
/// As socket(2).
pub fn takes_datagrams(socket_file: &impl AsFd) -> io::Result<bool> {
    let path = format!("/proc/self/fd/{}", socket_file.as_fd().as_raw_fd());
    Ok(std::os::unix::net::UnixDatagram::unbound()?
        .connect(path)
        .is_ok())
}

fn connect_once(socket: &impl AsRawFd, address: &Address) -> io::Result<()> {
    // SAFETY: the pointer and the length describe the address, which outlives the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr(), address.len) })
}

fn socket(flags: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just created and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `/proc/self/fd/<dir>/<name>` as a socket address.
struct Address {
    raw: libc::sockaddr_un,
    len: libc::socklen_t,
}

impl Address {
    fn new(dir: &impl AsFd, name: &str) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(invalid("socket name is not a plain file name"));
        }
        Address::of_path(&short_path(dir, name))
    }

    fn of_path(path: &Path) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let path = path.as_os_str().as_encoded_bytes();
        // SAFETY: all-zero bytes are a valid sockaddr_un.
        let mut raw: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        // One byte stays for the terminating zero.
        if path.len() >= size_of_val(&raw.sun_path) {
            return Err(invalid("socket name is too long"));
        }
        raw.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in raw.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
        let len = offset_of!(libc::sockaddr_un, sun_path) + path.len() + 1;
        debug_assert!(len <= size_of::<libc::sockaddr_un>());
        Ok(Self {
            raw,
            len: len as libc::socklen_t,
        })
    }

    fn as_ptr(&self) -> *const libc::sockaddr {
        std::ptr::from_ref(&self.raw).cast()
    }
}

/// Fills `bytes`, however slowly they come, until `end`; the stream has no time-out then.
///
/// # Errors
/// `TimedOut`, `UnexpectedEof`, and as read(2).
pub fn read_until(mut stream: &UnixStream, bytes: &mut [u8], end: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => filled += got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // What an expired time-out is.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    stream.set_read_timeout(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    fn long_dir() -> (tempfile::TempDir, std::path::PathBuf, File) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&path).unwrap();
        let dir = File::open(&path).unwrap();
        (root, path, dir)
    }

    #[test]
    fn a_directory_longer_than_a_socket_address_works() {
        let (_root, path, dir) = long_dir();
        assert!(path.as_os_str().len() > 200);
        let listener = bind(&dir, "vsock.sock").unwrap();
        let mode = fs::metadata(path.join("vsock.sock")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);

        type Connect = fn(&File, &str) -> io::Result<UnixStream>;
        let both: [Connect; 2] = [|d, n| connect(d, n), |d, n| connect_nonblocking(d, n)];
        for connect in both {
            let mut client = connect(&dir, "vsock.sock").unwrap();
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(b"hello").unwrap();
            drop(client);
            let mut got = String::new();
            server.read_to_string(&mut got).unwrap();
            assert_eq!(got, "hello");
        }
    }

    #[test]
    fn a_missing_or_dead_listener_is_told_apart() {
        let (_root, _path, dir) = long_dir();
        let missing = connect(&dir, "nobody").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        drop(bind(&dir, "dead").unwrap());
        let dead = connect(&dir, "dead").unwrap_err();
        assert_eq!(dead.kind(), io::ErrorKind::ConnectionRefused);
        let taken = bind(&dir, "dead").unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_name_that_leaves_the_directory_is_refused() {
        let (_root, _path, dir) = long_dir();
        for name in ["", ".", "..", "a/b", "/a", "a\0b", &"n".repeat(100)] {
            let refused = bind(&dir, name).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }
}
