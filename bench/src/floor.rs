//! The floor: the QEMU process of a pod with another init and without the devices
//! that only the runtime needs.
//!
//! Its command line is not written here again: it is taken from the QEMU of a running
//! container, so that both are always the same machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kuasar_runv_test_harness::{CALL, Flavour, World, leaks, reaper, runtime};

/// What the trivial init prints (rootfs-builder/floor/init.c).
const LINE: &str = "floor: init runs";

pub struct Floor {
    program: PathBuf,
    args: Vec<String>,
    console: PathBuf,
}

impl Floor {
    /// Learns the command line from the VM of a container of this world.
    pub fn learn(world: &World) -> Floor {
        let image = runtime::guest_dir().join("floor.img");
        assert!(
            image.exists(),
            "{} is missing: run `make floor` first",
            image.display()
        );
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
