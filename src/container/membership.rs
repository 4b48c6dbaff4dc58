//! Which virtual machine a container goes to, and which namespaces it shares there.
//!
//! 1. The annotations of CRI (`io.kubernetes.cri.*`), or of CRI-O and podman
//!    (`io.kubernetes.cri-o.*`), name the pod: the container whose VM it is.
//! 2. A path of `linux.namespaces` that is a namespace of one of our stand-ins names
//!    the pod too, and which namespaces are joined: in the guest those of the
//!    container itself.
//! 3. Without either a container has a VM of its own.
//!
//! On the host, stand-ins that share network, ipc or uts in the guest share them
//! here, and are found by them whatever the path is. They share the other kinds with
//! the whole host: those are found by the pid in `/proc/PID/ns/...`.
//!
//! A network namespace of nobody here is adopted: the stand-in enters it, and in the
//! guest the container has one of its own. Other namespaces cannot be brought into a
//! virtual machine.

mod annotations;
mod owner;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::namespace::Kind;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::state::{ContainerRecord, RecordError, Status};
use crate::root::Root;
use crate::sandbox::record::SandboxRecord;
use crate::sys::namespace::{self, Namespace};
use crate::sys::process::ProcessRef;
use annotations::Named;
use owner::Owner;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The words are runc's.
    #[error("namespace path: lstat {}: {}", .path.display(), kuasar_runv_protocol::words::words(source))]
    NoNamespace {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("linux.namespaces: {} is not a {kind} namespace", .path.display())]
    NotANamespace { path: PathBuf, kind: &'static str },
    #[error(
        "joining the {kind} namespace {} is not supported: it is not that of a container of kuasar-runv, and a virtual machine cannot use one of the host; leave the path out for a namespace of its own, or name that of a running container",
        .path.display()
    )]
    Foreign { path: PathBuf, kind: &'static str },
    #[error(
        "joining the mount namespace {} is not supported: a container has one of its own",
        .path.display()
    )]
    Mount { path: PathBuf },
    #[error(
        "the host's network cannot be used from a virtual machine, and {} is the host's network namespace (for an engine: use a bridge network and publish ports instead of --net=host)",
        .path.display()
    )]
    HostNetwork { path: PathBuf },
    #[error("the annotation {annotation} is {value:?}, which is neither sandbox nor container")]
    UnknownType {
        annotation: &'static str,
        value: String,
    },
    #[error(
        "the annotation {type_annotation} says \"container\", but {id_annotation} names no sandbox"
    )]
    NoSandbox {
        type_annotation: &'static str,
        id_annotation: &'static str,
    },
    #[error(
        "the annotation {annotation} names {sandbox}, which does not exist: create the pod's sandbox first"
    )]
    UnknownSandbox {
        annotation: &'static str,
        sandbox: String,
    },
    #[error("container {id} of the pod has not been created completely")]
    Creating { id: String },
    #[error(
        "the virtual machine of {id} has ended, and nothing can join it: delete its containers and start the pod again"
    )]
    Ended { id: String },
    #[error(
        "the annotation {annotation} puts the container into the pod of {sandbox}, but the {kind} namespace {} is that of {owner} in another virtual machine",
        .path.display()
    )]
    Contradiction {
        annotation: &'static str,
        sandbox: String,
        kind: &'static str,
        path: PathBuf,
        owner: String,
    },
    #[error(
        "the {kind} namespace {} is that of {owner}, and another of linux.namespaces is that of {other} in another virtual machine: a container can only be in one",
        .path.display()
    )]
    TwoMachines {
        kind: &'static str,
        path: PathBuf,
        owner: String,
        other: String,
    },
    #[error(
        "the annotation {annotation} makes the container the sandbox of a pod, but the {kind} namespace {} is that of {owner}: a sandbox has a virtual machine of its own",
        .path.display()
    )]
    SandboxJoins {
        annotation: &'static str,
        kind: &'static str,
        path: PathBuf,
        owner: String,
    },
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// A running VM that was made for another container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The container it was made for, whose id is the sandbox's.
    pub sandbox_id: String,
    /// Tells the VM from a later one of the same id.
    pub sandboxer: ProcessRef,
}

/// Where a container belongs.
#[derive(Debug, Default)]
pub struct Membership {
    /// `None` for a VM of its own.
    pub pod: Option<Pod>,
    /// Whose namespaces it joins in the guest, by kind.
    pub joins: BTreeMap<Kind, String>,
    /// Path of a network namespace of the host, which is nobody's.
    pub adopted_network: Option<PathBuf>,
    /// Others may come to its VM when its own process has ended: it is called the
    /// sandbox of a pod, or what it has started goes on without it, because it has no
    /// pid namespace of its own.
    pub outlives_its_process: bool,
    /// Namespaces of the host that its stand-in enters, by kind: those of the
    /// stand-ins of `joins`, and an adopted network.
    pub host: BTreeMap<Kind, Namespace>,
}

impl Membership {
    /// Whether its VM is of no use to anybody when its process has ended.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.pod.is_none() && !self.outlives_its_process
    }
}

/// A namespace of config.json that has a path.
struct Given<'a> {
    kind: Kind,
    path: &'a Path,
}

/// Finds out where a container with this configuration belongs.
///
/// # Errors
/// See [`Error`].
pub fn resolve(root: &Root, id: &str, spec: &Spec) -> Result<Membership, Error> {
    let named = annotations::read(spec.annotations().as_ref())?;
    let mut unknown = None;
    let pod = match named.as_ref().filter(|named| !named.is_sandbox) {
        None => None,
        Some(named) => match pod_of(root, id, named) {
            Err(e @ Error::UnknownSandbox { .. }) if named.may_name_no_container => {
                unknown = Some(e);
                None
            }
            pod => Some(pod?),
        },
    };
    let mut found = Membership {
        outlives_its_process: named.as_ref().is_some_and(|named| named.is_sandbox)
            || !has_own_pids(spec),
        ..Membership::default()
    };
    let mut owners: Vec<(Owner, Pod)> = Vec::new();
    for given in given(spec)? {
        let hint = pod.as_ref().map(|pod| pod.sandbox_id.as_str());
        let (owner, namespace) = owner::find(root, given.kind, given.path, hint)?;
        match owner {
            Some(owner) => {
                let of = pod_of_container(root, &owner.id)?;
                check_agreement(&given, &owner, &of, named.as_ref(), pod.as_ref(), &owners)?;
                found.joins.insert(given.kind, owner.id.clone());
                owners.push((owner, of));
            }
            None => {
                check_adoption(&given)?;
                found.adopted_network = Some(given.path.to_owned());
            }
        }
        if let Some(namespace) = namespace {
            found.host.insert(given.kind, namespace);
        }
    }
    let by_path = owners.into_iter().next().map(|(_, pod)| pod);
    if let Some(unknown) = unknown.filter(|_| by_path.is_some()) {
        return Err(unknown);
    }
    found.pod = pod.or(by_path);
    Ok(found)
}

/// Whether the container gets a new pid namespace, whose processes end with its first.
fn has_own_pids(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    namespaces.unwrap_or_default().iter().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid
            && namespace
                .path()
                .as_ref()
                .is_none_or(|path| path.as_os_str().is_empty())
    })
}

/// The namespaces with a path; an empty one is a new namespace, as with runc.
fn given(spec: &Spec) -> Result<Vec<Given<'_>>, Error> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let mut given = Vec::new();
    for namespace in namespaces.unwrap_or_default() {
        let path = namespace.path().as_deref();
        let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
            continue;
        };
        match kind_of(namespace.typ()) {
            Some(kind) => given.push(Given { kind, path }),
            None => return Err(Error::Mount { path: path.into() }),
        }
    }
    Ok(given)
}

fn kind_of(kind: LinuxNamespaceType) -> Option<Kind> {
    Some(match kind {
        LinuxNamespaceType::Mount => return None,
        LinuxNamespaceType::Pid => Kind::Pid,
        LinuxNamespaceType::Network => Kind::Network,
        LinuxNamespaceType::Ipc => Kind::Ipc,
        LinuxNamespaceType::Uts => Kind::Uts,
        LinuxNamespaceType::User => Kind::User,
        LinuxNamespaceType::Cgroup => Kind::Cgroup,
        LinuxNamespaceType::Time => Kind::Time,
    })
}

/// A namespace that is not of ours: only a network can be adopted, and not that of
/// the host itself.
fn check_adoption(given: &Given<'_>) -> Result<(), Error> {
    let path = given.path.to_owned();
    if given.kind != Kind::Network {
        return Err(Error::Foreign {
            path,
            kind: given.kind.name(),
        });
    }
    let same = |own: &str| {
        let ids = [Path::new(own), given.path].map(namespace::id_at);
        matches!(ids, [Ok(own), Ok(given)] if own == given)
    };
    if same("/proc/self/ns/net") || same("/proc/1/ns/net") {
        return Err(Error::HostNetwork { path });
    }
    Ok(())
}

/// Annotation and paths must lead to the same VM.
fn check_agreement(
    given: &Given<'_>,
    owner: &Owner,
    of: &Pod,
    named: Option<&Named<'_>>,
    pod: Option<&Pod>,
    earlier: &[(Owner, Pod)],
) -> Result<(), Error> {
    let kind = given.kind.name();
    let path = || given.path.to_owned();
    if let Some(named) = named.filter(|named| named.is_sandbox) {
        return Err(Error::SandboxJoins {
            annotation: named.type_annotation,
            kind,
            path: path(),
            owner: owner.id.clone(),
        });
    }
    if let (Some(named), Some(pod)) = (named, pod)
        && pod != of
    {
        return Err(Error::Contradiction {
            annotation: named.id_annotation,
            sandbox: pod.sandbox_id.clone(),
            kind,
            path: path(),
            owner: owner.id.clone(),
        });
    }
    match earlier.iter().find(|(_, pod)| pod != of) {
        None => Ok(()),
        Some((other, _)) => Err(Error::TwoMachines {
            kind,
            path: path(),
            owner: owner.id.clone(),
            other: other.id.clone(),
        }),
    }
}

/// The pod an annotation names.
fn pod_of(root: &Root, id: &str, named: &Named<'_>) -> Result<Pod, Error> {
    let unknown = || Error::UnknownSandbox {
        annotation: named.id_annotation,
        sandbox: named.sandbox.to_owned(),
    };
    // Not yet a path: what comes from config.json may be anything.
    if named.sandbox == id || super::check_id(named.sandbox).is_err() {
        return Err(unknown());
    }
    match pod_of_container(root, named.sandbox) {
        Err(Error::Record(RecordError::NotFound)) => Err(unknown()),
        other => other,
    }
}

/// The running VM of a container.
fn pod_of_container(root: &Root, id: &str) -> Result<Pod, Error> {
    let record = ContainerRecord::read(root, id)?;
    if record.status(root) == Status::Creating {
        return Err(Error::Creating { id: id.to_owned() });
    }
    let ended = || Error::Ended { id: id.to_owned() };
    match record.live_sandbox(root) {
        Some(SandboxRecord {
            sandboxer: Some(sandboxer),
            ..
        }) => Ok(Pod {
            sandbox_id: record.sandbox_id,
            sandboxer,
        }),
        _ => Err(ended()),
    }
}

#[cfg(test)]
mod tests;
