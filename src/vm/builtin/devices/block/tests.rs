use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::super::hostile;
use super::super::test_ring::TestRing;
use super::*;

const SIZE: u64 = 64 * 1024;
/// Where things are in the guest's memory.
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10_000;
const STATUS: u64 = 0x9000;
/// No device writes this.
const NONE: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn image(size: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; size as usize]).unwrap();
    file
}

fn worker(file: &File, read_only: bool, ring: &TestRing) -> Worker {
    let device = BlockDevice {
        file: file.try_clone().unwrap().into(),
        is_device: false,
        read_only,
    };
    let block = Arc::new(Block {
        disk: RwLock::new(Some(Disk::new(&device).unwrap())),
        serial: "disk-1".into(),
    });
    Worker {
        block,
        memory: ring.memory.clone(),
    }
}

struct Driver {
    ring: TestRing,
    worker: Worker,
    requests: u64,
}

impl Driver {
    fn new(file: &File, read_only: bool) -> Driver {
        let ring = TestRing::new();
        let worker = worker(file, read_only, &ring);
        Driver {
            ring,
            worker,
            requests: 0,
        }
    }
    fn work(&self) {
        let rings = std::slice::from_ref(&self.ring.ring);
        self.worker.handle(0, rings).unwrap();
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ring.write(HEADER, &kind.to_le_bytes());
        self.ring.write(HEADER + 8, &sector.to_le_bytes());
        self.ring.write(STATUS, &[NONE]);
    }

    /// A request with data; its outcome.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        self.header(kind, sector);
        let from_device = matches!(kind, IN | GET_ID);
        let mut chain = vec![(HEADER, 16, false), (DATA, len, from_device)];
        chain.push((STATUS, 1, true));
        if len == 0 {
            chain.remove(1);
        }
        self.ring.add(&chain);
        self.work();
        self.requests += 1;
        assert_eq!(self.ring.used().len() as u64, self.requests);
        self.ring.read(STATUS, 1)[0]
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (index, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = DATA + index as u64 * 16;
            self.ring.write(at, &sector.to_le_bytes());
            self.ring.write(at + 8, &sectors.to_le_bytes());
            self.ring.write(at + 12, &flags.to_le_bytes());
        }
        self.request(kind, 0, ranges.len() as u32 * 16)
    }
}

#[test]
fn sectors_are_read_and_written_in_pieces_of_any_size() {
    let mut file = image(SIZE);
    let mut driver = Driver::new(&file, false);
    driver.ring.write(DATA, &[9; 1024]);
    assert_eq!(driver.request(OUT, 3, 1024), 0);
    assert_eq!(driver.request(FLUSH, 0, 0), 0);
    file.seek(SeekFrom::Start(3 * 512 - 1)).unwrap();
    let mut bytes = [0; 1026];
    file.read_exact(&mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1], bytes[1024], bytes[1025]), (7, 9, 9, 7));
    // Two sectors into three pieces.
    driver.header(IN, 2);
    driver.ring.add(&[
        (HEADER, 16, false),
        (DATA, 100, true),
        (DATA + 0x1000, 412, true),
        (DATA + 0x2000, 512, true),
        (STATUS, 1, true),
    ]);
    driver.work();
    assert_eq!(driver.ring.used().last(), Some(&1025));
    assert_eq!(driver.ring.read(STATUS, 1), [0]);
    assert_eq!(
        driver.ring.read(DATA, 101),
        [vec![7; 100], vec![9]].concat()
    );
    assert_eq!(driver.ring.read(DATA + 0x1000, 412), [7; 412]);
    assert_eq!(driver.ring.read(DATA + 0x2000, 512), [9; 512]);
}

#[test]
fn space_is_given_back_and_zeroed() {
    let file = image(SIZE);
    let mut driver = Driver::new(&file, false);
    assert_eq!(driver.request(GET_ID, 0, 20), 0);
    assert_eq!(
        &driver.ring.read(DATA, 20),
        b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    let before = file.metadata().unwrap().blocks();
    assert_eq!(driver.ranges(DISCARD, &[(0, 16, 0), (64, 16, 0)]), 0);
    assert!(file.metadata().unwrap().blocks() < before);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(20, 1, 0), (30, 2, 1)]), 0);
    let mut bytes = vec![1; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let zero = |sector: usize| bytes[sector * 512..][..512].iter().all(|byte| *byte == 0);
    assert!(zero(20) && zero(30) && zero(31) && !zero(19) && !zero(21) && !zero(32));
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    // Flags and ranges that make no sense.
    assert_eq!(driver.ranges(DISCARD, &[(0, 1, 1)]), 2);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(0, 1, 2)]), 2);
    assert_eq!(driver.ranges(DISCARD, &[(u64::MAX / 512, 1, 0)]), 1);
    assert_eq!(driver.ranges(DISCARD, &[(u64::MAX, u32::MAX, 0)]), 1);
    assert_eq!(driver.ranges(DISCARD, &[(0, 1, 0); 17]), 1);
    assert_eq!(driver.request(WRITE_ZEROES, 0, 15), 1);
    assert_eq!(driver.request(DISCARD, 0, 0), 1);
}

#[test]
fn what_is_beyond_the_end_is_an_error() {
    let file = image(SIZE + 100);
    let mut driver = Driver::new(&file, false);
    let last = SIZE / 512 - 1;
    for kind in [IN, OUT] {
        assert_eq!(driver.request(kind, last, 512), 0);
        for (sector, len) in [
            (last, 1024),
            (last + 1, 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 1024),
            (0, 100),
            (0, 0),
        ] {
            assert_eq!(
                driver.request(kind, sector, len),
                1,
                "{kind} {sector} {len}"
            );
        }
    }
    assert_eq!(driver.request(GET_ID, 0, 19), 1);
    assert_eq!(driver.request(99, 0, 512), 2);
    // The file has become shorter behind everybody's back.
    file.set_len(512).unwrap();
    assert_eq!(driver.request(IN, 4, 512), 1);
    assert_eq!(file.metadata().unwrap().len(), 512);
}

#[test]
fn nothing_is_written_to_a_read_only_disk() {
    let file = image(SIZE);
    let mut driver = Driver::new(&file, true);
    assert_eq!(driver.request(IN, 0, 512), 0);
    assert_eq!(driver.request(OUT, 0, 512), 1);
    assert_eq!(driver.ranges(DISCARD, &[(0, 1, 0)]), 1);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(0, 1, 0)]), 1);
    let mut bytes = vec![1; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn malformed_requests_harm_nobody() {
    let file = image(SIZE);
    let mut driver = Driver::new(&file, false);
    driver.header(OUT, 0);
    let chains: [&[(u64, u32, bool)]; 8] = [
        // Nowhere to write the outcome to.
        &[(HEADER, 16, false)],
        &[(HEADER, 16, false), (DATA, 512, false)],
        // Not memory, or partly.
        &[(1 << 40, 16, false), (STATUS, 1, true)],
        &[
            (HEADER, 16, false),
            (TestRing::SIZE - 8, 512, false),
            (STATUS, 1, true),
        ],
        &[(HEADER, 16, false), (DATA, 512, false), (1 << 40, 1, true)],
        &[
            (HEADER, 16, false),
            (DATA, u32::MAX, false),
            (STATUS, 1, true),
        ],
        // A header that is too short, and none.
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
    ];
    for (number, chain) in chains.iter().enumerate() {
        driver.ring.write(STATUS, &[NONE]);
        driver.ring.add(chain);
        driver.work();
        let status = driver.ring.read(STATUS, 1)[0];
        assert!(matches!(status, NONE | 1), "{number}: {status}");
    }
    driver.ring.add_loop();
    driver.work();
    assert_eq!(driver.ring.used().len(), chains.len() + 1);
    driver.ring.break_ring();
    driver.work();
    let mut bytes = vec![1; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn a_disk_that_is_gone_answers_with_errors() {
    let mut driver = Driver::new(&image(SIZE), false);
    driver.worker.block.disconnect();
    assert_eq!(driver.request(IN, 0, 512), 1);
    assert_eq!(driver.request(FLUSH, 0, 0), 1);
}

#[test]
fn memory_that_the_disk_cannot_get_at_goes_through_the_hosts() {
    let file = image(SIZE);
    let device = BlockDevice {
        file: file.try_clone().unwrap().into(),
        is_device: false,
        read_only: false,
    };
    let mut driver = Driver::new(&file, false);
    let mut disk = Disk::new(&device).unwrap();
    disk.demand_alignment(512);
    *driver.worker.block.disk.write_unpoisoned() = Some(disk);
    driver.ring.write(DATA + 3, &[5; 1024]);
    driver.header(OUT, 1);
    driver.ring.add(&[
        (HEADER, 16, false),
        (DATA + 3, 1024, false),
        (STATUS, 1, true),
    ]);
    driver.work();
    assert_eq!(driver.ring.read(STATUS, 1), [0]);
    let mut bytes = [0; 2048];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[..512], [7; 512]);
    assert_eq!(bytes[512..1536], [5; 1024]);
    assert_eq!(bytes[1536..], [7; 512]);
    driver.header(IN, 1);
    driver.ring.add(&[
        (HEADER, 16, false),
        (DATA + 0x4001, 700, true),
        (DATA + 0x5000, 324, true),
        (STATUS, 1, true),
    ]);
    driver.work();
    assert_eq!(driver.ring.read(DATA + 0x4001, 700), [5; 700]);
    assert_eq!(driver.ring.read(DATA + 0x5000, 324), [5; 324]);
}

#[test]
fn a_device_is_made_and_ends_with_its_handles() {
    let file = image(SIZE);
    let device = BlockDevice {
        file: file.into(),
        is_device: false,
        read_only: true,
    };
    let memory = GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
    let plugged = plug(&memory, 9, "serial", &device).unwrap();
    let identity = &plugged.planned.identity;
    assert_eq!((identity.id, identity.queues.len()), (2, 4));
    let config = identity.config.bytes();
    assert_eq!(config[..8], (SIZE / 512).to_le_bytes());
    assert_eq!(config[34..36], 4u16.to_le_bytes());
    let writes = feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(identity.features & (feature::RO | writes), feature::RO);
    assert_eq!(plugged.handles.len(), 4);
    assert!(plugged.handles.iter().all(|h| h.failure().is_none()));
}

#[test]
fn no_sequence_of_requests_harms_a_disk_beyond_its_file() {
    let file = image(SIZE);
    let ring = TestRing::new();
    let worker = worker(&file, false, &ring);
    let request = |random: &mut hostile::Random, ring: &mut TestRing| {
        let kind = match random.below(8) {
            0 => random.next() as u32,
            n => [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, IN][n as usize - 1],
        };
        // Several requests share the header, as it suits a hostile driver.
        ring.write(HEADER, &kind.to_le_bytes());
        let sector = random.number(SIZE / 512 + 2);
        ring.write(HEADER + 8, &sector.to_le_bytes());
        for range in 0..4 {
            let at = DATA + range * 16;
            let (start, sectors) = (random.number(140), random.number(64) as u32);
            ring.write(at, &start.to_le_bytes());
            ring.write(at + 8, &sectors.to_le_bytes());
            ring.write(at + 12, &(random.below(3) as u32).to_le_bytes());
        }
        let len = [512, 1024, 16, 64, 20, 700][random.below(6) as usize];
        let mut chain = vec![(HEADER, 16, false), (DATA, len, random.below(2) == 0)];
        if random.below(4) == 0 {
            chain.push(random.buffer());
        }
        chain.push((STATUS, 1, true));
        ring.add(&chain);
    };
    let ring = hostile::drive(ring, 20_000, request, |ring| {
        worker.handle(0, std::slice::from_ref(&ring.ring)).unwrap();
    });
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    let mut driver = Driver {
        ring,
        worker,
        requests: 0,
    };
    driver.ring.write(DATA, &[9; 512]);
    assert_eq!(driver.request(OUT, 5, 512), 0);
    driver.ring.write(DATA, &[0; 512]);
    assert_eq!(driver.request(IN, 5, 512), 0);
    assert_eq!(driver.ring.read(DATA, 512), [9; 512]);
}
