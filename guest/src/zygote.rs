//! The process that forks helpers, and the agent's end of it.
//!
//! ```text
//!  agent ──request+fds──▶ requests socket ◀── helper, forked by the zygote when
//!    ▲                                          │ the socket becomes readable
//!    └───────────── answer socket ◀─────────────┤ Started + pidfd, Created | Failed
//!                   closed by the agent ───────▶│ exits; the zygote goes on
//! ```
//!
//! One helper works at a time: that bounds the memory, and creating containers
//! is bound by the processor anyway. None is forked ahead of need: it would be
//! one more than a pod of one container uses.
//!
//! The helper stays until the agent has closed its end of the answer socket.
//! Until then it, and not the agent, is the parent of the container's first
//! process, so that the process cannot be reaped before the agent knows it.

pub(crate) mod request;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ForkResult;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::{helper, ipc, logging, sys};
pub use request::{CreateRequest, ExecRequest, Request};

/// How long a helper may take for one operation.
const OPERATION_DEADLINE: Duration = Duration::from_secs(60);
/// How long a request may wait for a free helper, those before it included.
const QUEUE_DEADLINE: Duration = Duration::from_secs(120);

/// What a helper answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The request was taken; a pidfd of the helper comes along.
    Started,
    /// The process is there: it waits for the start of its container, or for an
    /// exec its program has been started. With a terminal its master comes along.
    Created { pid: i32 },
    /// There is none; what is left of a container is the agent's to remove.
    Failed { kind: FailureKind, message: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The spec asks for something that cannot be done.
    InvalidSpec,
    /// Everything else.
    Internal,
}

const STARTED: u8 = 0;
const CREATED: u8 = 1;
const INVALID_SPEC: u8 = 2;
const FAILED: u8 = 3;

impl Answer {
    /// A byte for the variant, then its content.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Started => vec![STARTED],
            Answer::Created { pid } => [&[CREATED][..], &pid.to_le_bytes()].concat(),
            Answer::Failed { kind, message } => {
                let kind = match kind {
                    FailureKind::InvalidSpec => INVALID_SPEC,
                    FailureKind::Internal => FAILED,
                };
                [&[kind][..], message.as_bytes()].concat()
            }
        }
    }

    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Answer> {
        let (variant, content) = bytes.split_first()?;
        let kind = match *variant {
            STARTED => return Some(Answer::Started),
            CREATED => {
                let pid = i32::from_le_bytes(content.try_into().ok()?);
                return Some(Answer::Created { pid });
            }
            INVALID_SPEC => FailureKind::InvalidSpec,
            FAILED => FailureKind::Internal,
            _ => return None,
        };
        let message = String::from_utf8_lossy(content).into_owned();
        Some(Answer::Failed { kind, message })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    #[error("{message}")]
    Failed { kind: FailureKind, message: String },
    #[error("the helper process ended without an answer")]
    HelperDied,
    #[error("setting the process up took longer than {0:?}")]
    Deadline(Duration),
    #[error("talking to the helper: {0}")]
    Io(#[from] io::Error),
}

/// A process that was just made.
pub struct Created {
    pub pid: i32,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// Dropping this ends the helper, and makes the agent the process's parent.
    pub hold: AnswerSocket,
}

/// The agent's end of an answer socket.
pub struct AnswerSocket(AsyncFd<OwnedFd>);

/// The agent's end of the zygote.
pub struct Zygote {
    requests: OwnedFd,
    one_at_a_time: Mutex<()>,
}

impl Zygote {
    /// Forks the zygote.
    ///
    /// # Errors
    /// Of `socketpair` and `fork`.
    ///
    /// Must be called before any other thread exists.
    pub fn spawn() -> io::Result<Zygote> {
        let (ours, theirs) = ipc::pair()?;
        // SAFETY: there is one thread, as this function demands, so the child
        // may do everything its parent could.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { .. } => Ok(Zygote {
                requests: ours,
                one_at_a_time: Mutex::new(()),
            }),
            ForkResult::Child => {
                logging::disown_machine();
                drop(ours);
                let status = i32::from(run(&theirs).is_err());
                // SAFETY: ends this process without running the parent's
                // destructors a second time.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// Has a helper carry out a request, and hands it the descriptors that belong
    /// to it.
    ///
    /// # Errors
    /// See [`ZygoteError`].
    pub async fn submit(
        &self,
        request: &Request,
        with: &[BorrowedFd<'_>],
    ) -> Result<Created, ZygoteError> {
        let _turn = timeout(QUEUE_DEADLINE, self.one_at_a_time.lock())
            .await
            .map_err(|_| ZygoteError::Deadline(QUEUE_DEADLINE))?;
        let (ours, theirs) = ipc::pair()?;
        sys::set_nonblocking(&ours)?;
        let mut fds: Vec<RawFd> = vec![theirs.as_raw_fd()];
        fds.extend(with.iter().map(AsRawFd::as_raw_fd));
        ipc::send(&self.requests, &request.encode(), &fds)?;
        drop(theirs);
        let answers = AnswerSocket(sys::on_runtime(ours, Interest::READABLE)?);
        // Covers the fork of this helper as well, the previous one may have
        // ended only now.
        timeout(OPERATION_DEADLINE, answers.result())
            .await
            .unwrap_or(Err(ZygoteError::Deadline(OPERATION_DEADLINE)))
            .map(|(pid, terminal)| Created {
                pid,
                terminal,
                hold: answers,
            })
    }
}

impl AnswerSocket {
    async fn result(&self) -> Result<(i32, Option<OwnedFd>), ZygoteError> {
        let helper = match self.next().await? {
            Some((Answer::Started, fds)) => KillOnDrop::new(fds.into_iter().next())?,
            _ => return Err(ZygoteError::HelperDied),
        };
        let answer = tokio::select! {
            biased;
            answer = self.next() => answer?,
            // The container's process has a copy of the helper's end of the
            // socket, so the end of the helper is no end of file here.
            () = helper.ended() => self.try_next()?,
        };
        match answer {
            Some((Answer::Created { pid }, fds)) => {
                helper.release();
                Ok((pid, fds.into_iter().next()))
            }
            Some((Answer::Failed { kind, message }, _)) => {
                helper.release();
                Err(ZygoteError::Failed { kind, message })
            }
            Some((Answer::Started, _)) | None => Err(ZygoteError::HelperDied),
        }
    }

    async fn next(&self) -> io::Result<Option<(Answer, Vec<OwnedFd>)>> {
        loop {
            let mut ready = self.0.readable().await?;
            match receive_answer(self.0.get_ref()) {
                Err(e) if sys::would_block(&e) => ready.clear_ready(),
                result => return result,
            }
        }
    }

    fn try_next(&self) -> io::Result<Option<(Answer, Vec<OwnedFd>)>> {
        match receive_answer(self.0.get_ref()) {
            Err(e) if sys::would_block(&e) => Ok(None),
            result => result,
        }
    }
}

fn receive_answer(socket: &OwnedFd) -> io::Result<Option<(Answer, Vec<OwnedFd>)>> {
    let Some((bytes, fds)) = ipc::receive(socket)? else {
        return Ok(None);
    };
    match Answer::decode(&bytes) {
        Some(answer) => Ok(Some((answer, fds))),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A working helper; killed when its operation is given up.
struct KillOnDrop(Option<AsyncFd<OwnedFd>>);

impl KillOnDrop {
    fn new(pidfd: Option<OwnedFd>) -> Result<KillOnDrop, ZygoteError> {
        let pidfd = pidfd.ok_or(ZygoteError::HelperDied)?;
        Ok(KillOnDrop(Some(sys::on_runtime(
            pidfd,
            Interest::READABLE,
        )?)))
    }

    async fn ended(&self) {
        match &self.0 {
            // An error of the poll is as much a reason to stop waiting.
            Some(pidfd) => drop(pidfd.readable().await),
            None => std::future::pending().await,
        }
    }

    fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.0 {
            // It may have ended by itself.
            drop(sys::pidfd_send_signal(pidfd.get_ref(), libc::SIGKILL));
        }
    }
}

/// The zygote's life: one helper after the other until the agent is gone.
fn run(requests: &OwnedFd) -> io::Result<()> {
    helper::prepare_zygote()?;
    loop {
        wait_for(requests, PollFlags::POLLIN, PollTimeout::NONE)?;
        // SAFETY: the zygote never makes a thread.
        match unsafe { sys::clone_sibling() }? {
            sys::Cloned::Child => {
                let status = i32::from(helper::run(requests).is_err());
                // SAFETY: as in `spawn`.
                unsafe { libc::_exit(status) }
            }
            sys::Cloned::Parent(helper) => {
                // The helper's deadline is the agent's business, which kills it.
                wait_for(&helper, PollFlags::POLLIN, PollTimeout::NONE)?;
            }
        }
        if wait_for(requests, PollFlags::empty(), PollTimeout::ZERO)? {
            // Hung up: the agent is gone, and with it the machine.
            return Ok(());
        }
    }
}

/// Whether one of `events`, or a hang-up, came in time.
fn wait_for(fd: &OwnedFd, events: PollFlags, timeout: PollTimeout) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    loop {
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
            Ok(n) => return Ok(n > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_the_round_trip() {
        let failed = |kind| Answer::Failed {
            kind,
            message: "exec: \"x\"".into(),
        };
        for answer in [
            Answer::Started,
            Answer::Created { pid: 4711 },
            failed(FailureKind::InvalidSpec),
            failed(FailureKind::Internal),
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
        assert_eq!(Answer::decode(&[CREATED, 1]), None);
        assert_eq!(Answer::decode(&[9]), None);
    }
}
