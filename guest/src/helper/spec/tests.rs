use super::*;
use serde_json::{Value, json};

fn normalised(change: impl FnOnce(&mut Value)) -> Result<Spec> {
    let mut config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": "/"},
        "mounts": [],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    });
    change(&mut config);
    let mut spec: Spec = serde_json::from_value(config).unwrap();
    normalise(&mut spec, Path::new("/kuasar-x"))?;
    Ok(spec)
}

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    match normalised(change) {
        Err(Failure::InvalidSpec(message)) => message,
        Err(other) => panic!("refused for another reason: {other}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn absent_capabilities_are_none_and_not_all() {
    let spec = normalised(|_| {}).unwrap();
    let caps = spec
        .process()
        .as_ref()
        .unwrap()
        .capabilities()
        .clone()
        .unwrap();
    for set in [
        caps.bounding(),
        caps.effective(),
        caps.permitted(),
        caps.inheritable(),
        caps.ambient(),
    ] {
        assert_eq!(set.as_ref().map(|s| s.len()), Some(0));
    }
}

#[test]
fn given_capabilities_are_kept() {
    let spec = normalised(|c| {
        c["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    })
    .unwrap();
    let caps = spec
        .process()
        .as_ref()
        .unwrap()
        .capabilities()
        .clone()
        .unwrap();
    assert_eq!(caps.bounding().as_ref().unwrap().len(), 1);
    assert_eq!(caps.permitted().as_ref().unwrap().len(), 0);
}

#[test]
fn home_is_always_there_for_libcontainer() {
    let spec = normalised(|_| {}).unwrap();
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env, ["PATH=/bin", "HOME=/"]);
}

#[test]
fn no_new_privileges_false_is_the_same_as_absent() {
    let spec = normalised(|c| c["process"]["noNewPrivileges"] = json!(false)).unwrap();
    assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), None);
    let spec = normalised(|c| c["process"]["noNewPrivileges"] = json!(true)).unwrap();
    assert_eq!(
        spec.process().as_ref().unwrap().no_new_privileges(),
        Some(true)
    );
}

#[test]
fn the_cgroup_is_the_agents_choice() {
    let spec = normalised(|c| c["linux"]["cgroupsPath"] = json!("system.slice:x:y")).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(
        linux.cgroups_path().as_deref(),
        Some(Path::new("/kuasar-x"))
    );
}

#[test]
fn what_cannot_be_honoured_is_named() {
    let mount = |options: Value| json!([{"destination": "/x", "type": "bind", "source": "/", "options": options}]);
    for (field, message) in [
        (
            refusal(|c| c["process"]["args"] = json!([])),
            "args must not be empty",
        ),
        (
            refusal(|c| c["process"]["cwd"] = json!("x")),
            "Cwd must be an absolute path",
        ),
        (
            refusal(|c| c["process"]["env"] = json!(["B"])),
            "invalid environment variable: \"B\"",
        ),
        (
            refusal(|c| c["process"]["apparmorProfile"] = json!("docker-default")),
            "docker-default",
        ),
        (
            refusal(|c| c["process"]["selinuxLabel"] = json!("x")),
            "selinuxLabel",
        ),
        (
            refusal(|c| c["hooks"] = json!({"poststop": [{"path": "/x"}]})),
            "poststop",
        ),
        (
            refusal(|c| c["linux"]["namespaces"] = json!([])),
            "without a mount namespace",
        ),
        (refusal(|c| c["linux"]["intelRdt"] = json!({})), "intelRdt"),
        (
            refusal(|c| c["linux"]["rootfsPropagation"] = json!("shared")),
            "rootfsPropagation",
        ),
        (
            refusal(|c| c["mounts"] = mount(json!(["rbind", "rshared"]))),
            "rshared",
        ),
        (
            refusal(|c| c["mounts"] = mount(json!(["rbind", "bogus"]))),
            "bogus",
        ),
        (
            refusal(|c| c["mounts"] = mount(json!(["rbind", "idmap"]))),
            "idmap",
        ),
        (refusal(|c| c["ociVersion"] = json!("2.0.0")), "2.0.0"),
        (
            refusal(|c| c["root"]["path"] = json!("/nonexistent")),
            "/nonexistent",
        ),
        (
            refusal(|c| c["linux"]["resources"] = json!({"memory": {"swappiness": 1}})),
            "swappiness",
        ),
    ] {
        assert!(field.contains(message), "{field}");
    }
}

#[test]
fn namespaces_come_once() {
    let message = refusal(|c| {
        c["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "mount"}]);
    });
    assert!(message.contains("duplicated ns"), "{message}");
}

#[test]
fn a_missing_bind_source_is_worded_as_runc_does() {
    let error = normalised(|c| {
        c["mounts"] = json!([{
            "destination": "/x", "type": "bind", "source": "/nonexist", "options": ["rbind"]
        }]);
    })
    .unwrap_err();
    assert!(error.to_string().ends_with(
        "error mounting \"/nonexist\" to rootfs at \"/x\": stat /nonexist: no such file or directory"
    ));
}

#[test]
fn a_filesystem_without_a_source_gets_its_type() {
    let spec = normalised(|c| {
        c["mounts"] = json!([{"destination": "/t", "type": "tmpfs"}]);
    })
    .unwrap();
    let mounts = spec.mounts().clone().unwrap();
    assert_eq!(mounts[0].source().as_deref(), Some(Path::new("tmpfs")));
}
