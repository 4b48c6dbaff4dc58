//! The other machine: the QEMU process of a pod whose file system device is served
//! by virtiofsd, and whose init is the workload.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use kuasar_runv_test_harness::{Flavour, SHORT, World, leaks, process, reaper, wait_until};

/// Debian's package qemu-system-common up to version 7, and the package virtiofsd.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// For how long a guest may use names and attributes without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    Nothing,
    /// What virtiofsd says without being told.
    Default,
}

/// A running machine and its file server.
pub struct Peer {
    processes: Vec<i32>,
    world: String,
    socket: PathBuf,
}

impl Peer {
    /// Boots a machine like the container's beside it.
    pub fn boot(world: &World, model: &Model, dir: &Path, trust: Trust) -> Peer {
        let image = world.path("workload.img");
        if !image.exists() {
            pack(&image);
        }
        let socket = world.path(&format!("virtiofsd-{trust:?}.sock"));
        let server = spawn_server(&socket, dir, trust);
        wait_until("virtiofsd's socket", SHORT, || socket.exists());
        let kernel = Flavour::Source.artefact("vmlinux");
        let args = adapt(&model.words, &kernel, &image, &socket);
        let mut command = Command::new(&model.program);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let machine = spawn(&mut command);
        join_cgroups(world, machine);
        Peer {
            processes: vec![machine, server],
            world: world.name().to_owned(),
            socket,
        }
    }

    fn is_served(&self) -> bool {
        let socket = self.socket.display().to_string();
        leaks::processes(&self.world).into_iter().any(|p| {
            let line = fs::read(format!("/proc/{}/cmdline", p.pid)).unwrap_or_default();
            p.comm.starts_with("virtiofsd") && String::from_utf8_lossy(&line).contains(&socket)
        })
    }
}

/// Puts the machine and its file server where the container's are: on a busy host the
/// scheduler shares processor time between cgroups first.
fn join_cgroups(world: &World, machine: i32) {
    let servers = leaks::processes(world.name()).into_iter();
    let servers = servers.filter(|p| p.comm.starts_with("virtiofsd"));
    for pid in servers.map(|p| p.pid).chain([machine]) {
        for cgroup in leaks::cgroups(world.name()) {
            let joined = fs::write(cgroup.join("cgroup.procs"), pid.to_string());
            joined.unwrap_or_else(|e| panic!("{}: {e}", cgroup.display()));
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for pid in &self.processes {
            // It may have ended with the other.
            let _ = process::signal(*pid, libc::SIGKILL);
            let _ = reaper::wait(*pid, SHORT);
        }
        // virtiofsd has a process in other namespaces, which ends after the one that was
        // killed, and which the container's cgroups are not to wait for.
        wait_until("the end of virtiofsd", SHORT, || !self.is_served());
    }
}

fn spawn(command: &mut Command) -> i32 {
    let child = reaper::spawn(command);
    let child = child.unwrap_or_else(|e| panic!("{:?}: {e}", command.get_program()));
    child.pid
}

fn spawn_server(socket: &Path, dir: &Path, trust: Trust) -> i32 {
    let program = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
    let program = program.expect("virtiofsd is installed (qemu-system-common, or virtiofsd)");
    let mut command = Command::new(program);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", dir.display())])
        .args([
            "-o",
            "cache=auto",
            "-o",
            "xattr",
            "-o",
            "announce_submounts",
        ])
        .args((trust == Trust::Nothing).then_some("-otimeout=0"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    spawn(&mut command)
}

/// An initramfs with this program as init.
fn pack(image: &Path) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let kernel = Flavour::Source.artefact("vmlinux");
    let mut command = Command::new(top.join("rootfs-builder/build-image"));
    command
        .arg("--agent")
        .arg(env::current_exe().expect("/proc is mounted"))
        .arg("--kernel")
        .arg(kernel.parent().expect("a directory"))
        .arg("--out")
        .arg(image)
        .stdout(Stdio::null());
    let pid = spawn(&mut command);
    let status = reaper::wait(pid, SHORT).expect("build-image ends");
    assert!(status.success(), "build-image: {status}");
}

/// The machine of a container.
pub struct Model {
    program: PathBuf,
    words: Vec<String>,
}

impl Model {
    /// That of the only QEMU of the world.
    pub fn learn(world: &World) -> Model {
        let qemu = leaks::processes(world.name())
            .into_iter()
            .find(|p| p.comm.starts_with("qemu-system"))
            .expect("a running container has a QEMU");
        let program = fs::read_link(format!("/proc/{}/exe", qemu.pid)).expect("QEMU runs");
        let line = fs::read(format!("/proc/{}/cmdline", qemu.pid)).expect("QEMU runs");
        let words = line.split(|byte| *byte == 0).skip(1);
        let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
        let words = words.filter(|word| !word.is_empty()).collect();
        Model { program, words }
    }
}

/// The same machine with files instead of descriptors, without a vsock device, and
/// with the other file server.
fn adapt(words: &[String], kernel: &Path, image: &Path, socket: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(option) = words.next() {
        let value = words.next_if(|word| !word.starts_with('-'));
        let value = match (option.as_str(), value.map(String::as_str)) {
            ("-kernel", _) => Some(kernel.display().to_string()),
            ("-initrd", _) => Some(image.display().to_string()),
            ("-chardev", Some(v)) if v.starts_with("socket,id=fs,") => {
                Some(format!("socket,id=fs,path={}", socket.display()))
            }
            ("-chardev", Some(v)) if v.starts_with("file,id=console,") => {
                Some("null,id=console".to_owned())
            }
            ("-chardev", Some(v)) if v.starts_with("socket,") => continue,
            ("-device", Some(v)) if v.contains("vsock") => continue,
            ("-mon" | "-sandbox", _) => continue,
            (_, value) => value.map(str::to_owned),
        };
        out.push(option.clone());
        out.extend(value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_file_server_is_another() {
        let line = "-machine q35 -kernel /proc/self/fd/4 -initrd /proc/self/fd/5 -append quiet \
            -chardev socket,id=vsock,path=v -device vhost-user-vsock-pci,chardev=vsock \
            -chardev socket,id=fs,path=f -device vhost-user-fs-pci,chardev=fs,tag=kuasar-share \
            -chardev file,id=console,path=/proc/self/fd/6 -serial chardev:console \
            -chardev socket,id=qmp,fd=7 -mon chardev=qmp,mode=control -sandbox on";
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let out = adapt(&words, Path::new("/k"), Path::new("/i"), Path::new("/s"));
        assert_eq!(
            out.join(" "),
            "-machine q35 -kernel /k -initrd /i -append quiet -chardev socket,id=fs,path=/s \
             -device vhost-user-fs-pci,chardev=fs,tag=kuasar-share -chardev null,id=console \
             -serial chardev:console"
        );
    }
}
