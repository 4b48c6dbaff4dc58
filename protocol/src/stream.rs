//! The stream port: stdio and control of one guest process.
//!
//! A stand-in opens one connection per stream of its process and names it with
//! a [`Header`]; after that stdin, stdout and stderr connections carry plain
//! bytes in one direction, and shutting down the writing side is the end of the
//! stream. With a terminal, `Stdin` carries the keyboard, `Stdout` the screen,
//! and there is no `Stderr`. A `Preserved` connection is another descriptor of the
//! process: a pipe in either direction, or a socket in both.
//!
//! The control connection carries [`Frame`]s: signals, window sizes and the
//! hang-up of the terminal towards the guest, the exit status back. When the host's end of it goes away before
//! the exit status was sent, the guest kills the process: a stand-in that is
//! SIGKILLed takes its process with it. When the guest's end goes away without
//! an exit status, the VM has died.
//!
//! Connections may arrive before or after the request that creates the process.
//!
//! Everything here is plain bytes without allocation beyond the ids, because the
//! stand-in has to stay small.

use std::fmt;

/// First bytes of every stream connection.
pub const MAGIC: [u8; 4] = *b"RVS1";
/// Longest container or exec id, in bytes. runc has no limit of its own; an id is
/// part of file names, which have 255, on both sides.
pub const MAX_ID_LEN: usize = 240;

/// Most descriptors that a process gets besides stdio.
pub const MAX_PRESERVED: u8 = 64;
/// The first of their numbers in the process.
pub const FIRST_PRESERVED: i32 = 3;

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Control,
    Stdin,
    Stdout,
    Stderr,
    /// The so many-th descriptor from [`FIRST_PRESERVED`] on, counted from 0, below
    /// [`MAX_PRESERVED`].
    Preserved(u8),
}

/// Set in the byte of a [`Kind::Preserved`].
const PRESERVED: u8 = 0x80;

impl Kind {
    fn to_byte(self) -> u8 {
        match self {
            Kind::Control => 0,
            Kind::Stdin => 1,
            Kind::Stdout => 2,
            Kind::Stderr => 3,
            Kind::Preserved(index) => PRESERVED | index,
        }
    }

    fn from_byte(byte: u8) -> Option<Kind> {
        match byte {
            0 => Some(Kind::Control),
            1 => Some(Kind::Stdin),
            2 => Some(Kind::Stdout),
            3 => Some(Kind::Stderr),
            _ if byte & PRESERVED != 0 && byte & !PRESERVED < MAX_PRESERVED => {
                Some(Kind::Preserved(byte & !PRESERVED))
            }
            _ => None,
        }
    }
}

/// Which stream of which process a connection is.
///
/// On the wire: [`MAGIC`], the kind, the length of each id (one byte each), the
/// container id, the exec id (empty for the container's own process).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub container_id: String,
    pub exec_id: String,
}

/// Bytes of a header before the ids.
pub const HEADER_PREFIX_LEN: usize = MAGIC.len() + 3;

/// Bytes that are not a header or not a frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed stream data: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

impl Header {
    /// # Errors
    /// An id that is longer than [`MAX_ID_LEN`].
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let len = |id: &str| match u8::try_from(id.len()) {
            Ok(len) if id.len() <= MAX_ID_LEN => Ok(len),
            _ => Err(Malformed("id too long")),
        };
        let mut wire = MAGIC.to_vec();
        wire.push(self.kind.to_byte());
        wire.push(len(&self.container_id)?);
        wire.push(len(&self.exec_id)?);
        wire.extend_from_slice(self.container_id.as_bytes());
        wire.extend_from_slice(self.exec_id.as_bytes());
        Ok(wire)
    }

    /// Kind and length of the ids that follow the prefix.
    ///
    /// # Errors
    /// Not a header of this protocol.
    pub fn decode_prefix(prefix: [u8; HEADER_PREFIX_LEN]) -> Result<(Kind, usize), Malformed> {
        let [m0, m1, m2, m3, kind, container, exec] = prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed("wrong magic"));
        }
        let kind = Kind::from_byte(kind).ok_or(Malformed("unknown stream kind"))?;
        if container == 0 {
            return Err(Malformed("empty container id"));
        }
        Ok((kind, usize::from(container) + usize::from(exec)))
    }

    /// The header made of a prefix and the ids that followed it.
    ///
    /// # Errors
    /// Not a header of this protocol, or ids of another length than it announces.
    pub fn decode(prefix: [u8; HEADER_PREFIX_LEN], ids: &[u8]) -> Result<Header, Malformed> {
        let (kind, len) = Self::decode_prefix(prefix)?;
        if ids.len() != len {
            return Err(Malformed("ids of another length than announced"));
        }
        let (container, exec) = ids.split_at(usize::from(prefix[5]));
        let text = |bytes: &[u8]| {
            std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| Malformed("id is not UTF-8"))
        };
        Ok(Header {
            kind,
            container_id: text(container)?,
            exec_id: text(exec)?,
        })
    }
}

/// A message on the control connection.
///
/// On the wire: type and payload length (one byte each), then the payload,
/// integers little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Host to guest: send this signal to the process.
    Signal(u32),
    /// Host to guest: the terminal has this size now.
    WindowSize { rows: u16, cols: u16 },
    /// Guest to host, the last frame: the process ended with this code.
    Exited(u32),
    /// Guest to host, the last frame: the process was ended by this signal.
    Killed(u32),
    /// Host to guest: nobody is at the terminal any more; hang it up.
    Hangup,
}

const SIGNAL: u8 = 1;
const WINDOW_SIZE: u8 = 2;
const EXITED: u8 = 3;
const KILLED: u8 = 4;
const HANGUP: u8 = 5;

/// An encoded [`Frame`].
#[derive(Clone, Copy)]
pub struct EncodedFrame {
    bytes: [u8; 6],
}

impl EncodedFrame {
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Frame {
    /// Every frame of this version has the same length.
    pub const LEN: usize = 6;

    #[must_use]
    pub fn encode(self) -> EncodedFrame {
        let (kind, payload) = match self {
            Frame::Signal(n) => (SIGNAL, n.to_le_bytes()),
            Frame::WindowSize { rows, cols } => {
                let ([r0, r1], [c0, c1]) = (rows.to_le_bytes(), cols.to_le_bytes());
                (WINDOW_SIZE, [r0, r1, c0, c1])
            }
            Frame::Exited(code) => (EXITED, code.to_le_bytes()),
            Frame::Killed(signal) => (KILLED, signal.to_le_bytes()),
            Frame::Hangup => (HANGUP, [0; 4]),
        };
        let [p0, p1, p2, p3] = payload;
        EncodedFrame {
            bytes: [kind, 4, p0, p1, p2, p3],
        }
    }

    /// # Errors
    /// Not a frame of this protocol.
    pub fn decode(bytes: [u8; Self::LEN]) -> Result<Frame, Malformed> {
        let [kind, len, p0, p1, p2, p3] = bytes;
        if len != 4 {
            return Err(Malformed("frame of unknown length"));
        }
        let value = u32::from_le_bytes([p0, p1, p2, p3]);
        match kind {
            SIGNAL => Ok(Frame::Signal(value)),
            WINDOW_SIZE => Ok(Frame::WindowSize {
                rows: u16::from_le_bytes([p0, p1]),
                cols: u16::from_le_bytes([p2, p3]),
            }),
            EXITED => Ok(Frame::Exited(value)),
            KILLED => Ok(Frame::Killed(value)),
            HANGUP => Ok(Frame::Hangup),
            _ => Err(Malformed("unknown frame")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(wire: &[u8]) -> ([u8; HEADER_PREFIX_LEN], &[u8]) {
        let (prefix, ids) = wire.split_at(HEADER_PREFIX_LEN);
        (prefix.try_into().unwrap(), ids)
    }

    #[test]
    fn a_header_survives_the_round_trip() {
        for (kind, exec) in [
            (Kind::Control, ""),
            (Kind::Stderr, "exec-1"),
            (Kind::Preserved(0), ""),
            (Kind::Preserved(MAX_PRESERVED - 1), "exec-1"),
        ] {
            let header = Header {
                kind,
                container_id: "c".repeat(MAX_ID_LEN),
                exec_id: exec.into(),
            };
            let wire = header.encode().unwrap();
            let (prefix, ids) = split(&wire);
            assert_eq!(Header::decode_prefix(prefix).unwrap(), (kind, ids.len()));
            assert_eq!(Header::decode(prefix, ids).unwrap(), header);
        }
    }

    #[test]
    fn what_is_not_a_header_is_refused() {
        let good = Header {
            kind: Kind::Stdin,
            container_id: "c1".into(),
            exec_id: String::new(),
        }
        .encode()
        .unwrap();
        let mut wrong_magic = good.clone();
        wrong_magic[0] = b'X';
        let mut unknown_kind = good.clone();
        unknown_kind[4] = 9;
        let mut too_many = good.clone();
        too_many[4] = PRESERVED | MAX_PRESERVED;
        let mut no_container = good.clone();
        no_container[5] = 0;
        for wire in [wrong_magic, unknown_kind, too_many, no_container] {
            assert!(Header::decode_prefix(split(&wire).0).is_err());
        }
        let (prefix, ids) = split(&good);
        assert!(Header::decode(prefix, &ids[1..]).is_err());
        assert!(Header::decode(prefix, &[0xff, 0xff]).is_err());
        assert!(
            Header {
                kind: Kind::Stdin,
                container_id: "c".repeat(MAX_ID_LEN + 1),
                exec_id: String::new()
            }
            .encode()
            .is_err()
        );
    }

    #[test]
    fn frames_survive_the_round_trip() {
        for frame in [
            Frame::Signal(15),
            Frame::WindowSize { rows: 24, cols: 80 },
            Frame::Exited(255),
            Frame::Killed(9),
            Frame::Hangup,
        ] {
            let wire: [u8; Frame::LEN] = frame.encode().as_bytes().try_into().unwrap();
            assert_eq!(Frame::decode(wire).unwrap(), frame);
        }
        assert!(Frame::decode([0, 4, 0, 0, 0, 0]).is_err());
        assert!(Frame::decode([1, 5, 0, 0, 0, 0]).is_err());
    }
}
