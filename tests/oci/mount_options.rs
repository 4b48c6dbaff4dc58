//! The options of `mounts`, and `linux.rootfsPropagation`.

use std::fs;
use std::path::{Path, PathBuf};

use kuasar_runv_test_harness::{Bundle, Output, World, json};

fn directory(world: &World, name: &str) -> PathBuf {
    let dir = world.path(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("file"), format!("{name}\n")).unwrap();
    dir
}

/// A bundle that mounts `source` with these options on `/m` and shows how.
fn shown(bundle: Bundle, kind: &str, source: &Path, options: &[&str]) -> Bundle {
    bundle
        .sh("grep ' /m ' /proc/self/mountinfo | tail -1")
        .mount(json!({
            "destination": "/m", "type": kind, "source": source, "options": options,
        }))
}

/// Flags of the mount, flags of its file system, and its propagation.
fn flags(out: &Output) -> (String, String, String) {
    let text = out.stdout();
    let fields: Vec<_> = text.split_whitespace().collect();
    let dash = fields
        .iter()
        .position(|f| *f == "-")
        .unwrap_or_else(|| panic!("{text}{}", out.stderr()));
    (
        fields[5].to_owned(),
        fields[dash + 3].to_owned(),
        fields[6..dash].join(" "),
    )
}

fn has(flags: &str, flag: &str) -> bool {
    flags.split(',').any(|f| f == flag)
}

#[test]
fn flags_of_bind_mounts() {
    let world = World::new();
    let volume = directory(&world, "volume");
    let cases: [(&[&str], &[&str], &[&str]); 5] = [
        (
            &[
                "bind",
                "ro",
                "nosuid",
                "nodev",
                "noexec",
                "noatime",
                "nodiratime",
            ],
            &["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"],
            &["rw"],
        ),
        (
            &[
                "bind", "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec",
            ],
            &["rw"],
            &["ro", "nosuid", "nodev", "noexec"],
        ),
        (
            &["rbind", "strictatime", "sync", "dirsync"],
            &["rw"],
            &["relatime", "noatime"],
        ),
        (
            &["bind", "relatime", "nosymfollow"],
            &["relatime", "nosymfollow"],
            &["ro"],
        ),
        (
            &["bind", "rprivate", "mand", "lazytime", "silent"],
            &["rw"],
            &["ro"],
        ),
    ];
    for (number, (options, present, absent)) in cases.into_iter().enumerate() {
        let bundle = shown(world.bundle(), "bind", &volume, options);
        let (mount, _, _) = flags(&world.run(&bundle, &format!("c{number}")).ok());
        for flag in present {
            assert!(has(&mount, flag), "{options:?}: {mount}");
        }
        for flag in absent {
            assert!(!has(&mount, flag), "{options:?}: {mount}");
        }
    }
}

/// A file system knows no `bogus`; a bind mount has no file system that would be asked.
#[test]
fn unknown_options() {
    let world = World::new();
    let volume = directory(&world, "volume");
    let bundle = shown(world.bundle(), "bind", &volume, &["bind", "bogus"]);
    let _ = world.run(&bundle, "bind").ok();
    let bundle = shown(world.bundle(), "tmpfs", Path::new("tmpfs"), &["bogus"]);
    let _ = world
        .try_create(&bundle, "tmpfs")
        .fails_about(1, "invalid argument");
    world.assert_clean();
}

#[test]
fn recursive_flags_reach_the_mounts_below() {
    let world = World::new();
    let volume = directory(&world, "volume");
    let options = [
        "rbind",
        "rro",
        "rnosuid",
        "rnodev",
        "rnoexec",
        "rnoatime",
        "rnosymfollow",
    ];
    let bundle = shown(world.bundle(), "bind", &volume, &options);
    let (mount, _, _) = flags(&world.run(&bundle, "c").ok());
    for flag in ["ro", "nosuid", "nodev", "noexec", "noatime", "nosymfollow"] {
        assert!(has(&mount, flag), "{mount}");
    }
    let sub = HostTmpfs::mount(&volume.join("sub"));
    let script = "touch /m/x; echo top=$?; touch /m/sub/x; echo sub=$?; ls /m/sub";
    let bundle = shown(world.bundle(), "bind", &volume, &["rbind", "rro"]).sh(script);
    let out = world.run(&bundle, "below").ok();
    assert_eq!(out.fact("top"), "1");
    assert_eq!(out.fact("sub"), "1");
    assert!(
        out.stderr().contains("Read-only file system"),
        "{}",
        out.stderr()
    );
    drop(sub);
}

struct HostTmpfs(std::ffi::CString);

impl HostTmpfs {
    fn mount(target: &Path) -> HostTmpfs {
        HostTmpfs::with_flags(target, 0)
    }

    fn with_flags(target: &Path, flags: libc::c_ulong) -> HostTmpfs {
        fs::create_dir_all(target).unwrap();
        let path = std::ffi::CString::new(target.to_str().unwrap()).unwrap();
        let (source, kind) = (c"krt".as_ptr(), c"tmpfs".as_ptr());
        // SAFETY: C strings that outlive the call; tmpfs takes no data.
        let rc = unsafe { libc::mount(source, path.as_ptr(), kind, flags, std::ptr::null()) };
        assert_eq!(rc, 0, "mount: {}", std::io::Error::last_os_error());
        HostTmpfs(path)
    }
}

impl Drop for HostTmpfs {
    fn drop(&mut self) {
        // SAFETY: a C string that outlives the call.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

/// What the mount of the source forbids on the host is forbidden in the container.
#[test]
fn a_bind_mount_inherits_the_flags_of_its_source() {
    let world = World::new();
    let volume = world.path("volume");
    let mount = HostTmpfs::with_flags(&volume, libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
    let bundle = shown(world.bundle(), "bind", &volume, &["bind"]);
    let (flags, _, _) = flags(&world.run(&bundle, "c").ok());
    for flag in ["nosuid", "nodev", "noexec"] {
        assert!(has(&flags, flag), "{flags}");
    }
    drop(mount);
}

#[test]
fn options_of_file_systems() {
    let world = World::new();
    let options = [
        "nosuid",
        "sync",
        "dirsync",
        "size=2m",
        "mode=1750",
        "nr_inodes=100",
        "uid=3",
    ];
    let bundle = shown(world.bundle(), "tmpfs", Path::new("tmpfs"), &options);
    let (mount, filesystem, _) = flags(&world.run(&bundle, "c").ok());
    assert!(has(&mount, "nosuid"), "{mount}");
    for option in [
        "sync",
        "dirsync",
        "size=2048k",
        "mode=1750",
        "nr_inodes=100",
        "uid=3",
    ] {
        assert!(has(&filesystem, option), "{filesystem}");
    }
    let bundle = shown(
        world.bundle(),
        "tmpfs",
        Path::new("tmpfs"),
        &["ro", "noatime"],
    );
    let (mount, _, _) = flags(&world.run(&bundle, "ro").ok());
    assert!(has(&mount, "ro") && has(&mount, "noatime"), "{mount}");
    let bundle = shown(world.bundle(), "proc", Path::new("proc"), &["hidepid=2"]);
    let (_, filesystem, _) = flags(&world.run(&bundle, "proc").ok());
    assert!(has(&filesystem, "hidepid=invisible"), "{filesystem}");
}

#[test]
fn a_mount_of_no_type_with_a_bind_option_is_a_bind_mount() {
    let world = World::new();
    let volume = directory(&world, "volume");
    for (kind, name) in [("none", "none"), ("", "empty")] {
        let bundle = shown(world.bundle(), kind, &volume, &["rbind"]).sh("cat /m/file");
        assert_eq!(world.run(&bundle, name).ok().stdout(), "volume\n");
    }
    let bundle = shown(world.bundle(), "", &volume, &[]);
    let _ = world.try_create(&bundle, "c").exits_with(1);
    let bundle = shown(world.bundle(), "tmpfs", Path::new("tmpfs"), &["remount"]);
    let _ = world.try_create(&bundle, "c").exits_with(1);
    world.assert_clean();
}

/// config.md: a relative destination "MUST be interpreted as relative to '/'".
#[test]
fn a_relative_destination_starts_at_the_root() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cd /; grep ' /rel/x ' /proc/mounts | cut -d' ' -f3");
    let bundle = bundle.mount(json!({ "destination": "rel/x", "type": "tmpfs", "source": "t" }));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "tmpfs\n");
    assert!(out.stderr().contains("not absolute"), "{}", out.stderr());
}

#[test]
fn propagation_of_mounts() {
    let world = World::new();
    let volume = directory(&world, "volume");
    let run = |kind: &str, source: &Path, option: &str| {
        let bundle = shown(world.bundle(), kind, source, &["nosuid", option]);
        let bundle = if kind == "bind" {
            shown(world.bundle(), kind, source, &["rbind", option])
        } else {
            bundle
        };
        flags(&world.run(&bundle, "c").ok()).2
    };
    let tmpfs = Path::new("tmpfs");
    for option in ["shared", "rshared"] {
        assert!(run("tmpfs", tmpfs, option).starts_with("shared:"));
    }
    assert_eq!(run("tmpfs", tmpfs, "unbindable"), "unbindable");
    assert_eq!(run("bind", &volume, "runbindable"), "unbindable");
    for option in ["private", "rprivate", "slave", "rslave"] {
        let shown = run("bind", &volume, option);
        assert!(!shown.contains("shared"), "{option}: {shown}");
    }
}

/// Mounts that the host makes later do not appear in a private bind mount.
#[test]
fn a_private_bind_mount_is_cut_off_from_the_host() {
    let world = World::new();
    let volume = world.path("volume");
    let shared = HostTmpfs::mount(&volume);
    // SAFETY: C strings that outlive the call.
    let rc = unsafe {
        let none = std::ptr::null();
        libc::mount(none, shared.0.as_ptr(), none, libc::MS_SHARED, none.cast())
    };
    assert_eq!(rc, 0);
    fs::create_dir(volume.join("late")).unwrap();
    let script = "echo ready; while [ ! -e /m/go ]; do sleep 0.05; done; echo late=$(ls /m/late)";
    let bundle = shown(world.bundle(), "bind", &volume, &["rbind", "rprivate"]).sh(script);
    {
        let container = world.start(&bundle, "c");
        container.wait_for_output("ready");
        let late = HostTmpfs::mount(&volume.join("late"));
        fs::write(volume.join("late/file"), "").unwrap();
        fs::write(volume.join("go"), "").unwrap();
        assert_eq!(container.exit_code(), 0);
        assert_eq!(container.stdout(), "ready\nlate=\n");
        drop(late);
    }
    drop(shared);
}

#[test]
fn propagation_of_the_root() {
    let world = World::new();
    let run = |propagation: &str| {
        let bundle = world
            .bundle()
            .sh("grep -E '^[^ ]+ [^ ]+ [^ ]+ [^ ]+ / ' /proc/self/mountinfo")
            .with(|c| c["linux"]["rootfsPropagation"] = json!(propagation));
        flags(&world.run(&bundle, propagation).ok()).2
    };
    for propagation in ["private", "rprivate", "slave", "rslave"] {
        assert!(!run(propagation).contains("shared"), "{propagation}");
    }
    // runc 1.1 accepts these two and leaves the root private, or fails.
    if world.runtime.is_ours {
        for propagation in ["shared", "rshared"] {
            assert!(run(propagation).contains("shared:"), "{propagation}");
        }
        for propagation in ["unbindable", "runbindable"] {
            assert!(run(propagation).contains("unbindable"), "{propagation}");
        }
    }
}

#[test]
fn a_tmpfs_that_starts_with_a_copy_of_what_it_covers() {
    let world = World::new();
    let script = "cat /data/sub/file; readlink /data/link; stat -c 'mode=%a %u' /data/sub/file
        echo changed >/data/sub/file; cat /data/sub/file; grep ' /data ' /proc/mounts";
    let bundle = world.bundle().sh(script).mount(json!({
        "destination": "/data", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "tmpcopyup", "size=1m"],
    }));
    let bundle = bundle.capabilities(&["CAP_DAC_OVERRIDE"]);
    let data = bundle.rootfs().join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("sub/file"), "original\n").unwrap();
    std::os::unix::fs::chown(data.join("sub/file"), Some(33), Some(33)).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o604);
    fs::set_permissions(data.join("sub/file"), mode).unwrap();
    std::os::unix::fs::symlink("sub/file", data.join("link")).unwrap();
    let out = world.run(&bundle, "c").ok();
    let text = out.stdout();
    assert!(text.starts_with("original\nsub/file\n"), "{text}");
    assert_eq!(out.fact("mode"), "604 33");
    assert!(
        text.contains("changed\n") && text.contains("tmpfs /data tmpfs"),
        "{text}"
    );
    assert_eq!(
        fs::read_to_string(data.join("sub/file")).unwrap(),
        "original\n"
    );
}

#[test]
fn the_proc_file_system_cannot_be_covered_except_for_what_reports_numbers() {
    let world = World::new();
    let file = world.path("meminfo");
    fs::write(&file, "made up\n").unwrap();
    let bundle = world
        .bundle()
        .sh("cat /proc/meminfo")
        .bind(&file, "/proc/meminfo");
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "made up\n");
    let bundle = world.bundle().sh("exit 0").bind(&file, "/proc/version");
    let _ = world.try_create(&bundle, "c").exits_with(1);
    let bundle = world.bundle().sh("exit 0");
    let bundle = bundle.mount(json!({ "destination": "/proc/x", "type": "tmpfs", "source": "t" }));
    let _ = world.try_create(&bundle, "c").exits_with(1);
    world.assert_clean();
}
