//! User namespaces: ids in the container, on its files, and on the host behind them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::Path;

use kuasar_runv_test_harness::{Bundle, World, json, listener};

/// First id of the host that the container's ids are mapped to.
const BASE: u32 = 100_000;

fn mapped(bundle: Bundle) -> Bundle {
    own(&bundle.rootfs());
    bundle.with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": BASE, "size": 65536 }]);
        c["linux"]["uidMappings"] = map.clone();
        c["linux"]["gidMappings"] = map;
    })
}

/// Gives the rootfs to the container's root, as engines do.
fn own(path: &Path) {
    lchown(path, Some(BASE), Some(BASE)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap() {
            own(&entry.unwrap().path());
        }
    }
}

#[test]
fn root_of_the_container_is_somebody_else_outside() {
    let world = World::new();
    let bundle = mapped(world.bundle()).sh(
        "echo map=$(cat /proc/self/uid_map | tr -s ' '); echo id=$(id -u):$(id -g)
        echo owner=$(stat -c %u:%g /bin/busybox); touch /made; chown 7:8 /made
        echo made=$(stat -c %u:%g /made); mkdir -m 700 /dir && echo x >/dir/file && echo dir=ok
        echo null=$(echo x >/dev/null && echo ok); echo cwd=$(pwd)",
    );
    let bundle = bundle.capabilities(&["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID"]);
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("map").trim(), format!("0 {BASE} 65536"));
    assert_eq!(out.fact("id"), "0:0");
    assert_eq!(out.fact("owner"), "0:0");
    assert_eq!(out.fact("made"), "7:8");
    assert_eq!(out.fact("dir"), "ok");
    assert_eq!(out.fact("null"), "ok");
    let made = fs::metadata(bundle.rootfs().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (BASE + 7, BASE + 8));
    let dir = fs::metadata(bundle.rootfs().join("dir")).unwrap();
    assert_eq!(dir.uid(), BASE);
}

#[test]
fn files_of_ids_without_a_mapping_belong_to_nobody() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    for (name, uid) in [("root", 0), ("mapped", BASE + 1000)] {
        fs::write(volume.join(name), "").unwrap();
        chown(volume.join(name), Some(uid), Some(uid)).unwrap();
    }
    let script = "echo root=$(stat -c %u /vol/root); echo mapped=$(stat -c %u /vol/mapped)
        rm /vol/root; echo rm=$?";
    let bundle = mapped(world.bundle()).sh(script).bind(&volume, "/vol");
    let bundle = bundle.capabilities(&["CAP_DAC_OVERRIDE", "CAP_FOWNER"]);
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("root"), "65534");
    assert_eq!(out.fact("mapped"), "1000");
    // Root of the container has no rights over what is not in its namespace.
    assert_ne!(out.fact("rm"), "0");
    assert!(volume.join("root").exists());
}

#[test]
fn an_ordinary_user_in_a_user_namespace() {
    let world = World::new();
    let bundle = mapped(world.bundle())
        .sh("echo id=$(id -u):$(id -g); touch /tmp/x; echo groups=$(id -G); echo out")
        .with(|c| {
            c["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5] });
        });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("id"), "1000:1001");
    assert_eq!(out.fact("groups"), "1001 5");
    let made = fs::metadata(bundle.rootfs().join("tmp/x")).unwrap();
    assert_eq!((made.uid(), made.gid()), (BASE + 1000, BASE + 1001));
}

/// Who is not root on the host is not root to a service of it either.
#[test]
fn a_service_of_the_host_sees_who_connects() {
    let world = World::new();
    let socket = world.path("service.sock");
    listener::echo(&socket);
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let bundle = world.bundle().probe("socket /service.sock");
    let bundle = mapped(bundle.bind(&socket, "/service.sock"));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("answer"), format!("{BASE}:{BASE} question"));
}
