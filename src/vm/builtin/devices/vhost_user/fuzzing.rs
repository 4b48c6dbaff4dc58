//! A back end that does not do what it should, for [`crate::fuzzing`].
//!
//! It answers each request as the protocol has it, except where the input has another
//! idea: values, codes, lengths, descriptors. So an input that ends early is that of a
//! back end that misbehaves once and goes on well.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::mailbox::{Mailbox, Request};
use super::kinds::{Kind, Space};
use super::link::{Link, LinkService};
use crate::fuzzing::Input;
use crate::sys::seqpacket::wait_readable;
use crate::vm::VhostUserKind;
use crate::vm::builtin::devices::FEATURES;
use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::virtio::registers::{Identity, QueueSetup};
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::Service;

const MEMORY: u64 = 1 << 16;
const ROOM: u64 = 128 << 20;
/// Of a request or an answer: code, flags, length of what follows.
const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// How long a descriptor may take to be gone.
const GONE: Duration = Duration::from_secs(10);
/// Longest request.
const MAX_REQUEST: usize = 4096;
/// Most descriptors that the front end takes in with a message; of one that has more
/// it takes nothing, and waits for another.
const MAX_DESCRIPTORS: usize = 32;

/// What a back end of each kind is asked, and whether it sees its device started.
pub fn vhost_user(input: &mut Input<'_>) {
    let how = input.byte();
    let vcpus = how >> 1 & 7;
    let kind = match (how & 1, vcpus) {
        (0, _) => VhostUserKind::Block,
        (_, 7) => VhostUserKind::Net { mac: [2; 6] },
        _ => VhostUserKind::Fs { tag: "fs-1".into() },
    };
    let kind = Kind::new(&kind, vcpus.into());
    let rounds = 1 + (how >> 4);
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let (kept, gift) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe");
    let words = input.rest();
    std::thread::scope(|scope| {
        let back_end = scope.spawn(|| BackEnd::new(theirs, gift, words).serve());
        live(ours, &kind, rounds);
        back_end.join().expect("requests are well-formed");
    });
    // Nobody has kept what came with the answers; a child of another test may have it until
    // it executes its program.
    assert!(wait_readable(kept.as_fd(), GONE).expect("a pipe"));
    assert_eq!(rustix::io::read(&kept, &mut [0]), Ok(0));
}

/// The device, as far as the back end has it.
fn live(stream: UnixStream, kind: &Kind, rounds: u8) {
    let file = MemoryFile::new(MEMORY, ROOM).expect("memory");
    let memory = file.map().expect("memory");
    let Ok((link, identity)) = Link::negotiate(stream, memory, kind) else {
        return;
    };
    check(&identity, kind);
    let (features, sizes) = (identity.features, identity.queues.clone());
    let config = identity.config.clone();
    let events = Arc::new(Events::new(kind.queues.len()).expect("descriptors"));
    let mailbox = Arc::new(Mailbox::new().expect("a descriptor"));
    let service = LinkService::new(
        link,
        identity,
        kind.when_lost(),
        events.clone(),
        mailbox,
        "d".into(),
    );
    for round in 0..rounds {
        // The driver need not use all of them, nor take everything that is offered.
        let queues = sizes.iter().enumerate().map(|(number, size)| QueueSetup {
            size: *size,
            ready: number == 0 || round & 1 == 0,
            descriptors: 0,
            available: 0x4000,
            used: 0x8000,
        });
        let features = features & !(u64::from(round & 4) << 7);
        let started = service.answer(Request::Start(features, queues.collect()));
        let done = started && service.answer(Request::Stop);
        assert_eq!(done, !config.has_failed());
        if !done {
            assert!(config.is_changed() && events.call.read().is_ok());
            return;
        }
    }
    // It hangs up, which is noticed once.
    service.handle(0, &[]).expect("the thread goes on");
    assert!(config.has_failed());
}

/// A device is never more than what its kind may be.
fn check(identity: &Identity, kind: &Kind) {
    assert_eq!(identity.id, kind.id);
    assert_eq!(identity.features & !kind.features & !kind.own_features, 0);
    assert_eq!(identity.features & kind.own_features, kind.own_features);
    assert_ne!(identity.features & 1 << VIRTIO_F_VERSION_1, 0);
    let count = identity.queues.len();
    assert!((kind.min_queues..=kind.queues.len()).contains(&count));
    assert!(kind.queues.starts_with(&identity.queues));
    let space = identity.config.bytes();
    match &kind.config {
        Space::Own(own) => assert_eq!(space, *own),
        Space::BackEnd(len) => {
            assert_eq!(space[34..36], (count as u16).to_le_bytes());
            assert_eq!(space.len(), *len as usize);
        }
    }
}

/// The other end.
struct BackEnd<'i> {
    stream: UnixStream,
    /// Comes with answers that should have none.
    gift: OwnedFd,
    input: Input<'i>,
}

impl<'i> BackEnd<'i> {
    fn new(stream: UnixStream, gift: OwnedFd, words: &'i [u8]) -> BackEnd<'i> {
        BackEnd {
            stream,
            gift,
            input: Input::new(words),
        }
    }

    /// Until either hangs up.
    fn serve(mut self) {
        let mut header = [0; HEADER];
        while self.stream.read_exact(&mut header).is_ok() {
            let [code, flags, len] =
                [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().expect("4")));
            assert_eq!(flags & !NEED_REPLY, VERSION);
            let len = len as usize;
            assert!(len <= MAX_REQUEST);
            let mut body = vec![0; len];
            self.stream.read_exact(&mut body).expect("all of it");
            if !self.answer(code, flags & NEED_REPLY != 0, &body) {
                return;
            }
        }
    }

    /// Whether it goes on afterwards.
    fn answer(&mut self, code: u32, is_ack_wanted: bool, request: &[u8]) -> bool {
        let how = self.input.byte();
        let usual = usual(code, request);
        // Mostly nothing that nobody waits for.
        if usual.is_none() && !is_ack_wanted && how < 0xf0 {
            return true;
        }
        let usual = usual.unwrap_or_else(|| vec![0; 8]);
        let (mut code, mut flags) = (code, VERSION | REPLY);
        let mut body = usual.clone();
        let mut claimed = None;
        match how & 7 {
            0 | 1 => {}
            2 => {
                let at = self.input.below(256) % body.len();
                let changes = self.input.bytes(8);
                for (byte, change) in body[at..].iter_mut().zip(changes) {
                    *byte ^= change;
                }
            }
            3 => code = self.input.byte().into(),
            4 => flags = self.input.u32(),
            5 => claimed = Some(self.input.u32()),
            6 => {
                let len = usize::from(self.input.u16() % 4200);
                body = self.input.bytes(len).to_vec();
            }
            _ => body.truncate(self.input.below(256)),
        }
        let claimed = claimed.unwrap_or(body.len() as u32);
        let mut message = Vec::new();
        for word in [code, flags, claimed] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        let gifts = [0, 0, 1, MAX_DESCRIPTORS + 8][usize::from(how >> 4 & 3)];
        let split = match how & 8 {
            0 => 0,
            _ => self.input.below(256).min(message.len()),
        };
        let pieces = message.split_at(split);
        let sent = self.send(pieces.0, gifts) && self.send(pieces.1, gifts);
        // The front end is not made to wait, which would be the matter of a deadline.
        sent && message.len() >= HEADER + usual.len() && gifts <= MAX_DESCRIPTORS
    }

    fn send(&self, bytes: &[u8], gifts: usize) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let gifts = vec![self.gift.as_raw_fd(); gifts];
        // It fits, if there is somebody at the other end.
        let sent = self.stream.send_with_fds(&[bytes], &gifts);
        sent.is_ok_and(|len| len == bytes.len())
    }
}

/// What comes after the header of a good answer, if there is one to be.
fn usual(code: u32, request: &[u8]) -> Option<Vec<u8>> {
    let features = FEATURES | 1 << 30 | 1 << 1 | 1 << 12;
    let is = |request: FrontendReq| code == u32::from(request);
    let number = if is(FrontendReq::GET_FEATURES) {
        features
    } else if is(FrontendReq::GET_PROTOCOL_FEATURES) {
        // MQ, REPLY_ACK, CONFIG, RESET_DEVICE.
        1 | 1 << 3 | 1 << 9 | 1 << 13
    } else if is(FrontendReq::GET_QUEUE_NUM) {
        4
    } else if is(FrontendReq::GET_CONFIG) || is(FrontendReq::GET_VRING_BASE) {
        return Some(request.to_vec());
    } else {
        return None;
    };
    Some(number.to_le_bytes().to_vec())
}
