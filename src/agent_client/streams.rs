//! The streams of one guest process, opened for its stand-in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kuasar_runv_protocol::STREAM_PORT;
use kuasar_runv_protocol::stream::{Header, Kind, MAX_PRESERVED};

// One bit of `Wanted::preserved` each.
const _: () = assert!(MAX_PRESERVED as u32 <= u64::BITS);

use super::vsock;

/// Which streams a process has on the host. What is absent is `/dev/null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// One bit per preserved descriptor.
    pub preserved: u64,
}

impl Wanted {
    /// With these preserved descriptors.
    #[must_use]
    pub fn with_preserved(self, indices: &[u8]) -> Wanted {
        let preserved = indices.iter().fold(0, |bits, index| bits | 1 << index);
        Wanted { preserved, ..self }
    }

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
        .chain(
            (0..MAX_PRESERVED)
                .filter(move |index| self.preserved & (1 << index) != 0)
                .map(Kind::Preserved),
        )
    }
}

/// Streams that have been asked for.
#[derive(Debug)]
pub struct Opening(Vec<vsock::Dialing>);

/// Asks for the control stream and the wanted ones, all at once.
///
/// # Errors
/// As connect(2), and for ids that are too long.
pub fn start(
    dir: BorrowedFd<'_>,
    socket: &str,
    container_id: &str,
    exec_id: &str,
    wanted: Wanted,
) -> io::Result<Opening> {
    let mut dialing = Vec::new();
    for kind in wanted.kinds() {
        let header = Header {
            kind,
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        }
        .encode()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let mut stream = vsock::start(dir, socket, STREAM_PORT)?;
        stream.say(&header)?;
        dialing.push(stream);
    }
    Ok(Opening(dialing))
}

impl Opening {
    /// Waits until they are open.
    ///
    /// # Errors
    /// When the guest refuses one or does not accept it in time.
    pub fn finish(self, deadline: Duration) -> io::Result<Vec<OwnedFd>> {
        let streams = self.0.into_iter();
        streams
            .map(|stream| stream.finish(deadline).map(OwnedFd::from))
            .collect()
    }
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
