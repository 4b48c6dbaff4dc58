use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use nix::sched::{CloneFlags, unshare};

use super::super::hostile::Random;
use super::super::test_ring::TestQueue;
use super::*;
use crate::sandbox::network::tap::Tap;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const VERSION_1: u64 = 1 << 32;
const SIZE: u64 = 4 << 20;
/// What the driver's buffers are.
const BUFFERS: u64 = 1 << 20;
/// EtherType for experiments (IEEE 802).
const TYPE: [u8; 2] = [0x88, 0xb5];

/// A device on a tap in a network namespace of the test's thread, a socket at the
/// other end, and a driver.
struct Bench {
    device: Plugged,
    socket: OwnedFd,
    tap: String,
    queues: Vec<TestQueue>,
}

impl Bench {
    fn new(pairs: u32) -> Bench {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let mut netlink = Rtnetlink::new().unwrap();
        let tap = Tap::create(&mut netlink, pairs, 1500).unwrap();
        let memory =
            GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), SIZE as usize)]).unwrap();
        let device = NetDevice {
            queues: tap.queues,
            vhost: Vec::new(),
            mac: MAC,
        };
        let device = plug(&memory, &device).unwrap();
        let count = device.planned.identity.queues.len() as u64;
        let queues = (0..count).map(|n| TestQueue::new(memory.clone(), 0x1000 + n * 0x4000));
        Bench {
            device,
            socket: packets(tap.index),
            tap: tap.name,
            queues: queues.collect(),
        }
    }

    fn start(&mut self, features: u64) -> bool {
        let setup: Vec<_> = self.queues.iter().map(TestQueue::setup).collect();
        self.device
            .planned
            .rings
            .start(VERSION_1 | features, &setup)
    }

    /// Rings as new; the device is stopped.
    fn reset(&mut self) {
        for queue in &mut self.queues {
            let setup = queue.setup();
            let memory = GuestMemoryMmap::clone(queue.memory());
            *queue = TestQueue::new(memory, setup.descriptors);
            queue.write(setup.available, &[0; 4]);
            queue.write(setup.used, &[0; 4]);
        }
    }

    fn kick(&self, queue: usize) {
        self.device.planned.events.kicks[queue].write(1).unwrap();
    }

    /// The driver sends; `false` if the device does not answer.
    fn transmit(&mut self, chain: &[(u64, u32, bool)]) {
        let before = self.queues[1].used().len();
        self.queues[1].add(chain);
        self.kick(1);
        self.queues[1].wait_for_used(before + 1);
    }

    fn is_there(&self) -> bool {
        nix::net::if_::if_nametoindex(self.tap.as_str()).is_ok()
    }

    fn fails(&self) -> bool {
        self.device.handles.iter().any(|h| h.failure().is_some())
    }
}

/// A socket for all frames of an interface.
fn packets(index: u32) -> OwnedFd {
    let protocol = u16::from_be_bytes(TYPE).to_be();
    // SAFETY: the descriptor belongs to nobody else; the address is complete, and zeros
    // are valid for the rest of it.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol));
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as u32;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
        let timeout = libc::timeval {
            tv_sec: 30,
            tv_usec: 0,
        };
        let len = size_of_val(&timeout) as u32;
        let set = libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            len,
        );
        assert_eq!(set, 0);
        socket
    }
}

fn send(socket: &OwnedFd, frame: &[u8]) {
    // SAFETY: pointer and length are those of the slice.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    assert_eq!(usize::try_from(sent).unwrap(), frame.len());
}

fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut frame = vec![0; 70_000];
    // SAFETY: pointer and length are those of the vector.
    let len = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            frame.as_mut_ptr().cast(),
            frame.len(),
            0,
        )
    };
    assert!(len > 0, "{}", io::Error::last_os_error());
    frame.truncate(len as usize);
    frame
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = MAC.to_vec();
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(TYPE);
    frame.resize(len, fill);
    frame
}

#[test]
fn frames_go_both_ways() {
    let mut bench = Bench::new(1);
    assert!(bench.start(feature::MRG_RXBUF | feature::OF_GUEST | feature::OF_HOST));
    bench.queues[1].write(BUFFERS + 12, &frame(60, 3));
    bench.transmit(&[(BUFFERS, 12, false), (BUFFERS + 12, 60, false)]);
    assert_eq!(receive(&bench.socket), frame(60, 3));
    // A frame that comes before there is a buffer waits for it.
    send(&bench.socket, &frame(80, 4));
    std::thread::sleep(Duration::from_millis(50));
    bench.queues[0].add(&[(BUFFERS, 2048, true)]);
    bench.kick(0);
    assert_eq!(bench.queues[0].wait_for_used(1), [92]);
    let bytes = bench.queues[0].read(BUFFERS, 92);
    assert_eq!(bytes[10..12], [1, 0], "one buffer");
    assert_eq!(bytes[12..], frame(80, 4));
    // One that does not fit one buffer takes several, and waits for all of them.
    bench.queues[0].add(&[(BUFFERS, 512, true)]);
    bench.kick(0);
    send(&bench.socket, &frame(1400, 5));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.queues[0].used().len(), 1);
    for n in 1..4 {
        bench.queues[0].add(&[(BUFFERS + n * 512, 512, true)]);
    }
    bench.kick(0);
    assert_eq!(bench.queues[0].wait_for_used(4)[1..], [512, 512, 388]);
    let bytes = bench.queues[0].read(BUFFERS, 1412);
    assert_eq!(bytes[10..12], [3, 0], "three buffers");
    assert_eq!(bytes[12..], frame(1400, 5));
    assert!(!bench.fails());
}

#[test]
fn frames_that_are_not_merged_need_a_buffer_that_is_long_enough() {
    let mut bench = Bench::new(1);
    assert!(bench.start(0));
    bench.queues[0].add(&[(BUFFERS, 100, true)]);
    bench.queues[0].add(&[(BUFFERS + 4096, 12, true), (BUFFERS + 8192, 1500, true)]);
    bench.kick(0);
    send(&bench.socket, &frame(600, 1));
    send(&bench.socket, &frame(700, 2));
    // The first was lost with the buffer that is too short.
    assert_eq!(bench.queues[0].wait_for_used(2), [0, 712]);
    assert_eq!(bench.queues[0].read(BUFFERS + 8192, 700), frame(700, 2));
}

#[test]
fn what_a_hostile_driver_sends_harms_nobody() {
    let mut bench = Bench::new(1);
    assert!(bench.start(feature::MRG_RXBUF));
    let chains: [&[(u64, u32, bool)]; 7] = [
        &[(BUFFERS, 12, false)],
        &[(BUFFERS, 3, false)],
        &[(BUFFERS, 100, true)],
        &[(1 << 40, 100, false)],
        &[(BUFFERS, 12, false), (SIZE - 8, 100, false)],
        &[(BUFFERS, u32::MAX, false)],
        &[(BUFFERS, 200_000, false)],
    ];
    for chain in chains {
        bench.transmit(chain);
    }
    // A header of ones asks for a checksum and segments beyond the frame.
    bench.queues[1].write(BUFFERS, &[0xff; 100]);
    bench.transmit(&[(BUFFERS, 100, false)]);
    bench.queues[1].add_loop();
    bench.kick(1);
    bench.queues[1].wait_for_used(9);
    // Useless buffers for what comes in, then good ones.
    for chain in [
        &[(BUFFERS, 4, true)][..],
        &[(BUFFERS, 2000, false)],
        &[(1 << 40, 2000, true)],
    ] {
        bench.queues[0].add(chain);
    }
    bench.queues[0].add(&[(BUFFERS, 2000, true)]);
    bench.kick(0);
    for fill in 0..4 {
        send(&bench.socket, &frame(100, fill));
    }
    assert_eq!(bench.queues[0].wait_for_used(4), [0, 0, 0, 112]);
    bench.queues[1].break_ring();
    bench.kick(1);
    bench.queues[0].break_ring();
    bench.kick(0);
    send(&bench.socket, &frame(100, 9));
    std::thread::sleep(Duration::from_millis(50));
    // A reset repairs it.
    bench.device.planned.rings.stop();
    bench.reset();
    assert!(bench.start(0));
    bench.queues[1].write(BUFFERS, &[0; 12]);
    bench.queues[1].write(BUFFERS + 12, &frame(60, 8));
    bench.transmit(&[(BUFFERS, 72, false)]);
    while receive(&bench.socket) != frame(60, 8) {}
    assert!(!bench.fails());
}

#[test]
fn pairs_of_queues_are_switched_on_by_the_driver() {
    let mut bench = Bench::new(2);
    assert_eq!(bench.queues.len(), 5);
    let identity = bench.device.planned.identity.clone();
    assert_eq!(identity.config.bytes(), [2, 0, 0, 0, 0, 7, 1, 0, 2, 0]);
    assert!(
        !bench.start(feature::CTRL_VQ),
        "the control queue would be elsewhere"
    );
    assert!(bench.start(feature::CTRL_VQ | feature::MQ | feature::MRG_RXBUF));
    let mut command = |bytes: &[u8]| {
        let count = bench.queues[4].used().len();
        bench.queues[4].write(BUFFERS, bytes);
        bench.queues[4].write(BUFFERS + 64, &[0xee]);
        let len = bytes.len() as u32;
        bench.queues[4].add(&[(BUFFERS, len, false), (BUFFERS + 64, 1, true)]);
        bench.kick(4);
        bench.queues[4].wait_for_used(count + 1);
        bench.queues[4].read(BUFFERS + 64, 1)[0]
    };
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    assert_eq!(command(&[4, 0, 1, 0]), 0);
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 255, 255],
        &[4, 0, 1],
        &[4],
        &[4, 1, 1, 0],
        &[1, 0, 1, 0],
    ] {
        assert_eq!(command(bad), 1, "{bad:?}");
    }
    // Frames go out by either pair.
    for (pair, fill) in [(0, 1), (1, 2)] {
        let queue = 2 * pair + 1;
        bench.queues[queue].write(BUFFERS, &[0; 12]);
        bench.queues[queue].write(BUFFERS + 12, &frame(60, fill));
        bench.queues[queue].add(&[(BUFFERS, 72, false)]);
        bench.kick(queue);
        assert_eq!(receive(&bench.socket), frame(60, fill));
    }
    assert!(!bench.fails());
}

#[test]
fn a_detached_device_has_lost_its_interface_and_still_answers() {
    let mut bench = Bench::new(1);
    assert!(bench.start(0));
    assert!(bench.is_there());
    bench.device.back_end.disconnect();
    assert!(!bench.is_there());
    bench.queues[1].write(BUFFERS, &[0; 100]);
    bench.transmit(&[(BUFFERS, 100, false)]);
    bench.device.planned.rings.stop();
    assert!(bench.start(0), "a driver may still set it up");
    assert!(!bench.fails());
}

#[test]
fn no_sequence_of_chains_ends_a_device() {
    let mut bench = Bench::new(2);
    let features = feature::CTRL_VQ | feature::MQ | feature::MRG_RXBUF;
    let mut random = Random::new(0xbad);
    for round in 0..300u32 {
        let offloads = random.next() & (feature::OF_GUEST | feature::OF_HOST);
        // Some combinations of offloads are refused; the device stays as it was.
        if bench.start(features | offloads) {
            for _ in 0..random.below(24) {
                let queue = random.below(5) as usize;
                let chain: Vec<_> = (0..=random.below(4)).map(|_| random.buffer()).collect();
                if random.below(32) == 0 {
                    bench.queues[queue].break_ring();
                } else {
                    bench.queues[queue].add(&chain);
                }
                bench.kick(queue);
            }
            if random.below(4) == 0 {
                send(&bench.socket, &frame(100, round as u8));
            }
            bench.device.planned.rings.stop();
        }
        bench.reset();
        assert!(!bench.fails());
    }
    assert!(bench.start(feature::MRG_RXBUF | feature::CTRL_VQ | feature::MQ));
    bench.queues[1].write(BUFFERS, &[0; 12]);
    bench.queues[1].write(BUFFERS + 12, &frame(60, 8));
    bench.transmit(&[(BUFFERS, 72, false)]);
    while receive(&bench.socket) != frame(60, 8) {}
}
