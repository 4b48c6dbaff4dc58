//! The device's core: requests in, answers out.
//!
//! The owner of the virtqueues (the vhost-user glue, or the built-in VMM) calls
//! [`Device::answer_next`] for each of them. The kind of guest memory is the file
//! server's choice: it could log writes for a migration, which nothing here does.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;
use vm_memory::GuestMemoryMmap;

use super::guard::Guard;
use crate::vm::devices::throttle::Throttle;
use crate::vm::devices::vhost_user::{lock, panic_text};

/// Guest memory that the file server can work with.
pub type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// The file system device of one VM.
pub struct Device<F = PassthroughFs>
where
    Guard<F>: FileSystem + Sync,
{
    server: Server<Guard<F>>,
    noise: Mutex<Throttle>,
}

impl<F> Device<F>
where
    Guard<F>: FileSystem + Sync,
{
    /// A device that serves these files.
    pub fn new(files: Guard<F>) -> Self {
        Self {
            server: Server::new(files),
            noise: Mutex::new(Throttle::default()),
        }
    }

    /// Answers the next request of a queue; `false` if there is none. It may take as
    /// long as the host's file system takes.
    ///
    /// # Errors
    /// The guest has broken its ring; it is useless until the next reset.
    pub fn answer_next(&self, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, QueueError> {
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(false);
        };
        let head = chain.head_index();
        let len = self.answer(memory, chain);
        queue.add_used(memory, head, len)?;
        Ok(true)
    }

    /// Answers a request and returns how many bytes of its buffers were written.
    fn answer(&self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> u32 {
        // A request the server cannot understand is returned unanswered, which
        // the guest's driver takes as an I/O error.
        let answer = || -> Result<usize, Box<dyn std::error::Error>> {
            let reader = Reader::new(memory, chain.clone())?;
            let writer = Writer::new(memory, chain)?;
            if writer.available_bytes() < size_of::<OutHeader>() && expects_answer(&reader)? {
                return Err("no room for the answer".into());
            }
            Ok(self
                .server
                .handle_message(reader, writer, None::<&mut ()>)?)
        };
        // The server checks most of what the guest says, but not all of it; a
        // panic must cost the guest its request and not the VM its device.
        match catch_unwind(AssertUnwindSafe(answer)) {
            Ok(Ok(len)) => u32::try_from(len).unwrap_or(0),
            Ok(Err(e)) => {
                self.complain(&e);
                0
            }
            Err(panic) => {
                self.complain(&panic_text(&*panic));
                0
            }
        }
    }

    /// Logs what a guest did wrong.
    pub fn complain(&self, what: &dyn std::fmt::Display) {
        let mut noise = lock(&self.noise);
        if let Some(suppressed) = noise.admit() {
            log::warn!("fs: request: {what} ({suppressed} similar lines suppressed)");
        }
    }
}

/// Whether a request is of a kind that is answered.
fn expects_answer(request: &Reader<'_>) -> io::Result<bool> {
    let header: InHeader = request.clone().read_obj()?;
    Ok(!matches!(
        Opcode::try_from(header.opcode),
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy)
    ))
}
