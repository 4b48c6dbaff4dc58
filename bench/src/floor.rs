//! The floor: the VM of a pod with another init.
//!
//! With QEMU it is the QEMU process of a pod without the devices that only the runtime
//! needs. Its command line is not written here again: it is taken from the QEMU of a
//! running container, so that both are always the same machine.
//!
//! The built-in VMM is no program of its own. There it is the sandboxer that boots the
//! trivial init, and the time is that between two lines of its log: from the VMM's start
//! to the end of the machine. What comes before and after in that process is not in it.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::world::{configuration, hypervisor};
use kuasar_runv_test_harness::{Bundle, CALL, Flavour, Runtime, World, leaks, reaper, runtime};

/// What the trivial init prints (rootfs-builder/floor/init.c).
const LINE: &str = "floor: init runs";

/// How often the log of a sandboxer is looked for while its machine boots.
const LOOK: Duration = Duration::from_millis(20);

/// The floor of the hypervisor that the tests are told to use.
pub enum AnyFloor {
    Qemu(Floor),
    Builtin(Box<BuiltinFloor>),
}

impl AnyFloor {
    pub fn learn(world: &World) -> AnyFloor {
        match hypervisor().as_str() {
            "builtin" => AnyFloor::Builtin(Box::new(BuiltinFloor::new())),
            _ => AnyFloor::Qemu(Floor::learn(world)),
        }
    }

    /// Boots and powers off, once; how long that takes.
    pub fn boot(&self) -> Duration {
        match self {
            AnyFloor::Qemu(floor) => {
                let begin = Instant::now();
                floor.boot();
                begin.elapsed()
            }
            AnyFloor::Builtin(floor) => floor.boot(),
        }
    }
}

/// The trivial init's image.
fn image() -> PathBuf {
    let image = runtime::guest_dir().join("floor.img");
    assert!(
        image.exists(),
        "{} is missing: run `make floor` first",
        image.display()
    );
    image
}

/// The built-in VMM with the trivial init.
pub struct BuiltinFloor {
    world: World,
    bundle: Bundle,
}

impl BuiltinFloor {
    fn new() -> BuiltinFloor {
        let mut world = World::with(Runtime::built(), Flavour::Source);
        let usual = Flavour::Source.artefact("initramfs.img");
        let config = configuration(Flavour::Source);
        let config = config.replace(&format!("{usual:?}"), &format!("{:?}", image()));
        // A template is another machine's, with another image.
        world.configure(config.split("[template]").next().unwrap_or_default());
        let bundle = world.bundle();
        // Written before it is measured.
        let _ = bundle.path();
        BuiltinFloor { world, bundle }
    }

    /// Has a container created, which fails when the machine has powered itself off.
    fn boot(&self) -> Duration {
        let log = self.world.root.join("sandboxes").join(self.world.id("f"));
        let log = log.join("sandboxer.log");
        let call = self.world.call(["--debug", "create", "--bundle"]);
        let call = call.arg(self.bundle.path()).arg(self.world.id("f"));
        let (said, log) = thread::scope(|scope| {
            let create = scope.spawn(|| call.deadline(2 * CALL).output());
            // It is gone with the container, but what is open stays.
            let log = until(CALL, || File::open(&log).ok());
            (create.join().expect("it reports"), log)
        });
        let said = said.stderr();
        assert!(said.contains(LINE), "the machine's end: {said}");
        let mut text = String::new();
        let mut log = log.expect("a sandboxer has a log");
        log.read_to_string(&mut text).expect("text");
        took(&text).unwrap_or_else(|| panic!("the sandboxer's log has no times: {text}"))
    }
}

/// From the start of the VMM to the end of the machine, of a sandboxer's log.
fn took(log: &str) -> Option<Duration> {
    let at = |step: &str| {
        let rest = log.split_once(&format!("\"trace {step} "))?.1;
        rest.split('"')
            .next()?
            .parse()
            .ok()
            .map(Duration::from_micros)
    };
    at("vm-exited")?.checked_sub(at("vmm-start")?)
}

fn until<T>(deadline: Duration, mut try_it: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        let got = try_it();
        if got.is_some() || Instant::now() > end {
            return got;
        }
        thread::sleep(LOOK);
    }
}

pub struct Floor {
    program: PathBuf,
    args: Vec<String>,
    console: PathBuf,
}

impl Floor {
    /// Learns the command line from the VM of a container of this world.
    pub fn learn(world: &World) -> Floor {
        let image = image();
        let container = world.start(&world.bundle().sh("sleep 1000"), "model");
        let qemu = leaks::processes(world.name())
            .into_iter()
            .find(|p| p.comm.starts_with("qemu-system"))
            .expect("a running container has a QEMU");
        let program = fs::read_link(format!("/proc/{}/exe", qemu.pid)).expect("QEMU runs");
        let command_line = fs::read(format!("/proc/{}/cmdline", qemu.pid)).expect("QEMU runs");
        let _ = container.delete_force().ok();
        let console = world.path("floor.console");
        let words: Vec<String> = command_line
            .split(|byte| *byte == 0)
            .skip(1)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .filter(|word| !word.is_empty())
            .collect();
        let kernel = Flavour::Source.artefact("vmlinux");
        Floor {
            args: adapt(&words, &kernel, &image, &console),
            program,
            console,
        }
    }

    /// Boots and powers off, once.
    pub fn boot(&self) {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = reaper::spawn(&mut command)
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let status = reaper::wait(child.pid, CALL).expect("the floor powers off");
        let said = fs::read_to_string(&self.console).unwrap_or_default();
        assert!(
            said.contains(LINE),
            "{status}, and its console says {said:?}"
        );
    }
}

/// Files instead of descriptors, the other image, no connection to a sandboxer.
fn adapt(words: &[String], kernel: &Path, image: &Path, console: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(option) = words.next() {
        let value = words.next_if(|word| !word.starts_with('-'));
        let new_value = match (option.as_str(), value.map(String::as_str)) {
            ("-kernel", _) => Some(kernel.display().to_string()),
            ("-initrd", _) => Some(image.display().to_string()),
            ("-chardev", Some(v)) if v.starts_with("file,id=console,") => {
                Some(format!("file,id=console,path={}", console.display()))
            }
            ("-chardev", Some(v)) if v.starts_with("socket,") => continue,
            ("-device", Some(v)) if v.contains("vhost-user") => continue,
            ("-mon" | "-qmp" | "-pidfile" | "-daemonize", _) => continue,
            (_, value) => value.map(str::to_owned),
        };
        out.push(option.clone());
        out.extend(new_value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_machine_is_that_between_two_lines() {
        let log = r#"time="x" level=debug msg="trace vmm-start 1000"
time="x" level=info msg="virtual machine: GuestShutdown"
time="x" level=debug msg="trace vm-exited 3500""#;
        assert_eq!(took(log), Some(Duration::from_micros(2500)));
        assert_eq!(took("trace vmm-start 1000"), None);
    }

    #[test]
    fn only_the_machine_is_left_of_the_command_line() {
        let line = "-nodefaults -machine q35,memory-backend=ram -kernel /proc/self/fd/4 \
            -initrd /proc/self/fd/5 -append console=ttyS0 -chardev socket,id=vsock,path=v \
            -device vhost-user-vsock-pci,chardev=vsock -device virtio-rng-pci \
            -chardev file,id=console,path=/proc/self/fd/6 -serial chardev:console \
            -chardev socket,id=qmp,fd=7 -mon chardev=qmp,mode=control -no-reboot";
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let out = adapt(&words, Path::new("/k"), Path::new("/i"), Path::new("/c"));
        assert_eq!(
            out.join(" "),
            "-nodefaults -machine q35,memory-backend=ram -kernel /k -initrd /i \
             -append console=ttyS0 -device virtio-rng-pci -chardev file,id=console,path=/c \
             -serial chardev:console -no-reboot"
        );
    }
}
