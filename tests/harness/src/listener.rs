//! A service of the host that containers connect to.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread;

/// Answers every connection, when the other side has said all, with who it is
/// (`uid:gid`), a blank and what it said. Ends with the test's process.
///
/// # Panics
/// When it cannot listen there.
pub fn echo(path: &Path) {
    let listener = UnixListener::bind(path).expect("listener");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
}

/// Takes every connection and never reads from it or closes it. What comes is the number
/// of connections so far.
///
/// # Panics
/// When it cannot listen there.
pub fn negligent(path: &Path) -> Receiver<usize> {
    let listener = UnixListener::bind(path).expect("listener");
    let (taken, number) = mpsc::channel();
    thread::spawn(move || {
        let mut streams = Vec::new();
        for stream in listener.incoming().flatten() {
            streams.push(stream);
            if taken.send(streams.len()).is_err() {
                break;
            }
        }
    });
    number
}

fn answer(mut stream: UnixStream) -> std::io::Result<()> {
    let mut said = Vec::new();
    let (uid, gid) = peer(&stream)?;
    stream.read_to_end(&mut said)?;
    stream.write_all(format!("{uid}:{gid} ").as_bytes())?;
    stream.write_all(&said)
}

fn peer(stream: &UnixStream) -> std::io::Result<(u32, u32)> {
    // SAFETY: plain data, for which zero is valid.
    let mut who: libc::ucred = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: SO_PEERCRED stores a ucred.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut len,
        )
    };
    if got < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((who.uid, who.gid))
}
