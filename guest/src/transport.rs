//! The sockets between the guest and the host: vsock in a machine, unix sockets
//! in tests.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use kuasar_runv_protocol::AGENT_PORT;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Connections waiting to be accepted: the streams of hundreds of processes come
/// at once.
const BACKLOG: i32 = 1024;

/// How ports are reached.
#[derive(Debug, Clone)]
pub enum Transport {
    Vsock,
    /// Each port is a socket of this directory, named by its number.
    Unix(PathBuf),
}

/// A socket address with its length.
struct Address {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
}

impl Transport {
    /// Address of the ttrpc server, as ttrpc writes it.
    #[must_use]
    pub fn ttrpc_address(&self) -> String {
        match self {
            Transport::Vsock => format!("vsock://-1:{AGENT_PORT}"),
            Transport::Unix(dir) => format!("unix://{}/{AGENT_PORT}", dir.display()),
        }
    }

    /// Listens on a port of the guest.
    ///
    /// # Errors
    /// Of the socket calls.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        let address = self.address(libc::VMADDR_CID_ANY, port)?;
        let socket = self.socket()?;
        // SAFETY: the address is valid for its length.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr(), address.len) };
        sys::check(bound.into())?;
        // SAFETY: plain integers.
        sys::check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) }.into())?;
        Ok(Listener(sys::on_runtime(socket, Interest::READABLE)?))
    }

    /// Connects to a port of the host.
    ///
    /// # Errors
    /// `ECONNRESET`, `ECONNREFUSED` or `ENOENT` while nobody listens.
    pub async fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let address = self.address(libc::VMADDR_CID_HOST, port)?;
        let socket = self.socket()?;
        // SAFETY: the address is valid for its length.
        let connected = sys::check(
            unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr(), address.len) }.into(),
        );
        match connected {
            Ok(_) => return Ok(socket),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(e) => return Err(e),
        }
        let socket = sys::on_runtime(socket, Interest::WRITABLE)?;
        drop(socket.writable().await?);
        let socket = socket.into_inner();
        match pending_error(&socket)? {
            0 => Ok(socket),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn socket(&self) -> io::Result<OwnedFd> {
        let domain = match self {
            Transport::Vsock => libc::AF_VSOCK,
            Transport::Unix(_) => libc::AF_UNIX,
        };
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain integers.
        let fd = sys::check(unsafe { libc::socket(domain, kind, 0) }.into())?;
        // SAFETY: just made for us; descriptors fit RawFd.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }

    fn address(&self, cid: u32, port: u32) -> io::Result<Address> {
        // SAFETY: plain data, for which zero is valid.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        let len = match self {
            Transport::Vsock => {
                // SAFETY: sockaddr_storage has room and alignment for any family.
                let vm = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_vm>() };
                vm.svm_family = libc::AF_VSOCK as libc::sa_family_t;
                vm.svm_cid = cid;
                vm.svm_port = port;
                size_of::<libc::sockaddr_vm>()
            }
            Transport::Unix(dir) => {
                // SAFETY: as above.
                let un = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_un>() };
                un.sun_family = libc::AF_UNIX as libc::sa_family_t;
                let path = dir.join(port.to_string());
                let path = path.as_os_str().as_encoded_bytes();
                if path.len() >= un.sun_path.len() {
                    return Err(io::ErrorKind::InvalidFilename.into());
                }
                for (to, from) in un.sun_path.iter_mut().zip(path) {
                    *to = *from as libc::c_char;
                }
                size_of::<libc::sockaddr_un>()
            }
        };
        Ok(Address {
            storage,
            len: len as libc::socklen_t,
        })
    }
}

impl Address {
    fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }
}

fn pending_error(socket: &OwnedFd) -> io::Result<i32> {
    let mut errno: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: SO_ERROR stores an int.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut errno).cast(),
            &raw mut len,
        )
    };
    sys::check(got.into())?;
    Ok(errno)
}

/// A listening socket.
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// The next connection, non-blocking.
    ///
    /// # Errors
    /// `EMFILE` and its like; the listener stays usable.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.0.readable().await?;
            // SAFETY: null for the peer's address, which is not asked for.
            let accepted = sys::check(
                unsafe {
                    libc::accept4(
                        self.0.as_raw_fd(),
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                    )
                }
                .into(),
            );
            match accepted {
                // SAFETY: just made for us; descriptors fit RawFd.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
                Err(e) if sys::would_block(&e) => ready.clear_ready(),
                Err(e) => return Err(e),
            }
        }
    }
}
