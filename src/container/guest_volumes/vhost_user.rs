//! Programs of the host that serve a disk, files or a network card over vhost-user: the command
//! connects, so that it is the caller's rights that count, and the hypervisor goes on
//! with the connection.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

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
/// MRG_RXBUF, which every card has that is worth it (5.1.3), and no disk.
const OF_CARDS: u64 = 1 << 15;

/// What a program is to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Disk,
    Files,
    Card,
}

impl Wanted {
    /// Why a program with these features does not serve it.
    fn misses(self, features: u64) -> Option<&'static str> {
        let is_card = features & OF_CARDS != 0;
        match self {
            Wanted::Disk if is_card => Some("the program there serves no disk: it is a card's"),
            Wanted::Files if is_card => Some("the program there serves no files: it is a card's"),
            Wanted::Files if features & NOT_OF_FILES != 0 => {
                Some("the program there serves no files: it is a disk's")
            }
            Wanted::Card if !is_card => Some("the program there serves no network card"),
            _ => None,
        }
    }
}

/// Connects to the program that listens at `path`, and has it show that it speaks
/// the protocol, and serves what is wanted: nobody waits for a program that is another after
/// this.
///
/// # Errors
/// [`Error::Volume`].
pub fn connect(path: &Path, wanted: Wanted) -> Result<OwnedFd, Error> {
    let socket = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(at(path))?;
    connect_to(&socket, wanted).map_err(at(path))
}

/// As [`connect`], to a socket that was opened with `O_PATH`.
///
/// # Errors
/// The program does not answer, or serves something else.
pub fn connect_to(socket: &File, wanted: Wanted) -> io::Result<OwnedFd> {
    connect_within(socket, wanted, ANSWERS)
}

fn connect_within(socket: &File, wanted: Wanted, deadline: Duration) -> io::Result<OwnedFd> {
    let mut stream = unix_socket::connect_to(socket)?;
    let end = Instant::now() + deadline;
    stream.set_write_timeout(Some(deadline))?;
    let header = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
    let mut answer = [0; 20];
    let asked = stream.write_all(&header(GET_FEATURES));
    let answered = asked.and_then(|()| unix_socket::read_until(&stream, &mut answer, end));
    answered.map_err(|e| {
        io::Error::other(match e.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => format!(
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
    if let Some(reason) = wanted.misses(u64::from_le_bytes(features)) {
        return Err(io::Error::other(reason));
    }
    stream.set_write_timeout(None)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What [`connect_within`] makes of a program that answers like this, and what it asks.
    fn with(answer: Option<&'static [u8]>, wanted: Wanted) -> (io::Result<OwnedFd>, Vec<u8>) {
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
        let connected = connect_within(&socket, wanted, Duration::from_millis(300));
        (connected, program.join().unwrap())
    }

    #[test]
    fn a_program_is_asked_what_it_is() {
        let features = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\0\0\x40\x01\0\0\0";
        let (connected, asked) = with(Some(features), Wanted::Disk);
        assert!(connected.is_ok());
        assert_eq!(asked, b"\x01\0\0\0\x01\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_disk_is_told_from_files() {
        let flush = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\x02\0\x40\x01\0\0\0";
        assert!(with(Some(flush), Wanted::Disk).0.is_ok());
        let message = with(Some(flush), Wanted::Files).0.unwrap_err().to_string();
        assert!(message.contains("serves no files"), "{message}");
        let files = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\0\0\x70\x01\0\0\0";
        assert!(with(Some(files), Wanted::Files).0.is_ok());
    }

    #[test]
    fn a_card_is_told_from_both() {
        let card = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\x83\xf9\0\x70\x01\0\0\0";
        assert!(with(Some(card), Wanted::Card).0.is_ok());
        for wanted in [Wanted::Disk, Wanted::Files] {
            let message = with(Some(card), wanted).0.unwrap_err().to_string();
            assert!(message.contains("it is a card's"), "{message}");
        }
        let flush = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\x02\0\x40\x01\0\0\0";
        let message = with(Some(flush), Wanted::Card).0.unwrap_err().to_string();
        assert!(message.contains("serves no network card"), "{message}");
    }

    #[test]
    fn a_program_that_trickles_has_no_more_time_than_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let slow = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let disk = b"\x01\0\0\0\x05\0\0\0\x08\0\0\0\0\x02\0\x40\x01\0\0\0";
            // Twenty bytes: two seconds, unless the other side is gone.
            disk.iter().all(|byte| {
                thread::sleep(Duration::from_millis(100));
                client.write_all(&[*byte]).is_ok()
            })
        });
        let socket = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&path)
            .unwrap();
        let connected = connect_within(&socket, Wanted::Disk, Duration::from_millis(300));
        let message = connected.unwrap_err().to_string();
        assert!(message.contains("does not answer within"), "{message}");
        assert!(!slow.join().unwrap(), "it was waited for");
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
            let message = with(answer, Wanted::Disk).0.unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hasty");
        let listener = UnixListener::bind(&path).unwrap();
        let hasty = thread::spawn(move || drop(listener.accept()));
        let message = connect(&path, Wanted::Disk).unwrap_err().to_string();
        assert!(message.contains("does not speak"), "{message}");
        hasty.join().unwrap();
        let path = dir.path().join("closed");
        drop(UnixListener::bind(&path).unwrap());
        assert!(connect(&path, Wanted::Disk).is_err());
        assert!(connect(&dir.path().join("none"), Wanted::Disk).is_err());
    }
}
