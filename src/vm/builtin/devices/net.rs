//! virtio-net on a tap interface (VIRTIO 1.2, 5.1): one queue in each direction.
//!
//! Frames go from the guest's buffers to the tap and back without being looked at,
//! each with its virtio-net header: checksums and segmentation are left to whoever
//! needs them, as far as the driver has agreed. The device waits for frames only as
//! long as the guest has buffers for them; others wait in the tap, which drops what
//! it cannot hold.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap};

use super::{Answer, work_through};
use crate::vm::builtin::virtio::registers::{Identity, QueueSetup, Rings};
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The tap has frames.
pub const TAP_EVENT: u64 = 16;

/// Length of the header in front of each frame, and where it has the number of
/// buffers, which is 1 without mergeable ones.
const HEADER_LEN: libc::c_int = 12;
const NUM_BUFFERS: u64 = 10;
/// Most pieces of a buffer; drivers use up to 19.
const MAX_PIECES: usize = 64;

// include/uapi/linux/if_tun.h
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;

const OFFLOADS: [(u32, libc::c_uint); 3] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
];

pub fn identity(features: u64, mac: [u8; 6]) -> Identity {
    let own = [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
    ];
    Identity {
        id: VIRTIO_ID_NET,
        features: own.iter().fold(features, |all, bit| all | 1 << bit),
        queues: vec![QUEUE_SIZE; 2],
        config: mac.to_vec(),
    }
}

/// What the driver has agreed to, from the registers to the worker.
pub type Agreed = Arc<AtomicU64>;

/// The queues of the device, which also tell what was agreed.
pub struct NetRings<R> {
    pub rings: R,
    pub agreed: Agreed,
}

impl<R: Rings> Rings for NetRings<R> {
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        self.agreed.store(features, Ordering::Release);
        self.rings.start(features, queues)
    }

    fn stop(&mut self) {
        self.rings.stop();
        // Nobody takes what is not a plain frame any more.
        self.agreed.store(0, Ordering::Release);
    }
}

pub struct Net {
    tap: OwnedFd,
    memory: ServiceMemory<()>,
    agreed: Agreed,
    /// What the tap was told last.
    told: AtomicU64,
}

impl Net {
    /// # Errors
    /// The descriptor is not that of a tap with headers.
    pub fn new(tap: OwnedFd, memory: ServiceMemory<()>, agreed: Agreed) -> io::Result<Net> {
        // SAFETY: the request reads an integer, which outlives the call.
        let set = unsafe {
            libc::ioctl(
                tap.as_raw_fd(),
                libc::TUNSETVNETHDRSZ as libc::Ioctl,
                &raw const HEADER_LEN,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        rustix::io::ioctl_fionbio(&tap, true)?;
        let net = Net {
            tap,
            memory,
            agreed,
            told: AtomicU64::new(u64::MAX),
        };
        net.tell_tap();
        Ok(net)
    }

    pub fn tap(&self) -> i32 {
        self.tap.as_raw_fd()
    }

    /// Lets the host leave as much of frames to the guest as was agreed.
    fn tell_tap(&self) {
        let agreed = self.agreed.load(Ordering::Acquire);
        if self.told.swap(agreed, Ordering::AcqRel) == agreed {
            return;
        }
        let offloads = OFFLOADS
            .iter()
            .filter(|(bit, _)| agreed & 1 << bit != 0)
            .fold(0, |all, (_, flag)| all | flag);
        // SAFETY: the request takes a number.
        let set = unsafe {
            libc::ioctl(
                self.tap.as_raw_fd(),
                libc::TUNSETOFFLOAD as libc::Ioctl,
                libc::c_ulong::from(offloads),
            )
        };
        if set < 0 {
            log::warn!("net: offloads: {}", io::Error::last_os_error());
        }
    }

    /// Moves a frame of the guest to the tap. A frame the tap does not take is lost,
    /// as on a wire.
    fn transmit(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) {
        let pieces = pieces(memory, chain.readable());
        if let Some(pieces) = pieces {
            // SAFETY: the pieces are in the guest's memory, which is mapped as long
            // as `memory`; that the guest writes to it meanwhile is its own affair.
            unsafe { libc::writev(self.tap.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        }
    }

    /// Moves a frame of the tap to the guest.
    fn receive(
        &self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Answer {
        let first = chain.clone().writable().next();
        let Some(pieces) = pieces(memory, chain.writable()) else {
            return Answer::Used(0);
        };
        // SAFETY: the pieces are in the guest's memory, which is mapped as long as
        // `memory`; nothing of this process refers to it.
        let len =
            unsafe { libc::readv(self.tap.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        if len < 0 {
            // No frame, or no interface any more: the buffer is not used.
            return Answer::Later;
        }
        if let Some(first) = first.filter(|first| first.len() >= HEADER_LEN as u32) {
            let place = first.addr().unchecked_add(NUM_BUFFERS);
            // It was just written to.
            let _ = memory.write_obj(1u16.to_le(), place);
        }
        // A frame and its header.
        Answer::Used(len as u32)
    }
}

/// The parts of a buffer as the kernel wants them; `None` for one that is not all
/// memory, or has too many parts or none.
fn pieces<'a>(
    memory: &'a GuestMemoryMmap,
    chain: impl Iterator<Item = virtio_queue::desc::split::Descriptor> + 'a,
) -> Option<Vec<libc::iovec>> {
    let mut pieces = Vec::new();
    for part in chain {
        let (address, len): (GuestAddress, _) = (part.addr(), part.len() as usize);
        // A part may lie across two regions of memory.
        for slice in memory.get_slices(address, len) {
            let slice = slice.ok()?;
            pieces.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        if pieces.len() > MAX_PIECES {
            return None;
        }
    }
    (!pieces.is_empty()).then_some(pieces)
}

impl Service for Net {
    type Bitmap = ();

    fn handle(&self, event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        self.tell_tap();
        let memory = self.memory.memory();
        let [receive, transmit] = rings else {
            return Ok(());
        };
        let (is_receive, is_transmit) = (
            event as usize == RECEIVE || u64::from(event) == TAP_EVENT,
            event as usize == TRANSMIT,
        );
        if is_receive {
            work_through("net", receive, &memory, |memory, chain| {
                self.receive(memory, chain)
            });
        }
        if is_transmit {
            work_through("net", transmit, &memory, |memory, chain| {
                self.transmit(memory, chain);
                Answer::Used(0)
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_ring::TestRing;
    use super::*;
    use std::os::unix::net::UnixDatagram;

    /// A pair of sockets that keep frames apart plays the tap.
    fn net(ring: &TestRing) -> (Net, UnixDatagram) {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        for socket in [&tap, &wire] {
            socket.set_nonblocking(true).unwrap();
        }
        let net = Net {
            tap: tap.into(),
            memory: ring.memory.clone(),
            agreed: Agreed::default(),
            told: AtomicU64::new(0),
        };
        (net, wire)
    }

    fn handle(net: &Net, event: usize, ring: &TestRing) {
        let rings = [ring.ring.clone(), ring.ring.clone()];
        net.handle(event as u16, &rings).unwrap();
    }

    #[test]
    fn frames_go_out_as_they_are() {
        let mut ring = TestRing::new();
        let (net, wire) = net(&ring);
        ring.write(0x10_000, b"header......");
        ring.write(0x20_000, b"a frame");
        ring.add(&[(0x10_000, 12, false), (0x20_000, 7, false)]);
        handle(&net, TRANSMIT, &ring);
        let mut frame = [0; 64];
        assert_eq!(wire.recv(&mut frame).unwrap(), 19);
        assert_eq!(&frame[..19], b"header......a frame");
        assert_eq!(ring.used(), [0]);
    }

    #[test]
    fn frames_wait_for_buffers_and_buffers_for_frames() {
        let mut ring = TestRing::new();
        let (net, wire) = net(&ring);
        wire.send(b"............frame one").unwrap();
        handle(&net, TAP_EVENT as usize, &ring);
        assert!(ring.used().is_empty());
        ring.add(&[(0x10_000, 16, true), (0x20_000, 1500, true)]);
        ring.add(&[(0x30_000, 1500, true)]);
        handle(&net, RECEIVE, &ring);
        assert_eq!(ring.used(), [21]);
        assert_eq!(ring.read(0x10_000, 16), b"..........\x01\0fram");
        assert_eq!(ring.read(0x20_000, 5), b"e one");
        wire.send(b"............two").unwrap();
        handle(&net, TAP_EVENT as usize, &ring);
        assert_eq!(ring.used(), [21, 15]);
        assert_eq!(ring.read(0x30_000 + 12, 3), b"two");
    }

    #[test]
    fn malformed_buffers_take_and_give_nothing() {
        let mut ring = TestRing::new();
        let (net, wire) = net(&ring);
        wire.send(b"............frame").unwrap();
        ring.add(&[(1 << 40, 1500, true)]);
        ring.add(&[(0x10_000, 1500, false)]);
        ring.add(&[(TestRing::SIZE - 4, 1500, true)]);
        ring.add(&[(0x10_000, 0, true)]);
        handle(&net, RECEIVE, &ring);
        assert_eq!(ring.used()[..3], [0; 3]);
        let mut ring = TestRing::new();
        let (net, wire) = self::net(&ring);
        ring.add(&[(1 << 40, 1500, false)]);
        ring.add(&[(0x10_000, 1500, true)]);
        handle(&net, TRANSMIT, &ring);
        assert_eq!(ring.used(), [0; 2]);
        assert!(wire.recv(&mut [0; 64]).is_err(), "nothing was sent");
    }

    #[test]
    fn what_is_agreed_ends_with_the_driver() {
        let ring = TestRing::new();
        let agreed = Agreed::default();
        let mut rings = NetRings {
            rings: ring.into_rings(),
            agreed: agreed.clone(),
        };
        assert!(rings.start(1 << 32 | 7, &[]));
        assert_eq!(agreed.load(Ordering::Acquire), 1 << 32 | 7);
        rings.stop();
        assert_eq!(agreed.load(Ordering::Acquire), 0);
    }
}
