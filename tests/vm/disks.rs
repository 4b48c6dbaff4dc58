//! Block devices of the host and images as disks of the virtual machine.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kuasar_runv_test_harness::{Bundle, SHORT, Value, World, json, reaper};

use crate::pods;

/// Runs a program of the host to its end and returns what it printed.
#[track_caller]
pub fn host(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = reaper::spawn(&mut command).unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut out = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    std::io::Read::read_to_string(stdout, &mut out).unwrap();
    let status = reaper::wait(child.pid, SHORT).unwrap();
    assert!(status.success(), "{program} {args:?}: {status}");
    out.trim().to_owned()
}

/// An ext4 image with the file `from-host` in it.
pub fn image(world: &World, name: &str) -> PathBuf {
    let contents = world.path(&format!("{name}.d"));
    fs::create_dir(&contents).unwrap();
    fs::write(contents.join("from-host"), "host\n").unwrap();
    let image = world.path(name);
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let [contents, path] = [&contents, &image].map(|p| p.to_str().unwrap());
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-d", contents, path]);
    image
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> Value {
    json!({ "destination": "/vol", "type": kind, "source": source, "options": options })
}

#[test]
fn an_image_is_mounted_in_the_guest_and_written_back_at_the_end() {
    let world = World::new();
    let image = image(&world, "image");
    let with = |script: &str| {
        let bundle = world.bundle().sh(script);
        bundle.mount(mount("ext4", &image, &["noatime", "nosuid", "discard"]))
    };
    let script = "cat /vol/from-host; echo guest >/vol/from-guest; grep ' /vol ' /proc/mounts
        echo end; sleep 1000";
    let container = world.start(&with(script), "a");
    container.wait_for_output("end\n");
    let said = container.stdout();
    assert!(said.starts_with("host\n/dev/vd"), "{said}");
    assert!(said.contains(" ext4 rw,nosuid,noatime,discard"), "{said}");
    // Nobody else has it meanwhile.
    let other = world.try_create(&with("exit 0"), "b");
    let _ = other.fails_with(1, "is in use by the host or by another virtual machine");
    let _ = container.delete_force().ok();
    let from_guest = ["-R", "cat from-guest", image.to_str().unwrap()];
    assert_eq!(host("debugfs", &from_guest), "guest");
    let again = world.run(&with("cat /vol/from-guest"), "c").ok();
    assert_eq!(again.stdout(), "guest\n");
}

#[test]
fn a_read_only_image_is_shared_by_machines() {
    let world = World::new();
    let image = image(&world, "image");
    let before = fs::read(&image).unwrap();
    let with = |script: &str| {
        let bundle = world.bundle().sh(script);
        bundle.mount(mount("ext4", &image, &["ro", "noload"]))
    };
    let first = world.start(&with("echo up; sleep 1000"), "a");
    first.wait_for_output("up\n");
    let script = "cat /vol/from-host; touch /vol/x 2>/dev/null; echo touch=$?";
    let second = world.run(&with(script), "b").ok();
    assert_eq!(second.stdout(), "host\ntouch=1\n");
    let _ = first.delete_force().ok();
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn what_cannot_be_mounted_is_an_error_that_says_why() {
    let world = World::new();
    let zeroes = world.path("zeroes");
    File::create(&zeroes).unwrap().set_len(1 << 20).unwrap();
    let try_mount = |name: &str, kind: &str, source: &Path, words: &str| {
        let bundle = world.bundle().sh("exit 0").mount(mount(kind, source, &[]));
        let _ = world.try_create(&bundle, name).fails_with(1, words);
        world.assert_clean();
    };
    try_mount("zeroes", "ext4", &zeroes, "mounting ext4: invalid argument");
    try_mount(
        "unknown",
        "xyzfs",
        &zeroes,
        "does not know the file system \"xyzfs\"",
    );
    try_mount(
        "missing",
        "ext4",
        &world.path("none"),
        "no such file or directory",
    );
}

/// As nested engines keep their images.
#[test]
fn an_overlay_has_its_changes_on_a_disk() {
    let world = World::new();
    let image = image(&world, "image");
    let script = "set -e; mkdir -p /lower /merged /vol/up /vol/work; echo low >/lower/file
        mount -t overlay overlay -o lowerdir=/lower,upperdir=/vol/up,workdir=/vol/work /merged
        echo high >/merged/file; echo lower=$(cat /lower/file) upper=$(cat /vol/up/file)";
    let bundle = world
        .bundle()
        .sh(script)
        .capabilities(&[
            "CAP_SYS_ADMIN",
            "CAP_DAC_OVERRIDE",
            "CAP_MKNOD",
            "CAP_FOWNER",
            "CAP_CHOWN",
        ])
        .mount(mount("ext4", &image, &[]));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "lower=low upper=high\n");
}

/// A block device of the host; its name on the host is its name nowhere else.
struct Loop(String);

impl Loop {
    fn over(image: &Path) -> Loop {
        let image = image.to_str().unwrap();
        Loop(host("losetup", &["--find", "--show", image]))
    }

    fn number(&self) -> (u32, u32) {
        use std::os::unix::fs::MetadataExt;
        let rdev = fs::metadata(&self.0).unwrap().rdev();
        (libc::major(rdev), libc::minor(rdev))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        host("losetup", &["--detach", &self.0]);
    }
}

fn with_device(bundle: Bundle, device: &Loop, access: &str) -> Bundle {
    let (major, minor) = device.number();
    // Its owner is not the container's user.
    bundle.capabilities(&["CAP_DAC_OVERRIDE"]).with(|c| {
        c["linux"]["devices"] = json!([{ "path": "/dev/disk", "type": "b", "major": major,
            "minor": minor, "fileMode": 0o640, "uid": 7, "gid": 8 }]);
        let rules = c["linux"]["resources"]["devices"].as_array_mut().unwrap();
        rules.push(
            json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": access }),
        );
    })
}

#[test]
fn a_block_device_is_a_disk_of_the_machine() {
    let world = World::new();
    let path = world.path("raw");
    let file = File::create_new(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(b"from the host", 0).unwrap();
    let device = Loop::over(&path);
    // Written without a sync: that is the runtime's to do.
    let script = "head -c 13 /dev/disk; echo; stat -c '%F %a %u:%g' /dev/disk
        printf guest | dd of=/dev/disk bs=1 seek=1048576 conv=notrunc 2>/dev/null; echo write=$?
        head -c 13 /bound; echo; wc -c </bound";
    let bundle = world.bundle().sh(script).mount(json!({
        "destination": "/bound", "type": "bind", "source": device.0, "options": ["bind"],
    }));
    let out = world.run(&with_device(bundle, &device, "rwm"), "c").ok();
    let expected = "from the host\nblock special file 640 7:8\nwrite=0\nfrom the host\n4194304\n";
    assert_eq!(out.stdout(), expected);
    let mut written = [0; 5];
    let on_host = File::open(&device.0).unwrap();
    on_host.read_exact_at(&mut written, 1 << 20).unwrap();
    assert_eq!(&written, b"guest");
    drop(on_host);

    // Who may only read gets a disk that can only be read.
    let script = "(: >>/dev/disk) 2>/dev/null; echo write=$?; head -c 4 /dev/disk";
    let bundle = with_device(world.bundle().sh(script), &device, "r");
    let out = world.run(&bundle, "r").ok();
    assert_eq!(out.stdout(), "write=1\nfrom");
}

/// A member of a pod uses a disk while the machine runs, and leaves it behind written.
#[test]
fn a_disk_comes_and_goes_with_a_member_of_a_pod() {
    let world = World::new();
    let image = image(&world, "image");
    let first = pods::sandbox(&world, "s");
    for round in ["one", "two"] {
        let script = format!("ls /vol | grep -v lost; echo {round} >/vol/{round}; sleep 1000");
        let bundle = pods::member(&world, &first.id, &script);
        let bundle = bundle.mount(mount("ext4", &image, &[]));
        let member = world.start(&bundle, round);
        member.wait_for_output("from-host\n");
        // Another one of the pod may use it at the same time.
        let script = format!("while [ ! -s /vol/{round} ]; do sleep 0.05; done; cat /vol/{round}");
        let bundle = pods::member(&world, &first.id, &script);
        let bundle = bundle.mount(mount("ext4", &image, &["ro"]));
        let out = world.run(&bundle, &format!("{round}-reader")).ok();
        assert_eq!(out.stdout(), format!("{round}\n"));
        let _ = member.delete_force().ok();
        let cat = format!("cat {round}");
        let on_host = ["-R", cat.as_str(), image.to_str().unwrap()];
        assert_eq!(host("debugfs", &on_host), round);
    }
    let _ = first.delete_force().ok();
}
