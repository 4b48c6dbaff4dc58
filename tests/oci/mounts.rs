//! `mounts`: host directories and files, live; file systems of the container's kernel.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use kuasar_runv_test_harness::{SHORT, World, json, wait_until};

/// A directory in the world with one file in it.
fn directory(world: &World, name: &str, file: &str) -> std::path::PathBuf {
    let dir = world.path(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(file), format!("{name}/{file}\n")).unwrap();
    dir
}

#[test]
fn a_bound_directory_is_live_in_both_directions() {
    let world = World::new();
    let volume = directory(&world, "volume", "before");
    let script = "cat /vol/before; echo from guest >/vol/guest
        while [ ! -e /vol/later ]; do sleep 0.05; done; cat /vol/later; rm /vol/before";
    let bundle = world.bundle().sh(script).bind(&volume, "/vol");
    let container = world.start(&bundle, "c");
    wait_until("file of the guest", SHORT, || {
        fs::read_to_string(volume.join("guest")).is_ok_and(|t| t == "from guest\n")
    });
    fs::write(volume.join("later"), "later\n").unwrap();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "volume/before\nlater\n");
    assert!(!volume.join("before").exists());
}

/// podman rewrites hosts and resolv.conf of running containers in place.
#[test]
fn a_bound_file_is_live_in_both_directions() {
    let world = World::new();
    let file = world.path("hosts");
    fs::write(&file, "first\n").unwrap();
    let script = "cat /etc/hosts; while ! grep -q second /etc/hosts; do sleep 0.05; done
        cat /etc/hosts; echo third >/etc/hosts; cat /deep/er/file";
    let bundle = world
        .bundle()
        .sh(script)
        .bind(&file, "/etc/hosts")
        .bind(&file, "/deep/er/file");
    let container = world.start(&bundle, "c");
    container.wait_for_output("first\n");
    fs::write(&file, "second\n").unwrap();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "first\nsecond\nthird\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "third\n");
    // The place in the rootfs is made, but stays empty.
    assert_eq!(fs::read(bundle.rootfs().join("deep/er/file")).unwrap(), b"");
}

#[test]
fn read_only_and_restricted_bind_mounts() {
    let world = World::new();
    let volume = directory(&world, "volume", "file");
    fs::copy("/bin/busybox", volume.join("echo")).unwrap();
    let bind = |destination: &str, options: &[&str]| json!({ "destination": destination, "type": "bind", "source": volume, "options": options });
    let script = "touch /ro/new; echo ro=$?; cat /ro/file; /noexec/echo x; echo noexec=$?
        /plain/echo runs; grep -E ' /(ro|noexec|plain) ' /proc/mounts";
    let bundle = world
        .bundle()
        .sh(script)
        .mount(bind("/ro", &["bind", "ro"]))
        .mount(bind("/noexec", &["rbind", "nosuid", "nodev", "noexec"]))
        .mount(bind("/plain", &["rbind"]));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("ro"), "1");
    assert_eq!(out.fact("noexec"), "126");
    assert!(out.stdout().contains("runs\n"));
    let options = |target: &str| {
        let text = out.stdout();
        let line = text
            .lines()
            .find(|l| l.contains(&format!(" {target} ")))
            .unwrap();
        line.split(' ').nth(3).unwrap().to_owned()
    };
    assert!(options("/ro").starts_with("ro,"), "{}", options("/ro"));
    for word in ["rw", "nosuid", "nodev", "noexec"] {
        assert!(options("/noexec").contains(word), "{}", options("/noexec"));
    }
    assert!(!options("/plain").contains("noexec"));
    assert!(!volume.join("new").exists());
}

#[test]
fn mounts_stack_in_the_order_of_the_configuration() {
    let world = World::new();
    let outer = directory(&world, "outer", "of-outer");
    let inner = directory(&world, "inner", "of-inner");
    fs::create_dir(outer.join("sub")).unwrap();
    fs::write(outer.join("sub/hidden"), "").unwrap();
    fs::create_dir(outer.join("tmpfs")).unwrap();
    let script = "echo outer=$(ls /vol); echo sub=$(ls /vol/sub); echo tmpfs=$(ls /vol/tmpfs)
        touch /vol/tmpfs/x /vol/sub/x /vol/x; echo again=$(ls /vol/again)";
    let bundle = world
        .bundle()
        .sh(script)
        .bind(&outer, "/vol")
        .bind(&inner, "/vol/sub")
        .mount(json!({ "destination": "/vol/tmpfs", "type": "tmpfs", "source": "tmpfs" }))
        .mount(json!({ "destination": "/vol/again", "type": "tmpfs", "source": "tmpfs" }))
        .bind(&inner, "/vol/again");
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("outer"), "again of-outer sub tmpfs");
    assert_eq!(out.fact("sub"), "of-inner");
    assert_eq!(out.fact("tmpfs"), "");
    // The later of two mounts on one place wins (CRI lists /dev/shm twice).
    assert!(out.fact("again").starts_with("of-inner"));
    assert!(inner.join("x").exists() && outer.join("x").exists());
    assert!(!outer.join("tmpfs/x").exists() && !outer.join("sub/x").exists());
}

#[test]
fn file_systems_of_the_kernel_are_mounted_with_their_options() {
    let world = World::new();
    let script = "awk '{ print $2 \"=\" $3 \" \" $4 }' /proc/mounts
        stat -c 'mode=%a %u:%g' /scratch; echo size=$(df -k /scratch | tail -1 | awk '{ print $2 }')
        stat -c 'shm=%a' /dev/shm; touch /dev/mqueue/q && echo mqueue=ok
        [ -e /dev/pts/ptmx ] && echo pts=ok; head -c 2000000 /dev/zero >/scratch/big; echo full=$?";
    let bundle = world.bundle().sh(script).mount(json!({
        "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "noexec", "size=1024k", "mode=1750", "uid=11", "gid=22"],
    }));
    let out = world.run(&bundle, "c").ok();
    for (place, kind) in [
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
        ("/sys", "sysfs"),
        ("/scratch", "tmpfs"),
    ] {
        assert!(
            out.fact(place).starts_with(&format!("{kind} ")),
            "{place}: {}",
            out.fact(place)
        );
    }
    assert!(out.fact("/sys").starts_with("sysfs ro,"));
    assert!(
        out.fact("/sys/fs/cgroup").contains("nosuid,nodev,noexec"),
        "{}",
        out.fact("/sys/fs/cgroup")
    );
    assert!(out.fact("/scratch").contains("noexec"));
    assert_eq!(out.fact("mode"), "1750 11:22");
    assert_eq!(out.fact("size"), "1024");
    assert_eq!(out.fact("full"), "1");
    assert_eq!(out.fact("shm"), "1777");
    assert_eq!(out.fact("mqueue"), "ok");
    assert_eq!(out.fact("pts"), "ok");
}

#[test]
fn the_cgroup_file_system_shows_the_container() {
    let world = World::new();
    let script = "cat /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs 2>/dev/null | sort -n | head -1
        mkdir /sys/fs/cgroup/x /sys/fs/cgroup/pids/x 2>/dev/null; echo mkdir=$?";
    let bundle = world.bundle().sh(script).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "cgroup" }));
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout().lines().next(), Some("1"));
    assert_ne!(out.fact("mkdir"), "0", "the mount is read-only");
}

struct HostMount(std::ffi::CString);

impl HostMount {
    fn tmpfs(target: &Path) -> HostMount {
        let c = |text: &str| std::ffi::CString::new(text).unwrap();
        let path = c(target.to_str().unwrap());
        let (source, kind) = (c("krt"), c("tmpfs"));
        // SAFETY: C strings that outlive the call; tmpfs takes no data.
        let rc = unsafe {
            libc::mount(
                source.as_ptr(),
                path.as_ptr(),
                kind.as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        assert_eq!(rc, 0, "mount: {}", std::io::Error::last_os_error());
        HostMount(path)
    }

    fn share(target: &Path) -> HostMount {
        let mount = HostMount::tmpfs(target);
        let none = std::ptr::null();
        // SAFETY: as above.
        let rc = unsafe { libc::mount(none, mount.0.as_ptr(), none, libc::MS_SHARED, none.cast()) };
        assert_eq!(rc, 0, "make-shared: {}", std::io::Error::last_os_error());
        mount
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // SAFETY: a C string that outlives the call.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn mounts_of_the_host_below_a_bound_directory_are_seen() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let _shared = HostMount::share(&volume);
    fs::create_dir(volume.join("early")).unwrap();
    fs::create_dir(volume.join("late")).unwrap();
    let _early = HostMount::tmpfs(&volume.join("early"));
    fs::write(volume.join("early/file"), "early\n").unwrap();
    let script = "cat /vol/early/file; echo x >/vol/early/guest
        while [ ! -e /vol/late/file ]; do sleep 0.05; done; cat /vol/late/file";
    let bundle = world.bundle().sh(script).mount(json!({
        "destination": "/vol", "type": "bind", "source": volume, "options": ["rbind", "rslave"],
    }));
    {
        let container = world.start(&bundle, "c");
        container.wait_for_output("early\n");
        let _late = HostMount::tmpfs(&volume.join("late"));
        fs::write(volume.join("late/file"), "late\n").unwrap();
        assert_eq!(container.exit_code(), 0);
        assert_eq!(container.stdout(), "early\nlate\n");
        assert!(volume.join("early/guest").exists());
        let _ = container.delete().ok();
    }
}

#[test]
fn a_bind_source_that_is_a_symlink_is_what_it_points_to() {
    let world = World::new();
    let volume = directory(&world, "volume", "file");
    symlink(&volume, world.path("link")).unwrap();
    let bundle = world
        .bundle()
        .sh("cat /vol/file")
        .bind(&world.path("link"), "/vol");
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "volume/file\n");
}

#[test]
fn a_relative_bind_source_is_relative_to_the_bundle() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /vol/file")
        .bind(Path::new("data"), "/vol");
    fs::create_dir(bundle.dir().join("data")).unwrap();
    fs::write(bundle.dir().join("data/file"), "in the bundle\n").unwrap();
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "in the bundle\n");
}

/// podman's `-v /dir:/place:O` and image volumes.
#[test]
fn an_overlay_of_host_directories_keeps_them_as_they_are() {
    let world = World::new();
    let lower = directory(&world, "lower", "file");
    let upper = world.path("upper");
    let work = world.path("work");
    // The upper directory of an overlay cannot be on an overlay itself.
    for dir in [&upper, &work] {
        fs::create_dir(dir).unwrap();
    }
    let overlay = |destination: &str, options: &[String]| json!({ "destination": destination, "type": "overlay", "source": "overlay", "options": options });
    let with = |name: &str, dir: &Path| format!("{name}={}", dir.display());
    let two = format!("lowerdir={}:{}", lower.display(), upper.display());
    let script = "cat /o/file; echo changed >/o/file; echo new >/o/new; cat /o/file
        touch /ro/x 2>&1; cat /ro/file";
    let bundle = world
        .bundle()
        .sh(script)
        .mount(overlay(
            "/o",
            &[
                with("lowerdir", &lower),
                with("upperdir", &upper),
                with("workdir", &work),
            ],
        ))
        .mount(overlay("/ro", &[two]));
    let out = world.run(&bundle, "c");
    let said = out.stdout();
    assert!(said.starts_with("lower/file\nchanged\n"), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
    assert_eq!(
        fs::read_to_string(lower.join("file")).unwrap(),
        "lower/file\n"
    );
    assert_eq!(fs::read_to_string(upper.join("new")).unwrap(), "new\n");
}
