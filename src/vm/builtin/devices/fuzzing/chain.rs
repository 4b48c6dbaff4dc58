//! Chains of descriptors that an input describes.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::{BUFFERS, SIZE};
use crate::fuzzing::Input;

/// What is in a readable buffer of this length.
pub type Content<'c> = dyn FnMut(&mut Input<'_>, usize) -> Vec<u8> + 'c;

/// Anything.
pub fn any(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    input.bytes(len).to_vec()
}

#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; 16]) -> Descriptor {
        let [a @ .., _, _, _, _, _, _, _, _] = *bytes;
        let [_, _, _, _, _, _, _, _, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        Descriptor {
            address: u64::from_le_bytes(a),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// With this one behind it, unless the input has had other ideas.
    pub fn followed_by(self, next: u16, is_followed: bool) -> Descriptor {
        if self.next != 0 || !is_followed {
            return self;
        }
        Descriptor {
            flags: self.flags | VRING_DESC_F_NEXT as u16,
            next,
            ..self
        }
    }
}

pub struct Chain {
    pub descriptors: Vec<Descriptor>,
    /// What is to be written to memory, and where.
    pub contents: Vec<(u64, Vec<u8>)>,
}

/// One to eight descriptors.
pub fn descriptors(
    input: &mut Input<'_>,
    how: u8,
    content: &mut super::Content<'_>,
    mut place: impl FnMut(u64) -> u64,
) -> Chain {
    let mut chain = Chain {
        descriptors: Vec::new(),
        contents: Vec::new(),
    };
    for _ in 0..=how & 7 {
        let kind = input.byte();
        let len = match kind >> 2 & 7 {
            0..3 => u32::from(input.byte()),
            3 => 24,
            4 => 16,
            5 => 0x1000,
            6 => u32::from(input.u16()),
            _ => input.u32(),
        };
        let writable = kind & 1 != 0;
        let address = match kind >> 5 {
            0..5 => place(len.into()),
            // Overlapping others.
            5 => BUFFERS + u64::from(input.u16()) % (SIZE - BUFFERS),
            6 => SIZE - u64::from(input.byte()),
            _ => input.u64(),
        };
        let mut flags = match writable {
            true => VRING_DESC_F_WRITE as u16,
            false => 0,
        };
        let mut next = 0;
        if kind & 2 != 0 && how & 0x40 != 0 {
            flags = input.u16();
            next = u16::from(input.byte());
        }
        if !writable && len <= 0x1000 {
            let bytes = content(input, len as usize);
            chain.contents.push((address, bytes));
        }
        chain.descriptors.push(Descriptor {
            address,
            len,
            flags,
            next,
        });
    }
    chain
}
