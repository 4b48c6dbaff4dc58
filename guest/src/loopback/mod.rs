//! The loopback interfaces of containers, as far as the host has to do with them: the
//! port of `kuasar_runv_protocol::loopback`.
//!
//! The host asks which ports are listened on ([`ports`]), connects to them
//! ([`connect`]), sends them datagrams ([`datagrams`]), and has an engine's name server that it has at an address of the
//! loopback network served here at the same address ([`resolver`]).

mod connect;
mod datagrams;
mod ports;
mod redirect;
mod resolver;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kuasar_runv_protocol::loopback::{Answer, Purpose, REQUEST_PREFIX_LEN, Request};
use nix::sched::{CloneFlags, setns};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{sleep, timeout};

use crate::cgroup;
use crate::containers::Containers;
use crate::streams::Connection;
use crate::sys;
use crate::transport::Listener;

/// Most connections of the host at the same time.
const MAX_CONNECTIONS: usize = 512;
/// How long one may take to say what it is for.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Wait after a failed accept: it fails for want of descriptors, not for good.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The service of the loopback port.
pub struct Loopback {
    containers: Arc<Containers>,
    /// Of all containers; made when it is first asked for.
    changes: OnceCell<ports::Changes>,
    room: Arc<Semaphore>,
}

impl Loopback {
    /// Serves the host for as long as the runtime lives.
    pub fn serve(listener: Listener, containers: Arc<Containers>) {
        let this = Arc::new(Loopback {
            containers,
            changes: OnceCell::new(),
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        });
        sys::spawn(async move {
            loop {
                match listener.accept().await.and_then(Connection::new) {
                    Ok(connection) => this.admit(connection),
                    Err(e) => {
                        log::warn!("accepting a connection for a loopback interface: {e}");
                        sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        });
    }

    fn admit(self: &Arc<Self>, connection: Connection) {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            log::warn!("too many connections to loopback interfaces, closing the newest");
            return;
        };
        let this = Arc::clone(self);
        sys::spawn(async move {
            if let Err(e) = this.attend(connection).await {
                log::debug!("a connection to a loopback interface: {e}");
            }
            drop(permit);
        });
    }

    async fn attend(&self, connection: Connection) -> io::Result<()> {
        let request = match timeout(REQUEST_DEADLINE, read_request(&connection)).await {
            Ok(request) => request?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        let namespace = match self.containers.network_namespace(&request.container_id) {
            Ok(namespace) => namespace,
            Err(e) => {
                answer(&connection, Answer::Refused).await?;
                return Err(io::Error::other(e.to_string()));
            }
        };
        match request.purpose {
            Purpose::Listeners => {
                let changes = self.changes.get_or_try_init(ports::Changes::watch).await;
                let changes = answer_failure(&connection, changes).await?;
                ports::tell(&connection, namespace, changes).await
            }
            Purpose::Connect(port) => connect::serve(connection, namespace, port).await,
            Purpose::Datagrams => {
                answer(&connection, Answer::Yes).await?;
                datagrams::serve(connection, namespace).await
            }
            Purpose::Resolve(address) => {
                let server = resolver::Server::bind(namespace, address).await;
                let server = answer_failure(&connection, server).await?;
                answer(&connection, Answer::Yes).await?;
                server.serve(connection).await
            }
        }
    }
}

async fn answer(connection: &Connection, answer: Answer) -> io::Result<()> {
    connection.write_all(&[answer as u8]).await
}

/// The result, after the host has been told of a failure.
async fn answer_failure<T>(connection: &Connection, result: io::Result<T>) -> io::Result<T> {
    if let Err(e) = &result {
        log::warn!("loopback interface: {e}");
        answer(connection, Answer::Failed).await?;
    }
    result
}

async fn read_request(connection: &Connection) -> io::Result<Request> {
    let malformed = |e| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut prefix = [0; REQUEST_PREFIX_LEN];
    connection.read_exact(&mut prefix).await?;
    let (purpose, len) = Request::decode_prefix(prefix).map_err(malformed)?;
    let mut id = vec![0; len];
    connection.read_exact(&mut id).await?;
    let container_id =
        String::from_utf8(id).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Request {
        purpose,
        container_id,
    })
}

/// Runs something in a network namespace, on a thread that ends with it. Sockets that
/// it makes stay there.
async fn in_namespace<T: Send + 'static>(
    namespace: OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("loopback".into())
        .spawn(move || {
            let entered = setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(Into::into);
            // Nobody waits any more when the connection has ended.
            let _ = sender.send(entered.and_then(|()| work()));
        })?;
    match receiver.await {
        Ok(result) => result,
        Err(_) => Err(io::Error::other("the thread panicked")),
    }
}

/// The cgroup of all containers.
fn root_cgroup() -> io::Result<File> {
    File::open(Path::new(cgroup::MOUNT_POINT))
}
