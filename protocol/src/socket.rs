//! A connection of a container's process to a socket of the host.
//!
//! The agent opens it and sends a [`Hello`]; all that follows are the bytes of the two,
//! and the end of either direction is that of the other side's. When the host does not
//! like the hello, or cannot connect, it closes.

/// What the host has to know first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Which socket: a secret between the host and the agent, because every process of
    /// the guest can open such a connection.
    pub token: Token,
    /// Who connects, by the ids of the guest's initial user namespace.
    pub uid: u32,
    pub gid: u32,
}

/// Random, never used for two sockets.
pub type Token = [u8; 16];

impl Hello {
    /// Bytes on the wire.
    pub const LEN: usize = 24;

    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.token);
        bytes[16..20].copy_from_slice(&self.uid.to_le_bytes());
        bytes[20..].copy_from_slice(&self.gid.to_le_bytes());
        bytes
    }

    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Hello {
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[..16]);
        let number = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Hello {
            token,
            uid: number(16),
            gid: number(20),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let hello = Hello {
            token: *b"0123456789abcdef",
            uid: 1000,
            gid: 0x0102_0304,
        };
        assert_eq!(Hello::decode(&hello.encode()), hello);
        assert_eq!(hello.encode()[20..], [4, 3, 2, 1]);
    }
}
