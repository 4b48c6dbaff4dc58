//! The descriptors of the caller that a process gets besides stdio: `--preserve-fds`
//! and, as for a service that systemd starts, `LISTEN_FDS`.
//!
//! The process gets the same kind of thing at the same number. What leads to another
//! process is connected by its stand-in: a pipe in its direction, a socket in both. A
//! file is opened in the guest as it is open here. What cannot be made there is
//! refused.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kuasar_runv_protocol::GUEST_SHARE_DIR;
use kuasar_runv_protocol::agent::Preserved as Wanted;
use kuasar_runv_protocol::agent::preserved::Kind;
use kuasar_runv_protocol::stream::{FIRST_PRESERVED, MAX_PRESERVED};
use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, makedev, seek};
use rustix::net::{SocketType, getpeername, sockopt};
use serde_json::{Value, json};

use crate::sandbox::{self, Sandbox};
use crate::standin::Relayed;
use crate::sys::inherited;
use crate::sys::mount as mounts;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// runc's words.
    #[error(
        "unable to stat preserved-fd {index} (of {count}): stat /proc/self/fd/{number}: no such file or directory"
    )]
    Missing {
        index: usize,
        count: usize,
        number: i32,
    },
    #[error(
        "cannot preserve file descriptor {number}: {what} cannot be passed into a virtual machine"
    )]
    Unsupported { number: i32, what: &'static str },
    #[error(
        "cannot preserve {0} file descriptors: at most {MAX_PRESERVED} can be passed into a virtual machine"
    )]
    TooMany(usize),
    #[error("preserved file descriptor {number}: {source}")]
    Io { number: i32, source: io::Error },
    #[error("sharing preserved file descriptor {number}: {source}")]
    Share {
        number: i32,
        source: Box<sandbox::Error>,
    },
}

/// Character devices that are the same in every machine: minor numbers of the memory
/// devices (devices.txt of the kernel).
const DEVICES: [(u32, &str); 5] = [
    (3, "/dev/null"),
    (5, "/dev/zero"),
    (7, "/dev/full"),
    (8, "/dev/random"),
    (9, "/dev/urandom"),
];
const MEMORY_DEVICES: u32 = 1;

/// Flags of open(2) that are kept.
const KEPT: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC);

#[derive(Debug)]
enum What {
    /// The stand-in connects it.
    Relayed(Relayed),
    Device(&'static str),
    File {
        tree: OwnedFd,
        offset: u64,
    },
}

#[derive(Debug)]
struct Descriptor {
    fd: OwnedFd,
    flags: OFlags,
    what: What,
}

/// The preserved descriptors of one process.
#[derive(Debug, Default)]
pub struct Preserved {
    descriptors: Vec<Descriptor>,
    /// How many of them systemd has passed.
    listen: usize,
}

impl Preserved {
    /// Takes over the caller's: those that `LISTEN_FDS` announces if `may_listen`, and
    /// `count` more.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn take(count: u32, may_listen: bool) -> Result<Preserved, Error> {
        let listen = if may_listen { listen_fds() } else { 0 };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let all = listen.saturating_add(count);
        if all > usize::from(MAX_PRESERVED) {
            return Err(Error::TooMany(all));
        }
        let present = inherited::count();
        if present < all {
            let index = present.saturating_sub(listen);
            return Err(Error::Missing {
                index,
                count,
                number: FIRST_PRESERVED + i32::try_from(listen + index).unwrap_or(0),
            });
        }
        let descriptors = inherited::take(all)
            .into_iter()
            .zip(FIRST_PRESERVED..)
            .map(|(fd, number)| Descriptor::of(fd, number))
            .collect::<Result<_, _>>()?;
        Ok(Preserved {
            descriptors,
            listen,
        })
    }

    /// Tells the process, of a config.json, what systemd has passed (as runc).
    pub fn announce(&self, process: &mut Value) {
        if self.listen == 0 {
            return;
        }
        if !process["env"].is_array() {
            process["env"] = json!([]);
        }
        if let Some(env) = process["env"].as_array_mut() {
            env.push(json!(format!("LISTEN_FDS={}", self.listen)));
            env.push(json!("LISTEN_PID=1"));
        }
    }

    /// What the guest has to make. Files are in the shared directory of the container
    /// at names that start with `prefix`, see [`share`](Self::share).
    #[must_use]
    pub fn wanted(&self, container: &str, prefix: &str) -> Vec<Wanted> {
        let numbered = self.descriptors.iter().zip(FIRST_PRESERVED..);
        numbered
            .map(|(descriptor, number)| {
                let mut wanted = Wanted::new();
                let (kind, path) = match &descriptor.what {
                    What::Relayed(Relayed::Input) => (Kind::INPUT, String::new()),
                    What::Relayed(Relayed::Output) => (Kind::OUTPUT, String::new()),
                    What::Relayed(Relayed::Socket) => (Kind::SOCKET, String::new()),
                    What::Device(path) => (Kind::FILE, (*path).to_owned()),
                    What::File { offset, .. } => {
                        wanted.offset = *offset;
                        let name = name(prefix, number);
                        (Kind::FILE, format!("{GUEST_SHARE_DIR}/{container}/{name}"))
                    }
                };
                wanted.kind = kind.into();
                wanted.path = path;
                wanted.flags = descriptor.flags.bits();
                wanted
            })
            .collect()
    }

    /// Those that the stand-in connects: the place of each among all of them.
    #[must_use]
    pub fn relayed(&self) -> Vec<u8> {
        self.indexed().map(|(index, _, _)| index).collect()
    }

    /// What the stand-in has to know about them, and the descriptors, in the same
    /// order.
    pub fn relays(&self) -> impl Iterator<Item = (Relayed, BorrowedFd<'_>)> {
        self.indexed().map(|(_, kind, fd)| (kind, fd))
    }

    fn indexed(&self) -> impl Iterator<Item = (u8, Relayed, BorrowedFd<'_>)> {
        let indexed = (0..).zip(&self.descriptors);
        indexed.filter_map(|(index, descriptor)| match descriptor.what {
            What::Relayed(kind) => Some((index, kind, descriptor.fd.as_fd())),
            _ => None,
        })
    }

    /// Whether [`share`](Self::share) has anything to do.
    #[must_use]
    pub fn has_files(&self) -> bool {
        let is_file = |d: &Descriptor| matches!(d.what, What::File { .. });
        self.descriptors.iter().any(is_file)
    }

    /// Lets the guest reach the files until the value is dropped; once it has opened
    /// them, it can use them longer.
    ///
    /// # Errors
    /// [`Error::Share`].
    pub fn share<'a>(
        &self,
        sandbox: &'a Sandbox,
        container: &'a str,
        prefix: &str,
    ) -> Result<Shared<'a>, Error> {
        let mut shared = Shared {
            sandbox,
            container,
            names: Vec::new(),
        };
        for (descriptor, number) in self.descriptors.iter().zip(FIRST_PRESERVED..) {
            let What::File { tree, .. } = &descriptor.what else {
                continue;
            };
            let name = name(prefix, number);
            sandbox
                .share(container, &name, tree.as_fd())
                .map_err(|e| Error::Share {
                    number,
                    source: Box::new(e),
                })?;
            shared.names.push(name);
        }
        Ok(shared)
    }
}

fn name(prefix: &str, number: i32) -> String {
    format!("{prefix}fd-{number}")
}

/// Files in the shared directory, taken out of it when this is dropped.
pub struct Shared<'a> {
    sandbox: &'a Sandbox,
    container: &'a str,
    names: Vec<String>,
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(e) = self.sandbox.withdraw(self.container, name) {
                log::warn!("taking {name} out of the shared directory: {e}");
            }
        }
    }
}

impl Descriptor {
    fn of(fd: OwnedFd, number: i32) -> Result<Descriptor, Error> {
        let failed = |source: rustix::io::Errno| Error::Io {
            number,
            source: source.into(),
        };
        let unsupported = |what| Err(Error::Unsupported { number, what });
        let flags = fcntl_getfl(&fd).map_err(failed)?;
        if flags.contains(OFlags::PATH) {
            return unsupported("a descriptor that is only a path (O_PATH)");
        }
        let stat = fstat(&fd).map_err(failed)?;
        let what = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => match flags & OFlags::ACCMODE {
                OFlags::RDONLY => What::Relayed(Relayed::Input),
                OFlags::WRONLY => What::Relayed(Relayed::Output),
                _ => return unsupported("a pipe that is open in both directions"),
            },
            FileType::Socket => match refused_socket(fd.as_fd()).map_err(failed)? {
                Some(what) => return unsupported(what),
                None => What::Relayed(Relayed::Socket),
            },
            FileType::CharacterDevice => {
                let same =
                    |(minor, _): &&(u32, &str)| stat.st_rdev == makedev(MEMORY_DEVICES, *minor);
                match DEVICES.iter().find(same) {
                    Some((_, path)) => What::Device(path),
                    None if rustix::termios::isatty(&fd) => return unsupported("a terminal"),
                    None => return unsupported("a device of the host"),
                }
            }
            FileType::RegularFile if stat.st_nlink == 0 => {
                return unsupported("a file without a name (deleted, or of memfd_create)");
            }
            FileType::RegularFile => What::File {
                tree: match clone(fd.as_fd(), flags) {
                    Ok(tree) => tree,
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                        return unsupported("a file outside of the mounts of this process");
                    }
                    Err(source) => return Err(Error::Io { number, source }),
                },
                offset: seek(&fd, SeekFrom::Current(0)).map_err(failed)?,
            },
            FileType::Directory => return unsupported("a directory"),
            FileType::BlockDevice => return unsupported("a device of the host"),
            _ => return unsupported("something without a place in the file system"),
        };
        Ok(Descriptor {
            fd,
            flags: flags & KEPT,
            what,
        })
    }
}

/// A mount of the file alone, through which no more is possible than through `fd`.
fn clone(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let tree = mounts::clone_file(fd)?;
    if flags & OFlags::ACCMODE == OFlags::RDONLY {
        mounts::set_read_only(tree.as_fd(), false)?;
    }
    Ok(tree)
}

/// What kind of socket it is, if not a connected stream.
fn refused_socket(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<&'static str>> {
    Ok(match sockopt::socket_type(socket)? {
        SocketType::STREAM if sockopt::socket_acceptconn(socket)? => Some("a listening socket"),
        SocketType::STREAM => match getpeername(socket) {
            Ok(_) => None,
            Err(_) => Some("a socket that is not connected"),
        },
        SocketType::DGRAM => Some("a datagram socket"),
        _ => Some("a socket that is no stream"),
    })
}

/// How many descriptors the environment announces, if it means this process
/// (sd_listen_fds(3)).
fn listen_fds() -> usize {
    let number = |name: &str| env::var(name).ok()?.parse::<usize>().ok();
    match number("LISTEN_PID") {
        Some(pid) if u32::try_from(pid) == Ok(std::process::id()) => {
            number("LISTEN_FDS").unwrap_or(0)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Seek, Write};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn of(fd: impl Into<OwnedFd>) -> Result<What, String> {
        Descriptor::of(fd.into(), 7)
            .map(|descriptor| descriptor.what)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn what_leads_to_another_process_is_relayed_in_its_direction() {
        let (read, write) = io::pipe().unwrap();
        assert!(matches!(of(read), Ok(What::Relayed(Relayed::Input))));
        assert!(matches!(of(write), Ok(What::Relayed(Relayed::Output))));
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(of(a), Ok(What::Relayed(Relayed::Socket))));
    }

    #[test]
    fn devices_that_every_machine_has_are_opened_there() {
        for (_, path) in DEVICES {
            let Ok(What::Device(found)) = of(File::open(path).unwrap()) else {
                panic!("{path}");
            };
            assert_eq!(found, path);
        }
    }

    #[test]
    fn what_a_machine_cannot_have_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let pty = nix::pty::openpty(None, None).unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let unconnected =
            rustix::net::socket(rustix::net::AddressFamily::INET, SocketType::STREAM, None);
        let memfd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = rustix::fs::open("/", OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        let deleted = tempfile::tempfile().unwrap();
        let cases: [(OwnedFd, &str); 9] = [
            (listener.into(), "a listening socket"),
            (UnixDatagram::unbound().unwrap().into(), "a datagram socket"),
            (unconnected.unwrap(), "a socket that is not connected"),
            (pty.slave, "a terminal"),
            (File::open(dir.path()).unwrap().into(), "a directory"),
            (memfd, "a file without a name"),
            (deleted.into(), "a file without a name"),
            (path, "O_PATH"),
            (epoll.unwrap(), "without a place in the file system"),
        ];
        for (fd, what) in cases {
            let message = of(fd).unwrap_err();
            assert!(message.contains(what), "{message}");
            assert!(
                message.starts_with("cannot preserve file descriptor 7: "),
                "{message}"
            );
        }
    }

    #[test]
    fn a_file_keeps_its_position() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let mut file = named.as_file().try_clone().unwrap();
        file.write_all(b"0123456789").unwrap();
        file.seek(io::SeekFrom::Start(4)).unwrap();
        match of(file) {
            Ok(What::File { offset, .. }) => assert_eq!(offset, 4),
            // Without the right to mount there is no way to share it.
            Err(e) => assert!(e.contains("Operation not permitted"), "{e}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn systemds_descriptors_are_announced() {
        let mut process = json!({"env": ["A=1"]});
        Preserved::default().announce(&mut process);
        assert_eq!(process, json!({"env": ["A=1"]}));
        let preserved = Preserved {
            descriptors: Vec::new(),
            listen: 2,
        };
        preserved.announce(&mut process);
        let env = json!(["A=1", "LISTEN_FDS=2", "LISTEN_PID=1"]);
        assert_eq!(process["env"], env);
    }
}
