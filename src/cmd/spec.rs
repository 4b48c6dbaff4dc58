//! `kuasar-runv spec`

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;

use super::{Context, Failure, OCI_VERSION};
use serde_json::{Value, json};

/// Create a config.json to start from
///
/// It runs `sh` in a terminal, with the rootfs in the directory `rootfs` of the
/// bundle. Edit it to run something else.
#[derive(clap::Args)]
#[command(after_help = "Example: busybox from a container image\n    \
    mkdir -p mybundle/rootfs\n    \
    podman export $(podman create busybox) | tar -C mybundle/rootfs -xf -\n    \
    kuasar-runv spec --bundle mybundle\n    \
    kuasar-runv run --bundle mybundle mycontainer")]
pub struct Args {
    /// Directory of the bundle [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Make it for a container that is started without root privileges
    #[arg(long)]
    rootless: bool,
}

pub fn run(_: &Context, args: &Args) -> Result<u8, Failure> {
    let dir = args.bundle.clone().unwrap_or_default();
    let path = dir.join("config.json");
    let mut spec = default_spec();
    if args.rootless {
        make_rootless(&mut spec);
    }
    let mut text = serde_json::to_string_pretty(&spec)?.replace("  ", "\t");
    text.push('\n');
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                io::Error::other("File config.json exists. Remove it first")
            }
            _ => io::Error::new(e.kind(), format!("{}: {e}", path.display())),
        })?;
    file.write_all(text.as_bytes())?;
    Ok(0)
}

/// The same container that `runc spec` describes.
fn default_spec() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm"
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
                "ambient": capabilities
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "kuasar-runv",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"},
                {"type": "uts"}, {"type": "mount"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ]
        }
    })
}

/// Root without privileges needs no user namespace in a VM of its own: the
/// guest's root is nobody on the host. Only what the host would have to grant
/// is taken out.
fn make_rootless(spec: &mut Value) {
    if let Some(linux) = spec["linux"].as_object_mut() {
        linux.remove("resources");
    }
}
