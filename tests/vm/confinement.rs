//! What the host's processes of a container have given up, and that there is no way
//! from them to the runtime's binary. docs/threat-model.md says why.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use kuasar_runv_test_harness::{Container, World};

use crate::victims::{self, Victim, proc_of, status};

fn running(world: &World) -> Container<'_> {
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    container
}

#[test]
fn no_process_has_privileges_it_does_not_need() {
    const DAC_OVERRIDE: u64 = 1 << 1;
    const SETGID: u64 = 1 << 6;
    const SETUID: u64 = 1 << 7;
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_NICE: u64 = 1 << 23;
    // chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap
    const FILES: u64 = 0x8800_00db;
    let world = World::new();
    let container = running(&world);
    let [vm, sandboxer, standin] = Victim::ALL.map(|v| victims::the(&world, v));
    assert_eq!(standin, container.pid);
    for pid in [vm, sandboxer, standin] {
        assert_eq!(status(&proc_of(pid), "NoNewPrivs"), "1", "{pid}");
    }
    for pid in [vm, standin] {
        assert_eq!(status(&proc_of(pid), "Seccomp"), "2", "{pid}");
        for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
            assert_eq!(status(&proc_of(pid), set), "0000000000000000", "{set}");
        }
    }
    for (name, capabilities) in victims::threads(sandboxer) {
        let allowed = match name.as_str() {
            "vsock" | "vsock-control" => 0,
            "fs" | "fs-control" | "vring_worker" => FILES,
            "network" => NET_ADMIN | NET_BIND_SERVICE,
            "loopback" => NET_BIND_SERVICE,
            "resolver" => 0,
            _ => {
                let sockets = SETGID | SETUID | SYS_NICE;
                DAC_OVERRIDE | SYS_ADMIN | NET_ADMIN | NET_BIND_SERVICE | sockets
            }
        };
        assert_eq!(capabilities & !allowed, 0, "{name}: {capabilities:x}");
    }
}

/// `podman cp`, hooks and whatever else runs in the container's namespaces on the
/// host find this binary there (CVE-2019-5736).
#[test]
fn the_binary_cannot_be_overwritten_through_a_stand_in() {
    let mut world = World::new();
    // A copy that nothing else executes, which would be an obstacle of its own.
    let copy = world.path("kuasar-runv");
    fs::copy(&world.runtime.binary, &copy).unwrap();
    world.runtime.binary = copy;
    let before = fs::read(&world.runtime.binary).unwrap();
    let container = running(&world);
    let exe = proc_of(container.pid).join("exe");
    // The second while it is being executed, on kernels that forbid that.
    let refused = [Some(libc::EROFS), Some(libc::ETXTBSY)];
    let write = |path: &Path| File::options().write(true).open(path).map(drop);
    let error = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    assert!(refused.contains(&error(write(&exe))));
    let truncate = File::options().write(true).truncate(true).open(&exe);
    assert!(refused.contains(&error(truncate.map(drop))));
    let mode = fs::metadata(&exe).unwrap().permissions();
    assert_eq!(error(fs::set_permissions(&exe, mode)), Some(libc::EROFS));
    // While it is being executed nothing could be written anyway: keep the file and
    // wait for the end of the process, as the attack does.
    let kept = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&exe)
        .unwrap();
    let _ = container.delete_force().ok();
    let _ = container.wait();
    let kept_path = PathBuf::from(format!("/proc/self/fd/{}", kept.as_raw_fd()));
    assert_eq!(error(write(&kept_path)), Some(libc::EROFS));
    assert!(fs::read(&world.runtime.binary).unwrap() == before);
}

/// What QEMU could do with the rights of root, should the guest break out into it.
#[test]
fn the_hypervisor_sees_read_only_file_systems_only() {
    let world = World::new();
    let _container = running(&world);
    let vm = proc_of(victims::the(&world, Victim::Vm));
    let mounts = fs::read_to_string(vm.join("mountinfo")).unwrap();
    // What is mounted later arrives as it is: that of other tests, namespaces they make.
    let of_others = |line: &str| {
        let place = line.split(' ').nth(4).unwrap();
        let own = world.root.parent().unwrap().to_str().unwrap();
        let is_theirs = place.contains("/krt-") && !place.starts_with(own);
        is_theirs || line.contains(" - nsfs ")
    };
    let writable: Vec<_> = mounts
        .lines()
        .filter(|line| !line.split(' ').nth(5).unwrap().starts_with("ro"))
        .filter(|line| !of_others(line))
        .collect();
    assert_eq!(writable, Vec::<&str>::new());
    // Neither are the files it was given, nor its working directory.
    for entry in fs::read_dir(vm.join("fd")).unwrap() {
        let path = entry.unwrap().path();
        let target = fs::read_link(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_file() && !target.to_string_lossy().starts_with("/memfd:") {
            let error = File::options().write(true).open(&path).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{target:?}");
        }
    }
    let error = fs::write(vm.join("cwd/written"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

/// containerd leaves its listening socket at 3, shells leave others anywhere; a
/// process that stays must keep none of them.
#[test]
fn descriptors_of_the_caller_end_with_the_command() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let pipe = {
        let mut fds = [0; 2];
        // SAFETY: pipe2 writes two descriptors, which are nobody else's.
        unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
            fds.map(|fd| File::from_raw_fd(fd))
        }
    };
    let inode = pipe[1].metadata().unwrap().ino();
    let write_end = pipe[1].as_raw_fd();
    let mut call = world.create_call(bundle.path(), "c");
    // SAFETY: dup2 takes integers and is async-signal-safe.
    unsafe {
        call.command().pre_exec(move || {
            let done = [3, 10, 251]
                .iter()
                .all(|fd| libc::dup2(write_end, *fd) >= 0);
            if done {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output_to(files.0, files.1).output().ok();
    let container = Container::adopt(&world, "c");
    container.start();
    for victim in Victim::ALL {
        let pid = victims::the(&world, victim);
        for entry in fs::read_dir(proc_of(pid).join("fd")).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::metadata(&path).is_ok_and(|m| m.ino() == inode);
            assert!(
                !found,
                "{victim:?} has the caller's pipe: {}",
                path.display()
            );
        }
    }
}
