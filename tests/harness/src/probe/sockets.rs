//! What programs do with a socket that somebody outside of the container listens on.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use super::fact;

/// Connections at the same time.
const MANY: usize = 20;
/// More than all buffers on the way hold.
const LARGE: usize = 3 << 20;

/// The listener answers with who connected, a blank and all that it got.
pub fn connect(path: &Path) {
    fact("answer", ask(path, b"question"));
    let large: Vec<u8> = (0..LARGE).map(|n| (n % 251) as u8).collect();
    let echoed = ask_bytes(path, &large).map(|answer| answer.ends_with(&large));
    fact("large", echoed);
    let all: Vec<_> = (0..MANY)
        .map(|n| {
            let path = path.to_owned();
            thread::spawn(move || {
                let text = format!("number {n}");
                ask(&path, text.as_bytes()).is_ok_and(|answer| answer.ends_with(&text))
            })
        })
        .collect();
    let good = all.into_iter().filter_map(|thread| thread.join().ok());
    fact("many", Ok(good.filter(|good| *good).count()));
}

/// How often [`visit`] connects.
pub const VISITS: usize = 80;

/// Connects and goes, again and again, and then waits for the listener's end.
pub fn visit(path: &Path) {
    for _ in 0..VISITS {
        let mut visit = UnixStream::connect(path).expect("connection");
        visit.write_all(b"question").expect("question");
    }
    // It never answers; the container is to be there while the connections are handed on.
    let _ = UnixStream::connect(path).and_then(|mut last| last.read(&mut [0]));
}

fn ask(path: &Path, text: &[u8]) -> io::Result<String> {
    String::from_utf8(ask_bytes(path, text)?).map_err(io::Error::other)
}

fn ask_bytes(path: &Path, text: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(text)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Connects to a port of the host by the machine's own socket device and says
/// something: what comes back.
pub fn vsock(port: u32) {
    fact("back", vsock_back(port));
}

fn vsock_back(port: u32) -> io::Result<usize> {
    // SAFETY: plain integers; the descriptor is new.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    super::check(socket.min(0))?;
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: plain data, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    // SAFETY: the address is valid for its length.
    super::check(unsafe {
        libc::connect(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    })?;
    let mut stream = std::fs::File::from(socket);
    stream.write_all(&[7; 64])?;
    let mut back = Vec::new();
    match stream.read_to_end(&mut back) {
        Err(e) if e.kind() != io::ErrorKind::ConnectionReset => Err(e),
        _ => Ok(back.len()),
    }
}
