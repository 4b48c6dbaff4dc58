//! Namespaces of other containers, which a container joins.
//!
//! runc joins before it makes the container's own user namespace, so that one that
//! belongs to the machine can be joined from it. libcontainer enters the user
//! namespace first, so network, ipc and uts are entered here, and inherited by
//! what libcontainer makes. The others cannot be entered so early: pid and time are
//! for children only, user and cgroup would be in the way of the set-up.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use kuasar_runv_protocol::namespace::Kind;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};

use super::Failure;

/// Enters joined namespaces, or has libcontainer do it; the descriptors it needs
/// for that are returned. `joined` is in the order of [`Kind::ALL`].
///
/// # Errors
/// Of setns(2); `InvalidSpec` for what libcontainer cannot do.
pub fn enter(spec: &mut Spec, joins: u8, joined: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Failure> {
    let mut kept = Vec::new();
    if joins == 0 {
        return Ok(kept);
    }
    let names = (spec.hostname().clone(), spec.domainname().clone());
    let Some(linux) = spec.linux_mut() else {
        return Ok(kept);
    };
    refuse_from_new_user_namespace(linux, joins)?;
    for (kind, fd) in Kind::of_set(joins).zip(joined) {
        match kind {
            Kind::Network | Kind::Ipc | Kind::Uts => {
                enter_now(linux, kind, &fd)?;
                if kind == Kind::Uts {
                    set_names(names.0.as_deref(), names.1.as_deref())?;
                }
            }
            Kind::Pid | Kind::User | Kind::Cgroup | Kind::Time => {
                // Every process that opens it is a clone of this one and has the
                // descriptor.
                let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                for ns in linux.namespaces_mut().iter_mut().flatten() {
                    if ns.typ() == type_of(kind) {
                        ns.set_path(Some(path.clone()));
                    }
                }
                kept.push(fd);
            }
        }
    }
    Ok(kept)
}

fn enter_now(linux: &mut Linux, kind: Kind, fd: &OwnedFd) -> Result<(), Failure> {
    setns(fd, CloneFlags::from_bits_retain(kind.flag())).map_err(Failure::io(format!(
        "joining the {} namespace of another container",
        kind.name()
    )))?;
    if let Some(namespaces) = linux.namespaces_mut() {
        namespaces.retain(|ns| ns.typ() != type_of(kind));
    }
    Ok(())
}

/// As runc does in a namespace that it joins as well.
fn set_names(hostname: Option<&str>, domainname: Option<&str>) -> Result<(), Failure> {
    if let Some(name) = hostname.filter(|name| !name.is_empty()) {
        nix::unistd::sethostname(name).map_err(Failure::io("sethostname"))?;
    }
    if let Some(name) = domainname.filter(|name| !name.is_empty()) {
        // SAFETY: the name has the length that is given.
        let set = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
        crate::sys::check(set.into()).map_err(Failure::io("setdomainname"))?;
    }
    Ok(())
}

fn refuse_from_new_user_namespace(linux: &Linux, joins: u8) -> Result<(), Failure> {
    let has_user = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|ns| ns.typ() == LinuxNamespaceType::User);
    if !has_user || joins & Kind::User.bit() != 0 {
        return Ok(());
    }
    let mut late = [Kind::Pid, Kind::Cgroup, Kind::Time].into_iter();
    match late.find(|kind| joins & kind.bit() != 0) {
        None => Ok(()),
        Some(kind) => Err(Failure::invalid(format!(
            "joining the {} namespace of another container from a new user namespace is not \
             supported: join its user namespace as well",
            kind.name()
        ))),
    }
}

fn type_of(kind: Kind) -> LinuxNamespaceType {
    match kind {
        Kind::Pid => LinuxNamespaceType::Pid,
        Kind::Network => LinuxNamespaceType::Network,
        Kind::Ipc => LinuxNamespaceType::Ipc,
        Kind::Uts => LinuxNamespaceType::Uts,
        Kind::User => LinuxNamespaceType::User,
        Kind::Cgroup => LinuxNamespaceType::Cgroup,
        Kind::Time => LinuxNamespaceType::Time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs::File;

    fn spec(kinds: &[&str]) -> Spec {
        let namespaces: Vec<_> = kinds.iter().map(|kind| json!({"type": kind})).collect();
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "linux": {"namespaces": namespaces},
        }))
        .unwrap()
    }

    fn any() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn what_is_for_children_is_left_to_libcontainer() {
        let mut spec = spec(&["pid", "mount", "user"]);
        let joins = Kind::Pid.bit() | Kind::User.bit();
        let kept = enter(&mut spec, joins, vec![any(), any()]).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let paths: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|ns| ns.path().clone())
            .collect();
        let fd = |n: usize| Some(format!("/proc/self/fd/{}", kept[n].as_raw_fd()).into());
        assert_eq!(paths, [fd(0), None, fd(1)]);
    }

    #[test]
    fn what_is_no_namespace_is_not_joined() {
        let failed = enter(&mut spec(&["ipc"]), Kind::Ipc.bit(), vec![any()]);
        let (_, message) = failed.unwrap_err().into_parts();
        assert!(message.contains("joining the ipc namespace"), "{message}");
    }

    #[test]
    fn a_new_user_namespace_cannot_join_everything() {
        let failed = enter(&mut spec(&["pid", "user"]), Kind::Pid.bit(), vec![any()]);
        let (_, message) = failed.unwrap_err().into_parts();
        assert!(message.contains("join its user namespace"), "{message}");
    }
}
