//! The front end before back ends of this process: one that serves a block device, the
//! file server, and some that do not do what they should.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::vm::VhostUserKind;
use crate::vm::builtin::devices::FEATURES;
use crate::vm::builtin::devices::test_ring::TestQueue;
use crate::vm::builtin::memory::MemoryFile;
use crate::vm::devices::vhost_user::{ExitEvent, Memory, Ring, is_running, lock, serve};

const DEADLINE: Duration = Duration::from_secs(10);
const SIZE: u64 = 16 << 20;
const ROOM: u64 = 128 << 20;
/// Memory that may be added later begins here.
const ADDED: u64 = 4 << 30;
const QUEUES_AT: u64 = 0x10_000;

/// A block device that answers each request with a byte.
struct Echo {
    exit: ExitEvent,
    memory: Mutex<Option<Memory>>,
    was_reset: AtomicBool,
}

impl VhostUserBackend for Echo {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        // More than a driver here may know of: SIZE_MAX, MQ and packed rings.
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << 1 | 1 << 12 | 1 << 34
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.was_reset.store(true, Ordering::Release);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let all: Vec<u8> = (0..=255).collect();
        all[offset as usize..(offset + size) as usize].to_vec()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.take()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = lock(&self.memory).as_ref().map(|memory| memory.memory());
        let (Some(memory), Some(ring)) = (memory, rings.get(usize::from(event))) else {
            return Ok(());
        };
        let mut state = ring.get_mut();
        if !is_running(&state) {
            return Ok(());
        }
        while let Some(chain) = state.get_queue_mut().iter(&*memory).unwrap().next() {
            let head = chain.head_index();
            for descriptor in chain.filter(|d| d.is_write_only()) {
                memory.write_obj(b'e', descriptor.addr()).unwrap();
            }
            state.add_used(head, 1).unwrap();
            state.signal_used_queue().unwrap();
        }
        Ok(())
    }
}

/// A listener, and a connection to it.
fn socket() -> (tempfile::TempDir, UnixListener, VhostUserDevice) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = UnixStream::connect(path).unwrap().into();
    let kind = VhostUserKind::Block;
    (dir, listener, VhostUserDevice { socket, kind })
}

fn memory() -> GuestMemoryMmap {
    MemoryFile::new(SIZE, ROOM).unwrap().map().unwrap()
}

/// A block device with its back end, which lives as long as the handle.
fn echo(vcpus: u32) -> (Plugged, GuestMemoryMmap, Arc<Echo>, Handle) {
    echo_as(VhostUserKind::Block, vcpus)
}

/// The same as another kind of device.
fn echo_as(kind: VhostUserKind, vcpus: u32) -> (Plugged, GuestMemoryMmap, Arc<Echo>, Handle) {
    let (_dir, listener, mut device) = socket();
    device.kind = kind;
    let echo = Arc::new(Echo {
        exit: ExitEvent::new().unwrap(),
        memory: Mutex::new(None),
        was_reset: AtomicBool::new(false),
    });
    let backend = echo.clone();
    let serving = Handle::spawn("test-back-end", move |control| {
        serve("echo", listener, backend, &[], control)
    });
    let memory = memory();
    let plugged = plug(&memory, vcpus, "disk-1", &device, DEADLINE).unwrap();
    (plugged, memory, echo, serving.unwrap())
}

fn is_readable(event: &EventFd) -> bool {
    // SAFETY: the descriptor is open as long as the event lives.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(10_000u16)).unwrap() == 1
}

fn queues(memory: &GuestMemoryMmap, count: u64) -> Vec<TestQueue> {
    let queue = |number| TestQueue::new(memory.clone(), QUEUES_AT + number * 0x10_000);
    (0..count).map(queue).collect()
}

fn setups(queues: &[TestQueue]) -> Vec<QueueSetup> {
    queues.iter().map(TestQueue::setup).collect()
}

#[test]
fn a_device_is_what_its_back_end_says_as_far_as_it_is_known() {
    let (plugged, ..) = echo(8);
    let Planned {
        identity, events, ..
    } = &plugged.planned;
    assert_eq!(identity.id, 2);
    // What is negotiated of the protocol is not the driver's, nor are packed rings.
    assert_eq!(identity.features, FEATURES | 1 << 1 | 1 << 12);
    assert_eq!(identity.queues, [128, 128], "as many as the back end has");
    assert!(events.kicks.len() >= 2);
    let space = identity.config.bytes();
    let mut expected: Vec<u8> = (0..60).collect();
    expected[34..36].copy_from_slice(&[2, 0]);
    assert_eq!(space, expected);

    let (plugged, ..) = echo(1);
    assert_eq!(plugged.planned.identity.queues, [128]);
    let (features, space) = (
        plugged.planned.identity.features,
        plugged.planned.identity.config.bytes(),
    );
    assert_eq!((features & 1 << 12, &space[34..36]), (0, &[1, 0][..]));
}

#[test]
fn a_back_end_works_on_the_queues_between_start_and_stop() {
    let (mut plugged, memory, echo, _serving) = echo(2);
    let planned = &mut plugged.planned;
    let features = planned.identity.features;
    for round in 0..2 {
        let mut queues = queues(&memory, 2);
        for (number, queue) in queues.iter_mut().enumerate() {
            // The second in memory that the machine has not grown to yet.
            let buffer = [0x8000, ADDED + 0x1000][number];
            memory.write_obj(0u8, GuestAddress(buffer)).unwrap();
            queue.write(QUEUES_AT + number as u64 * 0x10_000 + 0x1000, &[0; 0x2000]);
            // There before the start, and after it.
            queue.add(&[(buffer, 1, true)]);
        }
        assert!(planned.rings.start(features, &setups(&queues)), "{round}");
        for queue in &mut queues {
            assert_eq!(queue.wait_for_used(1), [1]);
        }
        for buffer in [0x8000, ADDED + 0x1000] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(buffer)).unwrap(), b'e');
        }
        assert!(is_readable(&planned.events.call));
        queues[1].add(&[(0x9000, 1, true)]);
        planned.events.kicks[1].write(1).unwrap();
        assert_eq!(queues[1].wait_for_used(2), [1, 1]);
        planned.rings.stop();
        assert!(echo.was_reset.swap(false, Ordering::AcqRel));
        // Nobody looks at it any more.
        queues[1].add(&[(0xa000, 1, true)]);
        planned.events.kicks[1].write(1).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(queues[1].used().len(), 2);
        let _ = (planned.events.kicks[1].read(), planned.events.call.read());
    }
    assert!(!planned.identity.config.has_failed());
}

#[test]
fn the_file_server_answers_over_vhost_user() {
    let (_dir, listener, device) = socket();
    let shared = tempfile::tempdir().unwrap();
    let directory = std::fs::File::open(shared.path()).unwrap().into();
    let _serving = crate::vm::devices::fs::spawn(listener, directory).unwrap();
    let device = VhostUserDevice {
        kind: VhostUserKind::Fs { tag: "fs-1".into() },
        ..device
    };
    let memory = memory();
    let mut plugged = plug(&memory, 1, "fs-1", &device, DEADLINE).unwrap();
    let identity = &plugged.planned.identity;
    assert_eq!((identity.id, identity.queues.len()), (26, 2));
    assert!(identity.config.bytes().starts_with(b"fs-1\0"));
    let mut queues = queues(&memory, 2);
    // FUSE_INIT, version 7.38 (include/uapi/linux/fuse.h).
    let request: Vec<u8> = [56 + 48, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 38]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .chain([0; 56])
        .collect();
    queues[1].write(0x8000, &request);
    queues[1].add(&[(0x8000, 104, false), (0x9000, 80, true)]);
    let features = identity.features;
    assert!(plugged.planned.rings.start(features, &setups(&queues)));
    assert_eq!(queues[1].wait_for_used(1), [80]);
    let error = i32::from_le_bytes(queues[1].read(0x9004, 4).try_into().unwrap());
    assert_eq!(error, 0);
}

/// What the driver sees is a matter of the registers; the machine goes on.
#[test]
fn a_back_end_that_ends_makes_the_device_need_a_reset() {
    let (mut plugged, memory, _echo, _serving) = echo(1);
    let queues = queues(&memory, 1);
    let planned = &mut plugged.planned;
    assert!(planned.rings.start(FEATURES, &setups(&queues)));
    let _ = planned.events.call.read();
    // As if the program had: it reads the end of the stream.
    plugged.back_end.disconnect();
    assert!(is_readable(&planned.events.call), "an interrupt");
    assert!(planned.identity.config.has_failed() && planned.identity.config.is_changed());
    let asked = std::time::Instant::now();
    planned.rings.stop();
    assert!(!planned.rings.start(FEATURES, &setups(&queues)));
    assert!(asked.elapsed() < Duration::from_secs(2), "nobody is asked");
    // The thread has not failed, which would end the pod.
    assert_eq!(plugged.handles[0].failure(), None);
}

#[test]
fn a_network_card_has_its_address_and_a_link_as_long_as_its_back_end() {
    let mac = [2, 0, 0, 0, 0xca, 1];
    let (mut plugged, memory, _echo, _serving) = echo_as(VhostUserKind::Net { mac }, 4);
    let planned = &mut plugged.planned;
    let identity = &planned.identity;
    assert_eq!((identity.id, &identity.queues[..]), (1, &[256, 256][..]));
    // GUEST_CSUM and HOST_TSO6 are the back end's, MAC and STATUS are not.
    let own = 1 << 5 | 1 << 16;
    assert_eq!(identity.features, FEATURES | 1 << 1 | 1 << 12 | own);
    assert_eq!(identity.config.bytes(), [2, 0, 0, 0, 0xca, 1, 1, 0]);
    // It hears only of what it has offered, and takes anything else for an error.
    let features = identity.features;
    let queues = queues(&memory, 2);
    assert!(planned.rings.start(features, &setups(&queues)));
    let _ = planned.events.call.read();
    let generation = planned.identity.config.generation();
    plugged.back_end.disconnect();
    assert!(is_readable(&planned.events.call), "an interrupt");
    let config = &planned.identity.config;
    assert_eq!(config.bytes(), [2, 0, 0, 0, 0xca, 1, 0, 0]);
    assert!(config.is_changed() && config.has_failed());
    assert_ne!(config.generation(), generation);
}

#[test]
fn a_back_end_that_is_none_is_an_error_in_time() {
    // It says nothing at all.
    let (_dir, listener, device) = socket();
    let held = listener.accept().unwrap();
    let short = Duration::from_millis(200);
    let error = plug(&memory(), 1, "disk-1", &device, short).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    drop(held);
    // It ends.
    let (_dir, listener, device) = socket();
    drop(listener.accept().unwrap());
    assert!(plug(&memory(), 1, "disk-1", &device, DEADLINE).is_err());
    // It speaks something else, at length.
    let (_dir, listener, device) = socket();
    let talker = thread::spawn(move || {
        let mut client = listener.accept().unwrap().0;
        client.read_exact(&mut [0; 12]).unwrap();
        while client.write_all(&[0x41; 4096]).is_ok() {}
    });
    assert!(plug(&memory(), 1, "disk-1", &device, DEADLINE).is_err());
    drop(device);
    talker.join().unwrap();
    // The file server has no configuration that says what disk it is.
    let (_dir, listener, device) = socket();
    let shared = tempfile::tempdir().unwrap();
    let directory = std::fs::File::open(shared.path()).unwrap().into();
    let _serving = crate::vm::devices::fs::spawn(listener, directory).unwrap();
    let error = plug(&memory(), 1, "disk-1", &device, DEADLINE)
        .err()
        .unwrap();
    assert!(error.to_string().contains("CONFIG"), "{error}");
}

/// What [`fuzzing`] makes of it: each answer in turn is wrong, in each way.
#[test]
fn no_answer_that_is_wrong_does_harm() {
    // Two processors, but for cards.
    for kind in [2 << 1, 1 | 2 << 1, 1 | 7 << 1] {
        for place in 0..24 {
            for how in (0..64).chain(0xf0..=0xff) {
                for details in [&[1][..], &[0xff; 8]] {
                    // The device is started once.
                    let mut input = vec![kind];
                    input.resize(1 + place, 0);
                    input.push(how);
                    input.extend(details);
                    fuzzing::vhost_user(&mut crate::fuzzing::Input::new(&input));
                }
            }
        }
    }
}
