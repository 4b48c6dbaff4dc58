//! What does not leave the host's kernel while a machine on the built-in VMM works.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use kuasar_runv_test_harness::World;

/// KVM's counters, of all machines of the host.
struct Counters(PathBuf);

impl Counters {
    fn mount(world: &World) -> Counters {
        let dir = world.path("counters");
        fs::create_dir(&dir).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "debugfs", "none"])
            .arg(&dir)
            .status();
        assert!(mount.unwrap().success());
        Counters(dir)
    }

    /// Accesses to registers that a processor's thread has answered.
    fn accesses(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("kvm/mmio_exits")).unwrap();
        text.trim().parse().unwrap()
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// To be run alone: other machines count as well.
#[test]
#[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
fn files_and_streams_take_no_exits() {
    let world = World::new();
    let counters = Counters::mount(&world);
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    assert!(counters.accesses() > 50, "drivers have written registers");
    for script in [
        "dd if=/dev/zero of=/new bs=128k count=128 conv=fsync 2>/dev/null",
        "head -c 4m /dev/zero",
        "head -c 64 /dev/hwrng >/dev/null 2>&1; true",
    ] {
        let before = counters.accesses();
        let _ = container.exec_sh(&[], script).ok();
        let exits = counters.accesses() - before;
        assert!(exits < 8, "{exits} exits of `{script}`");
    }
}
