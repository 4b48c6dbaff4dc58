//! Images made to reach the host: links out of the rootfs where the runtime makes
//! mount points, in every form there is. Whatever becomes of the container, nothing
//! of the host is changed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use kuasar_runv_test_harness::{Bundle, World, json};

/// A directory of the host that nobody may touch.
struct Host {
    dir: PathBuf,
    before: BTreeMap<PathBuf, String>,
}

impl Host {
    fn new(world: &World) -> Host {
        let dir = world.path("host");
        fs::create_dir_all(dir.join("etc")).unwrap();
        fs::write(dir.join("etc/shadow"), "secret of the host\n").unwrap();
        let before = content(&dir);
        Host { dir, before }
    }

    #[track_caller]
    fn is_untouched(&self) {
        assert_eq!(content(&self.dir), self.before);
    }
}

/// Every path below a directory, with the text of files.
fn content(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(content(&path));
            found.insert(path, "directory".into());
        } else {
            let text = fs::read_to_string(&path).unwrap();
            found.insert(path, text);
        }
    }
    found
}

/// A bundle that prints what is mounted at the destination.
fn bundle(world: &World, destination: &str, is_dir: bool) -> Bundle {
    let source = world.path(if is_dir { "volume" } else { "volume/file" });
    let read = if is_dir { "/file" } else { "" };
    world
        .bundle()
        .sh(&format!(
            "cat {destination}{read}; echo changed >{destination}{read}"
        ))
        .bind(&source, destination)
}

fn volume(world: &World) {
    fs::create_dir(world.path("volume")).unwrap();
    fs::write(world.path("volume/file"), "of the volume\n").unwrap();
}

#[test]
fn links_out_of_the_rootfs_lead_back_into_it() {
    let world = World::new();
    let host = Host::new(&world);
    volume(&world);
    let up = "../".repeat(12);
    let host_dir = host.dir.to_str().unwrap();
    let links = [
        ("absolute", host_dir.to_owned()),
        ("relative", format!("{up}{host_dir}")),
        ("chained", "absolute".to_owned()),
    ];
    for (name, target) in &links {
        for is_dir in [true, false] {
            let destination = format!("/{name}/etc/made-{is_dir}");
            let bundle = bundle(&world, &destination, is_dir);
            for (name, target) in &links {
                symlink(target, bundle.rootfs().join(name)).unwrap();
            }
            fs::write(world.path("volume/file"), "of the volume\n").unwrap();
            let out = world.run(&bundle, "c").ok();
            assert_eq!(out.stdout(), "of the volume\n", "{name} -> {target}");
            let text = fs::read_to_string(world.path("volume/file")).unwrap();
            assert_eq!(text, "changed\n");
            host.is_untouched();
            // It is where the link leads in the container.
            let inside = host.dir.strip_prefix("/").unwrap().join("etc");
            assert!(bundle.rootfs().join(inside).is_dir());
        }
    }
}

/// `rootfs/etc -> /etc` of the host, and files that engines mount there.
#[test]
fn the_files_of_engines_do_not_land_in_the_hosts_etc() {
    let world = World::new();
    let host = Host::new(&world);
    volume(&world);
    let bundle = bundle(&world, "/etc/shadow", false);
    fs::remove_dir_all(bundle.rootfs().join("etc")).unwrap();
    symlink(host.dir.join("etc"), bundle.rootfs().join("etc")).unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "of the volume\n");
    host.is_untouched();
}

#[test]
fn dots_in_a_destination_do_not_leave_the_rootfs() {
    let world = World::new();
    let host = Host::new(&world);
    volume(&world);
    let out_of = format!("/a/{}{}/etc/made", "../".repeat(12), host.dir.display());
    let bundle = bundle(&world, &out_of, true);
    // runc makes `/a` and others do not: what counts is the host.
    let _ = world.run(&bundle, "c");
    host.is_untouched();
    world.assert_clean();
}

#[test]
fn loops_of_links_are_an_error_and_leave_nothing() {
    let world = World::new();
    volume(&world);
    let bundle = bundle(&world, "/loop/made", true);
    symlink("loop", bundle.rootfs().join("loop")).unwrap();
    let out = world.run(&bundle, "c");
    assert_ne!(out.code(), 0, "{}", out.stdout());
    world.assert_clean();
}

/// Links of /proc lead where their text does not say.
#[test]
fn magic_links_of_a_volume_are_not_followed() {
    let world = World::new();
    let host = Host::new(&world);
    volume(&world);
    for magic in ["/hostproc/1/root", "/hostproc/self/root", "/hostproc/1/cwd"] {
        let path = format!("{magic}{}/etc/made", host.dir.display());
        let link = symlink_bundle(&world, &path);
        let _ = world.run(&link, "c");
        host.is_untouched();
        world.assert_clean();
    }
}

/// The host's /proc as a volume, and a destination below a link into it.
fn symlink_bundle(world: &World, target: &str) -> Bundle {
    let bundle = world.bundle().sh("exit 0").mount(json!({
        "destination": "/hostproc", "type": "bind", "source": "/proc", "options": ["rbind", "ro"],
    }));
    let bundle = bundle.bind(&world.path("volume"), "/magic");
    symlink(target, bundle.rootfs().join("magic")).unwrap();
    bundle
}

/// The link is the destination itself, as an image would have it for a file.
#[test]
fn a_link_in_place_of_a_mount_point_is_not_followed_to_the_host() {
    let world = World::new();
    let host = Host::new(&world);
    volume(&world);
    let bundle = bundle(&world, "/shadow", false);
    symlink(host.dir.join("etc/shadow"), bundle.rootfs().join("shadow")).unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "of the volume\n");
    host.is_untouched();
}
