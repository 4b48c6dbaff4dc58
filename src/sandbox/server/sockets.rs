//! Sockets of the host that containers have been given.
//!
//! ```text
//!  process ── socket in the guest ── agent ── vsock ── device ── vsock.sock_1028
//!                                                                      │
//!                    the host's listener ── its socket ──── a thread ───┘
//! ```
//!
//! Every process of the guest can connect to the port. What it reaches there follows
//! from the token that it shows, which the agent alone has been told. It may say that it
//! is anybody whom the containers with that socket can be on the host, as a container
//! that shares the host's kernel could be.
//!
//! Each connection has a thread that does nothing but copy and has no capabilities. It
//! ends with the connection, and with the VM, which closes it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kuasar_runv_protocol::SOCKET_PORT;
use kuasar_runv_protocol::socket::{Hello, Token};
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::sandbox::VSOCK_SOCKET;
use crate::sandbox::control::Identities;
use crate::sandbox::relay::relay;
use crate::sys::capabilities::limit_to;
use crate::sys::unix_socket;

/// Most connections of a pod at the same time.
const MAX_CONNECTIONS: usize = 256;
/// How long a connection may take to say what it is.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Of the threads.
const STACK: usize = 128 * 1024;

/// A socket, and who may be said to connect to it.
struct HostSocket {
    socket: OwnedFd,
    identities: Identities,
}

type Offered = Arc<Mutex<HashMap<Token, Arc<HostSocket>>>>;

/// All that the pod's containers have been given.
pub(super) struct HostSockets {
    /// Where the device connects to.
    dir: OwnedFd,
    is_listening: bool,
    /// By their names as volumes.
    tokens: HashMap<String, Token>,
    offered: Offered,
}

impl HostSockets {
    pub(super) fn new(dir: OwnedFd) -> HostSockets {
        HostSockets {
            dir,
            is_listening: false,
            tokens: HashMap::new(),
            offered: Offered::default(),
        }
    }

    /// Offers a socket, unless that of this name is, and returns its token.
    ///
    /// # Errors
    /// Of making a socket or a thread.
    pub(super) fn offer(
        &mut self,
        name: &str,
        identities: Identities,
        socket: OwnedFd,
    ) -> io::Result<Token> {
        if let Some(token) = self.tokens.get(name) {
            return Ok(*token);
        }
        if !self.is_listening {
            let port = format!("{VSOCK_SOCKET}_{SOCKET_PORT}");
            let listener = unix_socket::bind(self.dir.as_fd(), &port)?;
            let offered = Arc::clone(&self.offered);
            start("sockets", move || accept(&listener, &offered))?;
            self.is_listening = true;
        }
        let mut token = Token::default();
        File::open("/dev/urandom")?.read_exact(&mut token)?;
        let socket = Arc::new(HostSocket { socket, identities });
        lock(&self.offered).insert(token, socket);
        self.tokens.insert(name.to_owned(), token);
        Ok(token)
    }

    /// Nobody uses it any more. Connections that are stay until they end.
    pub(super) fn withdraw(&mut self, name: &str) {
        if let Some(token) = self.tokens.remove(name) {
            lock(&self.offered).remove(&token);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = thread::Builder::new().name(name.into()).stack_size(STACK);
    builder.spawn(work).map(drop)
}

/// Takes part in the number of connections as long as it lives.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Place> {
        let before = taken.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(taken));
        (before < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(listener: &UnixListener, offered: &Offered) {
    let taken = Arc::default();
    loop {
        let guest = match listener.accept() {
            Ok((guest, _)) => guest,
            Err(e) => {
                log::warn!("a connection to a socket of the host: {e}");
                // EMFILE: some will end.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        // Dropped: the guest sees that the connection is closed.
        let Some(place) = Place::take(&taken) else {
            log::warn!("more than {MAX_CONNECTIONS} connections to sockets of the host");
            continue;
        };
        let offered = Arc::clone(offered);
        let started = start("socket", move || {
            if let Err(e) = serve(guest, &offered) {
                log::info!("a connection to a socket of the host: {e}");
            }
            drop(place);
        });
        if let Err(e) = started {
            log::warn!("a connection to a socket of the host: {e}");
        }
    }
}

fn serve(mut guest: UnixStream, offered: &Offered) -> io::Result<()> {
    guest.set_read_timeout(Some(HELLO_DEADLINE))?;
    let mut hello = [0; Hello::LEN];
    guest.read_exact(&mut hello)?;
    guest.set_read_timeout(None)?;
    let hello = Hello::decode(&hello);
    let known = lock(offered).get(&hello.token).cloned();
    let known = known.ok_or(io::ErrorKind::PermissionDenied)?;
    if !known.identities.allow(hello.uid, hello.gid) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    become_peer(hello.uid, hello.gid)?;
    let host = unix_socket::connect_to(&known.socket)?;
    limit_to(CapabilitySet::empty())?;
    relay(&guest, &host, None)
}

impl Identities {
    fn allow(&self, uid: u32, gid: u32) -> bool {
        let within = |ranges: &Option<Vec<(u32, u32)>>, id: u32| {
            let has =
                |(first, number): &(u32, u32)| id.checked_sub(*first).is_some_and(|n| n < *number);
            ranges.as_ref().is_none_or(|ranges| ranges.iter().any(has))
        };
        // No id at all (setresuid(2)).
        uid != u32::MAX && gid != u32::MAX && within(&self.uids, uid) && within(&self.gids, gid)
    }
}

/// Makes the calling thread, and no other, who the listener is to see. The guest's
/// kernel has judged whether it may connect, so the host's need not.
fn become_peer(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_keep_capabilities(true)?;
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::DAC_OVERRIDE,
            permitted: CapabilitySet::DAC_OVERRIDE,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}
