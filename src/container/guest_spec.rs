//! From the bundle's config.json to the one the guest's agent gets.
//!
//! Paths of the host become paths below the pod's shared directory; what only
//! the host can do is done here and taken out; what cannot be honoured is an
//! error now and not a surprise later.

use std::path::{Path, PathBuf};

use kuasar_runv_protocol::GUEST_SHARE_DIR;
use oci_spec::runtime::{LinuxNamespaceType, Mount};
use serde_json::{Value, json};

use super::bundle::Bundle;

/// Name of the rootfs below the container's part of the shared directory.
pub const ROOTFS: &str = "rootfs";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("config.json: {0}")]
    Unsupported(String),
    #[error(
        "error mounting \"{}\" to rootfs at \"{}\": stat {}: {source}",
        .path.display(), .destination.display(), .path.display()
    )]
    NoSource {
        path: PathBuf,
        destination: PathBuf,
        source: std::io::Error,
    },
}

/// A bind mount that becomes part of the shared directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Bind {
    /// Name below the container's part of the shared directory.
    pub name: String,
    /// Absolute host path.
    pub source: PathBuf,
    /// Path in the container.
    pub destination: PathBuf,
    pub read_only: bool,
    /// With the mounts below the source.
    pub recursive: bool,
}

/// The guest's half of a container.
#[derive(Debug)]
pub struct GuestSpec {
    pub json: Value,
    pub binds: Vec<Bind>,
}

/// Translates a bundle for the container `id`.
///
/// # Errors
/// See [`Error`].
pub fn translate(bundle: &Bundle, id: &str) -> Result<GuestSpec, Error> {
    check_namespaces(bundle)?;
    check_host_features(bundle)?;
    let mut json = bundle.json.clone();
    let share = Path::new(GUEST_SHARE_DIR).join(id);
    json["root"]["path"] = json!(share.join(ROOTFS));
    let mut binds = Vec::new();
    for (index, mount) in bundle.spec.mounts().iter().flatten().enumerate() {
        let Some(bind) = bind(bundle, mount, index)? else {
            continue;
        };
        let guest = &mut json["mounts"][index];
        guest["source"] = json!(share.join(&bind.name));
        guest["type"] = json!("bind");
        binds.push(bind);
    }
    json["linux"]["cgroupsPath"] = json!(format!("/containers/{id}"));
    // Nothing of the host's runtime is left for the guest to do.
    if let Some(spec) = json.as_object_mut() {
        spec.remove("hooks");
    }
    Ok(GuestSpec { json, binds })
}

fn check_namespaces(bundle: &Bundle) -> Result<(), Error> {
    let namespaces = bundle
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let find = |kind| {
        namespaces
            .into_iter()
            .flatten()
            .find(move |n| n.typ() == kind)
    };
    for namespace in namespaces.into_iter().flatten() {
        if let Some(path) = namespace.path() {
            return Err(Error::Unsupported(format!(
                "joining the {} namespace {} is not supported: a container in a virtual machine has namespaces of its own",
                json!(namespace.typ()).as_str().unwrap_or_default(),
                path.display()
            )));
        }
    }
    if find(LinuxNamespaceType::Mount).is_none() {
        return Err(Error::Unsupported(
            "a container needs a mount namespace: add {\"type\": \"mount\"} to linux.namespaces"
                .into(),
        ));
    }
    if find(LinuxNamespaceType::Network).is_none() {
        return Err(Error::Unsupported(
            "the host's network cannot be used from a virtual machine: add {\"type\": \"network\"} to linux.namespaces (for an engine: use a bridge network and publish ports instead of --net=host)"
                .into(),
        ));
    }
    Ok(())
}

/// Refuses what no virtual machine and no agent of this version can provide.
fn check_host_features(bundle: &Bundle) -> Result<(), Error> {
    let refuse = |pointer: &str, why: &str| match bundle.json.pointer(pointer) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) if text.is_empty() => Ok(()),
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(_) => Err(Error::Unsupported(format!(
            "{} {why}",
            pointer.trim_start_matches('/').replace('/', ".")
        ))),
    };
    const LATER: &str = "is not supported yet";
    for hook in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ] {
        refuse(&format!("/hooks/{hook}"), LATER)?;
    }
    refuse(
        "/linux/intelRdt",
        "cannot be used: a virtual machine has no resctrl",
    )?;
    refuse(
        "/linux/seccomp/listenerPath",
        "cannot be used: a notify descriptor cannot leave the virtual machine",
    )?;
    refuse(
        "/linux/mountLabel",
        "needs SELinux, which the guest does not have",
    )?;
    refuse(
        "/process/selinuxLabel",
        "needs SELinux, which the guest does not have",
    )?;
    refuse(
        "/process/apparmorProfile",
        "needs AppArmor, which the guest does not have",
    )?;
    refuse("/linux/netDevices", LATER)
}

/// The bind mount a mount of config.json is, if it is one.
fn bind(bundle: &Bundle, mount: &Mount, index: usize) -> Result<Option<Bind>, Error> {
    let options: Vec<&str> = mount
        .options()
        .iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let is_recursive = options.contains(&"rbind");
    let is_bind =
        is_recursive || options.contains(&"bind") || mount.typ().as_deref() == Some("bind");
    if !is_bind {
        return check_guest_mount(mount).map(|()| None);
    }
    let source = mount.source().as_ref().ok_or_else(|| {
        Error::Unsupported(format!(
            "the bind mount on {} has no source",
            mount.destination().display()
        ))
    })?;
    // Relative sources are relative to the bundle (config.md, mounts).
    let source = bundle.path.join(source);
    if let Err(e) = std::fs::metadata(&source) {
        return Err(Error::NoSource {
            path: source,
            destination: mount.destination().clone(),
            source: e,
        });
    }
    // The last of several wins, as with mount(8).
    let read_only = options
        .iter()
        .rev()
        .find(|option| matches!(**option, "ro" | "rw" | "rro" | "rrw"))
        .is_some_and(|option| option.ends_with("ro"));
    Ok(Some(Bind {
        name: format!("mount-{index}"),
        source,
        destination: mount.destination().clone(),
        read_only,
        recursive: is_recursive || !options.contains(&"bind"),
    }))
}

/// File systems that need nothing from the host.
fn check_guest_mount(mount: &Mount) -> Result<(), Error> {
    const OF_THE_GUEST: [&str; 8] = [
        "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay",
    ];
    let kind = mount.typ().as_deref().unwrap_or("");
    if OF_THE_GUEST.contains(&kind) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the mount on {} has type {kind:?}, which is not supported (supported: bind, {})",
        mount.destination().display(),
        OF_THE_GUEST.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(change: impl FnOnce(&mut Value)) -> Result<GuestSpec, Error> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        std::fs::write(dir.path().join("hosts"), "").unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind", "rw", "ro"]},
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]},
        });
        change(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        translate(&Bundle::load(dir.path()).unwrap(), "c1")
    }

    #[test]
    fn host_paths_become_paths_of_the_share() {
        let guest = bundle(|_| {}).unwrap();
        assert_eq!(guest.json["root"]["path"], "/run/kuasar/share/c1/rootfs");
        assert_eq!(guest.json["mounts"][0]["source"], "proc");
        assert_eq!(
            guest.json["mounts"][1]["source"],
            "/run/kuasar/share/c1/mount-1"
        );
        let [bind] = guest.binds.as_slice() else {
            panic!("{:?}", guest.binds)
        };
        assert!(bind.read_only && !bind.recursive && bind.source.is_absolute());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let cases: [(&str, fn(&mut Value)); 6] = [
            ("network", |c| {
                c["linux"]["namespaces"] = json!([{"type": "mount"}]);
            }),
            ("joining the network namespace /x", |c| {
                c["linux"]["namespaces"][1]["path"] = json!("/x");
            }),
            ("mount namespace", |c| {
                c["linux"]["namespaces"] = json!([{"type": "network"}]);
            }),
            ("linux.intelRdt", |c| {
                c["linux"]["intelRdt"] = json!({"closID": "a"})
            }),
            ("hooks.poststop", |c| {
                c["hooks"] = json!({"poststop": [{"path": "/bin/true"}]});
            }),
            ("\"ext4\"", |c| c["mounts"][0]["type"] = json!("ext4")),
        ];
        for (expected, change) in cases {
            let message = bundle(change).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_missing_source_is_reported_with_both_paths() {
        let message = bundle(|c| c["mounts"][1]["source"] = json!("/no/such/file"))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("/no/such/file") && message.contains("/etc/hosts"),
            "{message}"
        );
    }
}
