//! Requests as a hostile guest may send them, answered by the real server.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::confine;
use super::device::{Device, GuestMemory};

const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x20_0000;
const REPLY_LEN: u32 = 0x1_0000;
const READABLE: u16 = 0;
const WRITABLE: u16 = 2;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const READDIRPLUS: u32 = 44;

const ROOT: u64 = 1;
/// Flag of INIT.
const SUBMOUNTS: u32 = 1 << 27;
/// Flag of WRITE: the writer is not allowed to leave set-id bits as they are.
const KILL_SUIDGID: u32 = 1 << 2;

/// A guest that talks FUSE to the server of a directory.
struct Guest {
    memory: GuestMemory,
    device: Device,
}

/// Runs `test` on a thread of its own, because the server takes over a thread's
/// root and umask; nothing but the shared directory exists there. Next to it there
/// is a file `secret`, which is still the only one afterwards.
fn with_guest(test: impl FnOnce(&Guest) + Send) {
    let root = tempfile::tempdir().unwrap();
    let shared = root.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(root.path().join("secret"), "secret").unwrap();
    fs::write(shared.join("file"), "content").unwrap();
    let dir = File::open(&shared).unwrap().into();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let device = confine(&dir).unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
            let guest = Guest { memory, device };
            test(&guest);
        });
    });
    assert_eq!(fs::read(root.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}

impl Guest {
    /// Lets the server answer one chain; returns the bytes it says it has written.
    fn chain(&self, parts: &[(u64, u32, u16)]) -> Vec<u8> {
        let mem = &self.memory;
        for (index, (address, len, flags)) in parts.iter().enumerate() {
            let at = GuestAddress(index as u64 * 16);
            let next = u16::from(index + 1 < parts.len());
            mem.write_obj(*address, at).unwrap();
            mem.write_obj(*len, GuestAddress(at.0 + 8)).unwrap();
            mem.write_obj(flags | next, GuestAddress(at.0 + 12))
                .unwrap();
            mem.write_obj(index as u16 + 1, GuestAddress(at.0 + 14))
                .unwrap();
        }
        let avail = 0x4000;
        mem.write_obj(1u16, GuestAddress(avail + 2)).unwrap();
        mem.write_obj(0u16, GuestAddress(avail + 4)).unwrap();
        let mut queue = Queue::new(256).unwrap();
        queue.set_desc_table_address(Some(0), None);
        queue.set_avail_ring_address(Some(avail as u32), None);
        queue.set_used_ring_address(Some(0x8000), None);
        queue.set_ready(true);
        mem.write_obj(0u16, GuestAddress(0x8002)).unwrap();
        assert!(self.device.answer_next(mem, &mut queue).unwrap());
        let len: u32 = mem.read_obj(GuestAddress(0x8008)).unwrap();
        let mut reply = vec![0; len.min(REPLY_LEN) as usize];
        mem.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        reply
    }

    fn raw(&self, bytes: &[u8], reply: u32) -> Vec<u8> {
        self.memory
            .write_slice(bytes, GuestAddress(REQUEST))
            .unwrap();
        self.chain(&[
            (REQUEST, bytes.len() as u32, READABLE),
            (REPLY, reply, WRITABLE),
        ])
    }

    /// The error number and the body of the answer.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let reply = self.raw(&request(opcode, node, body), REPLY_LEN);
        assert!(reply.len() >= 16, "no answer to {opcode}");
        let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
        (-error, reply[16..].to_vec())
    }

    fn init(&self) {
        let mut body = [7u32, 38, 0x2_0000, SUBMOUNTS, 0]
            .map(u32::to_le_bytes)
            .concat();
        body.resize(64, 0);
        assert_eq!(self.ask(INIT, 0, &body).0, 0);
    }
}

/// The answer to LOOKUP and its like.
struct Entry {
    node: u64,
    /// For how long name and attributes may be used without asking.
    trust: [Duration; 2],
}

impl Entry {
    fn read(answer: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        Self {
            node: u64_at(0),
            trust: [
                Duration::new(u64_at(16), u32_at(32)),
                Duration::new(u64_at(24), u32_at(36)),
            ],
        }
    }

    fn is_trusted(&self) -> bool {
        assert_eq!(self.trust[0].is_zero(), self.trust[1].is_zero());
        !self.trust[0].is_zero()
    }
}

impl Guest {
    fn lookup(&self, parent: u64, name: &str) -> Entry {
        let (error, answer) = self.ask(LOOKUP, parent, format!("{name}\0").as_bytes());
        assert_eq!(error, 0, "{name}");
        Entry::read(&answer)
    }

    /// Whether a file is there after the guest has asked for it to be made; its handle.
    fn create(&self, parent: u64, name: &str) -> (Entry, u64) {
        let mut body = [libc::O_RDWR as u32, libc::S_IFREG | 0o644, 0, 0]
            .map(u32::to_le_bytes)
            .concat();
        body.extend(format!("{name}\0").as_bytes());
        let (error, answer) = self.ask(CREATE, parent, &body);
        assert_eq!(error, 0, "{name}");
        let handle = u64::from_le_bytes(answer[128..136].try_into().unwrap());
        (Entry::read(&answer), handle)
    }

    fn write(&self, node: u64, handle: u64, flags: u32) {
        let mut body = Vec::new();
        body.extend(handle.to_le_bytes());
        body.extend(0u64.to_le_bytes());
        body.extend([7, flags].map(u32::to_le_bytes).concat());
        body.extend(0u64.to_le_bytes());
        body.extend([0u32; 2].map(u32::to_le_bytes).concat());
        body.extend(b"written");
        assert_eq!(self.ask(WRITE, node, &body).0, 0);
    }

    fn chmod(&self, node: u64, mode: u32) {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&1u32.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        assert_eq!(self.ask(SETATTR, node, &body).0, 0);
    }

    /// RENAME, or LINK with the file's number as first argument.
    fn move_to(&self, opcode: u32, node: u64, first: u64, names: &str) {
        let body = [&first.to_le_bytes(), names.as_bytes()].concat();
        assert_eq!(self.ask(opcode, node, &body).0, 0, "{names:?}");
    }
}

/// Does something to a file until its change time is another, which takes as long as
/// the host's clock for change times is coarse.
fn as_the_host(path: &str, change: impl Fn()) {
    let time = || {
        let file = fs::metadata(path).unwrap();
        (file.ctime(), file.ctime_nsec())
    };
    let before = time();
    for _ in 0..1000 {
        change();
        if time() != before {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{path} has the change time of before");
}

/// A FUSE request of process 1, user and group 0.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((40 + body.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0u32, 0, 1, 0].map(u32::to_le_bytes).concat());
    bytes.extend(body);
    bytes
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    with_guest(|guest| {
        guest.init();
        assert_eq!(guest.ask(LOOKUP, ROOT, b"file\0").0, 0);
        for name in ["..", "../secret", "/etc/passwd", "x/../../secret"] {
            let name = format!("{name}\0");
            let mkdir = [&[0; 8], name.as_bytes()].concat();
            let symlink = [name.as_bytes(), b"target\0"].concat();
            assert_eq!(guest.ask(LOOKUP, ROOT, name.as_bytes()).0, libc::EINVAL);
            assert_eq!(guest.ask(UNLINK, ROOT, name.as_bytes()).0, libc::EINVAL);
            assert_eq!(guest.ask(MKDIR, ROOT, &mkdir).0, libc::EINVAL);
            assert_eq!(guest.ask(SYMLINK, ROOT, &symlink).0, libc::EINVAL);
        }
    });
}

#[test]
fn links_out_of_the_directory_are_not_followed() {
    with_guest(|guest| {
        guest.init();
        std::os::unix::fs::symlink("../secret", "/link").unwrap();
        let (error, entry) = guest.ask(LOOKUP, ROOT, b"link\0");
        assert_eq!(error, 0);
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        // The guest gets the link itself, and cannot open what it points to.
        let ino = u64::from_le_bytes(entry[40..48].try_into().unwrap());
        let link = fs::symlink_metadata("/link").unwrap();
        assert_eq!(ino, link.ino());
        assert_ne!(guest.ask(OPEN, node, &[0; 8]).0, 0);
    });
}

#[test]
fn the_serving_thread_cannot_see_anything_else() {
    with_guest(|_| {
        let names: Vec<_> = fs::read_dir("/")
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["file"]);
        assert!(fs::metadata("../../../../secret").is_err());
    });
    // The rest of the process can.
    assert!(Path::new("/proc/self").exists());
}

#[test]
fn requests_that_make_no_sense_cost_only_their_answer() {
    with_guest(|guest| {
        guest.init();
        // Nothing, half a header, a header that lies about its length.
        assert!(guest.raw(&[], REPLY_LEN).is_empty());
        assert!(guest.raw(&[0; 39], REPLY_LEN).is_empty());
        for len in [0, 1, 39, 41, 1 << 20, u32::MAX] {
            let mut bytes = request(LOOKUP, ROOT, b"file\0");
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            guest.raw(&bytes, REPLY_LEN);
        }
        // No room for the answer.
        for reply in [0, 1, 15, 16, 17] {
            guest.raw(&request(LOOKUP, ROOT, b"file\0"), reply);
            guest.raw(&request(READDIRPLUS, ROOT, &[0; 40]), reply);
        }
        // No name, no end of a name, an unknown operation, unknown files.
        guest.raw(&request(LOOKUP, ROOT, b""), REPLY_LEN);
        guest.raw(&request(LOOKUP, ROOT, b"file"), REPLY_LEN);
        assert_eq!(guest.ask(4711, ROOT, &[]).0, libc::ENOSYS);
        assert_eq!(guest.ask(GETATTR, 4711, &[0; 16]).0, libc::EBADF);
        assert_ne!(guest.ask(READ, 4711, &[0xff; 40]).0, 0);
        // Buffers outside of memory, in the wrong order, none at all.
        guest.chain(&[(1 << 40, 40, READABLE), (REPLY, REPLY_LEN, WRITABLE)]);
        guest.chain(&[(REQUEST, u32::MAX, READABLE), (REPLY, u32::MAX, WRITABLE)]);
        guest.chain(&[(REPLY, REPLY_LEN, WRITABLE), (REQUEST, 40, READABLE)]);
        guest.chain(&[(REQUEST, 0, READABLE)]);
        // It still works.
        assert_eq!(guest.ask(LOOKUP, ROOT, b"file\0").0, 0);
    });
}

#[test]
fn random_requests_do_no_harm() {
    with_guest(|guest| {
        guest.init();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            // xorshift64
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..20_000 {
            let len = random() as usize % 80;
            let body: Vec<u8> = (0..len)
                .map(|_| match random() % 4 {
                    0 => b"./\0a"[random() as usize % 4],
                    1 => 0,
                    _ => random() as u8,
                })
                .collect();
            // All but DESTROY, after which there are no files.
            let opcode = [random() as u32 % 38, 39 + random() as u32 % 14][random() as usize % 2];
            let mut bytes = request(opcode, random() % 6, &body);
            if random() % 8 == 0 {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            guest.raw(&bytes, (random() % 3000) as u32);
        }
        guest.init();
        guest.ask(LOOKUP, ROOT, b"file\0");
    });
}

#[test]
fn what_the_guest_makes_and_changes_is_trusted_until_the_host_changes_it() {
    with_guest(|guest| {
        guest.init();
        fs::create_dir("/dir").unwrap();
        let dir = guest.lookup(ROOT, "dir").node;
        let (made, handle) = guest.create(dir, "made");
        assert!(made.is_trusted());
        guest.write(made.node, handle, 0);
        guest.chmod(made.node, 0o600);
        guest.move_to(LINK, dir, made.node, "linked\0");
        assert!(guest.lookup(dir, "linked").is_trusted());
        guest.move_to(RENAME, dir, dir, "made\0renamed\0");
        assert!(guest.lookup(dir, "renamed").is_trusted());

        as_the_host("/dir/renamed", || {
            fs::write("/dir/renamed", "by the host").unwrap();
        });
        assert!(!guest.lookup(dir, "renamed").is_trusted());
        // Not even if the guest changes it again.
        guest.write(made.node, handle, 0);
        assert!(!guest.lookup(dir, "renamed").is_trusted());
    });
}

#[test]
fn a_change_by_the_host_is_seen_behind_a_later_one_by_the_guest() {
    with_guest(|guest| {
        guest.init();
        let (file, handle) = guest.create(ROOT, "made");
        as_the_host("/made", || fs::write("/made", "by the host").unwrap());
        guest.write(file.node, handle, 0);
        assert!(!guest.lookup(ROOT, "made").is_trusted());
    });
}

#[test]
fn a_file_of_the_host_that_the_guest_opens_as_a_new_one_is_the_hosts() {
    with_guest(|guest| {
        guest.init();
        fs::write("/there", "by the host").unwrap();
        let (there, _) = guest.create(ROOT, "there");
        assert!(!there.is_trusted());
        let (made, _) = guest.create(ROOT, "made");
        assert!(made.is_trusted());
    });
}

#[test]
fn a_directory_is_trusted_while_only_the_guest_fills_it() {
    with_guest(|guest| {
        guest.init();
        let mkdir = |name: &str| {
            let body = [&[0xed, 1, 0, 0, 0, 0, 0, 0], name.as_bytes(), b"\0"].concat();
            let (error, answer) = guest.ask(MKDIR, ROOT, &body);
            assert_eq!(error, 0);
            Entry::read(&answer)
        };
        // Directories at the top may be mount points: only their attributes are trusted.
        let top = mkdir("top");
        assert_eq!(top.trust.map(|time| time.is_zero()), [true, false]);
        guest.create(top.node, "file");
        let mut name = *b"file\0";
        assert!(!guest.lookup(ROOT, "top").trust[1].is_zero());
        assert_eq!(guest.ask(UNLINK, top.node, &name).0, 0);
        assert!(!guest.lookup(ROOT, "top").trust[1].is_zero());
        as_the_host("/top", || {
            File::create("/top/by the host").unwrap();
            fs::remove_file("/top/by the host").unwrap();
        });
        assert!(guest.lookup(ROOT, "top").trust[1].is_zero());
        name[0] = b'g';
        assert_eq!(guest.ask(UNLINK, top.node, &name).0, libc::ENOENT);
    });
}

#[test]
fn set_id_bits_go_when_somebody_else_writes() {
    with_guest(|guest| {
        guest.init();
        let (file, handle) = guest.create(ROOT, "program");
        let mode = || fs::metadata("/program").unwrap().mode() & 0o7777;
        let set = |mode| fs::set_permissions("/program", fs::Permissions::from_mode(mode)).unwrap();
        for (before, after) in [(0o4755, 0o755), (0o2755, 0o755), (0o6711, 0o711)] {
            set(before);
            guest.write(file.node, handle, 0);
            assert_eq!(mode(), before);
            guest.write(file.node, handle, KILL_SUIDGID);
            assert_eq!(mode(), after, "{before:o}");
        }
    });
}
