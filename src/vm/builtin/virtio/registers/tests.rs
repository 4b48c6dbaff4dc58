use super::*;
use std::sync::{Arc, Mutex};

/// What happened to the rings, in order.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Start(u64, Vec<QueueSetup>),
    Stop,
    GoOn(u64, Vec<QueueSetup>, Vec<Position>),
}

#[derive(Clone, Default)]
struct Log {
    events: Arc<Mutex<Vec<Event>>>,
    refuse: bool,
}

impl Rings for Log {
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        let event = Event::Start(features, queues.to_vec());
        self.events.lock().unwrap().push(event);
        !self.refuse
    }

    fn stop(&mut self) {
        self.events.lock().unwrap().push(Event::Stop);
    }

    fn freeze(&mut self) -> Option<Vec<Position>> {
        self.stop();
        (!self.refuse).then(|| POSITIONS.to_vec())
    }

    fn go_on(&mut self, features: u64, queues: &[QueueSetup], positions: &[Position]) -> bool {
        let event = Event::GoOn(features, queues.to_vec(), positions.to_vec());
        self.events.lock().unwrap().push(event);
        !self.refuse
    }
}

const POSITIONS: [Position; 2] = [
    Position {
        available: 7,
        used: 65_535,
    },
    Position {
        available: 0,
        used: 0,
    },
];

const FEATURES: u64 = 1 << 32 | 1 << 29 | 1;
const RUNNING: u32 = 15;

fn slot(log: &Log) -> Registers {
    let mut registers = Registers::alone();
    let identity = Identity {
        id: 19,
        features: FEATURES,
        queues: vec![256, 64],
        config: vec![1, 2, 3, 4, 5, 0, 0, 0].into(),
    };
    registers.insert(identity, Box::new(log.clone()));
    registers
}

fn read(registers: &Registers, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    registers.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(registers: &mut Registers, offset: u64, value: u32) {
    registers.write(offset, &value.to_le_bytes());
}

/// What a driver does until the device runs.
fn drive(registers: &mut Registers, features: u64) {
    for status in [0, 1, 3] {
        write(registers, at::STATUS, status);
    }
    for half in 0..2 {
        write(registers, at::DRIVER_FEATURES_SELECT, half);
        write(
            registers,
            at::DRIVER_FEATURES,
            (features >> (32 * half)) as u32,
        );
    }
    write(registers, at::STATUS, 11);
    write(registers, at::QUEUE_SELECT, 0);
    write(registers, at::QUEUE_SIZE, 128);
    let addresses = [
        (at::DESCRIPTORS, 0x1_0000_1000u64),
        (at::AVAILABLE, 0x2000),
        (at::USED, 0x3000),
    ];
    for (register, address) in addresses {
        write(registers, register, address as u32);
        write(registers, register + 4, (address >> 32) as u32);
    }
    write(registers, at::QUEUE_READY, 1);
    write(registers, at::STATUS, RUNNING);
}

#[test]
fn a_driver_starts_and_resets_a_device() {
    let log = Log::default();
    let mut registers = slot(&log);
    let first = [at::MAGIC, at::VERSION, at::DEVICE_ID].map(|at| read(&registers, at));
    assert_eq!(first, [0x7472_6976, 2, 19]);
    assert_eq!(read(&registers, at::DEVICE_FEATURES), 1 << 29 | 1);
    write(&mut registers, at::DEVICE_FEATURES_SELECT, 1);
    assert_eq!(read(&registers, at::DEVICE_FEATURES), 1);
    assert_eq!(read(&registers, at::QUEUE_SIZE_MAX), 256);

    drive(&mut registers, 1 << 32 | 1);
    assert!(registers.is_running());
    assert_eq!(read(&registers, at::STATUS), RUNNING);
    assert_eq!(read(&registers, at::QUEUE_READY), 1);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 1);
    let set_up = QueueSetup {
        size: 128,
        ready: true,
        descriptors: 0x1_0000_1000,
        available: 0x2000,
        used: 0x3000,
    };
    let start = Event::Start(1 << 32 | 1, vec![set_up, QueueSetup::default()]);
    assert_eq!(*log.events.lock().unwrap(), std::slice::from_ref(&start));

    write(&mut registers, at::STATUS, 0);
    assert_eq!(read(&registers, at::STATUS), 0);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 0);
    drive(&mut registers, 1 << 32 | 1);
    let events = [start.clone(), Event::Stop, start];
    assert_eq!(*log.events.lock().unwrap(), events);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let log = Log::default();
    let mut registers = slot(&log);
    for features in [1 << 32 | 2, 1, 0, u64::MAX] {
        drive(&mut registers, features);
        assert_eq!(read(&registers, at::STATUS) & status::FEATURES_OK, 0);
        assert!(!registers.is_running(), "{features:#x}");
    }
    assert!(log.events.lock().unwrap().is_empty());
}

#[test]
fn nothing_changes_while_the_device_runs() {
    let log = Log::default();
    let mut registers = slot(&log);
    drive(&mut registers, FEATURES);
    for (register, value) in [
        (at::QUEUE_SIZE, 1),
        (at::QUEUE_READY, 0),
        (at::DESCRIPTORS, 7),
        (at::DRIVER_FEATURES, 0),
        (at::STATUS, RUNNING),
        (at::STATUS, 1),
    ] {
        write(&mut registers, register, value);
    }
    assert!(registers.is_running());
    assert_eq!(log.events.lock().unwrap().len(), 1);
    // A driver that gives up.
    write(&mut registers, at::STATUS, status::FAILED);
    assert!(!registers.is_running());
    assert_eq!(log.events.lock().unwrap().last(), Some(&Event::Stop));
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_largest() {
    let log = Log::default();
    let mut registers = slot(&log);
    for (queue, size, fine) in [
        (0, 256, true),
        (0, 512, false),
        (0, 0, false),
        (0, 100, false),
        (0, 0x1_0010, false),
        (1, 64, true),
        (1, 128, false),
        (2, 1, false),
        (u32::MAX, 1, false),
    ] {
        write(&mut registers, at::QUEUE_SELECT, queue);
        write(&mut registers, at::QUEUE_SIZE, size);
        write(&mut registers, at::QUEUE_READY, 1);
        let ready = read(&registers, at::QUEUE_READY) == 1;
        assert_eq!(ready, fine, "queue {queue} with {size}");
    }
    assert_eq!(read(&registers, at::QUEUE_SIZE_MAX), 0);
}

#[test]
fn queues_that_cannot_be_need_a_reset() {
    let log = Log {
        refuse: true,
        ..Log::default()
    };
    let mut registers = slot(&log);
    drive(&mut registers, FEATURES);
    assert!(!registers.is_running());
    let needs_reset = 11 | status::NEEDS_RESET;
    assert_eq!(read(&registers, at::STATUS), needs_reset);
    write(&mut registers, at::STATUS, 0);
    assert_eq!(read(&registers, at::STATUS), 0);
}

#[test]
fn the_configuration_is_read_in_any_way_and_ends_where_it_ends() {
    let registers = slot(&Log::default());
    let mut data = [9; 8];
    registers.read(at::CONFIG + 1, &mut data);
    assert_eq!(data, [2, 3, 4, 5, 0, 0, 0, 0]);
    for offset in [at::CONFIG + 5, at::CONFIG + 4000, u64::MAX] {
        registers.read(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

#[test]
fn an_empty_slot_says_that_it_is_empty() {
    let log = Log::default();
    let mut registers = Registers::alone();
    drive(&mut registers, FEATURES);
    assert_eq!(read(&registers, at::MAGIC), 0x7472_6976);
    assert_eq!(read(&registers, at::DEVICE_ID), 0);
    registers = slot(&log);
    drive(&mut registers, FEATURES);
    registers.remove();
    assert!(registers.is_empty());
    assert_eq!(read(&registers, at::DEVICE_ID), 0);
    assert_eq!(log.events.lock().unwrap().last(), Some(&Event::Stop));
}

/// Starts and stops alternate, whatever is written where.
#[test]
fn no_sequence_of_writes_breaks_the_order_of_things() {
    let log = Log::default();
    let mut registers = slot(&log);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..200_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random >> 8 & 0x1ff;
        let value = match random & 3 {
            0 => RUNNING,
            1 => (random >> 40) as u32 & 0xff,
            _ => (random >> 32) as u32,
        };
        match random >> 5 & 7 {
            0 => write(&mut registers, at::STATUS, value),
            1 => drive(&mut registers, u64::from(value & 1) | 1 << 32),
            2 => registers.write(offset, &value.to_le_bytes()[..(random & 3) as usize]),
            3 => drop(read(&registers, offset)),
            _ => write(&mut registers, offset, value),
        }
    }
    let events = log.events.lock().unwrap();
    assert!(events.len() > 1000);
    for pair in events.chunks_exact(2) {
        let [Event::Start(features, queues), Event::Stop] = pair else {
            panic!("{pair:?}");
        };
        assert_eq!(features & !FEATURES, 0);
        for (queue, max) in queues.iter().zip([256, 64]) {
            assert!(queue.size <= max && (!queue.ready || queue.size.is_power_of_two()));
        }
    }
}

#[test]
fn a_device_that_is_taken_away_waits_for_its_driver() {
    let log = Log::default();
    let mut registers = slot(&log);
    drive(&mut registers, 1 << 32);
    registers.retire();
    assert!(!registers.is_empty());
    assert_eq!(read(&registers, at::STATUS), RUNNING | 64);
    // The driver cannot take the bit away, and is not hindered by it.
    write(&mut registers, at::STATUS, RUNNING | 64);
    assert!(registers.is_running());
    assert_eq!(log.events.lock().unwrap().len(), 1);
    write(&mut registers, at::STATUS, 0);
    assert!(registers.is_empty());
    assert_eq!(read(&registers, at::DEVICE_ID), 0);
    assert_eq!(log.events.lock().unwrap().last(), Some(&Event::Stop));
    // What nobody drives goes at once.
    for status in [0, 1] {
        let mut registers = slot(&log);
        write(&mut registers, at::STATUS, status);
        registers.retire();
        assert!(registers.is_empty());
    }
}

#[test]
fn a_saved_device_goes_on_in_another_slot_with_the_same_device() {
    let log = Log::default();
    let mut registers = slot(&log);
    drive(&mut registers, FEATURES);
    write(&mut registers, at::DEVICE_FEATURES_SELECT, 1);
    let saved = registers.save().unwrap().unwrap();
    assert_eq!(log.events.lock().unwrap().last(), Some(&Event::Stop));
    let json = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SavedDevice>(&json).unwrap(), saved);

    let other = Log::default();
    let mut restored = slot(&other);
    restored.restore(&saved).unwrap();
    let went_on = Event::GoOn(FEATURES, saved.driver.queues.clone(), POSITIONS.to_vec());
    assert_eq!(*other.events.lock().unwrap(), [went_on]);
    assert!(restored.is_running());
    for register in [at::STATUS, at::QUEUE_READY, at::DEVICE_FEATURES] {
        assert_eq!(read(&restored, register), read(&registers, register));
    }
    assert_eq!(restored.save().unwrap(), Some(saved));
    write(&mut restored, at::STATUS, 0);
    assert_eq!(other.events.lock().unwrap().last(), Some(&Event::Stop));
}

#[test]
fn a_device_without_driver_and_an_empty_slot_can_be_saved() {
    let log = Log::default();
    let saved = slot(&log).save().unwrap().unwrap();
    assert!(log.events.lock().unwrap().is_empty());
    let mut restored = slot(&log);
    restored.restore(&saved).unwrap();
    assert!(!restored.is_running() && log.events.lock().unwrap().is_empty());
    assert_eq!(Registers::alone().save(), Ok(None));
    assert_eq!(Registers::alone().restore(&saved), Err(Unfit::Device));
}

#[test]
fn a_device_that_cannot_go_on_is_not_saved() {
    let log = Log {
        refuse: false,
        ..Log::default()
    };
    let mut registers = slot(&log);
    drive(&mut registers, FEATURES);
    let refusing = Log {
        refuse: true,
        ..log.clone()
    };
    let device = registers.device.as_mut().unwrap();
    device.rings = Box::new(refusing);
    assert_eq!(registers.save(), Err(Unfit::Unsavable));
}

#[test]
fn what_no_driver_can_have_set_up_is_refused() {
    let log = Log::default();
    let mut registers = slot(&log);
    drive(&mut registers, FEATURES);
    let saved = registers.save().unwrap().unwrap();
    type Change = fn(&mut SavedDevice);
    let changes: [(Change, Unfit); 13] = [
        (|s| s.id = 18, Unfit::Device),
        (|s| s.offered |= 2, Unfit::Device),
        (|s| s.queue_sizes[1] = 65, Unfit::Device),
        (|s| s.driver.features |= 2, Unfit::Driver),
        (|s| s.driver.features &= !(1 << 32), Unfit::Driver),
        (|s| s.driver.status = 4, Unfit::Driver),
        (|s| s.driver.status |= status::NEEDS_RESET, Unfit::Driver),
        (|s| s.driver.status |= 1 << 20, Unfit::Driver),
        (|s| s.driver.queues[0].size = 512, Unfit::Queues),
        (|s| s.driver.queues[0].size = 3, Unfit::Queues),
        (|s| s.driver.queues[0].size = 0, Unfit::Queues),
        (|s| s.driver.queues.truncate(1), Unfit::Queues),
        (|s| s.driver.positions.truncate(1), Unfit::Queues),
    ];
    for (number, (change, reason)) in changes.into_iter().enumerate() {
        let log = Log::default();
        let (mut wrong, mut restored) = (saved.clone(), slot(&log));
        change(&mut wrong);
        assert_eq!(restored.restore(&wrong), Err(reason), "{number}");
        assert!(!restored.is_running() && log.events.lock().unwrap().is_empty());
    }
    // The queues themselves are impossible.
    let log = Log {
        refuse: true,
        ..Log::default()
    };
    let mut restored = slot(&log);
    assert_eq!(restored.restore(&saved), Err(Unfit::Queues));
    assert!(!restored.is_running());
}

#[test]
fn a_driver_sees_what_the_device_changes_by_itself() {
    let mut registers = slot(&Log::default());
    let config = registers.device.as_ref().unwrap().identity.config.clone();
    config.change_short(1, 0x0908);
    let before = read(&registers, at::CONFIG_GENERATION);
    assert_eq!(read(&registers, at::CONFIG), 0x0409_0801);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 0, "it does not run");
    drive(&mut registers, FEATURES);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 3);
    write(&mut registers, INTERRUPT_ACK, 2);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 1);
    config.change(&[(0, 7)], true);
    assert_eq!(read(&registers, at::CONFIG), 7);
    assert_ne!(read(&registers, at::CONFIG_GENERATION), before);
    assert_eq!(read(&registers, at::INTERRUPT_STATUS), 3);
    config.fail();
    assert_eq!(read(&registers, at::STATUS), RUNNING | status::NEEDS_RESET);
    write(&mut registers, at::STATUS, 0);
    assert_eq!(read(&registers, at::STATUS), 0);
}

#[test]
fn a_device_that_has_left_changes_nothing_of_the_next() {
    let mut registers = slot(&Log::default());
    let config = registers.device.as_ref().unwrap().identity.config.clone();
    registers.remove();
    for register in [at::CONFIG, at::CONFIG + 4, at::STATUS, at::QUEUE_SIZE_MAX] {
        assert_eq!(read(&registers, register), 0, "{register:#x}");
    }
    config.fail();
    config.change_short(0, 9);
    assert_eq!(read(&registers, at::CONFIG), 0);
}
