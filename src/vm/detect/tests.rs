//! The cache, and KVM of the machine the tests run on.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::*;

fn fails() -> Outcome {
    Outcome::Fails("it is only a test".into())
}

fn unusable() -> KvmStatus {
    KvmStatus::Unusable {
        reason: "it is only a test".into(),
    }
}

/// A cache in a directory that does not exist yet, and a machine.
fn setup() -> (tempfile::TempDir, Cache, Machine) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::new(&dir.path().join("run/kuasar-runv"));
    let machine = Machine::current(Path::new("/dev/null")).unwrap();
    (dir, cache, machine)
}

#[test]
fn an_answer_is_remembered() {
    let (_dir, cache, machine) = setup();
    let probes = Cell::new(0);
    for _ in 0..3 {
        let status = ask(&cache, &machine, || {
            probes.set(probes.get() + 1);
            fails()
        });
        assert_eq!(status, unusable());
    }
    assert_eq!(probes.get(), 1);
}

#[test]
fn a_usable_kvm_is_remembered_too() {
    let (_dir, cache, machine) = setup();
    assert_eq!(ask(&cache, &machine, || Outcome::Works), KvmStatus::Usable);
    assert_eq!(ask(&cache, &machine, fails), KvmStatus::Usable);
}

#[test]
fn an_answer_of_another_boot_or_device_is_not_used() {
    let (dir, cache, machine) = setup();
    ask(&cache, &machine, fails);
    let status = ask(&cache, &machine.after_reboot(), || Outcome::Works);
    assert_eq!(status, KvmStatus::Usable);
    let other = Machine::current(Path::new("/dev/zero")).unwrap();
    assert_eq!(cache.get(&other), None);
    // Nothing but the record and the lock is left.
    let files = std::fs::read_dir(dir.path().join("run/kuasar-runv")).unwrap();
    assert_eq!(files.count(), 2);
}

#[test]
fn what_could_not_be_found_out_is_asked_again() {
    let (_dir, cache, machine) = setup();
    let busy = ask(&cache, &machine, || Outcome::Unknown("busy".into()));
    assert_eq!(
        busy,
        KvmStatus::Unusable {
            reason: "busy".into()
        }
    );
    assert_eq!(ask(&cache, &machine, || Outcome::Works), KvmStatus::Usable);
}

#[test]
fn a_damaged_record_is_replaced() {
    let (dir, cache, machine) = setup();
    ask(&cache, &machine, fails);
    let path = dir.path().join("run/kuasar-runv/kvm.json");
    for junk in ["", "{", "{\"machine\": 1}", &"x".repeat(100_000)] {
        std::fs::write(&path, junk).unwrap();
        assert_eq!(cache.get(&machine), None);
    }
    ask(&cache, &machine, fails);
    assert_eq!(cache.get(&machine), Some(unusable()));
}

#[test]
fn a_cache_that_cannot_be_written_only_costs_a_probe() {
    let machine = Machine::current(Path::new("/dev/null")).unwrap();
    let cache = Cache::new(Path::new("/proc/nonexistent"));
    assert_eq!(ask(&cache, &machine, || Outcome::Works), KvmStatus::Usable);
    assert_eq!(ask(&cache, &machine, fails), unusable());
}

#[test]
fn concurrent_commands_probe_once() {
    let (_dir, cache, machine) = setup();
    let probes = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let status = ask(&cache, &machine, || {
                    probes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(50));
                    Outcome::Works
                });
                assert_eq!(status, KvmStatus::Usable);
            });
        }
    });
    assert_eq!(probes.into_inner(), 1);
}

/// Whatever this machine has, the answer comes in time, and the second time from
/// the cache.
#[test]
fn the_machine_answers_within_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let first = kvm(dir.path());
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    println!("{first:?} after {:?}", start.elapsed());
    if dir.path().join("kvm.json").exists() {
        let start = Instant::now();
        assert_eq!(kvm(dir.path()), first);
        assert!(start.elapsed() < Duration::from_millis(100));
    }
}
