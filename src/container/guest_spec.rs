//! From the bundle's config.json to the one the guest's agent gets.
//!
//! Paths of the host become paths below the pod's shared directory; what only
//! the host can do is done here and taken out; what cannot be honoured is an
//! error now and not a surprise later.

use std::path::{Path, PathBuf};

use kuasar_runv_protocol::agent::SharedMemory;
use kuasar_runv_protocol::words::words;
use kuasar_runv_protocol::{BUNDLE_ANNOTATION, GUEST_SHARE_DIR, GUEST_SHM_DIR, VOLUMES_DIR};
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Mount};
use serde_json::{Value, json};

use super::bundle::Bundle;
use super::guest_volumes::{self as volume, GuestVolume, Place, disk, huge_pages, socket};
use super::mount_options::{self, Depth};
use super::network::Sysctl;
use super::{devices, labels, seccomp, shared_memory, validate, volume_name};

/// Name of the rootfs below the container's part of the shared directory.
pub const ROOTFS: &str = "rootfs";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] validate::Invalid),
    #[error("config.json: {0}")]
    Unsupported(String),
    #[error(
        "error mounting \"{}\" to rootfs at \"{}\": stat {}: {}",
        .path.display(), .destination.display(), .path.display(), words(source)
    )]
    NoSource {
        path: PathBuf,
        destination: PathBuf,
        source: std::io::Error,
    },
    #[error("the volume {}: {}", .path.display(), words(source))]
    Volume {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the disk {} is in use by the host or by another virtual machine", .0.display())]
    InUse(PathBuf),
}

/// A bind mount that becomes part of the shared directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Bind {
    /// Name among the pod's volumes.
    pub volume: String,
    /// Absolute host path.
    pub source: PathBuf,
    /// Path in the container.
    pub destination: PathBuf,
    pub read_only: Option<Depth>,
    /// Later mounts of the host do not appear in it.
    pub private: bool,
    /// With the mounts below the source.
    pub recursive: bool,
    /// It is part of the shared directory. If not, the guest has memory or a socket
    /// there.
    pub is_shared: bool,
    /// The guest's options.
    options: Vec<String>,
}

/// The guest's half of a container.
#[derive(Debug)]
pub struct GuestSpec {
    pub json: Value,
    pub binds: Vec<Bind>,
    /// Disks, and what else the guest has beside the shared directory.
    pub volumes: Vec<GuestVolume>,
    /// What containers of the pod share, see [`shared_memory`].
    pub shared_memory: Vec<SharedMemory>,
    /// The system call filter, which the guest gets compiled.
    pub seccomp: Option<LinuxSeccomp>,
    /// Settings of its network namespace.
    pub sysctls: Vec<Sysctl>,
}

/// Translates a bundle for the container `id`.
///
/// # Errors
/// See [`Error`].
pub fn translate(bundle: &Bundle, id: &str) -> Result<GuestSpec, Error> {
    validate::check(&bundle.spec)?;
    check_namespaces(bundle)?;
    let mut json = bundle.json.clone();
    let share = Path::new(GUEST_SHARE_DIR).join(id);
    let volumes = Path::new(GUEST_SHARE_DIR).join(VOLUMES_DIR);
    json["root"]["path"] = json!(share.join(ROOTFS));
    let mut binds = Vec::new();
    let mut guest_volumes = devices::translate(&bundle.spec, &mut json)?;
    let mut memory = Vec::new();
    for (index, mount) in bundle.spec.mounts().iter().flatten().enumerate() {
        let destination = destination(mount);
        let guest = &mut json["mounts"][index];
        guest["destination"] = json!(destination);
        match translate_mount(bundle, mount, destination, &format!("{id} {index}"))? {
            Translated::Guests => {}
            Translated::Shared(mut bind) => {
                guest["source"] = match shared_memory::instead_of(&bind) {
                    None => json!(volumes.join(&bind.volume)),
                    Some(instead) => {
                        bind.is_shared = false;
                        let source = Path::new(GUEST_SHM_DIR).join(&instead.name);
                        memory.push(instead);
                        json!(source)
                    }
                };
                guest["type"] = json!("bind");
                guest["options"] = json!(bind.options);
                binds.push(bind);
            }
            Translated::Socket(bind, socket) => {
                guest["type"] = json!("bind");
                guest["options"] = json!(bind.options);
                binds.push(bind);
                let (place, kind) = (Place::Mount(index), volume::Kind::Socket(socket));
                guest_volumes.push(GuestVolume { place, kind });
            }
            Translated::InGuest(kind, options) => {
                guest["type"] = json!("bind");
                guest["options"] = json!(options);
                let place = Place::Mount(index);
                guest_volumes.push(GuestVolume { place, kind });
            }
        }
    }
    if let Some(linux) = json["linux"].as_object_mut() {
        // An empty one, or it would have been refused.
        linux.remove("intelRdt");
        linux.remove("mountLabel");
        // They reach it by the container's network namespace.
        linux.remove("netDevices");
        linux.remove("seccomp");
    }
    labels::strip(&mut json["process"]);
    json["linux"]["cgroupsPath"] = json!(format!("/containers/{id}"));
    forget_namespace_paths(&mut json);
    keep_guest_hooks(&mut json, bundle);
    let linux = bundle.spec.linux().as_ref();
    let sysctls = linux.map(Sysctl::of).unwrap_or_default();
    let seccomp = linux.and_then(|linux| linux.seccomp().clone());
    if let Some(guests) = json["linux"]["sysctl"].as_object_mut() {
        guests.retain(|key, _| !sysctls.iter().any(|s| s.of_interface && s.key == *key));
    }
    Ok(GuestSpec {
        json,
        binds,
        volumes: guest_volumes,
        shared_memory: memory,
        seccomp: seccomp.filter(seccomp::filters),
        sysctls,
    })
}

/// Leaves the guest the hooks that run in the container, with the part of their
/// state that only the host knows.
fn keep_guest_hooks(json: &mut Value, bundle: &Bundle) {
    let Some(spec) = json.as_object_mut() else {
        return;
    };
    let hooks = spec.remove("hooks");
    let start = hooks
        .and_then(|mut hooks| hooks.get_mut("startContainer").map(Value::take))
        .filter(|list| list.as_array().is_some_and(|list| !list.is_empty()));
    if let Some(list) = start {
        spec.insert("hooks".into(), json!({"startContainer": list}));
        let annotations = spec.entry("annotations").or_insert(Value::Null);
        if annotations.is_null() {
            *annotations = json!({});
        }
        annotations[BUNDLE_ANNOTATION] = json!(bundle.path);
    }
}

/// Paths of the host; what they mean is found out elsewhere
/// ([`membership`](super::membership)).
fn forget_namespace_paths(json: &mut Value) {
    let namespaces = json["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
        }
    }
}

/// Where a mount goes; relative paths start at the root (config.md, mounts).
fn destination(mount: &Mount) -> PathBuf {
    let path = mount.destination();
    if !path.is_absolute() {
        log::warn!("mount destination {} is not absolute", path.display());
    }
    Path::new("/").join(path)
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

/// What a mount of config.json is.
enum Translated {
    /// A file system that needs nothing from the host.
    Guests,
    Shared(Bind),
    /// A socket of the host, which the guest makes one for.
    Socket(Bind, socket::Socket),
    /// A volume that the guest makes, and the options of the bind mount of it.
    InGuest(volume::Kind, Vec<String>),
}

/// `own_key` names the mount among those of all containers.
fn translate_mount(
    bundle: &Bundle,
    mount: &Mount,
    destination: PathBuf,
    own_key: &str,
) -> Result<Translated, Error> {
    let options: Vec<&str> = mount
        .options()
        .iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let is_bind = options.contains(&"rbind")
        || options.contains(&"bind")
        || mount.typ().as_deref() == Some("bind");
    if !is_bind {
        return guest_mount(bundle, mount, own_key);
    }
    let source = mount.source().as_ref().ok_or_else(|| {
        Error::Unsupported(format!(
            "the bind mount on {} has no source",
            destination.display()
        ))
    })?;
    // Relative sources are relative to the bundle (config.md, mounts).
    let source = bundle.path.join(source);
    if let Err(e) = std::fs::metadata(&source) {
        return Err(Error::NoSource {
            path: source,
            destination,
            source: e,
        });
    }
    let mut parsed = mount_options::bind(&options, &destination).map_err(|refused| {
        Error::Unsupported(format!(
            "the option {:?} of the bind mount on {} is not supported: {}",
            refused.option,
            destination.display(),
            refused.why
        ))
    })?;
    if let Some(disk) = devices::of_bind(&source, parsed.read_only.is_some())? {
        return Ok(Translated::InGuest(volume::Kind::Disk(disk), parsed.guest));
    }
    let volume = volume_name::of(&source, &parsed)
        .and_then(|name| mount_options::inherit(&mut parsed.guest, &source).map(|()| name));
    let volume = match volume {
        Ok(name) => name,
        Err(e) => {
            return Err(Error::NoSource {
                path: source,
                destination,
                source: e,
            });
        }
    };
    if let Some(pages) = huge_pages::of_bind(&source, &volume, &bundle.spec)? {
        let kind = volume::Kind::HugePages(pages);
        return Ok(Translated::InGuest(kind, parsed.guest));
    }
    let socket = socket::of_bind(&source, &bundle.spec)?;
    let bind = Bind {
        volume,
        source,
        destination,
        read_only: parsed.read_only,
        private: parsed.private,
        recursive: parsed.recursive,
        is_shared: socket.is_none(),
        options: parsed.guest,
    };
    Ok(match socket {
        Some(socket) => Translated::Socket(bind, socket),
        None => Translated::Shared(bind),
    })
}

/// File systems that need nothing from the host, or a disk.
fn guest_mount(bundle: &Bundle, mount: &Mount, own_key: &str) -> Result<Translated, Error> {
    const OF_THE_GUEST: [&str; 8] = [
        "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay",
    ];
    let kind = mount.typ().as_deref().unwrap_or("");
    if OF_THE_GUEST.contains(&kind) {
        return Ok(Translated::Guests);
    }
    if kind == "hugetlbfs" {
        let (pages, options) = huge_pages::of_mount(mount, own_key, &bundle.spec)?;
        return Ok(Translated::InGuest(volume::Kind::HugePages(pages), options));
    }
    if let Some(mounted) = disk::of_mount(mount, kind)? {
        let kind = volume::Kind::Disk(mounted.disk);
        return Ok(Translated::InGuest(kind, mounted.options));
    }
    Err(Error::Unsupported(format!(
        "the mount on {} has type {kind:?}, which is not supported (supported: bind, hugetlbfs, {}, and file systems of a block device or an image)",
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
        let [bind] = guest.binds.as_slice() else {
            panic!("{:?}", guest.binds)
        };
        assert_eq!(
            guest.json["mounts"][1]["source"],
            format!("/run/kuasar/share/@volumes/{}", bind.volume)
        );
        assert!(bind.read_only == Some(Depth::Top) && !bind.recursive);
        assert!(bind.source.is_absolute());
        assert_eq!(guest.json.get("hooks"), None);
    }

    #[test]
    fn the_guest_gets_only_the_hooks_of_the_container() {
        let guest = bundle(|c| {
            let hook = json!([{"path": "/bin/true"}]);
            c["hooks"] = json!({"startContainer": hook, "poststop": hook});
        })
        .unwrap();
        assert_eq!(
            guest.json["hooks"],
            json!({"startContainer": [{"path": "/bin/true"}]})
        );
        assert!(guest.json["annotations"][BUNDLE_ANNOTATION].is_string());
    }

    #[test]
    fn paths_of_namespaces_stay_on_the_host() {
        let guest = bundle(|c| c["linux"]["namespaces"][1]["path"] = json!("/x")).unwrap();
        assert_eq!(
            guest.json["linux"]["namespaces"],
            json!([{"type": "mount"}, {"type": "network"}])
        );
    }

    #[test]
    fn a_relative_destination_starts_at_the_root() {
        let guest = bundle(|c| c["mounts"][1]["destination"] = json!("etc/hosts")).unwrap();
        assert_eq!(guest.json["mounts"][1]["destination"], "/etc/hosts");
        assert_eq!(guest.binds[0].destination, Path::new("/etc/hosts"));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        type Case = (&'static str, fn(&mut Value));
        let cases: [Case; 4] = [
            ("network", |c| {
                c["linux"]["namespaces"] = json!([{"type": "mount"}]);
            }),
            ("mount namespace", |c| {
                c["linux"]["namespaces"] = json!([{"type": "network"}]);
            }),
            ("\"rshared\"", |c| {
                c["mounts"][1]["options"] = json!(["rbind", "rshared"]);
            }),
            ("\"ext4\"", |c| {
                c["mounts"][0] = json!({"destination": "/x", "type": "ext4"});
            }),
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
