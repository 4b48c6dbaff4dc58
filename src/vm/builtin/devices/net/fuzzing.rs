//! A network interface for [`crate::fuzzing`], with a socket in place of the tap.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::super::fuzzing::{Conduct, Driver, any, memory_file};
use super::super::mailbox::Mailbox;
use super::control::Control;
use super::pair::Pair;
use super::tap::TapQueue;
use super::{BackEnd, Events, Net, feature};
use crate::fuzzing::Input;
use crate::vm::builtin::virtio::worker::{Service, ServiceRing};

const PAIRS: usize = 2;
/// The longest frame of the interface with its header.
const MAX_FRAME: usize = 12 + 65536 + 64;

/// Frames in both directions, and commands.
pub fn net(conduct: &mut impl Conduct) {
    let (mut taps, mut wires) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (wire, tap) = UnixDatagram::pair().expect("sockets");
        wire.set_nonblocking(true).expect("a socket");
        tap.set_nonblocking(true).expect("a socket");
        wires.push(wire);
        taps.push(TapQueue::of_socket(OwnedFd::from(tap)));
    }
    let mergeable = conduct.variant() & 1 != 0;
    let features = if mergeable { feature::MRG_RXBUF } else { 0 };
    let net = Arc::new(Net {
        taps,
        vhost: RwLock::new(Vec::new()),
        features: AtomicU64::new(features),
        active: Mutex::new(()),
    });
    let mut driver = Driver::new(&memory_file(0), 2 * PAIRS + 1);
    let memory = driver.memory.clone();
    let pairs: Vec<_> = (0..PAIRS)
        .map(|number| Pair::new(&net, number, memory.clone()))
        .collect();
    let control = Control {
        net: net.clone(),
        mailbox: Arc::new(Mailbox::new().expect("a descriptor")),
        memory: memory.clone(),
        events: Arc::new(Events::new(2 * PAIRS + 1).expect("descriptors")),
    };
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        let number = usize::from(queue) / 2;
        let (pair, rest) = (pairs.get(number), &rings[2 * PAIRS..]);
        let done = match pair {
            Some(pair) => pair.handle(queue % 2, &rings[2 * number..2 * number + 2]),
            None => control.handle(0, rest),
        };
        done.expect("the device goes on");
    };
    let mut host = |input: &mut Input<'_>| {
        let how = input.byte();
        let wire = &wires[usize::from(how) % PAIRS];
        let mut bytes = vec![0; MAX_FRAME + 1];
        match how >> 1 & 7 {
            0 => {
                let sent = wire.recv(&mut bytes);
                assert!(sent.is_err() || sent.is_ok_and(|len| (13..=MAX_FRAME).contains(&len)));
            }
            1 => {
                let features = u64::from(input.byte() & 1) * feature::MRG_RXBUF;
                net.features.store(features, Ordering::Release);
            }
            2 if input.byte() == 0xd1 => net.disconnect(),
            kind => {
                // A long one, or one of the input.
                let len = usize::from(input.u16());
                let frame = match kind {
                    3 => &bytes[..len],
                    _ => input.bytes(len % 512),
                };
                // The wire may be full.
                let _ = wire.send(frame);
            }
        }
    };
    conduct.conduct(&mut driver, &mut any, &mut work, &mut host);
}
