//! The streams of one guest process, opened for its stand-in.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kuasar_runv_protocol::STREAM_PORT;
use kuasar_runv_protocol::stream::{Header, Kind};

use super::vsock;

/// Which streams a process has on the host. What is absent is `/dev/null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

impl Wanted {
    /// The kinds in the order in which the stand-in gets them: control first.
    pub fn kinds(self) -> impl Iterator<Item = Kind> {
        [
            (true, Kind::Control),
            (self.stdin, Kind::Stdin),
            (self.stdout, Kind::Stdout),
            (self.stderr, Kind::Stderr),
        ]
        .into_iter()
        .filter_map(|(wanted, kind)| wanted.then_some(kind))
    }
}

/// Opens the control stream and the wanted ones, all at once.
///
/// # Errors
/// When the guest refuses one or does not accept it in time.
pub fn open(
    dir: BorrowedFd<'_>,
    socket: &str,
    container_id: &str,
    exec_id: &str,
    wanted: Wanted,
    deadline: Duration,
) -> io::Result<Vec<OwnedFd>> {
    let mut dialing = Vec::new();
    for kind in wanted.kinds() {
        dialing.push((kind, vsock::start(dir, socket, STREAM_PORT)?));
    }
    let mut streams = Vec::new();
    for (kind, pending) in dialing {
        let mut stream = pending.finish(deadline)?;
        let header = Header {
            kind,
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        }
        .encode()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        stream.write_all(&header)?;
        streams.push(OwnedFd::from(stream));
    }
    Ok(streams)
}

/// Whether a descriptor leads anywhere: `/dev/null` needs no stream.
#[must_use]
pub fn leads_somewhere(fd: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd.as_fd()) else {
        return false;
    };
    let is_char = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device();
    // Memory devices have major 1, /dev/null is minor 3 (devices.txt of the kernel).
    !(is_char && stat.st_rdev == rustix::fs::makedev(1, 3))
}
