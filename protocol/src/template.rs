//! How a machine becomes a template, and each machine that is made of it itself.
//!
//! A guest with [`cmdline::TEMPLATE`](crate::cmdline::TEMPLATE) boots as far as nothing is
//! any container's, listens on [`TEMPLATE_PORT`](crate::TEMPLATE_PORT), opens a connection to
//! the same port of the host, says [`Prepared`] and closes it. The host saves the machine.
//! Whenever it goes on, the first thing the host does is to open a connection and to say the
//! [`Identity`]; the guest goes on with its boot when it has taken it on, and closes.

/// The guest may be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the guest.
    pub protocol_version: u32,
}

impl Prepared {
    /// Bytes on the wire.
    pub const LEN: usize = 4;

    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        self.protocol_version.to_le_bytes()
    }

    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Prepared {
        Prepared {
            protocol_version: u32::from_le_bytes(*bytes),
        }
    }
}

/// Random bytes of the host: what the guest's kernel calls 512 bits of entropy.
pub const SEED_LEN: usize = 64;

/// What a machine has that no other one of the same template has.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub seed: [u8; SEED_LEN],
    /// Nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl Identity {
    /// Bytes on the wire.
    pub const LEN: usize = SEED_LEN + 8;

    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..SEED_LEN].copy_from_slice(&self.seed);
        bytes[SEED_LEN..].copy_from_slice(&self.realtime_ns.to_le_bytes());
        bytes
    }

    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Identity {
        let (mut seed, mut time) = ([0; SEED_LEN], [0; 8]);
        seed.copy_from_slice(&bytes[..SEED_LEN]);
        time.copy_from_slice(&bytes[SEED_LEN..]);
        Identity {
            seed,
            realtime_ns: u64::from_le_bytes(time),
        }
    }
}

/// The seed is in no log.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("realtime_ns", &self.realtime_ns)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut seed = [7; SEED_LEN];
        seed[0] = 1;
        let identity = Identity {
            seed,
            realtime_ns: 0x0102_0304_0506_0708,
        };
        let bytes = identity.encode();
        assert_eq!((bytes[0], bytes[63], bytes[64], bytes[71]), (1, 7, 8, 1));
        assert_eq!(Identity::decode(&bytes), identity);
        let prepared = Prepared {
            protocol_version: 9,
        };
        assert_eq!(Prepared::decode(&prepared.encode()), prepared);
    }

    #[test]
    fn the_seed_is_not_printed() {
        let identity = Identity {
            seed: [171; SEED_LEN],
            realtime_ns: 5,
        };
        let text = format!("{identity:?}");
        assert!(text.contains('5') && !text.contains("171"), "{text}");
    }
}
