//! The descriptors a process gets besides stdio: pipes and sockets whose other end
//! the host connects, and files.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use kuasar_runv_protocol::agent::Preserved as Wanted;
use kuasar_runv_protocol::agent::preserved::Kind;
use kuasar_runv_protocol::stream::{FIRST_PRESERVED, MAX_PRESERVED};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::{ContainerError, Result};
use crate::sys;

/// Flags of open(2) that a file keeps.
const KEPT: i32 = libc::O_APPEND | libc::O_SYNC | libc::O_DIRECT | libc::O_NOATIME;

/// The agent's end of one.
pub(super) enum Ours {
    /// What comes from the host goes here.
    Input(OwnedFd),
    /// What comes from here goes to the host.
    Output(OwnedFd),
    /// Both.
    Socket(OwnedFd),
}

/// A process's preserved descriptors.
pub(super) struct Preserved {
    theirs: Vec<OwnedFd>,
    ours: Vec<(u8, Ours)>,
}

impl Preserved {
    /// Makes and opens what is wanted.
    pub(super) async fn make(wanted: &[Wanted]) -> Result<Preserved> {
        let mut made = Preserved {
            theirs: Vec::with_capacity(wanted.len()),
            ours: Vec::new(),
        };
        if wanted.len() > usize::from(MAX_PRESERVED) {
            return Err(ContainerError::Invalid(format!(
                "{} preserved descriptors: at most {MAX_PRESERVED} are possible",
                wanted.len()
            )));
        }
        for (index, wanted) in (0..MAX_PRESERVED).zip(wanted) {
            made.add(index, wanted)
                .await
                .map_err(|source| ContainerError::Preserved {
                    number: FIRST_PRESERVED + i32::from(index),
                    source,
                })?;
        }
        Ok(made)
    }

    async fn add(&mut self, index: u8, wanted: &Wanted) -> io::Result<()> {
        let kind = wanted
            .kind
            .enum_value()
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let (ours, theirs) = match kind {
            Kind::INPUT => {
                let (read, write) = sys::pipe()?;
                (Some(Ours::Input(write)), read)
            }
            Kind::OUTPUT => {
                let (read, write) = sys::pipe()?;
                (Some(Ours::Output(read)), write)
            }
            Kind::SOCKET => {
                let flags = SockFlag::SOCK_CLOEXEC;
                let (mine, other) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
                (Some(Ours::Socket(mine)), other)
            }
            Kind::FILE => (None, open(wanted).await?),
        };
        self.theirs.push(theirs);
        self.ours.extend(ours.map(|ours| (index, ours)));
        Ok(())
    }

    pub(super) fn count(&self) -> u8 {
        // `make` has checked it.
        u8::try_from(self.theirs.len()).unwrap_or(MAX_PRESERVED)
    }

    /// The process's ends, in the order of their numbers.
    pub(super) fn theirs(&self) -> &[OwnedFd] {
        &self.theirs
    }

    /// Closes the process's ends, which it has now.
    pub(super) fn into_ours(self) -> Vec<(u8, Ours)> {
        self.ours
    }
}

/// Opens a file as the host has it open.
async fn open(wanted: &Wanted) -> io::Result<OwnedFd> {
    let flags = i32::try_from(wanted.flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    let access = flags & libc::O_ACCMODE;
    let mut options = File::options();
    options
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags((flags & KEPT) | libc::O_NOCTTY | libc::O_NOFOLLOW);
    let (path, offset) = (wanted.path.clone(), wanted.offset);
    // Not in this thread: for a file of the host, the host answers.
    tokio::task::spawn_blocking(move || {
        let mut file = options.open(path)?;
        if offset > 0 {
            file.seek(SeekFrom::Start(offset))?;
        }
        Ok(file.into())
    })
    .await?
}
