//! The agent's event connection for [`crate::fuzzing`].

use std::io::Write;
use std::os::unix::net::UnixStream;

use kuasar_runv_protocol::event::{MAX_EVENT_LEN, encode_from_host};

use super::agent::AgentEvents;
use super::clock;
use crate::fuzzing::Input;

/// What one read takes.
const CHUNK: usize = 4096;

/// A guest says anything in pieces of any length.
pub fn events(input: &mut Input<'_>) {
    let (ours, mut guest) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a socket");
    let mut agent = AgentEvents::new(ours);
    while !input.is_empty() {
        let how = input.byte();
        let body = input.bytes(usize::from(how & 0x7f));
        // With its length in front, or as it comes.
        if how & 0x80 != 0 {
            let len = (body.len() as u32).to_le_bytes();
            guest.write_all(&len).expect("there is room");
        }
        guest.write_all(body).expect("there is room");
        let Ok(events) = agent.receive() else { return };
        assert!(agent.waiting() <= 4 + MAX_EVENT_LEN + CHUNK);
        for event in events.iter().filter(|event| event.has_clock()) {
            encode_from_host(&clock::answer(event.clock())).expect("short");
        }
    }
}
