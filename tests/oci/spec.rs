//! `spec`.

use std::fs;

use kuasar_runv_test_harness::{Value, World, json};

#[test]
fn spec_writes_a_configuration_that_runs() {
    let world = World::new();
    let bundle = world.bundle();
    let _ = world
        .call(["spec", "--bundle"])
        .arg(bundle.dir())
        .output()
        .ok();
    let text = fs::read(bundle.dir().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(config["process"]["args"], json!(["sh"]));
    assert_eq!(config["process"]["terminal"], json!(true));
    assert_eq!(config["process"]["cwd"], "/");
    assert_eq!(
        config["root"],
        json!({ "path": "rootfs", "readonly": true })
    );
    assert!(config["ociVersion"].as_str().unwrap().starts_with("1."));
    let kinds: Vec<_> = config["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .collect();
    for kind in ["pid", "network", "ipc", "uts", "mount"] {
        assert!(kinds.contains(&&json!({ "type": kind })), "{kind}");
    }

    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["echo", "spec runs"]);
    let bundle = bundle.with(|c| *c = config);
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "spec runs\n");
}

/// Without privileges the host grants no limits and no other users.
#[test]
fn spec_rootless_has_a_user_namespace_and_no_limits() {
    let world = World::new();
    let bundle = world.bundle();
    let _ = world
        .call(["spec", "--rootless", "-b"])
        .arg(bundle.dir())
        .output()
        .ok();
    let text = fs::read(bundle.dir().join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&text).unwrap();
    let linux = &config["linux"];
    assert!(linux.get("resources").is_none());
    for mappings in ["uidMappings", "gidMappings"] {
        assert_eq!(
            linux[mappings],
            json!([{ "containerID": 0, "hostID": 0, "size": 1 }])
        );
    }
    let namespaces = linux["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({ "type": "user" })));
    let options = config["mounts"][2]["options"].as_array().unwrap();
    assert_eq!(config["mounts"][2]["destination"], "/dev/pts");
    assert!(!options.contains(&json!("gid=5")));
}

#[test]
fn spec_uses_the_current_directory_and_never_overwrites() {
    let world = World::new();
    fs::create_dir(world.path("dir")).unwrap();
    let call = || world.call(["spec"]).current_dir(world.path("dir"));
    let _ = call().output().ok();
    let before = fs::read(world.path("dir/config.json")).unwrap();
    let _ = call()
        .output()
        .fails_with(1, "File config.json exists. Remove it first");
    assert_eq!(fs::read(world.path("dir/config.json")).unwrap(), before);
}
