//! The configuration space of a device (VIRTIO 1.2, 2.5), which its registers show and
//! a device may change while a driver reads it.

use std::sync::{Arc, Mutex};

use crate::vm::devices::vhost_user::lock;

/// Shared by the registers and the device.
#[derive(Clone, Debug, Default)]
pub struct Config(Arc<Mutex<Space>>);

#[derive(Debug, Default)]
struct Space {
    bytes: Vec<u8>,
    /// Another one after each change, so that a driver that reads in pieces notices.
    generation: u32,
    /// There is a change the driver has not acknowledged.
    changed: bool,
    /// The device does not work any more.
    failed: bool,
}

impl From<Vec<u8>> for Config {
    fn from(bytes: Vec<u8>) -> Config {
        Config(Arc::new(Mutex::new(Space {
            bytes,
            ..Space::default()
        })))
    }
}

impl Config {
    /// What there is from `start` on; the rest of `data` stays as it is.
    pub fn read(&self, start: u64, data: &mut [u8]) {
        let space = lock(&self.0);
        let bytes = usize::try_from(start)
            .ok()
            .and_then(|start| space.bytes.get(start..));
        if let Some(bytes) = bytes {
            let len = bytes.len().min(data.len());
            data[..len].copy_from_slice(&bytes[..len]);
        }
    }

    /// Writes fields, given as offset and value, all of which exist. The driver is to be
    /// interrupted if it `must_know`.
    pub fn change(&self, fields: &[(usize, u64)], must_know: bool) {
        let mut space = lock(&self.0);
        for (at, value) in fields {
            space.bytes[*at..*at + 8].copy_from_slice(&value.to_le_bytes());
        }
        space.generation = space.generation.wrapping_add(1);
        space.changed |= must_know;
    }

    /// Writes a field of 16 bits that exists; the driver is to be interrupted.
    pub fn change_short(&self, at: usize, value: u16) {
        let mut space = lock(&self.0);
        space.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        space.generation = space.generation.wrapping_add(1);
        space.changed = true;
    }

    pub fn generation(&self) -> u32 {
        lock(&self.0).generation
    }

    /// Whether the driver is to look at it.
    pub fn is_changed(&self) -> bool {
        lock(&self.0).changed
    }

    /// The driver knows of the change.
    pub fn acknowledge(&self) {
        lock(&self.0).changed = false;
    }

    /// The device does not work any more. The driver is to be interrupted.
    pub fn fail(&self) {
        let mut space = lock(&self.0);
        space.failed = true;
        space.changed = true;
    }

    pub fn has_failed(&self) -> bool {
        lock(&self.0).failed
    }

    #[cfg(test)]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).bytes.clone()
    }
}
