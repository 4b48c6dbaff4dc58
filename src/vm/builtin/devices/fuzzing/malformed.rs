//! Chains and rings that a driver must not make, for every device.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::mmap::NewBitmap;

use super::chain::Descriptor;
use super::{
    BUFFERS, Conduct, Content, Driver, ENTRIES, FEATURES, Host, QueueSetup, Rings, SIZE,
    ServiceMemory, SharedRings, Work,
};
use crate::vm::builtin::devices::{block, net};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Where indirect tables are, away from the buffers.
const TABLE: u64 = SIZE - 0x1000;

const fn d(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// What is wrong, and the descriptors at the beginning of the queue's table.
const CHAINS: &[(&str, &[Descriptor])] = &[
    ("without a length", &[d(BUFFERS, 0, 0, 0)]),
    ("writable, without a length", &[d(BUFFERS, 0, WRITE, 0)]),
    (
        "empty ones around",
        &[
            d(BUFFERS, 0, NEXT, 1),
            d(BUFFERS, 64, NEXT, 2),
            d(BUFFERS + 64, 0, WRITE | NEXT, 3),
            d(BUFFERS + 64, 64, WRITE, 0),
        ],
    ),
    ("followed by itself", &[d(BUFFERS, 16, NEXT, 0)]),
    (
        "writable, followed by itself",
        &[d(BUFFERS, 16, WRITE | NEXT, 0)],
    ),
    (
        "a ring of two",
        &[d(BUFFERS, 16, NEXT, 1), d(BUFFERS, 16, WRITE | NEXT, 0)],
    ),
    ("followed by nothing", &[d(BUFFERS, 64, NEXT, ENTRIES)]),
    (
        "followed from afar",
        &[d(BUFFERS, 64, WRITE | NEXT, u16::MAX)],
    ),
    (
        "writable before readable",
        &[d(BUFFERS, 64, WRITE | NEXT, 1), d(BUFFERS + 64, 64, 0, 0)],
    ),
    ("only readable", &[d(BUFFERS, 512, 0, 0)]),
    ("only writable", &[d(BUFFERS, 512, WRITE, 0)]),
    ("longer than memory", &[d(BUFFERS, u32::MAX, 0, 0)]),
    (
        "writable, longer than memory",
        &[d(BUFFERS, u32::MAX, WRITE, 0)],
    ),
    (
        "around the end of memory",
        &[d(SIZE - 8, 64, NEXT, 1), d(SIZE - 8, 64, WRITE, 0)],
    ),
    (
        "no memory",
        &[d(1 << 40, 64, NEXT, 1), d(1 << 40, 64, WRITE, 0)],
    ),
    (
        "around the end of addresses",
        &[
            d(u64::MAX - 8, 64, NEXT, 1),
            d(u64::MAX - 8, u32::MAX, WRITE, 0),
        ],
    ),
    (
        "an indirect table that is no memory",
        &[d(1 << 40, 64, INDIRECT, 0)],
    ),
    (
        "an indirect table around the end of memory",
        &[d(SIZE - 8, 64, INDIRECT, 0)],
    ),
    ("an indirect table of nothing", &[d(TABLE, 0, INDIRECT, 0)]),
    (
        "an indirect table of one and a half",
        &[d(TABLE, 24, INDIRECT, 0)],
    ),
    (
        "an indirect table as long as can be",
        &[d(TABLE, u32::MAX, INDIRECT, 0)],
    ),
    (
        "an indirect table and more",
        &[d(TABLE, 32, INDIRECT | NEXT, 1), d(BUFFERS, 64, 0, 0)],
    ),
    (
        "an indirect table in the middle",
        &[d(BUFFERS, 64, NEXT, 1), d(TABLE, 32, INDIRECT, 0)],
    ),
    ("unknown flags", &[d(BUFFERS, 64, 0xfff8, 0)]),
    ("all flags", &[d(TABLE, 32, u16::MAX, 0)]),
];

/// What is in the indirect table.
const TABLES: &[&[Descriptor]] = &[
    &[d(BUFFERS, 64, NEXT, 1), d(BUFFERS + 64, 64, WRITE, 0)],
    &[d(BUFFERS, 64, NEXT, 1), d(TABLE, 32, INDIRECT, 0)],
    &[d(BUFFERS, 64, WRITE | NEXT, 1), d(BUFFERS, 64, NEXT, 0)],
    &[d(BUFFERS, 64, NEXT, 7), d(BUFFERS, 64, WRITE, 0)],
];

struct Malformed;

impl Conduct for Malformed {
    fn variant(&mut self) -> u8 {
        0
    }

    fn conduct<B: NewBitmap + Clone + Send + Sync + 'static>(
        &mut self,
        driver: &mut Driver<B>,
        _: &mut Content<'_>,
        work: &mut Work<'_, B>,
        _: &mut Host<'_>,
    ) where
        SharedRings<ServiceMemory<B>>: Rings,
    {
        for number in 0..driver.queues.len() {
            for (_, chain) in CHAINS {
                let is_indirect = chain.iter().any(|d| d.flags & INDIRECT != 0);
                for table in TABLES
                    .iter()
                    .take(if is_indirect { TABLES.len() } else { 1 })
                {
                    driver.begin();
                    fill(driver, number, chain, table);
                    driver.publish(number, 0);
                    driver.kick(number, work);
                    // The same again, with nothing new in between.
                    driver.kick(number, work);
                }
            }
            for head in [ENTRIES - 1, ENTRIES, u16::MAX] {
                driver.begin();
                driver.publish(number, head);
                driver.kick(number, work);
            }
            for by in [ENTRIES as i16, ENTRIES as i16 + 1, -1, i16::MAX, i16::MIN] {
                driver.begin();
                driver.jump(number, by);
                driver.kick(number, work);
                // A broken ring stays as it is, and does not come to life again.
                driver.publish(number, 0);
                driver.kick(number, work);
            }
            rings(driver, number, work);
        }
    }
}

fn fill<B: NewBitmap + Clone + Send + Sync + 'static>(
    driver: &Driver<B>,
    number: usize,
    chain: &[Descriptor],
    table: &[Descriptor],
) where
    SharedRings<ServiceMemory<B>>: Rings,
{
    let descriptors = driver.queues[number].setup.descriptors;
    for (start, descriptors) in [(descriptors, chain), (TABLE, table)] {
        for (index, descriptor) in (0..).zip(descriptors) {
            driver.descriptor(start, index, *descriptor);
        }
    }
}

/// Rings where they cannot be, or where they should not.
fn rings<B: NewBitmap + Clone + Send + Sync + 'static>(
    driver: &mut Driver<B>,
    number: usize,
    work: &mut Work<'_, B>,
) where
    SharedRings<ServiceMemory<B>>: Rings,
{
    let usual = driver.queues[number].setup;
    let places = [0, BUFFERS, SIZE - 16, SIZE, 1 << 40, !0xf];
    type Part = fn(&mut QueueSetup) -> &mut u64;
    let parts: [Part; 3] = [
        |s| &mut s.descriptors,
        |s| &mut s.available,
        |s| &mut s.used,
    ];
    for part in parts {
        for place in places {
            let mut setup = usual;
            *part(&mut setup) = place;
            driver.shared.stop();
            driver.write(0, &[0; SIZE as usize]);
            driver.queues[number].setup = setup;
            driver.queues[number].next_available = 0;
            if driver.start(FEATURES) {
                driver.publish(number, 0);
                driver.kick(number, work);
            }
        }
    }
    driver.begin();
}

#[test]
fn no_malformed_chain_or_ring_harms_any_device() {
    super::rng(&mut Malformed);
    super::balloon(&mut Malformed);
    super::console(&mut Malformed);
    super::more_memory(&mut Malformed);
    super::fs(&mut Malformed);
    super::vsock(&mut Malformed);
    block::fuzzing::block(&mut Malformed);
    net::fuzzing::net(&mut Malformed);
}
