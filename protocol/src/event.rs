//! Framing of the event connection: a `u32` little-endian length, then a
//! message of that length: an `Event` of the guest, a `FromHost` of the host.

use std::io::{self, Read, Write};

use protobuf::Message;

use crate::agent::Event;
use crate::resources::FromHost;

/// Largest `Event` either side accepts, in bytes. The guest is not trusted with
/// more of the host's memory.
pub const MAX_EVENT_LEN: usize = 64 * 1024;

/// Writes one event.
///
/// # Errors
/// The writer's, or `InvalidData` when the event is longer than
/// [`MAX_EVENT_LEN`].
pub fn write_event(out: &mut impl Write, event: &Event) -> io::Result<()> {
    out.write_all(&encode(event)?)
}

/// One event with its length prefix.
///
/// # Errors
/// `InvalidData` when the event is longer than [`MAX_EVENT_LEN`].
pub fn encode(event: &Event) -> io::Result<Vec<u8>> {
    frame(event, MAX_EVENT_LEN)
}

fn frame(message: &impl Message, limit: usize) -> io::Result<Vec<u8>> {
    let body = message
        .write_to_bytes()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    if body.len() > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message longer than its limit",
        ));
    }
    // The bound above is far below u32::MAX.
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Largest `FromHost`, in bytes: a container id and a few numbers.
pub const MAX_FROM_HOST_LEN: usize = 1024;

/// One message of the host with its length prefix.
///
/// # Errors
/// `InvalidData` when it is longer than [`MAX_FROM_HOST_LEN`].
pub fn encode_from_host(message: &FromHost) -> io::Result<Vec<u8>> {
    frame(message, MAX_FROM_HOST_LEN)
}

/// A message of the host, without its length prefix.
///
/// # Errors
/// `InvalidData` when it cannot be decoded.
pub fn decode_from_host(body: &[u8]) -> io::Result<FromHost> {
    FromHost::parse_from_bytes(body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Reads one event; `None` when the peer closed between two events.
///
/// # Errors
/// The reader's, `UnexpectedEof` in the middle of an event, `InvalidData` for
/// one that is too long or cannot be decoded.
pub fn read_event(input: &mut impl Read) -> io::Result<Option<Event>> {
    let mut len = [0u8; 4];
    let mut have = 0;
    while have < len.len() {
        match input.read(&mut len[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_EVENT_LEN {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("event of {len} bytes, at most {MAX_EVENT_LEN} are accepted"),
        ));
    }
    let mut body = vec![0; len];
    input.read_exact(&mut body)?;
    Event::parse_from_bytes(&body)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Ready;

    fn ready() -> Event {
        let mut event = Event::new();
        event.set_ready(Ready {
            protocol_version: 7,
            kernel_release: "6.12".into(),
            ..Ready::new()
        });
        event
    }

    #[test]
    fn an_event_survives_the_round_trip() {
        let mut wire = Vec::new();
        write_event(&mut wire, &ready()).unwrap();
        let mut wire = wire.as_slice();
        assert_eq!(read_event(&mut wire).unwrap(), Some(ready()));
        assert_eq!(read_event(&mut wire).unwrap(), None);
    }

    #[test]
    fn a_cut_event_is_an_error_and_not_an_end() {
        let wire = encode(&ready()).unwrap();
        for cut in 1..wire.len() {
            let err = read_event(&mut &wire[..cut]).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_it_is_allocated() {
        let wire = u32::MAX.to_le_bytes();
        let err = read_event(&mut wire.as_slice()).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::InvalidData);
    }
}
