//! The guest agent, as the host's commands see it.
//!
//! Everything that comes back is from the guest and therefore bounded: each
//! call has a deadline, ttrpc limits the size of a message, and the text of an
//! error is cut and cleaned before it is shown.

#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
mod resources;
mod storage;
pub mod streams;
pub mod vsock;

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use kuasar_runv_protocol::agent::{
    CreateContainerRequest, DeleteContainerRequest, ExecProcessRequest, ListProcessesRequest,
    ListProcessesResponse, SignalProcessRequest, StartContainerRequest,
};
use kuasar_runv_protocol::agent_ttrpc::AgentClient as Stub;
use kuasar_runv_protocol::network::{self, ApplyRequest};
use kuasar_runv_protocol::network_ttrpc::NetworkClient;
use kuasar_runv_protocol::resources_ttrpc::ResourcesClient as ResourcesStub;
use kuasar_runv_protocol::storage_ttrpc::StorageClient;
use nix::fcntl::{FcntlArg, fcntl};
use ttrpc::Code;

/// Longest error text of the guest that is passed on, in characters.
const MAX_ERROR_TEXT: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent's own words for a request it could not carry out.
    #[error("{message}")]
    Refused { code: Code, message: String },
    #[error("the guest did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the connection to the guest broke: {0}")]
    Broken(String),
}

impl Error {
    /// Whether the agent said that there is no such container.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Refused { code, .. } if *code == Code::NOT_FOUND)
    }

    /// Whether the agent said that it has such a container already.
    #[must_use]
    pub fn is_already_there(&self) -> bool {
        matches!(self, Error::Refused { code, .. } if *code == Code::ALREADY_EXISTS)
    }

    /// Whether the agent said that the container is in the wrong state.
    #[must_use]
    pub fn is_wrong_state(&self) -> bool {
        matches!(self, Error::Refused { code, .. } if *code == Code::FAILED_PRECONDITION)
    }
}

/// A connection to the agent's task service.
pub struct Agent {
    stub: Stub,
    resources: ResourcesStub,
    network: NetworkClient,
    storage: StorageClient,
    deadline: Duration,
}

impl Agent {
    /// Uses a stream to the agent's port; each call may take `deadline`.
    ///
    /// # Errors
    /// [`Error::Broken`] when the client's threads cannot be started.
    pub fn new(stream: UnixStream, deadline: Duration) -> Result<Agent, Error> {
        let client = ttrpc::Client::new(out_of_the_way(stream).into_raw_fd())
            .map_err(|e| Error::Broken(e.to_string()))?;
        Ok(Agent {
            stub: Stub::new(client.clone()),
            network: NetworkClient::new(client.clone()),
            resources: ResourcesStub::new(client.clone()),
            storage: StorageClient::new(client),
            deadline,
        })
    }

    /// # Errors
    /// See [`Error`].
    pub fn create_container(&self, request: &CreateContainerRequest) -> Result<(), Error> {
        self.stub
            .create_container(self.context(), request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// # Errors
    /// See [`Error`].
    pub fn start_container(&self, id: &str) -> Result<(), Error> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .start_container(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Removes a container from the guest, with all its processes.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_container(&self, id: &str) -> Result<(), Error> {
        let request = DeleteContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .delete_container(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Signals the container's process, or all its processes.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn signal(&self, id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.stub
            .signal_process(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Starts another process in a container.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn exec_process(&self, request: &ExecProcessRequest) -> Result<(), Error> {
        self.stub
            .exec_process(self.context(), request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// The processes of a container, as many as are listed; not yet checked.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn list_processes(&self, id: &str) -> Result<ListProcessesResponse, Error> {
        let request = ListProcessesRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .list_processes(self.context(), &request)
            .map_err(|e| self.error(e))
    }

    /// Has the guest make the network of a container what the request says.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn apply_network(&self, request: &ApplyRequest) -> Result<(), Error> {
        self.network
            .apply(self.context(), request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// What the guest says it has counted for the container's interfaces. The size is
    /// bounded by that of a message, and nothing else.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn network_stats(&self, id: &str) -> Result<network::StatsResponse, Error> {
        let request = network::StatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.network
            .stats(self.context(), &request)
            .map_err(|e| self.error(e))
    }

    fn context(&self) -> ttrpc::context::Context {
        ttrpc::context::with_duration(self.deadline)
    }

    fn error(&self, error: ttrpc::Error) -> Error {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => {
                Error::Timeout(self.deadline)
            }
            ttrpc::Error::RpcStatus(status) => Error::Refused {
                code: status.code(),
                message: printable(status.message()),
            },
            other => Error::Broken(printable(&other.to_string())),
        }
    }
}

/// The descriptor under a number that is not given out again soon.
///
/// A client of ttrpc closes its descriptor while its two threads may still be about to
/// read or write, if the guest says more than it was asked or reads nothing. Whoever got
/// the number then would read the guest's words, or have his own read. The kernel gives out
/// the least that is free; those from here on are for these clients alone, in turn.
fn out_of_the_way(stream: UnixStream) -> OwnedFd {
    /// Half of the usual limit, which is 1024.
    const FIRST: u16 = 512;
    static TURN: AtomicU16 = AtomicU16::new(0);
    let number = FIRST + TURN.fetch_add(1, Ordering::Relaxed) % FIRST;
    match fcntl(stream.as_raw_fd(), FcntlArg::F_DUPFD_CLOEXEC(number.into())) {
        // SAFETY: the new descriptor is nobody else's.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        // A lower limit, or all in use.
        Err(_) => stream.into(),
    }
}

/// Text of the guest made fit for a terminal and a log line.
fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_ERROR_TEXT)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_clients_are_not_given_out_again() {
        let [first, second] = [(); 2].map(|()| {
            let (stream, _peer) = UnixStream::pair().unwrap();
            out_of_the_way(stream).as_raw_fd()
        });
        assert_ne!(first, second, "both are closed");
        let next = std::fs::File::open("/dev/null").unwrap();
        assert!(next.as_raw_fd() < first.min(second));
    }

    #[test]
    fn a_guests_error_text_is_bounded_and_has_no_control_characters() {
        assert_eq!(printable("a\x1b[31m\nb"), "a [31m b");
        assert_eq!(printable(&"x".repeat(1 << 20)).len(), MAX_ERROR_TEXT);
    }
}
