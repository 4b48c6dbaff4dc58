//! The administrator's configuration: one TOML file and a directory of
//! fragments beside it.
//!
//! `/etc/kuasar-runv/config.toml` is read first, then every `*.toml` of
//! `/etc/kuasar-runv/config.d` in lexical order; a later file wins key by key.
//! `KUASAR_RUNV_CONFIG` names another file, whose sibling `config.d` is read in
//! the same way. Without any file the defaults below apply; `etc/config.toml` of
//! the sources shows all of them.
//!
//! Everything is checked while it is read (unknown keys, types, ranges, absolute
//! paths), so that a mistake is reported with its file and line and never as the
//! failure of some container. Paths must be absolute because callers such as
//! conmon run the runtime without `PATH`.
//!
//! Only commands that start a VM load the configuration; `state`, `list` and
//! `delete` work without it.

mod load;
mod values;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use load::{CONFIG_ENV, DEFAULT_PATH, Error};

/// The whole configuration. Every key has a default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Which hypervisor runs the VMs.
    pub hypervisor: Hypervisor,
    /// More detail from every part: debug messages on the host, the agent's at
    /// least at `debug`, and the guest kernel's messages in the console log.
    pub debug: bool,
    /// Serves a root shell of the guest on vsock port 1025. Whoever may enter
    /// the sandbox directory gets that shell.
    pub debug_console: bool,
    /// Keeps what the guest prints on its console in `console.log` of the
    /// sandbox directory (bounded to 512 KiB).
    pub console_log: bool,
    pub qemu: Qemu,
    pub guest: Guest,
    pub vm: Vm,
    pub network: Network,
    pub template: Template,
    pub timeouts: Timeouts,
}

/// Hypervisors of this version. The others the project knows are refused with
/// an error that says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    /// QEMU, with KVM where it works.
    #[default]
    Auto,
    /// The one inside the sandboxer; needs KVM.
    Builtin,
    Qemu,
}

/// `[qemu]`: used when the hypervisor is QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Qemu {
    /// The QEMU binary.
    #[serde(deserialize_with = "values::absolute_path")]
    pub path: PathBuf,
    /// Firmware that starts the kernel. qboot starts 0.1 s faster than SeaBIOS.
    #[serde(deserialize_with = "values::absolute_path")]
    pub firmware: PathBuf,
    pub accel: Accel,
    /// Confines QEMU with its own seccomp filter, and to read-only file systems. To
    /// be switched off only for a QEMU that was built without seccomp, or arguments
    /// that make it write to files.
    pub sandbox: bool,
    /// Appended to QEMU's command line as they are.
    pub extra_args: Vec<String>,
}

/// How QEMU executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM when it really works on this machine, else emulation.
    #[default]
    Auto,
    /// KVM, or an error when it does not work.
    Kvm,
    /// Emulation.
    Tcg,
}

/// `[guest]`: what runs in the VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guest {
    /// Kernel: an uncompressed ELF with a PVH entry, or a bzImage.
    #[serde(deserialize_with = "values::absolute_path")]
    pub kernel: PathBuf,
    /// Initramfs whose `/init` is the agent.
    #[serde(deserialize_with = "values::absolute_path")]
    pub image: PathBuf,
    /// Appended to the kernel's command line.
    #[serde(deserialize_with = "values::one_line")]
    pub kernel_params: String,
    /// What the agent logs.
    pub agent_log: LogLevel,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// As the agent's `kuasar.log=` parameter spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// `[vm]`: size of a VM when nothing else asks for one, and what it may grow to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vm {
    /// Virtual CPUs, 1 to 255.
    #[serde(deserialize_with = "values::vcpus")]
    pub vcpus: u32,
    /// Memory in MiB, 128 to 4194304. The host provides it when the guest
    /// touches it.
    #[serde(deserialize_with = "values::memory_mib")]
    pub memory_mib: u32,
    /// Most virtual CPUs a VM may grow to, 0 to 255. 0: as many as the host has.
    #[serde(deserialize_with = "values::vcpus_or_zero")]
    pub max_vcpus: u32,
    /// Most memory a VM may grow to, in MiB, 0 or 128 to 4194304. 0: as much as
    /// the host has.
    #[serde(deserialize_with = "values::memory_mib_or_zero")]
    pub max_memory_mib: u32,
    /// What the guest needs besides the limits of its containers, in MiB, 0 to
    /// 65536.
    #[serde(deserialize_with = "values::overhead_mib")]
    pub overhead_mib: u32,
    pub console: Console,
    pub hugepages: HugePages,
}

/// What the guest's console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// A serial port, on which the kernel prints errors and its last words.
    #[default]
    Serial,
    /// A virtio device: faster, but there is no console before its driver runs.
    Virtio,
    None,
}

/// Pages of the host that the guest's memory is made of: `false`, `"2M"`, `"1G"` or
/// `"thp"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Ordinary ones.
    #[default]
    Off,
    /// Of hugetlbfs, taken when the VM is made.
    Mib2,
    Gib1,
    /// Those that the kernel makes by itself.
    Transparent,
}

/// `[network]`: how interfaces of the host become network cards of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    pub model: NetworkModel,
    /// Queues of each card, 1 to 16. 0: as many as the VM has CPUs, 8 at most.
    #[serde(deserialize_with = "values::queues")]
    pub queues: u32,
    pub vhost: Vhost,
    /// Directories with the sockets of programs that may serve cards over vhost-user. What
    /// an annotation names elsewhere is refused.
    #[serde(deserialize_with = "values::directories")]
    pub vhost_user: Vec<PathBuf>,
}

/// What lies between an interface of the host and a card of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkModel {
    /// A tap, and a filter each way that redirects all packets.
    #[default]
    Tcfilter,
    /// A macvtap interface on top of the interface.
    Macvtap,
    /// A tap that is left to others to connect.
    None,
}

/// Whether the host's kernel moves packets of the VM by itself (`/dev/vhost-net`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// Where there is such a device, and KVM.
    #[default]
    Auto,
    /// An error where it cannot be had.
    On,
    Off,
}

impl Network {
    /// Queues of each card of a VM with this many CPUs.
    #[must_use]
    pub fn queues(&self, vcpus: u32) -> u32 {
        match self.queues {
            0 => vcpus.clamp(1, 8),
            queues => queues,
        }
    }
}

/// `[template]`: machines that are saved once and go on many times.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Template {
    /// Makes machines of a template where one fits. They are booted otherwise.
    pub enabled: bool,
    /// Where `kuasar-runv template create` puts them. Only root may write there.
    #[serde(deserialize_with = "values::absolute_path")]
    pub dir: PathBuf,
}

/// `[timeouts]`: longest waits, in seconds, 1 to 86400.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// From the start of the hypervisor until the agent is ready. 0: 30 s with
    /// KVM, 120 s with emulation.
    #[serde(deserialize_with = "values::seconds_or_zero")]
    pub boot_s: u32,
    /// For one request to the agent.
    #[serde(deserialize_with = "values::seconds")]
    pub agent_s: u32,
    /// For one command to the hypervisor.
    #[serde(deserialize_with = "values::seconds")]
    pub hypervisor_s: u32,
    /// Until a killed hypervisor process is gone.
    #[serde(deserialize_with = "values::seconds")]
    pub stop_s: u32,
}

impl Config {
    /// Reads the configuration from where the environment says, see the module's
    /// header.
    ///
    /// # Errors
    /// The first mistake found, with its file and line; a file that cannot be
    /// read, among them a missing one that `KUASAR_RUNV_CONFIG` names.
    pub fn load() -> Result<Config, Error> {
        match std::env::var_os(CONFIG_ENV) {
            Some(path) => load::load(Path::new(&path), load::Missing::IsAnError),
            None => load::load(Path::new(DEFAULT_PATH), load::Missing::MeansDefaults),
        }
    }

    /// The files [`load`](Self::load) reads.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn files() -> Result<Vec<PathBuf>, Error> {
        let main = std::env::var_os(CONFIG_ENV).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from);
        load::files(&main)
    }
}

impl Timeouts {
    /// How long a boot may take, see [`Timeouts::boot_s`].
    #[must_use]
    pub fn boot(&self, emulated: bool) -> Duration {
        let seconds = match (self.boot_s, emulated) {
            (0, false) => 30,
            (0, true) => 120,
            (seconds, _) => seconds,
        };
        Duration::from_secs(seconds.into())
    }

    /// How long a machine of a template may take, which has most of a boot behind it.
    #[must_use]
    pub fn restore(&self) -> Duration {
        self.boot(false) / 4
    }

    #[must_use]
    pub fn agent(&self) -> Duration {
        Duration::from_secs(self.agent_s.into())
    }

    #[must_use]
    pub fn hypervisor(&self) -> Duration {
        Duration::from_secs(self.hypervisor_s.into())
    }

    #[must_use]
    pub fn stop(&self) -> Duration {
        Duration::from_secs(self.stop_s.into())
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            hypervisor: Hypervisor::default(),
            debug: false,
            debug_console: false,
            console_log: true,
            qemu: Qemu::default(),
            guest: Guest::default(),
            vm: Vm::default(),
            network: Network::default(),
            template: Template::default(),
            timeouts: Timeouts::default(),
        }
    }
}

impl Default for Qemu {
    fn default() -> Qemu {
        Qemu {
            path: "/usr/bin/qemu-system-x86_64".into(),
            firmware: "/usr/share/qemu/qboot.rom".into(),
            accel: Accel::default(),
            sandbox: true,
            extra_args: Vec::new(),
        }
    }
}

impl Default for Guest {
    fn default() -> Guest {
        let dir = values::guest_dir();
        Guest {
            kernel: dir.join("vmlinux"),
            image: dir.join("initramfs.img"),
            kernel_params: String::new(),
            agent_log: LogLevel::default(),
        }
    }
}

impl Default for Vm {
    fn default() -> Vm {
        Vm {
            vcpus: 1,
            memory_mib: 512,
            max_vcpus: 0,
            max_memory_mib: 0,
            overhead_mib: 128,
            console: Console::default(),
            hugepages: HugePages::default(),
        }
    }
}

impl Default for Template {
    fn default() -> Template {
        Template {
            enabled: false,
            dir: "/var/lib/kuasar-runv/templates".into(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            boot_s: 0,
            agent_s: 60,
            hypervisor_s: 10,
            stop_s: 10,
        }
    }
}

#[cfg(test)]
mod tests;
