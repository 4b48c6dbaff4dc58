//! `volumes`: what programs expect of directories and files they share with the host
//! and with each other.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use kuasar_runv_test_harness::{SHORT, World, json, probe, wait_until};

/// A config map of Kubernetes is replaced by a rename, a file that an engine binds is
/// rewritten; a file that is bound and replaced stays what it was.
#[test]
fn files_that_the_host_replaces_or_rewrites() {
    let world = World::new();
    let dir = world.path("dir");
    fs::create_dir(&dir).unwrap();
    for name in ["config", "bound"] {
        fs::write(dir.join(name), "first\n").unwrap();
    }
    let script = "cat /dir/config /bound
        while ! grep -q renamed /dir/config; do sleep 0.05; done; cat /dir/config
        while ! grep -q rewritten /dir/config; do sleep 0.05; done; cat /dir/config /bound; echo end";
    let bundle = world
        .bundle()
        .sh(script)
        .bind(&dir, "/dir")
        .bind(&dir.join("bound"), "/bound");
    let container = world.start(&bundle, "c");
    container.wait_for_output("first\nfirst\n");
    for name in ["config", "bound"] {
        fs::write(dir.join("new"), "renamed\n").unwrap();
        fs::rename(dir.join("new"), dir.join(name)).unwrap();
    }
    container.wait_for_output("renamed\n");
    fs::write(dir.join("config"), "rewritten\n").unwrap();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(
        container.stdout(),
        "first\nfirst\nrenamed\nrewritten\nfirst\nend\n"
    );
}

/// Each sees what the other has just written, in place and by a rename, to a file that
/// both have known before.
#[test]
fn a_file_that_host_and_container_write_in_turn() {
    const TURNS: usize = 6;
    let world = World::new();
    let dir = world.path("dir");
    fs::create_dir(&dir).unwrap();
    let script = format!(
        "n=0; while [ $n -lt {TURNS} ]; do
            echo container $n > /dir/file
            while [ \"$(cat /dir/file)\" != \"host $n\" ]; do :; done
            n=$((n + 1)); done; echo end"
    );
    let bundle = world.bundle().sh(&script).bind(&dir, "/dir");
    let container = world.start(&bundle, "c");
    let file = dir.join("file");
    for turn in 0..TURNS {
        let theirs = format!("container {turn}\n");
        wait_until(&theirs, SHORT, || {
            fs::read_to_string(&file).is_ok_and(|text| text == theirs)
        });
        let ours = format!("host {turn}\n");
        if turn % 2 == 0 {
            fs::write(&file, ours).unwrap();
        } else {
            fs::write(dir.join("new"), ours).unwrap();
            fs::rename(dir.join("new"), &file).unwrap();
        }
    }
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "end\n");
}

#[test]
fn a_directory_bound_twice_is_one_directory() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let bundle = world
        .bundle()
        .probe("one-in-two-places /a /b")
        .bind(&volume, "/a")
        .bind(&volume, "/b");
    let out = world.run(&bundle, "c").ok();
    for key in [
        "same file",
        "mapping",
        "two mappings",
        "flock",
        "record lock",
    ] {
        assert_eq!(out.fact(key), "true", "{key}");
    }
}

#[test]
fn holes_direct_io_and_the_like() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let bundle = world
        .bundle()
        .probe("particular-files /vol")
        .bind(&volume, "/vol");
    let out = world.run(&bundle, "c").ok();
    for (key, value) in [
        ("holes", "1048576"),
        ("punched", "true"),
        ("direct", "true"),
        ("copied", "true"),
        ("replaced", "true"),
        ("space", "true"),
        ("notified", "true"),
    ] {
        assert_eq!(out.fact(key), value, "{key}");
    }
    assert_eq!(fs::read(volume.join("direct")).unwrap(), [b'd'; 4096]);
}

#[test]
fn five_thousand_files() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir_all(volume.join("host")).unwrap();
    for n in 0..5000 {
        fs::write(volume.join(format!("host/{n}")), format!("{n}\n")).unwrap();
    }
    let script = "set -e; set -- /vol/host/*; echo seen=$#; cd /vol/host
        echo sum=$(seq 0 199 | xargs cat | awk '{ s += $1 } END { print s }')
        mkdir /vol/guest; cd /vol/guest; seq 0 199 | xargs touch; rm -r /vol/host/1??
        echo made=$(ls | wc -l)";
    let bundle = world.bundle().sh(script).bind(&volume, "/vol");
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("seen"), "5000");
    assert_eq!(out.fact("sum"), "19900");
    assert_eq!(out.fact("made"), "200");
    assert_eq!(fs::read_dir(volume.join("guest")).unwrap().count(), 200);
    assert_eq!(fs::read_dir(volume.join("host")).unwrap().count(), 4900);
}

/// As builders of images and nested engines do it.
#[test]
fn an_overlay_over_the_rootfs_with_its_changes_on_a_tmpfs() {
    let world = World::new();
    let script = "set -e; mkdir -p /lower/dir /ov /merged; echo low >/lower/dir/file; echo gone >/lower/gone
        mount -t tmpfs tmpfs /ov; mkdir /ov/up /ov/work
        mount -t overlay overlay -o lowerdir=/lower,upperdir=/ov/up,workdir=/ov/work /merged
        echo up >/merged/dir/file; rm /merged/gone; mv /merged/dir /merged/moved 2>/dev/null || true
        echo lower=$(cat /lower/dir/file); echo merged=$(cat /merged/moved/file /merged/dir/file 2>/dev/null)
        [ -e /merged/gone ] && echo there || echo removed=ok; umount /merged";
    let bundle = world.bundle().sh(script).capabilities(&[
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_MKNOD",
        "CAP_FOWNER",
        "CAP_CHOWN",
    ]);
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("lower"), "low");
    assert_eq!(out.fact("merged"), "up");
    assert_eq!(out.fact("removed"), "ok");
}

/// Secrets: a read-only file for one user, and a part of a directory of the host.
#[test]
fn secrets_and_parts_of_a_directory() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir_all(volume.join("part/deep")).unwrap();
    fs::write(volume.join("secret"), "s\n").unwrap();
    fs::set_permissions(volume.join("secret"), fs::Permissions::from_mode(0o400)).unwrap();
    std::os::unix::fs::chown(volume.join("secret"), Some(1000), Some(1000)).unwrap();
    let script = "echo secret=$(cat /run/secret); echo x 2>/dev/null >/run/secret; echo write=$?
        echo x >/part/file; ls /part; chmod 600 /run/secret 2>/dev/null; echo chmod=$?";
    let bundle = world
        .bundle()
        .sh(script)
        .mount(json!({
            "destination": "/run/secret", "type": "bind", "source": volume.join("secret"),
            "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
        }))
        .bind(&volume.join("part"), "/part")
        .with(|c| c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 }));
    std::os::unix::fs::chown(volume.join("part"), Some(1000), Some(1000)).unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("secret"), "s");
    assert_ne!(out.fact("write"), "0");
    assert_ne!(out.fact("chmod"), "0");
    assert!(out.stdout().contains("deep\n"), "{}", out.stdout());
    wait_until("the guest's file", SHORT, || {
        volume.join("part/file").exists()
    });
    assert_eq!(fs::read_to_string(volume.join("secret")).unwrap(), "s\n");
}

/// Engines rewrite what they bind when a container is connected to another network.
#[test]
fn name_resolution_that_the_host_rewrites() {
    let world = World::new();
    let files = ["resolv.conf", "hosts"].map(|name| (name, world.path(name)));
    let mut bundle = world.bundle().sh("for f in resolv.conf hosts; do
            cat /etc/$f; until grep -q second /etc/$f; do sleep 0.05; done; cat /etc/$f
        done; wc -c </etc/hosts");
    for (name, path) in &files {
        fs::write(path, format!("# first and longer than what comes {name}\n")).unwrap();
        bundle = bundle.mount(json!({
            "destination": format!("/etc/{name}"), "type": "bind", "source": path,
            "options": ["rbind", "ro"],
        }));
    }
    let container = world.start(&bundle, "c");
    container.wait_for_output("resolv.conf");
    for (_, path) in &files {
        fs::write(path, "# second\n").unwrap();
    }
    assert_eq!(container.exit_code(), 0);
    let first = |name: &str| format!("# first and longer than what comes {name}\n");
    // The second file was rewritten before it was read.
    let said = container.stdout();
    let expected = format!("{}# second\n", first("resolv.conf"));
    assert!(
        said.starts_with(&expected) && said.ends_with("# second\n9\n"),
        "{said}"
    );
}

/// An access list as the kernel hands it over (`linux/posix_acl_xattr.h`): the owner
/// reads and writes, the user 1000 reads, nobody else does anything.
fn readable_for_1000() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    // Tag, permissions, id: owner, a user, group, mask, others.
    let entries: [(u16, u16, u32); 5] = [
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 0, NOBODY),
        (0x10, 4, NOBODY),
        (0x20, 0, NOBODY),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// What setfacl(1) does in the container is so on the host, and the other way round.
#[test]
fn access_lists_pass_in_both_directions() {
    const ACCESS: &str = "system.posix_acl_access";
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let list = readable_for_1000();
    let hex = list
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    for name in ["of-host", "of-guest"] {
        fs::write(volume.join(name), name).unwrap();
    }
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o755)).unwrap();
    probe::set_xattr(&volume.join("of-host"), ACCESS, &list).unwrap();
    let set = format!("access-list /v/of-guest {hex}");
    let bundle = world.bundle().probe(&set).bind(&volume, "/v");
    let out = world.run(&bundle, "root").ok();
    assert_eq!(out.fact("set"), "ok");
    assert_eq!(out.fact("get"), hex);
    let host = probe::get_xattr_bytes(&volume.join("of-guest"), ACCESS);
    assert_eq!(host.unwrap(), list);
    for (uid, allowed) in [(1000, true), (1001, false)] {
        let bundle = world.bundle().sh("cat /v/of-host; cat /v/of-guest");
        let bundle = bundle.bind(&volume, "/v").with(|c| {
            c["process"]["user"] = json!({ "uid": uid, "gid": uid });
        });
        let out = world.run(&bundle, &format!("u{uid}"));
        let expected = if allowed { "of-hostof-guest" } else { "" };
        assert_eq!(out.stdout(), expected, "{uid}: {}", out.stderr());
    }
}
