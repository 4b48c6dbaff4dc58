//! The configuration space of a device (VIRTIO 1.2, 2.5) and the registers that change
//! with it, which a device may do while a driver reads them.

use std::sync::{Arc, Mutex};

use super::page::Page;
use super::registers::{INTERRUPT_CONFIG, INTERRUPT_QUEUE, at, status};
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
    /// Where a driver reads it, while the device is in a slot, and the status without
    /// what is known here.
    shown: Option<(Page, u32)>,
}

impl Space {
    fn show(&self) {
        let Some((page, status)) = &self.shown else {
            return;
        };
        let (mut status, mut interrupt) = (*status, 0);
        if status & status::DRIVER_OK != 0 {
            interrupt = INTERRUPT_QUEUE | if self.changed { INTERRUPT_CONFIG } else { 0 };
            status |= if self.failed { status::NEEDS_RESET } else { 0 };
        }
        page.show_bytes(at::CONFIG, &self.bytes);
        page.show(at::CONFIG_GENERATION, self.generation);
        page.show(at::INTERRUPT_STATUS, interrupt);
        page.show(at::STATUS, status);
    }

    /// Changes bytes, given as offset and value. The guest reads at the same time: who
    /// began before sees another generation, and who began in between is interrupted or
    /// asked for it.
    fn change<B: AsRef<[u8]>>(&mut self, fields: impl Iterator<Item = (usize, B)>) {
        self.next_generation();
        for (at, bytes) in fields {
            let bytes = bytes.as_ref();
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        self.next_generation();
    }

    fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.show();
    }
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
    /// Shows it in a slot, to a driver whose status this is.
    pub fn show(&self, page: &Page, status: u32) {
        let mut space = lock(&self.0);
        space.shown = Some((page.clone(), status));
        space.show();
    }

    /// The slot is another device's.
    pub fn hide(&self) {
        lock(&self.0).shown = None;
    }

    /// Writes fields, given as offset and value, all of which exist. The driver is to be
    /// interrupted if it `must_know`.
    pub fn change(&self, fields: &[(usize, u64)], must_know: bool) {
        let mut space = lock(&self.0);
        space.changed |= must_know;
        space.change(fields.iter().map(|(at, value)| (*at, value.to_le_bytes())));
    }

    /// Writes a field of 16 bits that exists; the driver is to be interrupted.
    pub fn change_short(&self, at: usize, value: u16) {
        let mut space = lock(&self.0);
        space.changed = true;
        space.change([(at, value.to_le_bytes())].into_iter());
    }

    /// The driver knows of the change.
    pub fn acknowledge(&self) {
        let mut space = lock(&self.0);
        space.changed = false;
        space.show();
    }

    /// The device does not work any more. The driver is to be interrupted.
    pub fn fail(&self) {
        let mut space = lock(&self.0);
        space.failed = true;
        space.changed = true;
        space.show();
    }

    pub fn has_failed(&self) -> bool {
        lock(&self.0).failed
    }

    #[cfg(any(test, fuzzing))]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).bytes.clone()
    }

    /// The field of 64 bits that is there.
    #[cfg(any(test, fuzzing))]
    pub fn field(&self, at: usize) -> u64 {
        let bytes = &self.bytes()[at..at + 8];
        bytes
            .iter()
            .rfold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    #[cfg(test)]
    pub fn generation(&self) -> u32 {
        lock(&self.0).generation
    }

    #[cfg(any(test, fuzzing))]
    pub fn is_changed(&self) -> bool {
        lock(&self.0).changed
    }
}
