//! QEMU's control connection: the QEMU Machine Protocol, one JSON object per
//! line (docs/interop/qmp-spec of QEMU).
//!
//! The connection is one end of a socket pair that exists before QEMU does, so
//! the opening requests wait in it and nobody waits for QEMU: it answers when it
//! gets there. Answers carry the number of their request; events may come in
//! between at any time.
//!
//! A guest that took over QEMU also owns this connection. What comes in is
//! bounded, and nothing in it is trusted beyond the meaning of this VM's state.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::vm::process::wait_readable;

/// Longest line that is accepted, in bytes. The longest one this client asks
/// for, the greeting, has about 200.
const MAX_LINE: usize = 64 * 1024;
/// Most messages that may wait to be handled.
const MAX_QUEUED: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("closed")]
    Closed,
    #[error("a line longer than {MAX_LINE} bytes")]
    LineTooLong,
    #[error("more than {MAX_QUEUED} events at once")]
    TooManyEvents,
    #[error("not a message of the protocol: {0}")]
    Malformed(String),
    #[error("{command} failed: {description}")]
    Refused {
        command: &'static str,
        description: String,
    },
    #[error("no answer to {command} within {} s", deadline.as_secs())]
    TimedOut {
        command: &'static str,
        deadline: Duration,
    },
}

/// What QEMU says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    Greeting,
    Event {
        name: String,
        data: Value,
    },
    /// `Err` holds the description of the failure.
    Answer {
        id: u64,
        result: Result<Value, String>,
    },
}

/// Our end of the connection.
pub(super) struct Qmp {
    socket: UnixStream,
    /// Bytes that are not a whole line yet.
    partial: Vec<u8>,
    /// Messages that came while a command waited for its answer.
    queued: VecDeque<Message>,
    next_id: u64,
}

impl Qmp {
    /// A connection, and the end of it that QEMU gets. Negotiation is already
    /// requested; it comes before everything sent later.
    pub(super) fn new() -> io::Result<(Qmp, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut qmp = Qmp {
            socket: ours,
            partial: Vec::new(),
            queued: VecDeque::new(),
            next_id: 0,
        };
        qmp.send("qmp_capabilities", None)
            .map_err(io::Error::other)?;
        Ok((qmp, theirs))
    }

    /// Sends a command and returns its number; the answer comes as a message.
    pub(super) fn send(
        &mut self,
        command: &'static str,
        arguments: Option<Value>,
    ) -> Result<u64, QmpError> {
        self.send_with(command, arguments, None)
    }

    fn send_with(
        &mut self,
        command: &'static str,
        arguments: Option<Value>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<u64, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        // A few hundred bytes into a socket buffer of about 200 KiB: when that is
        // full, QEMU has not read for a long time and the error is in order.
        let line = format!("{request}\n");
        let mut line = line.as_bytes();
        if let Some(fd) = fd {
            let sent = send_fd(&self.socket, line, fd)?;
            line = &line[sent..];
        }
        self.socket.write_all(line)?;
        Ok(id)
    }

    /// The next message that is there, if any.
    pub(super) fn next(&mut self) -> Result<Option<Message>, QmpError> {
        match self.queued.pop_front() {
            Some(message) => Ok(Some(message)),
            None => self.receive(),
        }
    }

    /// Sends a command and waits for its answer. Other messages stay for
    /// [`Qmp::next`].
    pub(super) fn execute(
        &mut self,
        command: &'static str,
        arguments: Option<Value>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let ours = self.send(command, arguments)?;
        self.wait_for(ours, command, deadline)
    }

    /// Hands a copy of a descriptor to QEMU, which knows it by `name` until a
    /// command takes it, or `closefd`.
    pub(super) fn pass_fd(
        &mut self,
        name: &str,
        fd: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        let ours = self.send_with("getfd", Some(arguments), Some(fd))?;
        self.wait_for(ours, "getfd", deadline).map(drop)
    }

    /// Hands a copy of a descriptor to QEMU, which makes a set of it that can be
    /// opened as `/dev/fdset/N`; returns N.
    pub(super) fn add_fd(
        &mut self,
        fd: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<u64, QmpError> {
        let ours = self.send_with("add-fd", None, Some(fd))?;
        let answer = self.wait_for(ours, "add-fd", deadline)?;
        answer["fdset-id"]
            .as_u64()
            .ok_or_else(|| QmpError::Malformed("add-fd has no fdset-id".to_owned()))
    }

    fn wait_for(
        &mut self,
        ours: u64,
        command: &'static str,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let start = Instant::now();
        loop {
            match self.receive()? {
                Some(Message::Answer { id, result }) if id == ours => {
                    return result.map_err(|description| QmpError::Refused {
                        command,
                        description,
                    });
                }
                Some(_) if self.queued.len() >= MAX_QUEUED => return Err(QmpError::TooManyEvents),
                Some(message) => self.queued.push_back(message),
                None => {
                    let left = deadline.saturating_sub(start.elapsed());
                    if !wait_readable(self.socket.as_fd(), left)? {
                        return Err(QmpError::TimedOut { command, deadline });
                    }
                }
            }
        }
    }

    fn receive(&mut self) -> Result<Option<Message>, QmpError> {
        loop {
            if let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return parse(&line).map(Some);
            }
            if self.partial.len() > MAX_LINE {
                return Err(QmpError::LineTooLong);
            }
            let mut buffer = [0; 4096];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(n) => self.partial.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Err(QmpError::Closed),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends bytes with a descriptor; returns how many were taken, at least one.
fn send_fd(socket: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        // `space` has room for exactly this.
        return Err(ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

/// One line of the protocol.
fn parse(line: &[u8]) -> Result<Message, QmpError> {
    let malformed = |what: &str| QmpError::Malformed(what.to_owned());
    let mut message: Value =
        serde_json::from_slice(line).map_err(|e| QmpError::Malformed(e.to_string()))?;
    let id = message["id"].as_u64();
    let Some(object) = message.as_object_mut() else {
        return Err(malformed("no object"));
    };
    if object.contains_key("QMP") {
        return Ok(Message::Greeting);
    }
    if let Some(event) = object.get("event") {
        let name = event
            .as_str()
            .ok_or_else(|| malformed("event without a name"))?;
        return Ok(Message::Event {
            name: name.to_owned(),
            data: object.remove("data").unwrap_or_default(),
        });
    }
    let result = if let Some(value) = object.remove("return") {
        Ok(value)
    } else if let Some(error) = object.get("error") {
        Err(error["desc"]
            .as_str()
            .unwrap_or("no reason given")
            .to_owned())
    } else {
        return Err(malformed("neither answer nor event"));
    };
    let id = id.ok_or_else(|| match &result {
        // QEMU answers what it could not even parse without an id.
        Err(description) => malformed(description),
        Ok(_) => malformed("answer without an id"),
    })?;
    Ok(Message::Answer { id, result })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(200);

    fn connection() -> (Qmp, UnixStream) {
        Qmp::new().unwrap()
    }

    #[test]
    fn negotiation_is_requested_before_qemu_exists() {
        let (_qmp, mut qemu) = connection();
        let mut buffer = [0; 256];
        let n = qemu.read(&mut buffer).unwrap();
        let request: Value = serde_json::from_slice(&buffer[..n]).unwrap();
        assert_eq!(request, json!({ "execute": "qmp_capabilities", "id": 0 }));
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let (mut qmp, mut qemu) = connection();
        qemu.write_all(
            b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n\
              {\"return\": {}, \"id\": 0}\r\n\
              {\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n\
              {\"return\": {\"status\": \"paused\"}, \"id\": 1}\r\n",
        )
        .unwrap();
        let answer = qmp.execute("query-status", None, DEADLINE).unwrap();
        assert_eq!(answer["status"], "paused");
        assert_eq!(qmp.next().unwrap(), Some(Message::Greeting));
        assert!(matches!(
            qmp.next().unwrap(),
            Some(Message::Answer { id: 0, .. })
        ));
        let Some(Message::Event { name, data }) = qmp.next().unwrap() else {
            panic!("no event");
        };
        assert_eq!((name.as_str(), data), ("STOP", Value::Null));
        assert_eq!(qmp.next().unwrap(), None);
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let (mut qmp, mut qemu) = connection();
        qemu.write_all(b"{\"event\": \"RES").unwrap();
        assert_eq!(qmp.next().unwrap(), None);
        qemu.write_all(b"UME\"}\n\n").unwrap();
        assert!(matches!(qmp.next().unwrap(), Some(Message::Event { .. })));
        assert_eq!(qmp.next().unwrap(), None);
    }

    #[test]
    fn refusals_and_silence_are_different_errors() {
        let (mut qmp, mut qemu) = connection();
        qemu.write_all(
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 1}\n",
        )
        .unwrap();
        let refused = qmp.execute("cont", None, DEADLINE).unwrap_err();
        assert_eq!(refused.to_string(), "cont failed: no");
        let silent = qmp.execute("stop", None, DEADLINE).unwrap_err();
        assert!(matches!(
            silent,
            QmpError::TimedOut {
                command: "stop",
                ..
            }
        ));
        drop(qemu);
        assert!(matches!(qmp.next().unwrap_err(), QmpError::Closed));
    }

    #[test]
    fn junk_is_an_error() {
        for junk in [
            "{}",
            "[]",
            "nonsense",
            "{\"event\": 7}",
            "{\"return\": {}}",
            "{\"return\": {}, \"id\": \"x\"}",
            "{\"error\": {\"desc\": \"bad\"}}",
            "\u{0}",
        ] {
            assert!(
                matches!(parse(junk.as_bytes()), Err(QmpError::Malformed(_))),
                "{junk}"
            );
        }
        let deep = "[".repeat(10_000);
        assert!(matches!(
            parse(deep.as_bytes()),
            Err(QmpError::Malformed(_))
        ));
    }

    #[test]
    fn what_comes_in_is_bounded() {
        let (mut qmp, qemu) = connection();
        qemu.set_nonblocking(true).unwrap();
        let mut qemu = qemu;
        let chunk = [b'x'; 4096];
        let error = loop {
            while qemu.write(&chunk).is_ok() {}
            match qmp.next() {
                Ok(None) => {}
                Ok(Some(message)) => panic!("{message:?}"),
                Err(e) => break e,
            }
        };
        assert!(matches!(error, QmpError::LineTooLong));

        let (mut qmp, mut qemu) = connection();
        for _ in 0..=MAX_QUEUED {
            qemu.write_all(b"{\"event\": \"RESUME\"}\n").unwrap();
        }
        let error = qmp.execute("stop", None, DEADLINE).unwrap_err();
        assert!(matches!(error, QmpError::TooManyEvents));
    }
}
