//! Namespaces libcontainer leaves incomplete.
//!
//! A new network namespace has its loopback interface down, where runc brings it
//! up. A new user namespace is made here and joined by path, so that it is
//! complete, with its mappings, before libcontainer starts.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use kuasar_runv_protocol::namespace::Kind;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use super::Failure;
use crate::sys;

/// Makes the user namespace that `linux` asks for and has libcontainer join it.
/// The descriptor keeps it until then.
pub fn make_user_namespace(linux: &mut Linux) -> Result<Option<OwnedFd>, Failure> {
    let new = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|ns| ns.typ() == LinuxNamespaceType::User && ns.path().is_none());
    if !new {
        return Ok(None);
    }
    let maps = [
        ("uid_map", mapping_lines(linux.uid_mappings().as_deref())),
        ("gid_map", mapping_lines(linux.gid_mappings().as_deref())),
    ];
    if maps.iter().any(|(_, lines)| lines.is_empty()) {
        return Err(Failure::invalid(
            "user namespaces enabled, but no uid or gid mappings found",
        ));
    }
    let namespace = new_user_namespace(&maps).map_err(Failure::io("making the user namespace"))?;
    // Every process that opens it is a clone of this one and has the descriptor.
    let path = PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd()));
    for ns in linux.namespaces_mut().iter_mut().flatten() {
        if ns.typ() == LinuxNamespaceType::User {
            ns.set_path(Some(path.clone()));
        }
    }
    Ok(Some(namespace))
}

/// The lines of a uid_map or gid_map.
fn mapping_lines(mappings: Option<&[LinuxIdMapping]>) -> String {
    mappings
        .unwrap_or_default()
        .iter()
        .map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size()))
        .collect()
}

/// Id in the guest of an id in the container.
pub fn map_id(mappings: Option<&[LinuxIdMapping]>, id: u32) -> u32 {
    let Some(mappings) = mappings.filter(|m| !m.is_empty()) else {
        return id;
    };
    mappings
        .iter()
        .find_map(|m| {
            let offset = id.checked_sub(m.container_id())?;
            (offset < m.size()).then(|| m.host_id().saturating_add(offset))
        })
        .unwrap_or(id)
}

/// A namespace needs a process to be made; this one lives only that long.
fn new_user_namespace(maps: &[(&str, String)]) -> io::Result<OwnedFd> {
    let (ready_read, ready_write) = sys::pipe()?;
    // SAFETY: helpers have one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ready_read);
            let made = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            drop(File::from(ready_write).write_all(&[u8::from(made)]));
            loop {
                // Until the parent has what it needs.
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => {
            drop(ready_write);
            let namespace = open_mapped_namespace(child, ready_read, maps);
            // It may be dead already; it is reaped either way.
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            namespace
        }
    }
}

fn open_mapped_namespace(
    child: Pid,
    ready: OwnedFd,
    maps: &[(&str, String)],
) -> io::Result<OwnedFd> {
    let mut made = [0];
    File::from(ready).read_exact(&mut made)?;
    if made != [1] {
        return Err(io::Error::other("unshare failed"));
    }
    for (file, lines) in maps {
        fs::write(format!("/proc/{child}/{file}"), lines)?;
    }
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}

/// Where a container's network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// In a namespace of its own.
    New,
    /// In the namespace of the machine.
    Machine,
    /// In that of another container, which is complete.
    Joined,
}

impl Network {
    /// Of a spec whose container joins these kinds of namespaces.
    pub fn of(linux: Option<&Linux>, joins: u8) -> Network {
        if joins & Kind::Network.bit() != 0 {
            return Network::Joined;
        }
        let namespace = linux
            .and_then(|l| l.namespaces().as_deref())
            .unwrap_or_default()
            .iter()
            .find(|ns| ns.typ() == LinuxNamespaceType::Network);
        match namespace {
            None => Network::Machine,
            Some(_) => Network::New,
        }
    }

    /// Brings up the loopback interface that the container's process `pid` will
    /// use. This process stays in the process's namespace.
    pub fn bring_up_loopback(self, pid: i32) -> Result<(), Failure> {
        let entered = match self {
            Network::Joined => return Ok(()),
            Network::Machine => Ok(()),
            Network::New => sys::pidfd_open(pid)
                .and_then(|process| Ok(setns(&process, CloneFlags::CLONE_NEWNET)?)),
        };
        entered
            .and_then(|()| loopback_up())
            .map_err(Failure::io("bringing up the loopback interface"))
    }
}

/// Brings `lo` up; the kernel gives it its addresses.
fn loopback_up() -> io::Result<()> {
    // SAFETY: plain integers.
    let socket = sys::check(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into(),
    )?;
    // SAFETY: just made for us; descriptors fit an int.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    let fd = socket.as_raw_fd();
    // SAFETY: the request names an interface and has room for its flags.
    sys::check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) }.into())?;
    // SAFETY: the call above stored the flags, which is the active union field.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as above.
    sys::check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) }.into())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxIdMappingBuilder;

    #[test]
    fn ids_are_mapped_by_range() {
        let map = LinuxIdMappingBuilder::default()
            .container_id(0u32)
            .host_id(1000u32)
            .size(10u32)
            .build()
            .unwrap();
        let maps = [map];
        assert_eq!(map_id(Some(&maps), 3), 1003);
        assert_eq!(map_id(Some(&maps), 10), 10);
        assert_eq!(map_id(None, 3), 3);
        assert_eq!(mapping_lines(Some(&maps)), "0 1000 10\n");
    }
}
