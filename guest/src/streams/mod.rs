//! The stream port: which connection belongs to which stream of which process.
//!
//! A stand-in may connect before or after the request that creates its process,
//! so both sides wait here: connections nobody has asked for yet, and streams
//! whose connection has not come yet. Both waits have a deadline and the number
//! of waiting connections a bound.

mod connection;
mod control;
mod relay;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::stream::{HEADER_PREFIX_LEN, Header, Kind};
use tokio::sync::oneshot;
use tokio::time::timeout;

pub use connection::Connection;
pub use control::serve as serve_control;
pub use relay::{
    OutputEnd, relay_input, relay_output, relay_socket, relay_terminal_input, relay_terminal_output,
};

use crate::sys;
use crate::transport::Listener;

/// How long a connection may take to say what it is.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection waits for its process, and a process for it: as long as
/// making the process may take.
const CLAIM_DEADLINE: Duration = Duration::from_secs(60);
/// Most connections that wait for a header or a process: four for each of two
/// hundred processes that are made at once.
const MAX_WAITING: usize = 800;
/// Wait after a failed accept: it fails for want of descriptors, not for good.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Names one stream of one process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamId {
    pub container_id: String,
    pub exec_id: String,
    pub kind: Kind,
}

enum Slot {
    /// A connection without a process; the number tells it from its successors.
    Arrived(Connection, u64),
    /// A process without a connection.
    Wanted(oneshot::Sender<Connection>),
}

/// Connections and processes that wait for each other.
#[derive(Default)]
pub struct Streams {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<StreamId, Slot>,
    /// Connections in `slots` and those whose header is being read.
    waiting: usize,
    sequence: u64,
}

impl Streams {
    /// Accepts connections for as long as the runtime lives.
    pub fn serve(listener: Listener) -> Arc<Streams> {
        let streams = Arc::new(Streams::default());
        let this = Arc::clone(&streams);
        sys::spawn(async move {
            loop {
                match listener.accept().await.and_then(Connection::new) {
                    Ok(connection) => this.admit(connection),
                    Err(e) => {
                        log::warn!("accepting a stream: {e}");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        });
        streams
    }

    /// The connection of a stream, or none if it does not come in time.
    pub async fn claim(&self, id: StreamId) -> Option<Connection> {
        let receiver = {
            let mut inner = self.lock();
            match inner.slots.remove(&id) {
                Some(Slot::Arrived(connection, _)) => {
                    inner.waiting -= 1;
                    return Some(connection);
                }
                Some(Slot::Wanted(_)) | None => {
                    let (sender, receiver) = oneshot::channel();
                    inner.slots.insert(id.clone(), Slot::Wanted(sender));
                    receiver
                }
            }
        };
        match timeout(CLAIM_DEADLINE, receiver).await {
            Ok(connection) => connection.ok(),
            Err(_) => {
                log::warn!("{:?} of {} was never connected", id.kind, id.container_id);
                let mut inner = self.lock();
                if let Some(Slot::Wanted(_)) = inner.slots.get(&id) {
                    inner.slots.remove(&id);
                }
                None
            }
        }
    }

    /// Drops what waits for a container that will not come, or is gone.
    pub fn forget(&self, container_id: &str) {
        self.drop_those(|id| id.container_id == container_id);
    }

    /// Drops what waits for a process that will not come.
    pub fn forget_exec(&self, container_id: &str, exec_id: &str) {
        self.drop_those(|id| id.container_id == container_id && id.exec_id == exec_id);
    }

    fn drop_those(&self, which: impl Fn(&StreamId) -> bool) {
        let mut inner = self.lock();
        let before = inner.arrived();
        inner.slots.retain(|id, _| !which(id));
        inner.waiting -= before - inner.arrived();
    }

    fn admit(self: &Arc<Self>, connection: Connection) {
        {
            let mut inner = self.lock();
            if inner.waiting >= MAX_WAITING {
                log::warn!("too many streams are waiting, closing the newest");
                return;
            }
            inner.waiting += 1;
        }
        let this = Arc::clone(self);
        sys::spawn(async move {
            let header = timeout(HEADER_DEADLINE, read_header(&connection)).await;
            match header {
                Ok(Ok(header)) => this.arrive(header, connection).await,
                Ok(Err(e)) => {
                    this.lock().waiting -= 1;
                    log::warn!("stream without a header: {e}");
                }
                Err(_) => {
                    this.lock().waiting -= 1;
                    log::warn!("stream without a header in time");
                }
            }
        });
    }

    async fn arrive(&self, header: Header, connection: Connection) {
        let id = StreamId {
            container_id: header.container_id,
            exec_id: header.exec_id,
            kind: header.kind,
        };
        let Some(number) = self.hand_over(&id, connection) else {
            return;
        };
        tokio::time::sleep(CLAIM_DEADLINE).await;
        let mut inner = self.lock();
        if matches!(inner.slots.get(&id), Some(Slot::Arrived(_, n)) if *n == number) {
            inner.slots.remove(&id);
            inner.waiting -= 1;
            log::warn!("{:?} of {} was never claimed", id.kind, id.container_id);
        }
    }

    /// Gives the connection to its process; or keeps it and returns its number.
    fn hand_over(&self, id: &StreamId, connection: Connection) -> Option<u64> {
        let mut inner = self.lock();
        match inner.slots.remove(id) {
            Some(Slot::Wanted(sender)) => {
                inner.waiting -= 1;
                // The process may have given up; then the connection closes.
                drop(sender.send(connection));
                None
            }
            arrived => {
                // One that waits already is of a command that was killed before it
                // asked for the process: the newest is that of the process.
                if let Some(Slot::Arrived(..)) = arrived {
                    log::warn!("second {:?} of {}", id.kind, id.container_id);
                    inner.waiting -= 1;
                }
                inner.sequence += 1;
                let number = inner.sequence;
                inner
                    .slots
                    .insert(id.clone(), Slot::Arrived(connection, number));
                Some(number)
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn arrived(&self) -> usize {
        self.slots
            .values()
            .filter(|slot| matches!(slot, Slot::Arrived(..)))
            .count()
    }
}

async fn read_header(connection: &Connection) -> io::Result<Header> {
    let malformed = |e| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut prefix = [0; HEADER_PREFIX_LEN];
    connection.read_exact(&mut prefix).await?;
    let (_, len) = Header::decode_prefix(prefix).map_err(malformed)?;
    let mut ids = vec![0; len];
    connection.read_exact(&mut ids).await?;
    Header::decode(prefix, &ids).map_err(malformed)
}

#[cfg(test)]
mod tests;
