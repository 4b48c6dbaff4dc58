//! Network namespaces of others: opened by path, checked, and cleaned of what a VM
//! that is gone has left.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use nix::sched::{CloneFlags, setns};

use super::model;
use super::snapshot::Snapshot;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the network namespace {path}: {source}")]
    Open { path: String, source: io::Error },
    #[error("{0} is not a network namespace")]
    WrongKind(String),
    #[error(
        "{0} is the host's network, which cannot be used from a virtual machine (for an engine: use a bridge network and publish ports instead of --net=host)"
    )]
    Host(String),
}

/// Opens the network namespace a container is to be in.
///
/// # Errors
/// See [`Error`]; the caller's own namespace is the host's.
pub fn open(path: &Path) -> Result<OwnedFd, Error> {
    let name = path.display().to_string();
    let failed = |source| Error::Open {
        path: name.clone(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if kind(file.as_fd()).map_err(failed)? != Some(libc::CLONE_NEWNET) {
        return Err(Error::WrongKind(name));
    }
    let own = File::open("/proc/self/ns/net").map_err(failed)?;
    if is_same(file.as_fd(), own.as_fd()).map_err(failed)? {
        return Err(Error::Host(name));
    }
    Ok(file.into())
}

/// Whether two descriptors are of the same namespace.
///
/// # Errors
/// As fstat(2).
pub fn is_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    let (a, b) = (rustix::fs::fstat(a)?, rustix::fs::fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// Runs something in a network namespace, on a thread of its own.
///
/// # Errors
/// As setns(2), and what the work returns.
pub fn run_in<T: Send + 'static>(
    namespace: OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let thread = std::thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

/// Removes what the VM of a sandbox, which is gone, has left in a namespace.
///
/// # Errors
/// The kernel's.
pub fn clean(namespace: OwnedFd, sandbox_id: &str) -> io::Result<()> {
    let owner = model::owner(sandbox_id);
    run_in(namespace, move || {
        let mut netlink = Rtnetlink::new()?;
        for link in Snapshot::take(&mut netlink)?.links {
            if !link.is_loopback {
                model::clean(&mut netlink, &link, &owner)?;
            }
        }
        Ok(())
    })
}

/// Which kind of namespace it is, as a `CLONE_NEW*` flag; `None` for other files.
fn kind(fd: BorrowedFd<'_>) -> io::Result<Option<libc::c_int>> {
    /// `NS_GET_NSTYPE` of ioctl_ns(2).
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) } {
        -1 => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
            e => Err(e),
        },
        kind => Ok(Some(kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_network_namespaces_will_do() {
        let error = |path: &str| open(Path::new(path)).unwrap_err().to_string();
        assert!(error("/proc/self/ns/net").contains("--net=host"));
        assert!(error("/proc/self/ns/mnt").contains("is not a network namespace"));
        assert!(error("/etc/passwd").contains("is not a network namespace"));
        assert!(error("/no/such/namespace").contains("/no/such/namespace"));
    }
}
