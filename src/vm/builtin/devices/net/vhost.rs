//! vhost-net: a pair of queues that the host's kernel works on.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestAddressSpace, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{FEATURES as RING_FEATURES, QUEUE_SIZE, feature};
use crate::vm::builtin::virtio::registers::QueueSetup;
use crate::vm::builtin::virtio::worker::ServiceMemory;

/// Features that the kernel takes part in.
pub const FEATURES: u64 = RING_FEATURES | feature::MRG_RXBUF;

pub struct VhostNet {
    file: File,
    memory: ServiceMemory<()>,
}

impl AsRawFd for VhostNet {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for VhostNet {
    type AS = ServiceMemory<()>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl VhostNet {
    /// Takes a copy of an open `/dev/vhost-net` and makes it this process's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(fd: &OwnedFd, memory: &ServiceMemory<()>) -> io::Result<VhostNet> {
        let vhost = VhostNet {
            file: fd.try_clone()?.into(),
            memory: memory.clone(),
        };
        vhost.set_owner().map_err(io::Error::other)?;
        let guest = memory.memory();
        // The kernel works in this process's mapping, and asks for no file.
        let regions = guest.iter().map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        });
        let regions: Vec<_> = regions.collect();
        vhost.set_mem_table(&regions).map_err(io::Error::other)?;
        Ok(vhost)
    }

    /// # Errors
    /// The kernel's.
    pub fn features(&self) -> io::Result<u64> {
        self.get_features().map_err(io::Error::other)
    }

    /// Has the kernel work on a pair of queues.
    ///
    /// # Errors
    /// The queues are not as they have to be; the interface is gone.
    pub fn start(
        &self,
        features: u64,
        queues: &[QueueSetup],
        kicks: &[EventFd],
        call: &EventFd,
        tap: &Option<File>,
    ) -> io::Result<()> {
        let tap = tap.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        self.set_features(features & FEATURES)
            .map_err(io::Error::other)?;
        for (number, (queue, kick)) in queues.iter().zip(kicks).enumerate() {
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: queue.size,
                flags: 0,
                desc_table_addr: queue.descriptors,
                used_ring_addr: queue.used,
                avail_ring_addr: queue.available,
                log_addr: None,
            };
            self.set_vring_num(number, queue.size)
                .and_then(|()| self.set_vring_base(number, 0))
                .and_then(|()| self.set_vring_addr(number, &config))
                .and_then(|()| self.set_vring_call(number, call))
                .and_then(|()| self.set_vring_kick(number, kick))
                .map_err(io::Error::other)?;
        }
        for number in 0..queues.len() {
            self.set_backend(number, tap.as_raw_fd())?;
        }
        Ok(())
    }

    /// Has it stop, which waits for what is under way.
    pub fn stop(&self) {
        for queue in 0..2 {
            if let Err(e) = self.set_backend(queue, -1) {
                log::debug!("net: vhost-net: queue {queue}: {e}");
            }
        }
    }

    fn set_backend(&self, queue: usize, fd: RawFd) -> io::Result<()> {
        let file = vhost_vring_file {
            // One of two.
            index: queue as u32,
            fd,
        };
        // SAFETY: the request reads the structure, and the descriptor is open.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
