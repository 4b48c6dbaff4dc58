//! Random bytes of the kernel (getrandom(2)).

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes`, waiting while the kernel has no entropy yet.
///
/// # Errors
/// The kernel's; `Interrupted` by a signal, which happens only above 256 bytes.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let len = bytes.len();
    match getrandom(bytes, GetRandomFlags::empty())? {
        got if got == len => Ok(()),
        _ => Err(io::ErrorKind::Interrupted.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn all_bytes_are_filled() {
        let mut bytes = [[0; 64]; 2];
        for bytes in &mut bytes {
            fill(bytes).unwrap();
            assert!(bytes[56..].iter().any(|byte| *byte != 0));
        }
        assert_ne!(bytes[0], bytes[1]);
        fill(&mut []).unwrap();
    }
}
