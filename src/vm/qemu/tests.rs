//! The state machine of a QEMU VM, against a script that plays QEMU.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Instant;

use super::super::detect;
use super::super::process::wait_readable;
use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

struct Fixture {
    dir: tempfile::TempDir,
    config: Config,
}

impl Fixture {
    /// A sandbox directory, and `script` in place of QEMU. It finds the control
    /// connection at descriptor 3 and the guest's console at 6.
    fn new(script: &str) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.qemu.path = dir.path().join("qemu");
        config.qemu.accel = config::Accel::Tcg;
        config.qemu.firmware = dir.path().join("firmware");
        config.timeouts.hypervisor_s = 5;
        for name in ["firmware", "kernel", "initrd"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::write(&config.qemu.path, format!("#!/bin/busybox sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&config.qemu.path, PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::create_dir(dir.path().join("sandbox")).unwrap();
        Fixture { dir, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn create(&self) -> Result<QemuVm, Error> {
        let vm = VmConfig {
            sandbox_dir: self.path("sandbox"),
            kernel: self.path("kernel"),
            initrd: self.path("initrd"),
            kernel_params: String::new(),
            most: VmSize {
                vcpus: 1,
                memory_mib: 256,
            },
            size: VmSize {
                vcpus: 1,
                memory_mib: 128,
            },
            fs_tag: "tag".into(),
            console_log: Some("console.log".into()),
            verbose_console: false,
            template: crate::vm::Templates::None,
            console: crate::config::Console::default(),
            huge_pages: crate::config::HugePages::default(),
        };
        QemuVm::new(&self.config, vm, &self.path("cache"))
    }

    fn boot(&self) -> QemuVm {
        let mut vm = self.create().unwrap();
        vm.boot(&mut |_| Ok(())).unwrap();
        vm
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path("sandbox").join(name)).unwrap()
    }
}

fn next_event(vm: &mut QemuVm) -> Result<VmEvent, Error> {
    let start = Instant::now();
    loop {
        if let Some(event) = vm.next_event()? {
            return Ok(event);
        }
        let left = DEADLINE.saturating_sub(start.elapsed());
        assert!(wait_readable(vm.event_fd(), left).unwrap(), "no event");
    }
}

fn exited(event: VmEvent) -> VmExit {
    match event {
        VmEvent::Exited(exit) => exit,
        other => panic!("{other:?} instead of the exit"),
    }
}

const NEGOTIATE: &str = r#"
echo '{"QMP": {"version": {}, "capabilities": []}}' >&3
read -r capabilities <&3
echo '{"return": {}, "id": 0}' >&3
read -r status <&3
echo '{"return": {"status": "running", "running": true}, "id": 1}' >&3
"#;

#[test]
fn a_guest_that_resets_is_told_from_one_that_powers_off() {
    for (reason, expected) in [
        ("guest-reset", VmEvent::GuestReset),
        ("guest-shutdown", VmEvent::GuestShutdown),
        ("guest-panic", VmEvent::GuestPanicked),
    ] {
        let fixture = Fixture::new(&format!(
            "{NEGOTIATE}\necho 'Kernel panic' >&6\n\
             echo '{{\"event\": \"SHUTDOWN\", \"data\": {{\"guest\": true, \"reason\": \
             \"{reason}\"}}}}' >&3"
        ));
        let mut vm = fixture.boot();
        assert_eq!(next_event(&mut vm).unwrap(), expected);
        let exit = exited(next_event(&mut vm).unwrap());
        assert!(exit.status.unwrap().success());
        assert_eq!(exit.message, None);
        assert_eq!(fixture.log("console.log"), "Kernel panic\n");
        // The last event: nothing is readable any more.
        assert_eq!(vm.next_event().unwrap(), None);
        assert!(!wait_readable(vm.event_fd(), Duration::ZERO).unwrap());
        assert_eq!(vm.pid(), None);
        assert_eq!(vm.stop(DEADLINE).unwrap(), exit.status);
    }
}

#[test]
fn a_qemu_that_dies_at_once_leaves_its_last_words() {
    let fixture = Fixture::new("echo warning >&2; echo 'qemu: no such machine' >&2; exit 1");
    let mut vm = fixture.boot();
    let exit = exited(next_event(&mut vm).unwrap());
    assert_eq!(exit.status.unwrap().code(), Some(1));
    assert_eq!(exit.message.unwrap(), "qemu: no such machine");
    assert_eq!(fixture.log(QEMU_LOG), "warning\nqemu: no such machine\n");
}

#[test]
fn virtual_cpus_that_stopped_by_themselves_are_an_event() {
    let fixture = Fixture::new(&format!(
        r#"{NEGOTIATE}
        echo '{{"event": "STOP"}}' >&3
        read -r status <&3
        echo '{{"return": {{"status": "internal-error", "running": false}}, "id": 2}}' >&3
        read -r forever <&3"#
    ));
    let mut vm = fixture.boot();
    assert_eq!(
        next_event(&mut vm).unwrap(),
        VmEvent::Stalled {
            reason: "QEMU reports internal-error".into()
        }
    );
    let status = vm.stop(DEADLINE).unwrap().unwrap();
    assert_eq!(status.signal(), Some(9));
    assert_eq!(vm.next_event().unwrap(), None);
}

#[test]
fn a_pause_is_not_taken_for_a_failure() {
    let fixture = Fixture::new(&format!(
        r#"{NEGOTIATE}
        read -r stop <&3
        echo '{{"event": "STOP"}}' >&3
        echo '{{"return": {{}}, "id": 2}}' >&3
        read -r query <&3
        echo '{{"return": {{"status": "paused", "running": false}}, "id": 3}}' >&3
        read -r cont <&3
        echo '{{"error": {{"class": "GenericError", "desc": "not today"}}, "id": 4}}' >&3
        echo "$stop $query $cont" >&2"#
    ));
    let mut vm = fixture.boot();
    vm.pause().unwrap();
    assert_eq!(vm.next_event().unwrap(), None);
    let error = vm.resume().unwrap_err();
    assert_eq!(
        error.to_string(),
        "control connection to QEMU: cont failed: not today"
    );
    exited(next_event(&mut vm).unwrap());
    let log = fixture.log(QEMU_LOG);
    for command in ["\"stop\"", "\"query-status\"", "\"cont\""] {
        assert!(log.contains(command), "{command} not in {log}");
    }
    assert!(matches!(vm.pause(), Err(Error::NotRunning { .. })));
}

/// The protocol as QEMU itself speaks it, with a machine that has no parts.
#[test]
fn the_real_qemu_pauses_and_resumes() {
    let fixture = Fixture::new(
        "exec /usr/bin/qemu-system-x86_64 -nodefaults -machine none -display none \
         -chardev socket,id=qmp,fd=3 -mon chardev=qmp,mode=control \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    let mut vm = fixture.boot();
    for _ in 0..2 {
        vm.pause().unwrap();
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.resume().unwrap();
    }
    for _ in 0..2 {
        assert_eq!(vm.next_event().unwrap(), Some(VmEvent::Resumed));
    }
    assert_eq!(vm.next_event().unwrap(), None);
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(vm.pid().unwrap()).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    let exit = exited(next_event(&mut vm).unwrap());
    assert!(
        exit.status.unwrap().success(),
        "{exit:?} {}",
        fixture.log(QEMU_LOG)
    );
}

/// A PC with the bridge, which is what hot-plug needs of a machine.
const PC: &str = "exec /usr/bin/qemu-system-x86_64 -nodefaults -machine q35 -accel tcg -S -m 32M \
     -global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off -display none \
     -device pci-bridge,id=hotplug,chassis_nr=1 \
     -device virtio-rng-pci,bus=hotplug,addr=1f,disable-legacy=on \
     -chardev socket,id=qmp,fd=3 -mon chardev=qmp,mode=control \
     -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

fn tap() -> Device {
    use std::os::fd::AsRawFd;
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = crate::sandbox::network::tap::ifreq(b"krtvm%d");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let fd = tap.as_raw_fd();
    crate::sandbox::network::tap::attach_queue(fd, &mut request, flags).unwrap();
    Device::Net(crate::vm::NetDevice {
        queues: vec![tap.into()],
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 1],
    })
}

/// In a network namespace of its own, which takes its taps along.
#[test]
fn devices_come_and_go_without_the_guest() {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let fixture = Fixture::new(PC);
        let mut vm = fixture.boot();
        for round in 0..2 {
            for number in 1..=hotplug::SLOTS {
                vm.attach(&format!("net{number}"), &tap()).unwrap();
            }
            assert!(matches!(
                vm.attach("more", &tap()),
                Err(Error::NoSlot { .. })
            ));
            assert!(matches!(vm.attach("net1", &tap()), Err(Error::DeviceId(_))));
            for number in 1..=hotplug::SLOTS {
                let id = format!("net{number}");
                vm.detach(&id).unwrap();
                assert_eq!(next_event(&mut vm).unwrap(), VmEvent::Detached { id });
            }
            assert!(
                matches!(vm.detach("net1"), Err(Error::DeviceId(_))),
                "{round}"
            );
        }
        // What fails leaves its id and its slot free.
        let no_tap = Device::Net(crate::vm::NetDevice {
            queues: vec![File::open("/dev/null").unwrap().into()],
            vhost: Vec::new(),
            mac: [2, 0, 0, 0, 0, 1],
        });
        assert!(matches!(vm.attach("net1", &no_tap), Err(Error::Qmp(_))));
        vm.attach("net1", &tap()).unwrap();
        let no_vfio = Device::Vfio {
            address: "0000:7f:1f.7".into(),
        };
        assert!(matches!(vm.attach("vfio1", &no_vfio), Err(Error::Qmp(_))));
        vm.stop(DEADLINE).unwrap();
    })
    .join()
    .unwrap();
}

#[test]
fn ids_of_devices_have_an_alphabet() {
    for id in ["", "1", "-a", "A", "a b", "a.b", &"x".repeat(33)] {
        assert!(!crate::vm::valid_device_id(id), "{id}");
    }
    for id in ["a", "net0", "vol-1", &"x".repeat(32)] {
        assert!(crate::vm::valid_device_id(id), "{id}");
    }
}

#[test]
fn a_broken_control_connection_is_reported_once_and_the_vm_can_be_stopped() {
    let fixture = Fixture::new("echo nonsense >&3; read -r a <&3; read -r b <&3; read -r c <&3");
    let mut vm = fixture.boot();
    let error = next_event(&mut vm).unwrap_err();
    assert!(matches!(error, Error::Qmp(QmpError::Malformed(_))));
    exited(next_event(&mut vm).unwrap());
}

#[test]
fn a_flood_on_the_console_keeps_nobody_busy() {
    let fixture =
        Fixture::new("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&6; done");
    let mut vm = fixture.boot();
    let start = Instant::now();
    let mut wakeups = 0;
    while start.elapsed() < PERIOD * 5 {
        wait_readable(vm.event_fd(), PERIOD).unwrap();
        assert_eq!(vm.next_event().unwrap(), None);
        wakeups += 1;
    }
    assert!(wakeups <= 25, "{wakeups}");
    vm.stop(DEADLINE).unwrap();
    assert!(fixture.log("console.log").len() > 60_000);
}

#[test]
fn a_vm_that_was_never_booted_stops_and_drops() {
    let fixture = Fixture::new("");
    let mut vm = fixture.create().unwrap();
    assert_eq!(vm.stop(DEADLINE).unwrap(), None);
    assert_eq!(vm.next_event().unwrap(), None);
}

#[test]
fn a_missing_part_is_named_with_what_to_do() {
    type Break = fn(&mut Fixture);
    let cases: [(Break, &str); 5] = [
        (
            |f| f.config.qemu.path = "/nonexistent/qemu".into(),
            "cannot use the QEMU binary /nonexistent/qemu: it does not exist (install the package qemu-system-x86, or set qemu.path in config.toml)",
        ),
        (
            |f| {
                let readable = PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(&f.config.qemu.path, readable).unwrap();
            },
            "it may not be used (install the package qemu-system-x86",
        ),
        (
            |f| f.config.qemu.firmware = "/".into(),
            "cannot use the firmware /: not a file (it comes with the package qemu-system-data",
        ),
        (
            |f| std::fs::remove_file(f.path("kernel")).unwrap(),
            "(install kernel and image with `make install`",
        ),
        (
            |f| std::fs::remove_file(f.path("initrd")).unwrap(),
            "cannot use the guest image ",
        ),
    ];
    for (break_it, expected) in cases {
        let mut fixture = Fixture::new("");
        break_it(&mut fixture);
        let Err(error) = fixture.create() else {
            panic!("created although: {expected}");
        };
        let error = error.to_string();
        assert!(error.contains(expected), "{expected} not in {error}");
    }
}

#[test]
fn kvm_that_was_asked_for_is_not_replaced_by_emulation() {
    let mut fixture = Fixture::new("");
    fixture.config.qemu.accel = config::Accel::Kvm;
    match (fixture.create(), detect::kvm(&fixture.path("cache"))) {
        (Ok(vm), detect::KvmStatus::Usable) => assert!(!vm.capabilities().emulated),
        (Err(Error::KvmUnusable { reason, .. }), _) => assert!(!reason.is_empty()),
        (result, status) => panic!("{:?} with {status:?}", result.err()),
    }
}
