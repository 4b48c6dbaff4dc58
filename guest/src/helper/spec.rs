//! The spec between the host and libcontainer.
//!
//! What the guest cannot honour is refused here with a message that names it;
//! nothing is dropped silently. What libcontainer defaults differently from
//! runc is made explicit:
//!
//! | field | libcontainer 0.7 | here |
//! |---|---|---|
//! | `capabilities` absent, or one of its sets | keeps all | none |
//! | `HOME` absent | asks the container's nsswitch | placeholder, the executor fills it in |
//! | mount without `source` | error | the type |
//! | mount options it does not know, of a bind mount | ignored | refused |
//! | propagation of a mount, `sync` and others | ignored | see [`super::late_mounts`] |
//! | `pids.limit: 0` | one process | no limit |
//! | `rdma`, `network`, `swappiness`, `disableOOMKiller` | ignored | refused |
//! | SELinux labels | ignored | refused |

use std::path::{Path, PathBuf};

use libcontainer::syscall::linux::{MountOption, MountRecursive};
use oci_spec::runtime::{
    Capabilities, Hooks, Linux, LinuxCapabilities, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};

use super::Failure;
use super::failure::chain;
use super::passwd::DEFAULT_HOME;

/// Option of a tmpfs: start with a copy of what it covers.
pub const TMPCOPYUP: &str = "tmpcopyup";

type Result<T> = std::result::Result<T, Failure>;

/// Reads a spec as the host sent it. In the way libcontainer will: under
/// emulation the second reader of another kind would cost more than reading.
///
/// # Errors
/// `InvalidSpec` when it is not one.
pub fn load(path: &Path) -> Result<Spec> {
    Spec::load(path).map_err(|e| Failure::invalid(format!("invalid config.json: {}", chain(&e))))
}

/// Refuses what cannot be honoured and fills in defaults, see the module's
/// table. `cgroup` is the absolute path of the container's cgroup.
///
/// # Errors
/// `InvalidSpec`.
pub fn normalise(spec: &mut Spec, cgroup: &Path) -> Result<()> {
    if !spec.version().starts_with("1.") {
        return Err(Failure::invalid(format!(
            "unsupported ociVersion \"{}\"",
            spec.version()
        )));
    }
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Failure::invalid("root must be set"))?;
    if !root.path().is_dir() {
        return Err(Failure::invalid(format!(
            "invalid rootfs: stat {}: no such directory",
            root.path().display()
        )));
    }
    normalise_hooks(spec.hooks_mut())?;
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or_else(|| Failure::invalid("process must be set"))?;
    normalise_process(process)?;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        normalise_mount(mount)?;
    }
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| Failure::invalid("linux must be set"))?;
    normalise_linux(linux)?;
    linux.set_cgroups_path(Some(cgroup.to_owned()));
    Ok(())
}

fn unsupported<T>(what: &str, why: &str) -> Result<T> {
    Err(Failure::invalid(format!("{what} is not supported: {why}")))
}

/// Hooks of the host run on the host; only those of the container can run here.
#[allow(deprecated)]
fn normalise_hooks(hooks: &mut Option<Hooks>) -> Result<()> {
    let Some(set) = hooks else { return Ok(()) };
    for (name, list) in [
        ("prestart", set.prestart()),
        ("createRuntime", set.create_runtime()),
        ("createContainer", set.create_container()),
        ("poststart", set.poststart()),
        ("poststop", set.poststop()),
    ] {
        if list.as_ref().is_some_and(|l| !l.is_empty()) {
            return unsupported(
                &format!("hook {name} in the guest"),
                "it belongs to the host",
            );
        }
    }
    if set.start_container().as_ref().is_none_or(Vec::is_empty) {
        *hooks = None;
    }
    Ok(())
}

fn normalise_process(process: &mut Process) -> Result<()> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::invalid("args must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Failure::invalid("Cwd must be an absolute path"));
    }
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    match process.apparmor_profile().as_deref() {
        None => {}
        Some("" | "unconfined") => {
            process.set_apparmor_profile(None);
        }
        Some(profile) => {
            return unsupported(
                &format!("AppArmor profile \"{profile}\""),
                "the guest's kernel has no AppArmor",
            );
        }
    }
    refuse_label("process.selinuxLabel", process.selinux_label().as_deref())?;
    process.set_capabilities(Some(complete_capabilities(process.capabilities().as_ref())));
    let env = process.env_mut().get_or_insert_default();
    for entry in env.iter() {
        if entry.starts_with('=') || !entry.contains('=') || entry.contains('\0') {
            return Err(Failure::invalid(format!(
                "unable to start container process: error during container init: \
                 invalid environment variable: {entry:?}"
            )));
        }
    }
    // Nothing reads this value: it keeps libcontainer from looking for one.
    env.push(format!("HOME={DEFAULT_HOME}"));
    Ok(())
}

fn refuse_label(field: &str, label: Option<&str>) -> Result<()> {
    match label {
        None | Some("") => Ok(()),
        Some(_) => unsupported(field, "the guest's kernel has no SELinux"),
    }
}

/// Absent sets are empty ones.
pub fn complete_capabilities(given: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut all = LinuxCapabilities::default();
    let set = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        Some(given.and_then(|g| of(g).clone()).unwrap_or_default())
    };
    all.set_bounding(set(LinuxCapabilities::bounding))
        .set_effective(set(LinuxCapabilities::effective))
        .set_permitted(set(LinuxCapabilities::permitted))
        .set_inheritable(set(LinuxCapabilities::inheritable))
        .set_ambient(set(LinuxCapabilities::ambient));
    all
}

fn normalise_linux(linux: &mut Linux) -> Result<()> {
    normalise_namespaces(linux)?;
    refuse_label("linux.mountLabel", linux.mount_label().as_deref())?;
    // An empty one would become a mount option.
    linux.set_mount_label(None);
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt", "it belongs to the host's processor");
    }
    if linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()) {
        return unsupported("linux.netDevices", "the devices are the host's");
    }
    let propagation = match linux.rootfs_propagation().as_deref() {
        None | Some("") => None,
        Some("private" | "rprivate") => Some("private"),
        Some("slave" | "rslave") => Some("slave"),
        Some("unbindable" | "runbindable") => Some("unbindable"),
        Some(other) => {
            return unsupported(
                &format!("rootfsPropagation \"{other}\""),
                "mounts made in a virtual machine do not reach the host",
            );
        }
    };
    linux.set_rootfs_propagation(propagation.map(str::to_owned));
    if linux.seccomp().is_some() {
        return unsupported("linux.seccomp", "the host compiles it");
    }
    if let Some(resources) = linux.resources_mut() {
        check_resources(resources)?;
        super::resources::check(resources)?;
        // runc leaves the number of processes alone at 0, libcgroups makes it 1.
        if let Some(pids) = resources.pids_mut().as_mut().filter(|p| p.limit() == 0) {
            pids.set_limit(-1);
        }
    }
    Ok(())
}

fn normalise_namespaces(linux: &mut Linux) -> Result<()> {
    let mut seen = Vec::new();
    for ns in linux.namespaces_mut().iter_mut().flatten() {
        let typ = ns.typ();
        if seen.contains(&typ) {
            return Err(Failure::invalid(format!(
                "malformed spec file: duplicated ns {typ:?}"
            )));
        }
        seen.push(typ);
        if ns.path().as_ref().is_some_and(|p| p.as_os_str().is_empty()) {
            ns.set_path(None);
        }
        if typ == LinuxNamespaceType::Mount && ns.path().is_some() {
            return unsupported("joining a mount namespace", "a container has its own");
        }
    }
    if !seen.contains(&LinuxNamespaceType::Mount) {
        return unsupported(
            "a container without a mount namespace",
            "the host's is not in the virtual machine",
        );
    }
    Ok(())
}

fn check_resources(resources: &LinuxResources) -> Result<()> {
    if let Some(memory) = resources.memory() {
        if memory.swappiness().is_some() {
            return unsupported("memory.swappiness", "cgroup v2 has no such limit");
        }
        if memory.disable_oom_killer() == Some(true) {
            return unsupported("memory.disableOOMKiller", "cgroup v2 has no such switch");
        }
        if memory.kernel_tcp().is_some_and(|limit| limit > 0) {
            return unsupported("memory.kernelTCP", "cgroup v2 has no such limit");
        }
    }
    if let Some(network) = resources.network() {
        let priorities = network.priorities().as_ref().is_some_and(|p| !p.is_empty());
        if priorities || network.class_id().is_some_and(|id| id != 0) {
            return unsupported("resources.network", "cgroup v2 has no such controller");
        }
    }
    if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
        return unsupported("resources.rdma", "the devices are the host's");
    }
    Ok(())
}

/// Whether a mount binds another path.
pub fn is_bind(mount: &Mount) -> bool {
    libcontainer_is_bind(mount.typ().as_deref(), options(mount))
}

fn libcontainer_is_bind(typ: Option<&str>, options: &[String]) -> bool {
    typ == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind")
}

pub fn options(mount: &Mount) -> &[String] {
    mount.options().as_deref().unwrap_or_default()
}

fn normalise_mount(mount: &mut Mount) -> Result<()> {
    let destination = mount.destination().clone();
    let bind = is_bind(mount);
    let refuse = |option: &str, why: &str| -> Result<()> {
        unsupported(
            &format!("option \"{option}\" of mount {}", destination.display()),
            why,
        )
    };
    for option in options(mount) {
        match option.as_str() {
            "shared" | "rshared" => refuse(
                option,
                "mounts made in a virtual machine do not reach the host",
            )?,
            "remount" => refuse(option, "there is nothing mounted yet")?,
            "idmap" | "ridmap" => refuse(option, "the guest has no ID-mapped mounts")?,
            TMPCOPYUP if mount.typ().as_deref() == Some("tmpfs") => {}
            other if bind => {
                let known =
                    other.parse::<MountOption>().is_ok() || other.parse::<MountRecursive>().is_ok();
                if !known {
                    refuse(other, "it is unknown")?;
                }
            }
            // The filesystem judges what is left.
            _ => {}
        }
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        refuse("idmap", "the guest has no ID-mapped mounts")?;
    }
    if bind {
        return check_bind_source(mount);
    }
    let Some(typ) = mount.typ().clone().filter(|t| !t.is_empty()) else {
        return Err(Failure::invalid(format!(
            "mount {} has neither a type nor the option bind",
            destination.display()
        )));
    };
    if mount.source().is_none() {
        mount.set_source(Some(PathBuf::from(typ)));
    }
    Ok(())
}

fn check_bind_source(mount: &Mount) -> Result<()> {
    let source = mount.source().clone().unwrap_or_default();
    match std::fs::metadata(&source) {
        Ok(_) => Ok(()),
        Err(e) => Err(Failure::Other(format!(
            "unable to start container process: error during container init: error mounting \
             {source:?} to rootfs at {:?}: stat {}: {}",
            mount.destination(),
            source.display(),
            kuasar_runv_protocol::words::words(&e),
        ))),
    }
}

#[cfg(test)]
mod tests;
