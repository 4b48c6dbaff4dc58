//! Drivers that an input speaks for, see [`crate::fuzzing`].
//!
//! A [`Driver`] has real queues in a small memory between pages that nobody may touch.
//! It makes chains available, breaks rings, negotiates anew; and after each time that
//! the device has worked it looks at what became of the memory: nothing may have changed
//! but the used rings and what was in writable buffers, and what was used is what was
//! made available.

mod chain;
#[cfg(test)]
mod malformed;
mod memory;
mod oracle;

use std::fs::File;
use std::sync::Arc;

use rustix::io::{ioctl_fionread, read};
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use vm_memory::mmap::NewBitmap;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::{FEATURES, balloon, console, fs, more_memory, rng, vsock};
use crate::fuzzing::Input;
use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::virtio::registers::{QueueSetup, Rings};
use crate::vm::builtin::virtio::rings::{Events, SharedRings};
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};

pub use self::chain::{Content, any};
use self::chain::{Descriptor, descriptors};
use self::oracle::Oracle;

/// The guest's memory.
pub const SIZE: u64 = 0x8000;
/// What a queue takes of it: descriptors, available ring, used ring.
const QUEUE: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const ENTRIES: u16 = 16;
/// Most queues of a device here.
const MAX_QUEUES: usize = 6;
/// Buffers are behind the queues.
pub const BUFFERS: u64 = QUEUE * MAX_QUEUES as u64;
/// Most steps of an input.
const MAX_STEPS: usize = 200;

/// A driver of a device with some queues.
pub struct Driver<B: NewBitmap + Clone + Send + Sync + 'static> {
    pub memory: ServiceMemory<B>,
    pub rings: Vec<ServiceRing<B>>,
    guest: GuestMemoryMmap<B>,
    shared: SharedRings<ServiceMemory<B>>,
    queues: Vec<Queue>,
    /// Where the next buffer goes.
    next_buffer: u64,
    /// The last to go.
    _space: Vec<memory::Reserved>,
}

/// What the driver knows of a queue.
#[derive(Clone, Copy)]
struct Queue {
    setup: QueueSetup,
    next_descriptor: u16,
    next_available: u16,
}

impl Queue {
    /// The one with this number, where it belongs.
    fn new(number: u64) -> Queue {
        let start = number * QUEUE;
        Queue {
            setup: QueueSetup {
                size: ENTRIES,
                ready: true,
                descriptors: start,
                available: start + AVAILABLE,
                used: start + USED,
            },
            next_descriptor: 0,
            next_available: 0,
        }
    }
}

impl<B: NewBitmap + Clone + Send + Sync + 'static> Driver<B>
where
    SharedRings<ServiceMemory<B>>: Rings,
{
    pub fn new(file: &MemoryFile, queues: usize) -> Driver<B> {
        assert!(queues <= MAX_QUEUES);
        let (memory, space) = memory::map(file);
        let memory = GuestMemoryAtomic::new(memory);
        let events = Arc::new(Events::new(queues).expect("descriptors"));
        let sizes = vec![ENTRIES; queues];
        let shared = SharedRings::new(&memory, &sizes, events).expect("queues");
        let mut driver = Driver {
            rings: shared.rings(),
            guest: GuestMemoryMmap::clone(&memory.memory()),
            memory,
            shared,
            queues: Vec::new(),
            next_buffer: BUFFERS,
            _space: space,
        };
        driver.queues = (0..queues as u64).map(Queue::new).collect();
        driver.start(FEATURES);
        driver
    }

    /// A reset, after which everything is as it was in the beginning.
    fn begin(&mut self) {
        self.shared.stop();
        self.write(0, &[0; SIZE as usize]);
        let queues = self.queues.len() as u64;
        self.queues = (0..queues).map(Queue::new).collect();
        assert!(self.start(FEATURES));
    }

    fn start(&mut self, features: u64) -> bool {
        let setups: Vec<_> = self.queues.iter().map(|queue| queue.setup).collect();
        self.shared.start(features, &setups)
    }

    /// Everything from the beginning, as after a reset.
    fn restart(&mut self, input: &mut Input<'_>) {
        self.shared.stop();
        self.write(0, &[0; BUFFERS as usize]);
        let how = input.byte();
        for number in 0..self.queues.len() {
            let start = number as u64 * QUEUE;
            let wild = how & 3 == 3;
            let mut at = |usual: u64| match wild {
                true => u64::from(input.u16()) & !1,
                false => start + usual,
            };
            let setup = QueueSetup {
                size: ENTRIES >> (how >> 6),
                ready: how & 4 == 0 || number == 0,
                descriptors: at(0) & !0xf,
                available: at(AVAILABLE),
                used: at(USED) & !3,
            };
            self.queues[number] = Queue {
                setup,
                next_descriptor: 0,
                next_available: 0,
            };
        }
        let features = match how & 8 {
            0 => FEATURES,
            _ => 1 << 32,
        };
        if !self.start(features) {
            // Queues that cannot be.
            self.shared.stop();
        }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        // The driver does not write where there is no memory.
        let _ = self.guest.write_slice(bytes, GuestAddress(address));
    }

    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        let _ = self.guest.read_slice(bytes, GuestAddress(address));
    }

    fn descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.write(table + u64::from(index) * 16, &descriptor.encode());
    }

    /// A place for so many bytes.
    fn place(&mut self, len: u64) -> u64 {
        let len = len.min(SIZE - BUFFERS);
        if self.next_buffer + len > SIZE {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        // A gap, in which nothing may change.
        self.next_buffer = (at + len + 15) & !15;
        at
    }

    /// Makes a chain of what the input says available, its readable buffers filled by
    /// `content`.
    fn add(&mut self, number: usize, input: &mut Input<'_>, content: &mut Content<'_>) {
        let how = input.byte();
        let chain = descriptors(input, how, content, |len| self.place(len));
        for (at, bytes) in &chain.contents {
            self.write(*at, bytes);
        }
        let queue = self.queues[number];
        let (size, table) = (queue.setup.size.max(1), queue.setup.descriptors);
        let head = queue.next_descriptor % size;
        if how & 0x80 != 0 {
            let count = chain.descriptors.len() as u16;
            let at = self.place(u64::from(count) * 16);
            for (index, descriptor) in (0..).zip(&chain.descriptors) {
                self.descriptor(
                    at,
                    index,
                    descriptor.followed_by(index + 1, index + 1 < count),
                );
            }
            let indirect = Descriptor {
                address: at,
                len: u32::from(count) * 16,
                flags: VRING_DESC_F_INDIRECT as u16,
                next: 0,
            };
            self.descriptor(table, head, indirect);
            self.queues[number].next_descriptor = (head + 1) % size;
        } else {
            let mut index = head;
            for (place, descriptor) in chain.descriptors.iter().enumerate() {
                let next = (index + 1) % size;
                let is_last = place + 1 == chain.descriptors.len();
                self.descriptor(table, index, descriptor.followed_by(next, !is_last));
                index = next;
            }
            self.queues[number].next_descriptor = index;
        }
        self.publish(number, head);
    }

    fn publish(&mut self, number: usize, head: u16) {
        let queue = &mut self.queues[number];
        let (available, size) = (queue.setup.available, queue.setup.size.max(1));
        let place = available + 4 + u64::from(queue.next_available % size) * 2;
        queue.next_available = queue.next_available.wrapping_add(1);
        let next = queue.next_available;
        self.write(place, &head.to_le_bytes());
        self.write(available + 2, &next.to_le_bytes());
    }

    /// More is available than there can be, or less than there was.
    fn jump(&mut self, number: usize, by: i16) {
        let queue = &mut self.queues[number];
        queue.next_available = queue.next_available.wrapping_add_signed(by);
        let (available, next) = (queue.setup.available, queue.next_available);
        self.write(available + 2, &next.to_le_bytes());
    }

    /// Has the device work after a kick of this queue, and looks at what it did.
    fn kick(&self, number: usize, work: &mut Work<'_, B>) {
        let oracle = Oracle::new(self);
        work(number as u16, &self.rings);
        oracle.check(self);
    }
}

/// Has a device work after a kick of the queue with this number.
pub type Work<'w, B> = dyn FnMut(u16, &[ServiceRing<B>]) + 'w;
/// What else happens to a device.
pub type Host<'h> = dyn FnMut(&mut Input<'_>) + 'h;

/// Who says what a driver does.
pub trait Conduct {
    /// Which of several variants of a device is meant.
    fn variant(&mut self) -> u8;

    fn conduct<B: NewBitmap + Clone + Send + Sync + 'static>(
        &mut self,
        driver: &mut Driver<B>,
        content: &mut Content<'_>,
        work: &mut Work<'_, B>,
        host: &mut Host<'_>,
    ) where
        SharedRings<ServiceMemory<B>>: Rings;
}

/// Until it ends.
impl Conduct for Input<'_> {
    fn variant(&mut self) -> u8 {
        self.byte()
    }

    fn conduct<B: NewBitmap + Clone + Send + Sync + 'static>(
        &mut self,
        driver: &mut Driver<B>,
        content: &mut Content<'_>,
        work: &mut Work<'_, B>,
        host: &mut Host<'_>,
    ) where
        SharedRings<ServiceMemory<B>>: Rings,
    {
        for _ in 0..MAX_STEPS {
            if self.is_empty() {
                return;
            }
            let step = self.byte();
            let number = usize::from(step >> 4) % driver.queues.len();
            match step & 15 {
                0..7 => driver.add(number, self, content),
                7 => {
                    let (at, value) = (u64::from(self.u16()) % SIZE, self.u16());
                    driver.write(at, &value.to_le_bytes());
                }
                8 => driver.jump(number, i16::from(self.byte() as i8)),
                9 => driver.publish(number, self.u16()),
                10 => driver.restart(self),
                11 | 12 => host(self),
                _ => driver.kick(number, work),
            }
        }
    }
}

/// The file of a guest's memory, with room for more.
pub fn memory_file(room: u64) -> MemoryFile {
    MemoryFile::new(SIZE, room).expect("memory")
}

/// A device of one service that has all queues.
fn simple<S: Service<Bitmap = ()>>(
    conduct: &mut impl Conduct,
    file: &MemoryFile,
    queues: usize,
    make: impl FnOnce(ServiceMemory<()>) -> S,
) {
    let mut driver = Driver::new(file, queues);
    let service = make(driver.memory.clone());
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        service.handle(queue, rings).expect("the device goes on");
    };
    conduct.conduct(&mut driver, &mut any, &mut work, &mut |_| {});
}

pub fn rng(conduct: &mut impl Conduct) {
    simple(conduct, &memory_file(0), 1, |memory| rng::Rng { memory });
}

/// What the guest prints, and a host that reads it now and then.
pub fn console(conduct: &mut impl Conduct) {
    const OUTPUT: usize = 1;
    const WORDS: &[u8] = b"alive";
    let (log, sink) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe");
    let unread = || ioctl_fionread(&log).expect("a pipe");
    let drain = || while read(&log, &mut [0; 4096]).is_ok() {};
    let mut driver = Driver::new(&memory_file(0), 2);
    let console = console::Console::new(driver.memory.clone(), File::from(sink));
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        let before = unread();
        let taken: Vec<_> = rings.iter().map(VringT::queue_next_avail).collect();
        console.handle(queue, rings).expect("the device goes on");
        let taken = |number: usize| rings[number].queue_next_avail().wrapping_sub(taken[number]);
        assert_eq!(taken(0), 0, "there is no input");
        let most = u64::from(taken(OUTPUT)) * console::MAX_PIECE as u64;
        assert!(unread() - before <= most, "more than there was");
    };
    conduct.conduct(&mut driver, &mut any, &mut work, &mut |_| drain());
    drain();
    // Whatever there has been, the words of the next driver are printed.
    driver.begin();
    driver.write(BUFFERS, WORDS);
    let words = Descriptor {
        address: BUFFERS,
        len: WORDS.len() as u32,
        flags: 0,
        next: 0,
    };
    driver.descriptor(driver.queues[OUTPUT].setup.descriptors, 0, words);
    driver.publish(OUTPUT, 0);
    driver.kick(OUTPUT, &mut work);
    let mut printed = [0; 16];
    let len = read(&log, &mut printed).expect("what was printed");
    assert_eq!(&printed[..len], WORDS);
}

pub fn balloon(conduct: &mut impl Conduct) {
    let file = memory_file(0);
    let make = |memory| balloon::Balloon {
        file: file.clone(),
        memory,
    };
    simple(conduct, &file, 3, make);
}

/// virtio-mem, of which the host offers more or less meanwhile.
pub fn more_memory(conduct: &mut impl Conduct) {
    const BLOCK: u64 = 2 << 20;
    const ROOM: u64 = 64 * BLOCK;
    let file = memory_file(ROOM);
    let more = more_memory::MoreMemory::new(&file).expect("there is room");
    let config = more.identity(FEATURES).config;
    let events = Events::new(1).expect("descriptors");
    let start = file.room().expect("there is room").address;
    let mut driver = Driver::new(&file, 1);
    let plugger = more_memory::Plugger {
        more: more.clone(),
        memory: driver.memory.clone(),
    };
    let most = std::cell::Cell::new(0);
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        plugger.handle(queue, rings).expect("the device goes on");
        let plugged = config.field(40);
        assert!(plugged <= most.get(), "{plugged:#x} are plugged");
        assert!(plugged.is_multiple_of(BLOCK));
    };
    let mut host = |input: &mut Input<'_>| {
        let size = u64::from(input.byte() % 65) * BLOCK;
        most.set(most.get().max(size));
        more.offer(size, &events);
    };
    // A request, more often than not.
    let mut request = |input: &mut Input<'_>, len: usize| {
        if len != 24 {
            return any(input, len);
        }
        let (kind, block, count) = (input.byte() % 5, input.byte(), input.byte());
        let mut bytes = vec![0; 24];
        bytes[0] = kind;
        let address = start + u64::from(block % 80) * BLOCK;
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16] = count;
        bytes
    };
    conduct.conduct(&mut driver, &mut request, &mut work, &mut host);
}

/// The file system, with files that do not exist.
pub fn fs(conduct: &mut impl Conduct) {
    let mut driver = Driver::new(&memory_file(0), 2);
    let (backend, status) = fs::fuzzing::backend();
    backend
        .update_memory(driver.memory.clone())
        .expect("the device takes it");
    let mut work = |queue: u16, rings: &[ServiceRing<fs::Bitmap>]| {
        backend.handle(queue, rings).expect("the device goes on");
        status.assert_works();
    };
    let mut content = fs::fuzzing::content;
    conduct.conduct(&mut driver, &mut content, &mut work, &mut |_| {});
}

/// Sockets, with processes of the host at the other end.
pub fn vsock(conduct: &mut impl Conduct) {
    let mut driver = Driver::new(&memory_file(0), 2);
    let sockets = std::cell::RefCell::new(vsock::fuzzing::Sockets::new());
    let (backend, status) = {
        let sockets = sockets.borrow();
        (sockets.backend.clone(), sockets.status.clone())
    };
    backend
        .update_memory(driver.memory.clone())
        .expect("the device takes it");
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        // A queue, and what happened on the host since.
        for event in [
            queue,
            vsock::HOST_EVENT as u16,
            vsock::CONTINUE_EVENT as u16,
        ] {
            backend.handle(event, rings).expect("the device goes on");
            status.assert_works();
        }
    };
    let mut host = |input: &mut Input<'_>| sockets.borrow_mut().host(input);
    let mut content = vsock::fuzzing::content;
    conduct.conduct(&mut driver, &mut content, &mut work, &mut host);
    sockets.borrow_mut().end();
}
