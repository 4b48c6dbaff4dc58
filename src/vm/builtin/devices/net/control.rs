//! The device's own thread: sets up what the driver has negotiated, and serves the
//! control queue (VIRTIO 1.2, 5.1.6.5), of which only the number of queues is offered.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::super::mailbox::{Mailbox, Request};
use super::super::{buffers, work_through};
use super::{Net, feature};
use crate::vm::builtin::virtio::registers::QueueSetup;
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::{Own, Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::{PoisonFree, lock};

/// Class and command (5.1.6.5.5).
const SET_PAIRS: [u8; 2] = [4, 0];

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Event of the mailbox; smaller ones are those of the queue.
const MAIL: u64 = 16;

pub struct Control {
    pub net: Arc<Net>,
    pub mailbox: Arc<Mailbox>,
    pub memory: ServiceMemory<()>,
    pub events: Arc<Events>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl Service for Control {
    type Bitmap = ();

    fn handle(&self, event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        if u64::from(event) == MAIL {
            self.mailbox.answer(|request| match request {
                Request::Start(features, queues) => self.start(features, &queues),
                Request::Stop => self.stop(),
            });
            return Ok(());
        }
        let memory = self.memory.memory();
        for ring in rings {
            work_through("net", ring, &memory, |memory, chain| {
                self.command(memory, chain)
            });
        }
        Ok(())
    }

    fn own_events(&self) -> Vec<Own> {
        vec![(self.mailbox.event.as_raw_fd(), MAIL, EventSet::IN)]
    }
}

impl Control {
    fn start(&self, features: u64, queues: &[QueueSetup]) -> bool {
        for tap in &self.net.taps {
            if let Err(e) = tap.set_offloads(features & feature::OF_GUEST) {
                // A driver can have this as often as it likes, as what follows.
                log::debug!("net: offloads: {e}");
                return false;
            }
        }
        // The first pair alone is in use until the driver asks for more.
        self.net.use_pairs(1);
        let vhost = self.net.vhost.read_unpoisoned();
        for (number, (vhost, tap)) in vhost.iter().zip(&self.net.taps).enumerate() {
            let first = 2 * number;
            let (Some(setup), Some(kicks)) = (
                queues.get(first..first + 2),
                self.events.kicks.get(first..first + 2),
            ) else {
                return false;
            };
            // A driver may have fewer pairs than there are.
            if !setup.iter().all(|queue| queue.ready) {
                continue;
            }
            let started = vhost.start(features, setup, kicks, &self.events.call, &tap.file());
            if let Err(e) = started {
                log::debug!("net: vhost-net: {e}");
                vhost.stop();
                return false;
            }
        }
        true
    }

    fn stop(&self) -> bool {
        for vhost in &*self.net.vhost.read_unpoisoned() {
            vhost.stop();
        }
        true
    }

    /// The number of bytes written.
    fn command(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let Some((mut readable, writable)) = buffers::of_chain(memory, chain) else {
            return 0;
        };
        let done = readable.take::<2>() == Some(SET_PAIRS)
            && readable
                .take::<2>()
                .is_some_and(|pairs| self.set_pairs(u16::from_le_bytes(pairs)));
        let answer = if done { OK } else { ERROR };
        // One byte at most.
        writable.write(&[answer]) as u32
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        let pairs = usize::from(pairs);
        if pairs == 0 || pairs > self.net.taps.len() {
            return false;
        }
        self.net.use_pairs(pairs);
        true
    }
}

impl Net {
    /// Has the interface spread frames over the first `pairs` queues and no others.
    fn use_pairs(&self, pairs: usize) {
        let _changing = lock(&self.active);
        // An interface with one queue knows of no such state.
        if self.taps.len() == 1 {
            return;
        }
        for (number, tap) in self.taps.iter().enumerate() {
            match tap.set_active(number < pairs) {
                // It is in this state already.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) => log::debug!("net: queue {number}: {e}"),
                Ok(()) => {}
            }
        }
    }
}
