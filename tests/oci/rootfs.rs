//! The container's files are the host's files: live in both directions, with
//! everything a local file system can do.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use kuasar_runv_test_harness::{World, data, json, probe};

const FILE_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETFCAP",
    "CAP_KILL",
];

#[test]
fn what_either_side_writes_is_seen_by_the_other_at_once() {
    let world = World::new();
    let script = "echo from guest >/tmp/guest
        while [ ! -s /tmp/host ]; do sleep 0.05; done; cat /tmp/host
        while ! grep -q changed /tmp/host; do sleep 0.05; done; cat /tmp/host
        while [ -e /tmp/host ]; do sleep 0.05; done; echo gone
        while [ ! -d /tmp/dir ]; do sleep 0.05; done; ls /tmp/dir";
    let bundle = world.bundle().sh(script);
    let container = world.start(&bundle, "c");
    let tmp = bundle.rootfs().join("tmp");
    kuasar_runv_test_harness::wait_until(
        "file of the guest",
        kuasar_runv_test_harness::SHORT,
        || fs::read_to_string(tmp.join("guest")).is_ok_and(|text| text == "from guest\n"),
    );
    fs::write(tmp.join("host"), "from host\n").unwrap();
    container.wait_for_output("from host\n");
    // In place: the same inode, as `cp` onto a file does it.
    fs::write(tmp.join("host"), "changed\n").unwrap();
    container.wait_for_output("changed\n");
    fs::remove_file(tmp.join("host")).unwrap();
    container.wait_for_output("gone\n");
    fs::create_dir(tmp.join("new")).unwrap();
    fs::write(tmp.join("new/inside"), "").unwrap();
    fs::rename(tmp.join("new"), tmp.join("dir")).unwrap();
    container.wait_for_output("inside\n");
    assert_eq!(container.exit_code(), 0);
}

#[test]
fn what_the_guest_creates_is_on_the_host_as_it_was_made() {
    let world = World::new();
    let script = "set -e; umask 022; mkdir /made; cd /made
        echo text >file; chown 1234:5678 file; chmod 4751 file
        mkdir -m 1777 dir; ln -s ../etc/passwd link; ln file hard
        mkfifo -m 600 fifo; mknod -m 660 null c 1 3; mknod block b 7 99
        touch -d '2001-02-03 04:05:06' old
        echo x >before; mv before after; echo y >gone; rm gone
        truncate -s 12345 long";
    let bundle = world.bundle().sh(script).capabilities(FILE_CAPABILITIES);
    let _ = world.run(&bundle, "c").ok();
    let made = bundle.rootfs().join("made");
    let meta = |name: &str| fs::symlink_metadata(made.join(name)).unwrap();
    let file = meta("file");
    assert_eq!(file.mode() & 0o7777, 0o4751);
    assert_eq!((file.uid(), file.gid()), (1234, 5678));
    assert_eq!(file.nlink(), 2);
    assert_eq!(meta("hard").ino(), file.ino());
    assert_eq!(meta("dir").mode() & 0o7777, 0o1777);
    assert_eq!(
        fs::read_link(made.join("link")).unwrap(),
        Path::new("../etc/passwd")
    );
    assert!(meta("fifo").file_type().is_fifo());
    assert_eq!(meta("fifo").mode() & 0o7777, 0o600);
    assert!(meta("null").file_type().is_char_device());
    assert_eq!(meta("null").rdev(), libc::makedev(1, 3));
    assert!(meta("block").file_type().is_block_device());
    assert_eq!(meta("block").rdev(), libc::makedev(7, 99));
    assert_eq!(meta("old").mtime(), 981_173_106);
    assert_eq!(fs::read_to_string(made.join("after")).unwrap(), "x\n");
    assert!(!made.join("before").exists() && !made.join("gone").exists());
    assert_eq!(meta("long").len(), 12345);
}

#[test]
fn what_the_host_created_is_in_the_guest_as_it_was_made() {
    let world = World::new();
    let bundle = world.bundle().sh(
        "cd /made; stat -c 'file=%a %u %g %s %h' file; stat -c 'dir=%a %u %g' dir
        stat -c 'fifo=%F' fifo; echo link=$(readlink link); echo text=$(cat link)
        stat -c 'old=%Y' file; echo names=$(ls)",
    );
    let made = bundle.rootfs().join("made");
    fs::create_dir_all(made.join("dir")).unwrap();
    fs::write(made.join("file"), "text of the file\n").unwrap();
    fs::hard_link(made.join("file"), made.join("hard")).unwrap();
    chown(made.join("file"), Some(123), Some(456)).unwrap();
    fs::set_permissions(made.join("file"), Permissions::from_mode(0o2755)).unwrap();
    chown(made.join("dir"), Some(99), Some(98)).unwrap();
    fs::set_permissions(made.join("dir"), Permissions::from_mode(0o1711)).unwrap();
    symlink("file", made.join("link")).unwrap();
    let fifo = std::ffi::CString::new(made.join("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a C string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o640) }, 0);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    File::options()
        .write(true)
        .open(made.join("file"))
        .unwrap()
        .set_modified(time)
        .unwrap();

    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("file"), "2755 123 456 17 2");
    assert_eq!(out.fact("dir"), "1711 99 98");
    assert_eq!(out.fact("fifo"), "fifo");
    assert_eq!(out.fact("link"), "file");
    assert_eq!(out.fact("text"), "text of the file");
    assert_eq!(out.fact("old"), "1000000000");
    assert_eq!(out.fact("names"), "dir fifo file hard link");
}

#[test]
fn programs_can_map_execute_lock_and_connect_files() {
    let world = World::new();
    let bundle = world.bundle().probe("files /work");
    let work = bundle.rootfs().join("work");
    fs::create_dir(&work).unwrap();
    let out = world.run(&bundle, "c").ok();
    for (key, value) in [
        ("shared mapping", "true"),
        ("private mapping", "true"),
        ("execute", "ran"),
        ("unix socket", "dcba"),
        ("lock", "true"),
        ("fallocate", "1048576"),
        ("append", "one two three"),
        ("open and unlinked", "still here"),
        ("sparse", "true"),
        ("rename exchange", "ba"),
    ] {
        assert_eq!(out.fact(key), value, "{key}");
    }
    // FUSE has O_TMPFILE since Linux 6.2; programs do without it.
    let unnamed = out.fact("unnamed");
    assert!(
        unnamed == "4" || unnamed.contains("not supported"),
        "{unnamed}"
    );
    assert!(fs::read(work.join("mapped")).unwrap() == data::bytes(7, 256 * 1024));
    assert!(
        work.join("socket")
            .metadata()
            .unwrap()
            .file_type()
            .is_socket()
    );
}

#[test]
fn extended_attributes_pass_in_both_directions() {
    let world = World::new();
    let bundle = world.bundle().probe("xattrs /work");
    let work = bundle.rootfs().join("work");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("from-host"), "").unwrap();
    probe::set_xattr(&work.join("from-host"), "user.host", b"from host").unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("set"), "ok");
    assert_eq!(out.fact("get"), "from guest");
    assert_eq!(out.fact("from host"), "from host");
    assert!(
        out.fact("missing").contains("No data available"),
        "{}",
        out.fact("missing")
    );
    assert_eq!(
        probe::get_xattr(&work.join("own"), "user.guest").unwrap(),
        "from guest"
    );
}

/// The links are the container's: what they name is looked up in its root.
#[test]
fn a_symlink_out_of_the_rootfs_is_not_followed_on_the_host() {
    let world = World::new();
    let secret = world.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("file"), "secret\n").unwrap();
    let script = "cat /absolute/file /relative/file /etc/up; echo x >/absolute/new; echo read=$?
        touch /relative/new; ls /mnt; touch /mnt/from-guest; pwd";
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("of-volume"), "").unwrap();
    let bundle = world
        .bundle()
        .sh(script)
        .bind(&volume, "/mnt")
        .bind(&volume, "/relative-mnt/sub");
    let rootfs = bundle.rootfs();
    symlink(&secret, rootfs.join("absolute")).unwrap();
    symlink("../../secret", rootfs.join("relative")).unwrap();
    symlink(
        "../../../../../../../../../../etc/hostname",
        rootfs.join("etc/up"),
    )
    .unwrap();
    // A mount's destination goes through links as well.
    symlink(&secret, rootfs.join("mnt")).unwrap();
    symlink("../../secret", rootfs.join("relative-mnt")).unwrap();

    let out = world.run(&bundle, "c");
    assert!(!out.stdout().contains("secret\n"), "{}", out.stdout());
    assert!(
        out.stdout().contains("of-volume"),
        "{} {}",
        out.stdout(),
        out.stderr()
    );
    assert!(volume.join("from-guest").exists());
    let names: Vec<_> = fs::read_dir(&secret)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(
        names,
        ["file"],
        "the guest or the mounts changed the host's directory"
    );
    assert_eq!(fs::read_to_string(secret.join("file")).unwrap(), "secret\n");
}

#[test]
fn a_working_directory_that_is_a_symlink_stays_inside() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("ls")
        .with(|c| c["process"]["cwd"] = json!("/dir"));
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "").unwrap();
    symlink(&outside, bundle.rootfs().join("dir")).unwrap();
    // Refusing is as good as an empty directory inside.
    let out = world.run(&bundle, "c");
    assert!(!out.stdout().contains("secret"), "{}", out.stdout());
}

#[test]
fn many_and_large_files_survive() {
    let world = World::new();
    let script = "set -e; mkdir /many; cd /many
        n=0; while [ $n -lt 500 ]; do echo $n >file$n; n=$((n + 1)); done
        echo count=$(ls | wc -l); rm file?; echo left=$(ls | wc -l)
        sha256sum </data >/sum; cp /data /copy; sync";
    let bundle = world.bundle().sh(script);
    data::write(
        5,
        32 << 20,
        File::create(bundle.rootfs().join("data")).unwrap(),
    )
    .unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("count"), "500");
    assert_eq!(out.fact("left"), "490");
    for n in 10..500 {
        let text = fs::read_to_string(bundle.rootfs().join(format!("many/file{n}"))).unwrap();
        assert_eq!(text, format!("{n}\n"));
    }
    let [data, copy] = ["data", "copy"].map(|n| fs::read(bundle.rootfs().join(n)).unwrap());
    assert!(
        data == copy,
        "a copy of {} bytes has {}",
        data.len(),
        copy.len()
    );
}

#[test]
fn a_file_the_host_appends_to_can_be_followed() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("tail -f /log | while read line; do echo \"saw $line\"; done");
    let log = bundle.rootfs().join("log");
    fs::write(&log, "").unwrap();
    let container = world.start(&bundle, "c");
    for n in 0..3 {
        let mut file = OpenOptions::new().append(true).open(&log).unwrap();
        std::io::Write::write_all(&mut file, format!("line {n}\n").as_bytes()).unwrap();
        container.wait_for_output(&format!("saw line {n}\n"));
    }
}
