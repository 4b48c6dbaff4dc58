//! Rules of config.json that need nothing but config.json, checked before
//! anything is made. Where runc has the rule the words are runc's; what a virtual
//! machine cannot give is refused here too.
//!
//! Reference: the runtime specification, config.md and config-linux.md.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Hook, Linux, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, LinuxSeccompAction, Process,
    Spec, User,
};
use serde_json::{Value, json};

use super::labels;

/// What is wrong, ready for the user.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

type Result = std::result::Result<(), Invalid>;

fn invalid<T>(message: impl Into<String>) -> std::result::Result<T, Invalid> {
    Err(Invalid(message.into()))
}

/// Checks a configuration.
///
/// # Errors
/// [`Invalid`], for the first rule that is broken.
pub fn check(spec: &Spec) -> Result {
    check_hooks(spec)?;
    check_mounts(spec)?;
    if let Some(process) = spec.process() {
        check_process(process)?;
    }
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    check_namespaces(spec, linux)?;
    check_id_mappings(linux)?;
    check_sysctls(linux)?;
    check_linux(linux)?;
    linux.seccomp().as_ref().map_or(Ok(()), check_seccomp)
}

fn namespaces(linux: &Linux) -> &[LinuxNamespace] {
    linux.namespaces().as_deref().unwrap_or_default()
}

fn has(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    namespaces(linux).iter().any(|n| n.typ() == kind)
}

fn check_hooks(spec: &Spec) -> Result {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated)]
    let lists = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in lists {
        for (index, hook) in list.iter().flatten().enumerate() {
            check_hook(hook).map_err(|why| Invalid(format!("hooks.{name}[{index}]: {why}")))?;
        }
    }
    Ok(())
}

fn check_hook(hook: &Hook) -> std::result::Result<(), &'static str> {
    if !hook.path().is_absolute() {
        return Err("the path must be absolute");
    }
    if hook.timeout().is_some_and(|seconds| seconds <= 0) {
        return Err("the timeout must be greater than zero");
    }
    Ok(())
}

/// Nothing may cover the file system that tells the container's processes about
/// themselves, except what reports numbers of the machine (runc's list).
fn check_mounts(spec: &Spec) -> Result {
    const NUMBERS: [&str; 11] = [
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "net/dev",
        "slabinfo",
        "stat",
        "swaps",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
        "uptime",
    ];
    for mount in spec.mounts().iter().flatten() {
        let path = mount.destination();
        let normal = path
            .components()
            .filter(|c| matches!(c, Component::Normal(_)));
        let normal: PathBuf = normal.collect();
        let Ok(below) = normal.strip_prefix("proc") else {
            continue;
        };
        if below.as_os_str().is_empty() {
            if mount.typ().as_deref() != Some("proc") {
                return invalid(format!(
                    "{path:?} cannot be mounted because it is not of type proc"
                ));
            }
        } else if !NUMBERS.iter().any(|allowed| Path::new(allowed) == below) {
            return invalid(format!(
                "{path:?} cannot be mounted because it is inside /proc"
            ));
        }
    }
    Ok(())
}

fn check_process(process: &Process) -> Result {
    check_user(process.user())?;
    check_rlimits(process)?;
    if process
        .oom_score_adj()
        .is_some_and(|adj| !(-1000..=1000).contains(&adj))
    {
        return invalid("failed to update /proc/self/oom_score_adj: invalid argument");
    }
    labels::check_selinux(process.selinux_label().as_deref())
        .and_then(|()| labels::check_apparmor(process.apparmor_profile().as_deref()))
        .or_else(|e| invalid(e.to_string()))
}

fn check_user(user: &User) -> Result {
    const MAX: u32 = 0x7fff_ffff;
    let groups = user.additional_gids().iter().flatten().copied();
    if groups.chain([user.uid(), user.gid()]).any(|id| id > MAX) {
        return invalid(format!(
            "unable to start container process: unable to setup user: uids and gids must be in range 0-{MAX}"
        ));
    }
    Ok(())
}

fn check_rlimits(process: &Process) -> Result {
    let mut seen = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        let name = json!(limit.typ());
        let name = name.as_str().unwrap_or_default().to_owned();
        if limit.soft() > limit.hard() {
            return invalid(format!(
                "error setting rlimit {name}: invalid argument: the soft limit {} is above the hard limit {}",
                limit.soft(),
                limit.hard()
            ));
        }
        if seen.contains(&name) {
            return invalid(format!("process.rlimits has {name} twice"));
        }
        seen.insert(name);
    }
    Ok(())
}

fn check_namespaces(spec: &Spec, linux: &Linux) -> Result {
    let mut seen = HashSet::new();
    for namespace in namespaces(linux) {
        if !seen.insert(namespace.typ()) {
            let path = namespace.path().clone().unwrap_or_default();
            return invalid(format!(
                "malformed spec file: duplicated ns {{{} {path:?}}}",
                json!(namespace.typ())
            ));
        }
    }
    if !has(linux, LinuxNamespaceType::Uts) {
        for (field, value) in [
            ("hostname", spec.hostname()),
            ("domainname", spec.domainname()),
        ] {
            if value.as_ref().is_some_and(|name| !name.is_empty()) {
                return invalid(format!(
                    "unable to set {field} without a private UTS namespace"
                ));
            }
        }
    }
    Ok(())
}

fn check_id_mappings(linux: &Linux) -> Result {
    let lists = [("uid", linux.uid_mappings()), ("gid", linux.gid_mappings())];
    let in_namespace = has(linux, LinuxNamespaceType::User);
    for (kind, list) in lists {
        let mapped = list.as_ref().is_some_and(|list| !list.is_empty());
        if in_namespace && !mapped {
            return invalid(format!(
                "User namespaces enabled, but no {kind} mappings found."
            ));
        }
        if mapped && !in_namespace {
            return invalid(format!(
                "linux.{kind}Mappings is set, but linux.namespaces has no user namespace"
            ));
        }
    }
    Ok(())
}

/// Only what belongs to a namespace of the container, as with runc: the rest would
/// be a setting of the whole machine.
fn check_sysctls(linux: &Linux) -> Result {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    for key in linux.sysctl().iter().flat_map(|map| map.keys()) {
        let name = key.replace('/', ".");
        if name.contains("..") {
            return invalid(format!("sysctl {key:?} is not the name of a setting"));
        }
        if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
            if !has(linux, LinuxNamespaceType::Ipc) {
                return invalid(format!(
                    "sysctl {key:?} is not allowed in the hosts ipc namespace"
                ));
            }
        } else if name.starts_with("net.") {
            if !has(linux, LinuxNamespaceType::Network) {
                return invalid(format!(
                    "sysctl {key:?} not allowed in host network namespace"
                ));
            }
        } else if name == "kernel.hostname" {
            return invalid(format!(
                "sysctl {key:?} is not allowed as it conflicts with the OCI \"hostname\" field"
            ));
        } else {
            let uts = name == "kernel.domainname" && has(linux, LinuxNamespaceType::Uts);
            let user = name.starts_with("user.") && has(linux, LinuxNamespaceType::User);
            if !uts && !user {
                return invalid(format!(
                    "sysctl {key:?} is not in a separate kernel namespace"
                ));
            }
        }
    }
    Ok(())
}

/// Names the kernel would refuse (config-linux.md, network devices).
fn check_net_devices(linux: &Linux) -> Result {
    let plain = |name: &str| {
        let fits = (1..=15).contains(&name.len()) && name != "." && name != "..";
        fits && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
    };
    let mut targets = Vec::new();
    for (name, device) in linux.net_devices().iter().flatten() {
        let target = device.name().as_deref().filter(|n| !n.is_empty());
        let target = target.unwrap_or(name);
        for name in [name.as_str(), target] {
            if !plain(name) {
                return invalid(format!("invalid network device name {name:?}"));
            }
        }
        if targets.contains(&target) {
            return invalid(format!("two network devices are to be called {target:?}"));
        }
        targets.push(target);
    }
    if !targets.is_empty() && !has(linux, LinuxNamespaceType::Network) {
        return invalid("unable to move network devices without a private network namespace");
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result {
    if let Some(propagation) = linux.rootfs_propagation().as_deref() {
        let kind = propagation.strip_prefix('r').unwrap_or(propagation);
        if !["", "private", "shared", "slave", "unbindable"].contains(&kind) {
            return invalid(format!("rootfsPropagation={propagation} is not supported"));
        }
    }
    labels::check_selinux(linux.mount_label().as_deref()).or_else(|e| invalid(e.to_string()))?;
    // runc accepts an empty one as well.
    if json!(linux.intel_rdt()).as_object().is_some_and(|rdt| {
        rdt.values()
            .any(|v| !v.is_null() && *v != Value::Bool(false))
    }) {
        return invalid(
            "intelRdt is specified in config, but Intel RDT is not available in a virtual machine",
        );
    }
    let flags = linux
        .personality()
        .as_ref()
        .and_then(|p| p.flags().as_ref());
    if flags.is_some_and(|flags| !flags.is_empty()) {
        return invalid("additional flags not supported by personality");
    }
    check_net_devices(linux)?;
    let unified = linux
        .resources()
        .as_ref()
        .and_then(|r| r.unified().as_ref());
    if let Some(key) = unified
        .iter()
        .flat_map(|map| map.keys())
        .find(|k| k.contains('/'))
    {
        return invalid(format!(
            "unified resource {key:?} must be a file name (no slashes)"
        ));
    }
    Ok(())
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result {
    let syscalls = seccomp.syscalls().iter().flatten();
    let notifies = syscalls
        .map(oci_spec::runtime::LinuxSyscall::action)
        .chain([seccomp.default_action()])
        .any(|action| action == LinuxSeccompAction::ScmpActNotify);
    let listener = seccomp.listener_path().as_ref();
    if notifies || listener.is_some_and(|path| !path.as_os_str().is_empty()) {
        return invalid(
            "SCMP_ACT_NOTIFY and linux.seccomp.listenerPath are not supported: a notify descriptor cannot leave the virtual machine",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(change: impl FnOnce(&mut Value)) -> Result {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "hostname": "h",
            "process": {"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [
                {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"},
            ]},
        });
        change(&mut config);
        check(&serde_json::from_value(config).unwrap())
    }

    #[test]
    fn what_runc_accepts_is_accepted() {
        checked(|_| {}).unwrap();
        checked(|c| {
            c["process"]["apparmorProfile"] = json!("");
            c["process"]["selinuxLabel"] = json!("");
            c["process"]["oomScoreAdj"] = json!(-1000);
            c["linux"]["intelRdt"] = json!({});
            c["linux"]["rootfsPropagation"] = json!("rshared");
            c["mounts"] = json!([
                {"destination": "/proc", "type": "proc"},
                {"destination": "/proc/./meminfo", "type": "bind"},
                {"destination": "/process", "type": "tmpfs"},
            ]);
            c["linux"]["sysctl"] = json!({
                "net.ipv4.ip_forward": "1", "net/ipv4/ip_forward": "1", "kernel.msgmax": "1",
                "fs.mqueue.msg_max": "1", "kernel.domainname": "x",
            });
        })
        .unwrap();
    }

    #[test]
    fn each_broken_rule_is_named() {
        type Case = (&'static str, fn(&mut Value));
        let cases: [Case; 21] = [
            (
                "\"/proc/version\" cannot be mounted because it is inside /proc",
                |c| {
                    c["mounts"] = json!([{"destination": "/proc/version", "type": "tmpfs"}]);
                },
            ),
            ("cannot be mounted because it is not of type proc", |c| {
                c["mounts"] = json!([{"destination": "/proc/", "type": "tmpfs"}]);
            }),
            ("uids and gids must be in range 0-2147483647", |c| {
                c["process"]["user"]["uid"] = json!(u32::MAX);
            }),
            ("uids and gids must be in range", |c| {
                c["process"]["user"]["additionalGids"] = json!([1, u32::MAX]);
            }),
            ("RLIMIT_NOFILE: invalid argument", |c| {
                c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]);
            }),
            ("has RLIMIT_CORE twice", |c| {
                let limit = json!({"type": "RLIMIT_CORE", "soft": 1, "hard": 1});
                c["process"]["rlimits"] = json!([limit, limit]);
            }),
            ("oom_score_adj", |c| {
                c["process"]["oomScoreAdj"] = json!(1001)
            }),
            ("selinux is disabled", |c| {
                c["process"]["selinuxLabel"] = json!("x")
            }),
            ("selinux is disabled", |c| {
                c["linux"]["mountLabel"] = json!("x")
            }),
            ("apparmor failed to apply profile \"docker-default\"", |c| {
                c["process"]["apparmorProfile"] = json!("docker-default");
            }),
            ("duplicated ns {\"ipc\" \"\"}", |c| {
                let list = c["linux"]["namespaces"].as_array_mut().unwrap();
                list.push(json!({"type": "ipc"}));
            }),
            (
                "unable to set hostname without a private UTS namespace",
                |c| {
                    c["linux"]["namespaces"] = json!([{"type": "mount"}]);
                },
            ),
            ("User namespaces enabled, but no uid mappings found.", |c| {
                let list = c["linux"]["namespaces"].as_array_mut().unwrap();
                list.push(json!({"type": "user"}));
            }),
            (
                "sysctl \"vm.swappiness\" is not in a separate kernel namespace",
                |c| {
                    c["linux"]["sysctl"] = json!({"vm.swappiness": "1"});
                },
            ),
            ("conflicts with the OCI \"hostname\" field", |c| {
                c["linux"]["sysctl"] = json!({"kernel.hostname": "x"});
            }),
            ("rootfsPropagation=bogus is not supported", |c| {
                c["linux"]["rootfsPropagation"] = json!("bogus");
            }),
            ("intelRdt is specified", |c| {
                c["linux"]["intelRdt"] = json!({"l3CacheSchema": "L3:0=f"});
            }),
            ("listenerPath", |c| {
                c["linux"]["seccomp"] =
                    json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"});
            }),
            ("must be a file name (no slashes)", |c| {
                c["linux"]["resources"] = json!({"unified": {"../x": "1"}});
            }),
            ("hooks.poststop[0]: the path must be absolute", |c| {
                c["hooks"] = json!({"poststop": [{"path": "x"}]});
            }),
            (
                "hooks.prestart[1]: the timeout must be greater than zero",
                |c| {
                    c["hooks"] =
                        json!({"prestart": [{"path": "/x"}, {"path": "/x", "timeout": 0}]});
                },
            ),
        ];
        for (expected, change) in cases {
            let message = checked(change).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
