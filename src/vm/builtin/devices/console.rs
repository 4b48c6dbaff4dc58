//! virtio-console with one port (VIRTIO 1.2, 5.3): what the guest prints goes to the
//! console's log. There is no input.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Mutex;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::{buffers, work_through};
use crate::vm::builtin::ports::Console as Sink;
use crate::vm::builtin::virtio::registers::Identity;
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::lock;

const QUEUE_SIZE: u16 = 64;
/// Queues of the port: input, output.
const QUEUES: usize = 2;
const OUTPUT: usize = 1;
/// Columns, rows, ports, and a register that is not offered (5.3.4).
const CONFIG: [u8; 12] = [0; 12];
/// Most of a buffer that is printed: a driver has a page for it.
pub const MAX_PIECE: usize = 4096;

pub fn identity(features: u64) -> Identity {
    Identity {
        id: VIRTIO_ID_CONSOLE,
        features,
        queues: vec![QUEUE_SIZE; QUEUES],
        config: CONFIG.to_vec().into(),
    }
}

pub struct Console {
    pub memory: ServiceMemory<()>,
    sink: Mutex<Sink>,
}

impl Console {
    /// The sink never blocks; what does not fit is lost.
    pub fn new(memory: ServiceMemory<()>, sink: File) -> Console {
        Console {
            memory,
            sink: Mutex::new(Sink(Some(sink))),
        }
    }

    fn print(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) {
        let Some((readable, _)) = buffers::of_chain(memory, chain) else {
            return;
        };
        let mut piece = vec![0; readable.len().min(MAX_PIECE)];
        readable.read(&mut piece);
        // It takes everything.
        let _ = lock(&self.sink).write(&piece);
    }
}

impl Service for Console {
    type Bitmap = ();

    fn handle(&self, event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        let Some(ring) = rings.get(OUTPUT).filter(|_| usize::from(event) == OUTPUT) else {
            // Buffers for input wait for ever.
            return Ok(());
        };
        work_through("console", ring, &self.memory.memory(), |memory, chain| {
            self.print(memory, chain);
            0
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::super::hostile;
    use super::super::test_ring::TestRing;
    use super::*;

    fn console(ring: &TestRing) -> (Console, File) {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
        let console = Console::new(ring.memory.clone(), writer.into());
        (console, reader.into())
    }

    #[test]
    fn what_the_guest_prints_is_in_the_pipe_and_its_rest_is_lost() {
        let mut ring = TestRing::new();
        let (console, mut pipe) = console(&ring);
        let rings = [ring.ring.clone(), ring.ring.clone()];
        ring.write(0x20_000, b"Kernel panic");
        ring.add(&[(0x20_000, 7, false), (0x20_007, 5, false)]);
        console.handle(0, &rings).unwrap();
        assert!(ring.used().is_empty(), "of the queue for input");
        console.handle(1, &rings).unwrap();
        assert_eq!(ring.used(), [0]);
        let mut text = [0; 64];
        let len = pipe.read(&mut text).unwrap();
        assert_eq!(&text[..len], b"Kernel panic");
        // More than anybody reads, and in larger pieces than there are.
        for _ in 0..16 {
            ring.add(&[(0x20_000, 0x10_000, false)]);
            console.handle(1, &rings).unwrap();
        }
        drop(pipe);
        ring.add(&[(0x20_000, 7, false)]);
        console.handle(1, &rings).unwrap();
        assert_eq!(ring.used().len(), 18);
    }

    #[test]
    fn no_sequence_of_chains_ends_it() {
        let ring = TestRing::new();
        let (console, mut pipe) = console(&ring);
        let request = |random: &mut hostile::Random, ring: &mut TestRing| {
            let buffers = random.below(4) + 1;
            let chain: Vec<_> = (0..buffers).map(|_| random.buffer()).collect();
            ring.add(&chain);
        };
        let work = |ring: &TestRing| {
            let rings = [ring.ring.clone(), ring.ring.clone()];
            console.handle(1, &rings).unwrap();
        };
        let mut ring = hostile::drive(ring, 10_000, request, work);
        while pipe.read(&mut [0; 4096]).is_ok() {}
        ring.write(0x20_000, b"alive");
        ring.add(&[(0x20_000, 5, false)]);
        work(&ring);
        let mut text = [0; 16];
        assert_eq!(pipe.read(&mut text).unwrap(), 5);
        assert_eq!(&text[..5], b"alive");
    }
}
