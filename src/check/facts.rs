//! `env`: what a bug report should say about an installation.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::host::{Cgroups, available_mib};
use super::{all, configuration, hypervisor};
use crate::config::Config;
use crate::root::Root;

/// Versions, paths, the configuration in effect, facts of the host, and what
/// `check` says. Contains nothing about the containers but their number.
#[must_use]
pub fn environment(root: &Root, oci_version: &str) -> Value {
    let (config, _) = configuration();
    let files = Config::files().unwrap_or_default();
    let binary = std::env::current_exe().ok();
    json!({
        "runtime": {
            "version": env!("CARGO_PKG_VERSION"),
            "spec": oci_version,
            "protocol": kuasar_runv_protocol::PROTOCOL_VERSION,
            "binary": binary,
        },
        "paths": {
            "root": root.path(),
            "machine": Root::machine_path(),
        },
        "configuration": {
            "files": files,
            "in_effect": config,
        },
        "guest": {
            "kernel": file(&config.guest.kernel),
            "image": file(&config.guest.image),
        },
        "qemu": hypervisor::version(&config.qemu.path).unwrap_or_else(|e| e.to_string()),
        "host": host(),
        "containers": entries(&root.containers()),
        "check": all(root),
    })
}

fn host() -> Value {
    let name = rustix::system::uname();
    let cgroups = match Cgroups::of_host() {
        Cgroups::None => Value::Null,
        Cgroups::Found {
            version,
            controllers,
        } => json!({"version": version, "controllers": controllers}),
    };
    json!({
        "kernel": name.release().to_string_lossy(),
        "machine": name.machine().to_string_lossy(),
        "system": field("/etc/os-release", "PRETTY_NAME", '=').map(|v| v.trim_matches('"').to_owned()),
        "processor": field("/proc/cpuinfo", "model name", ':'),
        "processors": std::thread::available_parallelism().ok().map(usize::from),
        "available_memory_mib": available_mib().ok(),
        "uid": rustix::process::geteuid().as_raw(),
        "cgroups": cgroups,
    })
}

/// The first value of this key in a file of lines `key = value`.
fn field(path: &str, key: &str, separator: char) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(separator)?;
        (name.trim() == key).then(|| value.trim().to_owned())
    })
}

fn file(path: &Path) -> Value {
    match fs::metadata(path) {
        Ok(data) => {
            let modified = data.modified().ok();
            let modified = modified.map(|t| chrono::DateTime::<chrono::Utc>::from(t).to_rfc3339());
            json!({"path": path, "bytes": data.len(), "modified": modified})
        }
        Err(e) => json!({"path": path, "error": e.to_string()}),
    }
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}
