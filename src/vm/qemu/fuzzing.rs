//! QEMU's control connection for [`crate::fuzzing`].

use std::io::Write;
use std::time::Duration;

use super::qmp::{Qmp, QmpError};
use crate::fuzzing::Input;

/// Longest piece that is certain to fit into the socket.
const PIECE: usize = 32 * 1024;

/// A QEMU that a guest has taken over answers with anything, in pieces of any length.
pub fn qmp(input: &[u8]) {
    let mut input = Input::new(input);
    let (mut qmp, mut theirs) = Qmp::new().expect("sockets");
    while !input.is_empty() {
        let how = input.byte();
        let piece = match how & 3 {
            // The answer to what was asked last.
            0 => format!("{{\"id\": {}, \"return\": {{}}}}\n", how >> 2).into_bytes(),
            // A long line.
            1 => vec![b' '; usize::from(input.u16()) % PIECE],
            _ => {
                let len = usize::from(input.byte());
                input.bytes(len).to_vec()
            }
        };
        if theirs.write_all(&piece).is_err() {
            return;
        }
        // Nobody waits: what is there is an answer, or there is none.
        let done = match how >> 6 {
            0 => qmp.execute("query-status", None, Duration::ZERO).map(drop),
            _ => take_all(&mut qmp),
        };
        match done {
            // Nobody has waited, and the connection goes on.
            Ok(()) | Err(QmpError::TimedOut { .. } | QmpError::Refused { .. }) => {}
            // The machine ends with it. Its words are not endless.
            Err(e) => return assert!(e.to_string().len() < 128 * 1024),
        }
    }
}

fn take_all(qmp: &mut Qmp) -> Result<(), QmpError> {
    while qmp.next()?.is_some() {}
    Ok(())
}
