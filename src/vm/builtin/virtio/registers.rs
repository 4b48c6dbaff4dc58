//! The registers of a virtio device over MMIO (VIRTIO 1.2, 4.2.2), and the
//! negotiation between driver and device that goes through them (3.1).
//!
//! Plain data: what reads and writes of the guest do to it, and when that starts
//! and stops the device's [`Rings`]. The guest is hostile. It may write anything
//! anywhere at any time, of any width; what the specification does not allow in
//! the state the device is in is ignored, and queues are only looked at by the
//! device, which does not believe their addresses either.
//!
//! What the guest reads is memory ([`Page`]): after each write, and after each change
//! of the configuration, it is what the registers say.
//!
//! Interrupts go past the registers: a device signals an event descriptor that is
//! the interrupt line. So the status register does not know which interrupts there
//! were, and says of a running device that its queues may have something; nobody
//! else uses the line, and a driver that looks in vain does no harm. Of a change of
//! the configuration it knows by the configuration itself.

use serde::{Deserialize, Serialize};

use super::config::Config;
use super::page::Page;
use super::saved::{Position, SavedDevice, SavedDriver, Unfit};

/// What a device is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Device id of the specification, never 0.
    pub id: u32,
    /// Offered features; VERSION_1 has to be one of them.
    pub features: u64,
    /// Largest size of each queue, a power of two.
    pub queues: Vec<u16>,
    pub config: Config,
}

impl Identity {
    fn allows(&self, wanted: u64) -> bool {
        wanted & !self.features == 0 && wanted & VERSION_1 != 0
    }
}

/// What the driver has set up of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSetup {
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// The working part of a device.
pub trait Rings: Send {
    /// The driver is ready. `false`: the queues cannot be as it has set them up.
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool;

    /// The driver gives the device up: it no longer touches memory when this
    /// returns.
    fn stop(&mut self);

    /// As [`stop`](Self::stop), and says how far the device got in each queue. `None` for
    /// a device that cannot go on from there.
    fn freeze(&mut self) -> Option<Vec<Position>> {
        None
    }

    /// As [`start`](Self::start), but goes on where another such device was stopped.
    fn go_on(&mut self, features: u64, queues: &[QueueSetup], positions: &[Position]) -> bool {
        let _ = (features, queues, positions);
        false
    }
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "KUAS"; drivers only show it.
const VENDOR: u32 = u32::from_le_bytes(*b"KUAS");
const VERSION_1: u64 = 1 << 32;

/// Offsets of the registers.
pub mod at {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS: u64 = 0x80;
    pub const AVAILABLE: u64 = 0x90;
    pub const USED: u64 = 0xa0;
    pub const SHARED_MEMORY: [u64; 4] = [0xb0, 0xb4, 0xb8, 0xbc];
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Writes to this register reach the device as an event, not as an access.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Writes of [`INTERRUPT_QUEUE`] alone to this register end in KVM.
pub const INTERRUPT_ACK: u64 = 0x64;

/// Bits of the status register.
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    /// What a driver has to have said before it may say that it is ready.
    pub const MAY_RUN: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    /// All bits that a driver can set and have set.
    pub const OF_DRIVER: u32 = MAY_RUN | DRIVER_OK | FAILED;
}

/// Of the interrupt's status: a queue has something new.
pub const INTERRUPT_QUEUE: u32 = 1;
/// And: the device's configuration is another one.
pub const INTERRUPT_CONFIG: u32 = 2;

/// A slot: its registers, and the device in it, if there is one.
pub struct Registers {
    page: Page,
    device: Option<Device>,
}

struct Device {
    identity: Identity,
    rings: Box<dyn Rings>,
    driver: Driver,
    /// It has nothing behind it any more.
    retired: bool,
}

/// What the driver has said since the last reset.
#[derive(Default)]
struct Driver {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

impl Driver {
    fn new(queues: usize) -> Driver {
        Driver {
            queues: vec![QueueSetup::default(); queues],
            ..Driver::default()
        }
    }

    fn restored(saved: &SavedDriver) -> Driver {
        Driver {
            status: saved.status,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            features: saved.features,
            queue_select: saved.queue_select,
            queues: saved.queues.clone(),
        }
    }

    fn queue(&mut self) -> Option<&mut QueueSetup> {
        self.queues.get_mut(self.queue_select as usize)
    }
}

impl Registers {
    /// An empty slot, which the guest reads in `page`.
    pub fn new(page: Page) -> Registers {
        let registers = Registers { page, device: None };
        registers.show_empty();
        registers
    }

    /// As [`new`](Self::new), beside no other slot.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::expect_used)]
    pub fn alone() -> Registers {
        let page = super::page::Pages::new(1)
            .ok()
            .and_then(|pages| pages.page(0));
        // Only tests are here.
        Registers::new(page.expect("a page"))
    }

    /// Puts a device into the slot; a driver finds it when it looks the next time.
    /// A device that is there already is stopped.
    pub fn insert(&mut self, identity: Identity, rings: Box<dyn Rings>) {
        self.remove();
        self.device = Some(Device {
            driver: Driver::new(identity.queues.len()),
            identity,
            rings,
            retired: false,
        });
        self.show();
    }

    /// Stops the device and says what its driver has set up. The device is of no use any
    /// more; `None` for an empty slot.
    ///
    /// # Errors
    /// [`Unfit::Unsavable`].
    pub fn save(&mut self) -> Result<Option<SavedDevice>, Unfit> {
        let Some(device) = &mut self.device else {
            return Ok(None);
        };
        let positions = match device.is_running() {
            true => device.rings.freeze().ok_or(Unfit::Unsavable)?,
            false => Vec::new(),
        };
        let Driver {
            status,
            device_features_select,
            driver_features_select,
            features,
            queue_select,
            ref queues,
        } = device.driver;
        Ok(Some(SavedDevice {
            id: device.identity.id,
            offered: device.identity.features,
            queue_sizes: device.identity.queues.clone(),
            driver: SavedDriver {
                status,
                device_features_select,
                driver_features_select,
                features,
                queue_select,
                queues: queues.clone(),
                positions,
            },
        }))
    }

    /// Has the device of the slot, which no driver has seen yet, go on where a saved one
    /// was.
    ///
    /// # Errors
    /// See [`Unfit`]; the device is as it was.
    pub fn restore(&mut self, saved: &SavedDevice) -> Result<(), Unfit> {
        let device = self.device.as_mut().ok_or(Unfit::Device)?;
        let identity = &device.identity;
        let same = (identity.id, identity.features, &identity.queues);
        if same != (saved.id, saved.offered, &saved.queue_sizes) {
            return Err(Unfit::Device);
        }
        let driver = Driver::restored(&saved.driver);
        let is_running = driver.status & status::DRIVER_OK != 0;
        let asked = driver.status & status::FEATURES_OK != 0;
        if driver.status & !status::OF_DRIVER != 0
            || (asked && !identity.allows(driver.features))
            || (is_running && driver.status & status::MAY_RUN != status::MAY_RUN)
        {
            return Err(Unfit::Driver);
        }
        let fits = |(queue, max): (&QueueSetup, &u16)| {
            let size = queue.size.is_power_of_two() && queue.size <= *max;
            size || (queue.size == 0 && !queue.ready)
        };
        let queues = &driver.queues;
        if queues.len() != identity.queues.len() || !queues.iter().zip(&identity.queues).all(fits) {
            return Err(Unfit::Queues);
        }
        if is_running {
            let positions = &saved.driver.positions;
            if positions.len() != queues.len()
                || !device.rings.go_on(driver.features, queues, positions)
            {
                return Err(Unfit::Queues);
            }
        }
        device.driver = driver;
        self.show();
        Ok(())
    }

    /// Takes the device out.
    pub fn remove(&mut self) {
        if let Some(mut device) = self.device.take() {
            device.identity.config.hide();
            device.reset();
            self.show_empty();
        }
    }

    /// Takes the device out, or, when a driver has it, says that it needs a reset and
    /// takes it out when that driver has let go of it: nobody else may get the slot
    /// before.
    pub fn retire(&mut self) {
        if let Some(device) = &mut self.device {
            device.retired = true;
        }
        self.show();
        self.remove_retired();
    }

    fn remove_retired(&mut self) {
        let gone = |device: &Device| device.retired && !device.has_driver();
        if self.device.as_ref().is_some_and(gone) {
            self.remove();
        }
    }

    /// Whether there is no device.
    pub fn is_empty(&self) -> bool {
        self.device.is_none()
    }

    /// Whether a driver runs the device.
    #[cfg(test)]
    fn is_running(&self) -> bool {
        self.device.as_ref().is_some_and(Device::is_running)
    }

    /// The guest reads, in a way that memory cannot be read, or in a test.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    /// An id of 0: there is no device.
    fn show_empty(&self) {
        self.page.clear();
        self.page.show(at::MAGIC, MAGIC);
        self.page.show(at::VERSION, VERSION);
        self.page.show(at::VENDOR_ID, VENDOR);
    }

    fn show(&self) {
        if let Some(device) = &self.device {
            device.show(&self.page);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(data), Some(device)) = (<[u8; 4]>::try_from(data), &mut self.device) else {
            return;
        };
        if offset < at::CONFIG {
            device.write(offset, u32::from_le_bytes(data));
            self.show();
            self.remove_retired();
        }
    }
}

impl Device {
    fn is_running(&self) -> bool {
        self.driver.status & status::DRIVER_OK != 0
    }

    fn has_driver(&self) -> bool {
        self.driver.status & status::DRIVER != 0
    }

    fn show(&self, page: &Page) {
        let driver = &self.driver;
        let queue = driver.queue_select as usize;
        let features = half(self.identity.features, driver.device_features_select);
        let most = self.identity.queues.get(queue).copied().unwrap_or(0);
        let is_ready = driver.queues.get(queue).is_some_and(|queue| queue.ready);
        page.show(at::DEVICE_ID, self.identity.id);
        page.show(at::DEVICE_FEATURES, features);
        page.show(at::QUEUE_SIZE_MAX, most.into());
        page.show(at::QUEUE_READY, is_ready.into());
        for register in at::SHARED_MEMORY {
            // No region has a length of all ones.
            page.show(register, u32::MAX);
        }
        let gone = if self.retired { status::NEEDS_RESET } else { 0 };
        self.identity.config.show(page, driver.status | gone);
    }

    fn write(&mut self, offset: u64, value: u32) {
        let negotiating = self.driver.status & (status::FEATURES_OK | status::DRIVER_OK) == 0;
        let driver = &mut self.driver;
        match offset {
            at::DEVICE_FEATURES_SELECT => driver.device_features_select = value,
            at::DRIVER_FEATURES_SELECT => driver.driver_features_select = value,
            at::DRIVER_FEATURES if negotiating => {
                set_half(&mut driver.features, driver.driver_features_select, value);
            }
            at::QUEUE_SELECT => driver.queue_select = value,
            INTERRUPT_ACK if value & INTERRUPT_CONFIG != 0 => {
                self.identity.config.acknowledge();
            }
            at::STATUS => self.set_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    /// The selected queue, which can be changed until the driver is ready.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let select = self.driver.queue_select as usize;
        let max = self.identity.queues.get(select).copied().unwrap_or(0);
        if self.is_running() {
            return;
        }
        let Some(queue) = self.driver.queue() else {
            return;
        };
        let address = match offset & !4 {
            at::DESCRIPTORS => Some(&mut queue.descriptors),
            at::AVAILABLE => Some(&mut queue.available),
            at::USED => Some(&mut queue.used),
            _ => None,
        };
        match (offset, address) {
            (at::QUEUE_SIZE, _) => {
                queue.size = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= max)
                    .unwrap_or(0);
            }
            (at::QUEUE_READY, _) => queue.ready = value & 1 == 1 && queue.size != 0,
            // The high half follows the low one.
            (_, Some(address)) => set_half(address, u32::from(offset & 4 != 0), value),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        let before = self.driver.status;
        if value == 0 {
            return self.reset();
        }
        // Only a reset takes bits away, and the device's own are not the driver's.
        let mut now = before | value & 0xff & !status::NEEDS_RESET;
        let features_asked = now & status::FEATURES_OK != 0;
        if features_asked && before & status::FEATURES_OK == 0 && !self.features_are_fine() {
            now &= !status::FEATURES_OK;
        }
        if now & status::MAY_RUN != status::MAY_RUN || now & status::FAILED != 0 {
            now &= !status::DRIVER_OK;
        }
        let runs = |status: u32| status & status::DRIVER_OK != 0;
        if runs(before) && !runs(now) {
            self.rings.stop();
        }
        if runs(now)
            && !runs(before)
            && !self.rings.start(self.driver.features, &self.driver.queues)
        {
            now = now & !status::DRIVER_OK | status::NEEDS_RESET;
        }
        self.driver.status = now;
    }

    fn features_are_fine(&self) -> bool {
        self.identity.allows(self.driver.features)
    }

    fn reset(&mut self) {
        if self.is_running() {
            self.rings.stop();
        }
        self.driver = Driver::new(self.identity.queues.len());
    }
}

/// The low or high half; there is nothing beyond.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
