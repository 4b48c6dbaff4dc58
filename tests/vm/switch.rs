//! A program that serves a network card over vhost-user and has a tap at its other end: what
//! a switch in user space is to a machine, without the switch. It is this test binary.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use kuasar_runv_test_harness::Netns;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::served::Program;

/// Socket and name of the tap, separated by a blank.
const VARIABLE: &str = "KRT_SWITCH";

/// Starts the program in a network namespace; its tap has `address` there.
pub fn start(netns: &Netns, socket: &Path, tap: &str, address: &str) -> Program {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", netns.name()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "switch::main"])
        .env(VARIABLE, format!("{} {tap}", socket.display()));
    let program = Program::start(&mut command, socket.to_owned());
    netns.address(tap, &[address]);
    netns.ip(&format!("link set {tap} up"));
    program
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Ring = VringMutex<Memory>;

/// Numbers of the queues; the next is the library's, then comes the event of the tap.
const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;
const FRAME: u16 = 3;
/// `struct virtio_net_hdr_v1`, and its field of the number of buffers.
const HEADER: usize = 12;
const BUFFERS_AT: usize = 10;

struct Switch {
    tap: File,
    memory: Mutex<Option<Memory>>,
}

impl Switch {
    /// What the guest sends goes out by the tap.
    fn transmit(&self, ring: &Ring, memory: &GuestMemoryMmap) {
        let mut state = ring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return;
        }
        while let Some(chain) = state.get_queue_mut().iter(memory).unwrap().next() {
            let head = chain.head_index();
            let mut frame = Vec::new();
            for part in chain.readable() {
                let start = frame.len();
                frame.resize(start + part.len() as usize, 0);
                memory.read_slice(&mut frame[start..], part.addr()).unwrap();
            }
            // A network may lose what it likes.
            let _ = (&self.tap).write(&frame);
            state.add_used(head, 0).unwrap();
        }
        state.signal_used_queue().unwrap();
    }

    /// What comes in by the tap goes to the guest, or nowhere if that has no buffer.
    fn receive(&self, ring: &Ring, memory: &GuestMemoryMmap) {
        let mut frame = vec![0; 65_536 + HEADER];
        while let Ok(len) = (&self.tap).read(&mut frame) {
            let mut state = ring.get_mut();
            if !state.is_enabled() || !state.get_queue().ready() {
                continue;
            }
            let Some(chain) = state.get_queue_mut().iter(memory).unwrap().next() else {
                continue;
            };
            let head = chain.head_index();
            frame[BUFFERS_AT..HEADER].copy_from_slice(&1u16.to_le_bytes());
            let mut left = &frame[..len];
            for part in chain.writable() {
                let (now, later) = left.split_at(left.len().min(part.len() as usize));
                memory.write_slice(now, part.addr()).unwrap();
                left = later;
            }
            state.add_used(head, (len - left.len()) as u32).unwrap();
            state.signal_used_queue().unwrap();
        }
    }
}

impl VhostUserBackend for Switch {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.lock().unwrap().as_ref().map(|m| m.memory());
        if let Some(memory) = memory {
            match event {
                FROM_GUEST => self.transmit(&rings[usize::from(FROM_GUEST)], &memory),
                TO_GUEST | FRAME => self.receive(&rings[usize::from(TO_GUEST)], &memory),
                other => panic!("an event {other}"),
            }
        }
        Ok(())
    }
}

/// A tap that has the headers of virtio-net before its frames.
fn tap(name: &str) -> File {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
    let mut options = File::options();
    let options = options.read(true).write(true);
    let tap = std::os::unix::fs::OpenOptionsExt::custom_flags(options, libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    // `struct ifreq`: name and flags.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_le_bytes());
    // SAFETY: the requests read the structure and the number that they are given.
    unsafe {
        assert_eq!(libc::ioctl(tap.as_raw_fd(), TUNSETIFF as _, &request), 0);
        let size = HEADER as libc::c_int;
        assert_eq!(libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ as _, &size), 0);
    }
    tap
}

/// The program itself.
#[test]
#[ignore = "is the program of other tests"]
fn main() {
    let Ok(wanted) = std::env::var(VARIABLE) else {
        return;
    };
    let (socket, name) = wanted.split_once(' ').unwrap();
    let switch = Arc::new(Switch {
        tap: tap(name),
        memory: Mutex::new(None),
    });
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("switch".into(), switch.clone(), memory).unwrap();
    for handler in daemon.get_epoll_handlers() {
        let tap = switch.tap.as_raw_fd();
        handler
            .register_listener(tap, EventSet::IN, FRAME.into())
            .unwrap();
    }
    let mut listener = Listener::new(socket, false).unwrap();
    daemon.start(&mut listener).unwrap();
    // However the machine ends, it is one.
    let _ = daemon.wait();
}
