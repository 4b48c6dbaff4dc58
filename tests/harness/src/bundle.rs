//! A bundle: a rootfs of busybox links and a `config.json` that a test edits as JSON.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

/// Debian's `busybox-static`: needs nothing else in the rootfs.
const BUSYBOX: &str = "/bin/busybox";

/// A bundle directory with a complete rootfs. `config.json` is written by
/// [`Bundle::path`], which every user of the bundle goes through.
pub struct Bundle {
    dir: PathBuf,
    pub config: Value,
}

impl Bundle {
    /// # Panics
    /// When the directory exists or cannot be filled.
    #[must_use]
    pub fn create(dir: PathBuf) -> Bundle {
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        fill_rootfs(&dir.join("rootfs"));
        Bundle {
            dir,
            config: default_config(),
        }
    }

    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self.config["process"]["args"] = json!(args);
        self
    }

    /// Lets the container run a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.args(["/bin/sh", "-c", script])
    }

    /// Lets the container run a check of [`crate::probe`].
    ///
    /// # Panics
    /// When the running test cannot be copied into the rootfs.
    #[must_use]
    pub fn probe(self, check: &str) -> Self {
        let program = std::env::current_exe().expect("/proc is mounted");
        fs::copy(program, self.rootfs().join("bin/probe")).expect("rootfs is writable");
        let variable = json!(format!("{}={check}", crate::probe::VARIABLE));
        self.args([
            "/bin/probe",
            "--ignored",
            "--exact",
            "probe::main",
            "--nocapture",
            "--test-threads=1",
        ])
        .with(|c| {
            let env = c["process"]["env"].as_array_mut().expect("env");
            env.push(variable);
        })
    }

    /// Changes the configuration.
    #[must_use]
    pub fn with(mut self, edit: impl FnOnce(&mut Value)) -> Self {
        edit(&mut self.config);
        self
    }

    /// Adds an entry to `mounts`.
    ///
    /// # Panics
    /// When a test has replaced `mounts` by something else.
    #[must_use]
    pub fn mount(self, mount: Value) -> Self {
        self.with(|c| c["mounts"].as_array_mut().expect("mounts").push(mount))
    }

    /// Adds a read-write bind mount.
    #[must_use]
    pub fn bind(self, source: &Path, destination: &str) -> Self {
        self.mount(json!({
            "destination": destination, "type": "bind", "source": source,
            "options": ["rbind", "rw"],
        }))
    }

    /// Replaces the namespace of this kind by one with a path, or by none.
    ///
    /// # Panics
    /// When a test has replaced `linux.namespaces` by something else.
    #[must_use]
    pub fn namespace(self, kind: &str, path: Option<&str>) -> Self {
        self.with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().expect("namespaces");
            namespaces.retain(|n| n["type"] != kind);
            if let Some(path) = path {
                namespaces.push(json!({ "type": kind, "path": path }));
            }
        })
    }

    /// Lets the container join namespaces of a process, as engines do.
    #[must_use]
    pub fn joining(self, pid: i32, kinds: &[&str]) -> Self {
        // A hostname would be that of the process it is joined to.
        let joined = self.with(|c| {
            if kinds.contains(&"uts") {
                c.as_object_mut().expect("an object").remove("hostname");
            }
        });
        kinds.iter().fold(joined, |bundle, kind| {
            let file = if *kind == "network" { "net" } else { kind };
            bundle.namespace(kind, Some(&format!("/proc/{pid}/ns/{file}")))
        })
    }

    /// Adds annotations.
    #[must_use]
    pub fn annotations(self, annotations: &[(&str, &str)]) -> Self {
        self.with(|c| {
            for (key, value) in annotations {
                c["annotations"][*key] = json!(value);
            }
        })
    }

    /// Gives the process these capabilities instead of the three of `runc spec`.
    #[must_use]
    pub fn capabilities(self, names: &[&str]) -> Self {
        self.with(|c| {
            for set in ["bounding", "effective", "permitted"] {
                c["process"]["capabilities"][set] = json!(names);
            }
        })
    }

    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Writes `config.json` and returns the bundle directory.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn path(&self) -> &Path {
        let text = serde_json::to_vec_pretty(&self.config).expect("a Value can be written");
        self.write_config(&text);
        &self.dir
    }

    /// Writes these bytes as `config.json`; the next call of [`Bundle::path`]
    /// overwrites them.
    ///
    /// # Panics
    /// When they cannot be written.
    pub fn write_config(&self, bytes: &[u8]) {
        fs::write(self.dir.join("config.json"), bytes).expect("bundle directory is writable");
    }

    /// The bundle directory, with whatever is in it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Names of the applets of this busybox.
fn applets() -> &'static [String] {
    static APPLETS: OnceLock<Vec<String>> = OnceLock::new();
    APPLETS.get_or_init(|| {
        // The reaper collects the child: take the output and not the status.
        let mut command = Command::new(BUSYBOX);
        command.arg("--list").stdout(std::process::Stdio::piped());
        let child = crate::reaper::spawn(&mut command)
            .unwrap_or_else(|e| panic!("{BUSYBOX}: {e} (the package is busybox-static)"));
        let mut list = String::new();
        std::io::Read::read_to_string(&mut child.stdout.expect("piped"), &mut list)
            .expect("applet names are text");
        list.lines().map(str::to_owned).collect()
    })
}

/// Makes a rootfs in which every busybox applet can be called.
///
/// # Panics
/// When the directory exists or cannot be filled.
pub fn fill_rootfs(rootfs: &Path) {
    for dir in [
        "", "bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var",
    ] {
        fs::create_dir(rootfs.join(dir)).expect("new rootfs");
    }
    let mode = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(rootfs.join("tmp"), mode).expect("mode of /tmp");
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).expect("busybox-static is installed");
    for applet in applets().iter().filter(|a| *a != "busybox") {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("applet link");
    }
    fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n",
    )
    .expect("passwd");
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n").expect("group");
}

/// What `runc spec` writes, without a terminal and with a writable root.
#[must_use]
pub fn default_config() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "krt",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" },
                { "type": "uts" }, { "type": "mount" },
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}
