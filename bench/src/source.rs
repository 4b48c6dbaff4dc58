//! The part that runs inside the guest: writes bytes to stdout or to a vsock
//! connection, as the lines on stdin say.

use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};

/// Environment variable that makes this binary the source.
pub const VARIABLE: &str = "KUASAR_RUNV_BENCH_SOURCE";
/// vsock port the source listens on.
pub const PORT: u32 = 4321;
/// What the source prints when it listens.
pub const READY: &str = "listening\n";

/// As much as a program that copies files writes at once.
const BLOCK: usize = 64 << 10;

pub fn is_wanted() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Reads `stdout <bytes>` or `vsock <bytes>` and writes that many, until the end of
/// its input.
pub fn main() {
    let listener = listen().expect("a vsock socket");
    let mut stdout = io::stdout();
    stdout.write_all(READY.as_bytes()).expect("stdout");
    stdout.flush().expect("stdout");
    for line in io::stdin().lines() {
        let line = line.expect("stdin");
        let (target, bytes) = line.split_once(' ').expect("a target and a number");
        let bytes: usize = bytes.parse().expect("a number");
        match target {
            "stdout" => write_bytes(&mut raw(dup(1)), bytes),
            "vsock" => write_bytes(&mut raw(accept(&listener).expect("a connection")), bytes),
            other => panic!("no target {other:?}"),
        }
    }
}

/// The same unbuffered writes for both.
fn raw(fd: OwnedFd) -> std::fs::File {
    fd.into()
}

fn dup(fd: i32) -> OwnedFd {
    // SAFETY: dup takes an integer; a descriptor it returns is new and owned here.
    unsafe {
        let fd = libc::dup(fd);
        assert!(fd >= 0, "dup: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

fn write_bytes(out: &mut impl Write, mut bytes: usize) {
    let block = [b'x'; BLOCK];
    while bytes > 0 {
        let len = bytes.min(BLOCK);
        out.write_all(&block[..len]).expect("the reader stays");
        bytes -= len;
    }
}

fn listen() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sockaddr_vm is a valid value of the C struct.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK.try_into().expect("a small constant");
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = PORT;
    let len = size_of::<libc::sockaddr_vm>()
        .try_into()
        .expect("a small struct");
    // SAFETY: `address` is a sockaddr_vm of the length given and outlives the calls;
    // a descriptor that socket returns is new and owned here.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        if libc::bind(fd, (&raw const address).cast(), len) < 0 || libc::listen(fd, 1) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let none = std::ptr::null_mut();
    // SAFETY: accept4 without an address; a descriptor it returns is new and owned here.
    unsafe {
        let fd = libc::accept4(listener.as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
