//! Entry points for fuzz targets, see [`crate::fuzzing`]: the board as the threads of
//! the guest's processors reach it.

use std::sync::{Arc, Mutex};

use rustix::pipe::{PipeFlags, pipe_with};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::devices::{block, fuzzing as devices, net, vhost_user as front_end};
use super::layout::{VIRTIO_SIZE, VIRTIO_SLOTS, VIRTIO_START};
use super::machine::Board;
use super::memory::MemoryFile;
use super::ports::{Console, Line, Ports};
use super::snapshot::format::State;
use super::snapshot::sample;
use super::virtio::registers::{Identity, QueueSetup, Registers, Rings};
use super::virtio::rings::{Events, SharedRings};
use super::virtio::saved::{Position, SavedDevice, SavedDriver};
use super::virtio::worker::ServiceMemory;
use crate::fuzzing::Input;
use crate::vm::devices::vhost_user::lock;

/// A device by the input's driver.
macro_rules! devices {
    ($($name:ident: $($path:ident)::+),* $(,)?) => {$(
        pub fn $name(input: &[u8]) {
            $($path)::+(&mut Input::new(input));
        }
    )*};
}

devices! {
    balloon: devices::balloon,
    block: block::fuzzing::block,
    console: devices::console,
    fs: devices::fs,
    more_memory: devices::more_memory,
    net: net::fuzzing::net,
    rng: devices::rng,
    vhost_user: front_end::fuzzing::vhost_user,
    vsock: devices::vsock,
}

/// Slots that have a device, and that the input mostly is about.
const DEVICES: usize = 3;
const MEMORY: u64 = 1 << 16;
const VERSION_1: u64 = 1 << 32;

/// Real queues, and what the registers may do with them.
struct Checked {
    rings: SharedRings<ServiceMemory<()>>,
    identity: Identity,
    is_running: Arc<Mutex<bool>>,
}

impl Rings for Checked {
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        self.go_on(features, queues, &vec![Position::default(); queues.len()])
    }

    fn go_on(&mut self, features: u64, queues: &[QueueSetup], positions: &[Position]) -> bool {
        assert!(!*lock(&self.is_running), "started twice");
        assert_eq!(features & !self.identity.features, 0, "was not offered");
        assert_ne!(features & VERSION_1, 0);
        assert_eq!(queues.len(), self.identity.queues.len());
        assert_eq!(queues.len(), positions.len());
        for (queue, most) in queues.iter().zip(&self.identity.queues) {
            let fits = queue.size.is_power_of_two() && queue.size <= *most;
            assert!(!queue.ready || fits, "{queue:?} of {most}");
        }
        let started = self.rings.go_on(features, queues, positions);
        *lock(&self.is_running) = started;
        started
    }

    fn stop(&mut self) {
        assert!(
            std::mem::take(&mut *lock(&self.is_running)),
            "stopped without having run"
        );
        self.rings.stop();
    }
}

fn features(number: usize) -> u64 {
    VERSION_1 | 0x3000_0000 | 1 << (number * 7)
}

fn queue_sizes(number: usize) -> Vec<u16> {
    [vec![64], vec![128, 1024], vec![256, 256, 16]][number].clone()
}

/// A device without a worker, and whether it runs.
fn device(number: usize, memory: &ServiceMemory<()>) -> (Checked, Arc<Mutex<bool>>) {
    let identity = Identity {
        id: number as u32 + 1,
        features: features(number),
        config: vec![number as u8; 24].into(),
        queues: queue_sizes(number),
    };
    let is_running = Arc::new(Mutex::new(false));
    let events = Events::new(identity.queues.len()).expect("descriptors");
    let rings = SharedRings::new(memory, &identity.queues, Arc::new(events));
    let checked = Checked {
        rings: rings.expect("queues of a valid size"),
        identity,
        is_running: is_running.clone(),
    };
    (checked, is_running)
}

/// The files of a template that somebody has changed: what is in `state`, and what a
/// device is told to go on with.
pub fn snapshot(input: &[u8]) {
    // Nearly always its first line is wrong.
    let _ = State::parse(input);
    let mut input = Input::new(input);
    let saved = saved_device(&mut input);
    let file = MemoryFile::new(MEMORY, 0).expect("memory");
    let memory = GuestMemoryAtomic::new(file.map().expect("memory"));
    for number in 0..DEVICES {
        let (checked, is_running) = device(number, &memory);
        let mut registers = Registers::alone();
        registers.insert(checked.identity.clone(), Box::new(checked));
        let restored = registers.restore(&SavedDevice {
            id: number as u32 + 1,
            ..saved.clone()
        });
        assert!(
            restored.is_ok() || !*lock(&is_running),
            "it runs all the same"
        );
        registers.remove();
        assert!(!*lock(&is_running));
    }
    let mut state = sample::state();
    state.devices = vec![saved];
    let mut json = serde_json::to_vec(&state).expect("JSON");
    while !input.is_empty() {
        let at = usize::from(input.u16()) % json.len();
        let new = input.bytes(4);
        json.splice(at..(at + new.len()).min(json.len()), new.iter().copied());
    }
    if let Ok(state) = State::parse(&sample::file(&json)) {
        let again = serde_json::to_vec(&state).expect("JSON");
        assert_eq!(State::parse(&sample::file(&again)), Ok(state));
    }
}

/// Mostly one that fits a device of [`device`].
fn saved_device(input: &mut Input<'_>) -> SavedDevice {
    let number = input.below(DEVICES);
    let queue_sizes = queue_sizes(number);
    let count = queue_sizes.len() + usize::from(input.byte() == 1);
    let queues = (0..count).map(|_| QueueSetup {
        size: 1 << (input.byte() % 11),
        ready: input.flag(),
        descriptors: u64::from(input.u16()) & !0xf,
        available: u64::from(input.u16()) & !1,
        used: u64::from(input.u16()) & !3,
    });
    let queues: Vec<_> = queues.collect();
    let positions = (0..count).map(|_| Position {
        available: input.u16(),
        used: input.u16(),
    });
    SavedDevice {
        id: 0,
        offered: features(number),
        queue_sizes,
        driver: SavedDriver {
            positions: positions.collect(),
            queues,
            status: [15, 11, 3, 1, 0, input.u32()][input.below(6)],
            features: VERSION_1 | u64::from(input.byte()) << 28,
            ..SavedDriver::default()
        },
    }
}

/// Reads and writes of any width at any address and port, in between devices that come,
/// go, and change their configuration.
pub fn registers(input: &[u8]) {
    let mut input = Input::new(input);
    let file = MemoryFile::new(MEMORY, 0).expect("memory");
    let memory = GuestMemoryAtomic::new(file.map().expect("memory"));
    let (console, output) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe");
    let line = Line(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("a descriptor"));
    let board = Board::new(Ports::new(line, Console(Some(output.into())))).expect("memory");
    let insert = |slot: usize| {
        let (checked, is_running) = device(slot % DEVICES, &memory);
        let config = checked.identity.config.clone();
        board.insert_unwired(slot, checked.identity.clone(), Box::new(checked));
        (config, is_running)
    };
    let mut devices: Vec<_> = (0..DEVICES).map(insert).collect();
    while !input.is_empty() {
        let mut data = [0; 8];
        let len = [4, 1, 2, 4, 8, 4, 4, 3][input.below(8)];
        match input.byte() % 16 {
            0..6 => {
                let address = address(&mut input);
                let value = input.u32().to_le_bytes();
                data[..4].copy_from_slice(&value);
                board.write(address, &data[..len]);
            }
            6..10 => board.read(address(&mut input), &mut data[..len]),
            10 => {
                let port = input.u16();
                let value = input.u64().to_le_bytes();
                let _ = board.port_write(port, &value[..len]);
            }
            11 => board.port_read(input.u16(), &mut data[..len]),
            12 => board.retire(input.below(VIRTIO_SLOTS)),
            13 => {
                let slot = input.below(VIRTIO_SLOTS);
                if board.is_free(slot) {
                    devices.push(insert(slot));
                }
            }
            14 => negotiate(&board, input.below(DEVICES), &mut input),
            _ => {
                let (config, _) = &devices[input.below(256) % devices.len()];
                let at = input.below(17);
                config.change(&[(at, input.u64())], input.flag());
            }
        }
        check(&board);
    }
    // A device that is taken out has been stopped.
    for slot in 0..VIRTIO_SLOTS {
        board.write(VIRTIO_START + slot as u64 * VIRTIO_SIZE + 0x70, &[0; 4]);
        board.retire(slot);
        assert!(board.is_free(slot), "slot {slot} is taken for ever");
    }
    assert!(devices.iter().all(|(_, is_running)| !*lock(is_running)));
    drop(console);
}

/// Mostly a register of one of the devices.
fn address(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        0 => input.u64(),
        1 => VIRTIO_START + u64::from(input.u16()),
        slot => {
            let slot = u64::from(slot) % DEVICES as u64;
            VIRTIO_START + slot * VIRTIO_SIZE + u64::from(input.byte()) * 4
        }
    }
}

/// What a driver does to start a device, with anything for its queues.
fn negotiate(board: &Board, slot: usize, input: &mut Input<'_>) {
    let base = VIRTIO_START + slot as u64 * VIRTIO_SIZE;
    let write = |offset: u64, value: u32| board.write(base + offset, &value.to_le_bytes());
    for status in [0, 1, 3] {
        write(0x70, status);
    }
    let features = input.byte();
    for (select, value) in [(1, 1), (0, u32::from(features) << 24 & 0x3000_0000)] {
        write(0x24, select);
        write(0x20, value);
    }
    write(0x70, 11);
    for queue in 0..u32::from(input.byte() % 4) {
        write(0x30, queue);
        write(0x38, 1 << (input.byte() % 11));
        for register in [0x80, 0x90, 0xa0] {
            write(register, u32::from(input.u16()) & !0xf);
        }
        write(0x44, 1);
    }
    write(0x70, 15);
}

/// What the status says is what is.
fn check(board: &Board) {
    for slot in 0..DEVICES {
        let mut status = [0; 4];
        board.read(VIRTIO_START + slot as u64 * VIRTIO_SIZE + 0x70, &mut status);
        let status = u32::from_le_bytes(status);
        assert_eq!(status & !0xff, 0);
        let (needed, runs) = (1 | 2 | 8, status & 4 != 0);
        assert!(!runs || status & needed == needed, "status {status:#x}");
        assert!(!runs || status & 128 == 0, "status {status:#x}");
    }
}
