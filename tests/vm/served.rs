//! Disks and files that programs of the host serve over vhost-user: QEMU's storage
//! daemon and virtiofsd.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{CALL, SHORT, Value, World, json, reaper, wait_until};

use crate::disks::{host, image};
use crate::pods;

/// A program that serves something; it ends with the value.
pub struct Program {
    pid: i32,
    socket: PathBuf,
}

impl Program {
    pub fn start(command: &mut Command, socket: PathBuf) -> Program {
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let pid = reaper::spawn(command).expect("the program starts").pid;
        wait_until("the program listens", SHORT, || socket.exists());
        Program { pid, socket }
    }

    /// A disk of a raw image.
    pub fn storage(world: &World, name: &str, image: &Path) -> Program {
        let socket = world.path(name);
        let (file, address) = (image.display(), socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--blockdev", &format!("driver=file,node-name=disk,filename={file}")])
            .args([
                "--export",
                &format!(
                    "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={address}"
                ),
            ]);
        Program::start(&mut command, socket)
    }

    /// The files below a directory.
    fn files(world: &World, name: &str, directory: &Path) -> Program {
        let socket = world.path(name);
        let path = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("virtiofsd is installed (scripts/setup-packages test)");
        let mut command = Command::new(path);
        command
            .arg(format!("--socket-path={}", socket.display()))
            .arg("--thread-pool-size=0")
            .args([
                "-o",
                &format!("source={},sandbox=chroot", directory.display()),
            ]);
        Program::start(&mut command, socket)
    }

    fn mount(&self, kind: &str, options: &[&str]) -> Value {
        let source = &self.socket;
        json!({ "destination": "/vol", "type": kind, "source": source, "options": options })
    }

    fn kill(&self) {
        // SAFETY: a process of ours that nobody has waited for.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        let ended = reaper::wait(self.pid, SHORT);
        assert!(ended.is_some() || std::thread::panicking());
    }
}

/// A member of a pod uses a program's disk while the machine runs; another one shares
/// it; what was written is there for the next.
#[test]
fn a_disk_of_a_storage_daemon_comes_and_goes_with_a_member_of_a_pod() {
    let world = World::new();
    let image = image(&world, "image");
    let program = Program::storage(&world, "storage", &image);
    let first = pods::sandbox(&world, "s");
    // What cannot be mounted is taken out again.
    let bundle = pods::member(&world, &first.id, "exit 0").mount(program.mount("xfs", &[]));
    let _ = world
        .try_create(&bundle, "other")
        .fails_with(1, "does not know the file system");
    for round in ["one", "two"] {
        let script = format!("ls /vol | grep -v lost; echo {round} >/vol/{round}; sleep 1000");
        let bundle = pods::member(&world, &first.id, &script);
        let bundle = bundle.mount(program.mount("ext4", &["noatime"]));
        let member = world.start(&bundle, round);
        member.wait_for_output("from-host\n");
        let script = format!("while [ ! -s /vol/{round} ]; do sleep 0.05; done; cat /vol/{round}");
        let bundle = pods::member(&world, &first.id, &script);
        let bundle = bundle.mount(program.mount("ext4", &["ro"]));
        let out = world.run(&bundle, &format!("{round}-reader")).ok();
        assert_eq!(out.stdout(), format!("{round}\n"));
        let _ = member.delete_force().ok();
    }
    let _ = first.delete_force().ok();
    drop(program);
    for round in ["one", "two"] {
        let cat = format!("cat {round}");
        let on_host = ["-R", cat.as_str(), image.to_str().unwrap()];
        assert_eq!(host("debugfs", &on_host), round);
    }
}

#[test]
fn a_disk_of_a_storage_daemon_is_a_block_device() {
    let world = World::new();
    let path = world.path("raw");
    let file = File::create_new(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(b"from the host", 0).unwrap();
    let program = Program::storage(&world, "storage", &path);
    // Written without a sync: that is the runtime's to do.
    let script = "head -c 13 /vol; echo; wc -c </vol; stat -c '%F' /vol
        printf guest | dd of=/vol bs=1 seek=1048576 conv=notrunc 2>/dev/null; echo write=$?";
    let bundle = world
        .bundle()
        .sh(script)
        .capabilities(&["CAP_DAC_OVERRIDE"]);
    let bundle = bundle.mount(program.mount("vhost-user-blk", &[]));
    let out = world.run(&bundle, "c").ok();
    let expected = "from the host\n4194304\nblock special file\nwrite=0\n";
    assert_eq!(out.stdout(), expected);
    let mut written = [0; 5];
    file.read_exact_at(&mut written, 1 << 20).unwrap();
    assert_eq!(&written, b"guest");
    // It serves no files, and nobody waits for some.
    let bundle = world.bundle().sh("ls /vol");
    let bundle = bundle.mount(program.mount("virtiofs", &[]));
    let words = "serves no files";
    let _ = world.try_create(&bundle, "files").fails_with(1, words);
}

#[test]
fn files_of_a_file_server_are_mounted_in_the_guest() {
    let world = World::new();
    let directory = world.path("served");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("from-host"), "host\n").unwrap();
    let program = Program::files(&world, "files", &directory);
    let script = "cat /vol/from-host; grep ' /vol ' /proc/mounts; echo guest >/vol/from-guest
        dd if=/dev/zero of=/vol/large bs=64k count=64 2>/dev/null; echo end; sleep 1000";
    let bundle = world
        .bundle()
        .sh(script)
        .mount(program.mount("virtiofs", &["nosuid"]));
    let container = world.start(&bundle, "c");
    container.wait_for_output("end\n");
    let said = container.stdout();
    assert!(said.starts_with("host\n"), "{said}");
    assert!(said.contains(" virtiofs rw,nosuid"), "{said}");
    assert_eq!(
        fs::read_to_string(directory.join("from-guest")).unwrap(),
        "guest\n"
    );
    assert_eq!(
        fs::metadata(directory.join("large")).unwrap().len(),
        4 << 20
    );
    fs::write(directory.join("later"), "later\n").unwrap();
    let out = container.exec_sh(&[], "cat /vol/later").ok();
    assert_eq!(out.stdout(), "later\n");
    let _ = container.delete_force().ok();
}

/// A `create` that is given up late has nothing to say about what it takes apart.
#[test]
fn files_where_a_disk_is_wanted_are_one_error() {
    let world = World::new();
    let directory = world.path("served");
    fs::create_dir(&directory).unwrap();
    let program = Program::files(&world, "files", &directory);
    let bundle = world.bundle().sh("exit 0");
    let bundle = bundle.mount(program.mount("vhost-user-blk", &[]));
    let out = world.try_create(&bundle, "c").fails_with(1, "the volume ");
    assert!(!out.stderr().contains("level=warning"), "{}", out.stderr());
}

#[test]
fn what_does_not_serve_is_an_error_that_says_so() {
    let world = World::new();
    let silent = world.path("silent");
    // It accepts, as far as the kernel does that, and closes.
    let listener = UnixListener::bind(&silent).unwrap();
    let closing = std::thread::spawn(move || drop(listener.accept()));
    let mount = |source: &Path, kind: &str| json!({ "destination": "/vol", "type": kind, "source": source, "options": [] });
    let bundle = world.bundle().sh("exit 0").mount(mount(&silent, "ext4"));
    let words = "does not speak vhost-user";
    let _ = world.try_create(&bundle, "closes").fails_with(1, words);
    closing.join().unwrap();
    let bundle = world.bundle().sh("exit 0").mount(mount(&silent, "ext4"));
    let _ = world
        .try_create(&bundle, "gone")
        .fails_with(1, "connection refused");
    let file = world.path("file");
    fs::write(&file, "").unwrap();
    let bundle = world.bundle().sh("exit 0").mount(mount(&file, "virtiofs"));
    let words = "needs the socket of a program that speaks vhost-user";
    let _ = world.try_create(&bundle, "file").fails_with(1, words);
    world.assert_clean();
}

/// What waits for the program waits on; the pod does not.
#[test]
fn a_pod_goes_on_without_the_program_that_served_a_disk() {
    let world = World::new();
    let image = image(&world, "image");
    let program = Program::storage(&world, "storage", &image);
    let first = pods::sandbox(&world, "s");
    let script = "echo up; while [ ! -e /tmp/go ]; do sleep 0.1; done; ls /vol; echo x >/vol/x; sync; echo no";
    let bundle = pods::member(&world, &first.id, script).mount(program.mount("ext4", &[]));
    let bundle = bundle.mount(json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" }));
    let member = world.start(&bundle, "m");
    member.wait_for_output("up\n");
    program.kill();
    let _ = member.exec_sh(&[], ": >/tmp/go").ok();
    let _ = first.exec_sh(&[], "echo still here").ok();
    // Others come and go, with devices of their own.
    let other = world.path("other.image");
    fs::copy(&image, &other).unwrap();
    let mount = json!({ "destination": "/vol", "type": "ext4", "source": other, "options": [] });
    let bundle = pods::member(&world, &first.id, "cat /vol/from-host").mount(mount);
    assert_eq!(world.run(&bundle, "other").ok().stdout(), "host\n");
    assert!(!member.stdout().contains("no\n"));
    // The end of the pod is one in any case.
    let start = Instant::now();
    let _ = member.delete_force();
    let _ = first.delete_force().ok();
    assert!(start.elapsed() < CALL, "{:?}", start.elapsed());
    std::thread::sleep(Duration::from_millis(10));
}
