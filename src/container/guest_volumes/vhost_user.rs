//! Programs of the host that serve a disk or files over vhost-user: the command
//! connects, so that it is the caller's rights that count, and the hypervisor goes on
//! with the connection.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::super::guest_spec::Error;
use super::at;
use crate::sys::unix_socket;

/// How long a program may take to say what it is.
const ANSWERS: Duration = Duration::from_secs(10);

/// Header of GET_FEATURES: number of the request, version 1, no payload. The answer
/// has the same number, the flag of an answer, and 64 bits (QEMU's
/// docs/interop/vhost-user.rst, "Message structure").
const GET_FEATURES: [u32; 3] = [1, 1, 0];
const ANSWER: [u32; 3] = [1, 1 | 1 << 2, 8];

/// Features that a disk may have and a file server has not: those of the kind of device
/// (VIRTIO 1.2, 2.2) but the only one of file systems (5.11.3).
const NOT_OF_FILES: u64 = 0x00ff_fffe;

/// Connects to the program that listens at `path`, and has it show that it speaks
/// the protocol, and is no disk where `files` are wanted: nobody waits for a program that
/// is another after this.
///
/// # Errors
/// [`Error::Volume`].
pub fn connect(path: &Path, files: bool) -> Result<OwnedFd, Error> {
    let socket = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(at(path))?;
    connect_to(&socket, files, ANSWERS).map_err(at(path))
}

fn connect_to(socket: &File, files: bool, deadline: Duration) -> io::Result<OwnedFd> {
    let mut stream = unix_socket::connect_to(socket)?;
    // Both directions are in one message: this is the deadline of all.
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    let header = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
    let mut answer = [0; 20];
    let asked = stream.write_all(&header(GET_FEATURES));
    let answered = asked.and_then(|()| stream.read_exact(&mut answer));
    answered.map_err(|e| {
        io::Error::other(match e.kind() {
            io::ErrorKind::WouldBlock => format!(
                "the program there does not answer within {} s",
                deadline.as_secs()
            ),
            // It has closed the connection, before or after it was asked.
            _ => "the program there does not speak vhost-user, or serves another machine".into(),
        })
    })?;
    if answer[..12] != header(ANSWER)[..] {
        return Err(io::Error::other(
            "the program there does not speak vhost-user",
        ));
    }
    let mut features = [0; 8];
    features.copy_from_slice(&answer[12..]);
    if files && u64::from_le_bytes(features) & NOT_OF_FILES != 0 {
        return Err(io::Error::other(
            "the program there serves no files: it is a disk's",
        ));
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What [`connect_to`] makes of a program that answers like this, and what it asks.
    fn with(answer: Option<&'static [u8]>, files: bool) -> (io::Result<OwnedFd>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&path)
            .unwrap();
        let program = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut asked = vec![0; 12];
            client.read_exact(&mut asked).unwrap();
            match answer {
                Some(answer) => client.write_all(answer).unwrap(),
                // Until the other side gives up.
                None => drop(client.read(&mut [0])),
            }
            asked
        });
        let connected = connect_to(&socket, files, Duration::from_millis(300));
        (connected, program.join().unwrap())
    }

    #[test]
    fn a_program_is_asked_what_it_is() {
        let features = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\0\0\x40\x01\0\0\0";
        let (connected, asked) = with(Some(features), false);
        assert!(connected.is_ok());
        assert_eq!(asked, b"\x01\0\0\0\x01\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_disk_is_told_from_files() {
        let flush = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\x02\0\x40\x01\0\0\0";
        assert!(with(Some(flush), false).0.is_ok());
        let message = with(Some(flush), true).0.unwrap_err().to_string();
        assert!(message.contains("serves no files"), "{message}");
        let files = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\0\0\x70\x01\0\0\0";
        assert!(with(Some(files), true).0.is_ok());
    }

    #[test]
    fn whatever_else_listens_is_told_from_it() {
        for (answer, words) in [
            (
                Some(&b"220 mail.example.org ESMTP ready"[..]),
                "does not speak",
            ),
            (Some(&b""[..]), "does not speak"),
            (None, "does not answer within"),
        ] {
            let message = with(answer, false).0.unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hasty");
        let listener = UnixListener::bind(&path).unwrap();
        let hasty = thread::spawn(move || drop(listener.accept()));
        let message = connect(&path, false).unwrap_err().to_string();
        assert!(message.contains("does not speak"), "{message}");
        hasty.join().unwrap();
        let path = dir.path().join("closed");
        drop(UnixListener::bind(&path).unwrap());
        assert!(connect(&path, false).is_err());
        assert!(connect(&dir.path().join("none"), false).is_err());
    }
}
