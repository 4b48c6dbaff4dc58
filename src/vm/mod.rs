//! Hypervisors behind one trait, and the devices they share.
//!
//! A [`Vm`] is one virtual machine that the sandboxer owns. The model:
//!
//! - The sandboxer prepares a private directory and describes the machine in a
//!   [`VmConfig`]. [`create`] picks the hypervisor ([`selection`]) and checks what
//!   can be checked before anything runs.
//! - [`Vm::boot`] makes the machine, [`Vm::serve`] starts the devices of every pod
//!   and has the machine execute. When the guest is ready is the agent's to say.
//! - What happens to the machine afterwards arrives as [`VmEvent`]s: whenever
//!   [`Vm::event_fd`] is readable, [`Vm::next_event`] is called until it answers
//!   `None`. No threads are needed and no call waits longer than its deadline.
//! - [`VmEvent::Exited`] is the last event. Dropping a `Vm` kills and reaps what
//!   is left of it.
//!
//! What a hypervisor cannot do is [`Error::Unsupported`], and [`Capabilities`]
//! says so beforehand.

mod builtin;
pub mod detect;
pub mod devices;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod huge_pages;
mod log_pump;
mod process;
mod qemu;
pub mod selection;
pub mod template;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Console, HugePages};

pub use qemu::requirements;
use selection::Choice;

/// One virtual machine.
#[allow(
    dead_code,
    reason = "the verbs on running machines wait for the commands that need them"
)]
pub trait Vm {
    /// Name for messages and state files, as in the configuration.
    fn hypervisor(&self) -> &'static str;

    fn capabilities(&self) -> Capabilities;

    /// Makes the machine; a hypervisor with a process of its own starts executing
    /// it.
    ///
    /// For a hypervisor with a process of its own, `on_spawn` is called with its
    /// pid while that process still waits to execute the hypervisor, so that the
    /// pid can be recorded first. When `on_spawn` fails, or the caller dies in
    /// it, the process ends without having done anything.
    ///
    /// To be called on a thread that lives as long as the VM: the hypervisor is
    /// killed when that thread ends.
    ///
    /// # Errors
    /// The hypervisor could not be executed, or `on_spawn`'s error.
    fn boot(&mut self, on_spawn: &mut dyn FnMut(i32) -> io::Result<()>) -> Result<(), Error>;

    /// Starts the back ends of the devices that every machine has, on threads of
    /// this process; to be called once, after [`Vm::boot`]. At the latest from now
    /// on the machine executes.
    ///
    /// # Errors
    /// No thread, descriptor or socket is to be had; [`Error::NotRunning`] at the
    /// wrong time.
    fn serve(&mut self, back_ends: BackEnds) -> Result<Vec<Served>, Error>;

    /// Whether the machine was made of a template ([`VmConfig::template`]) when it was
    /// served: its guest waits for an identity of its own.
    fn is_restored(&self) -> bool;

    /// Saves a machine that was made for that ([`Templates::Make`]) as a new template, and
    /// returns the template's key. The machine is of no use any more.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Template`], [`Error::NotRunning`].
    fn save(&mut self, new: &template::New) -> Result<String, Error>;

    /// Pid of the hypervisor's process while it has one of its own.
    fn pid(&self) -> Option<i32>;

    /// Readable when [`Vm::next_event`] has work to do. The same descriptor for
    /// the whole life of the `Vm`.
    fn event_fd(&self) -> BorrowedFd<'_>;

    /// What has happened, without waiting. `None`: nothing more for now.
    ///
    /// # Errors
    /// The hypervisor said something that cannot be understood. Events may still
    /// follow: it is called again until it answers `None`.
    fn next_event(&mut self) -> Result<Option<VmEvent>, Error>;

    /// Stops the virtual CPUs. Idempotent.
    ///
    /// # Errors
    /// The hypervisor refuses or does not answer in time.
    fn pause(&mut self) -> Result<(), Error>;

    /// Lets the virtual CPUs run again. Idempotent.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    fn resume(&mut self) -> Result<(), Error>;

    /// Lets the running machine grow to a size, within [`VmConfig::most`]; what is
    /// smaller than now stays as it is. The guest has to take into use what is new.
    ///
    /// # Errors
    /// As [`Vm::pause`], [`Error::Unsupported`] and [`Error::TooLarge`].
    fn resize(&mut self, size: VmSize) -> Result<(), Error>;

    /// Adds a device to the running machine under an id of the caller's, which is
    /// one of [`valid_device_id`], and says where it is. The guest does not notice: its
    /// agent has to look for it (`guest/src/hotplug.rs`).
    ///
    /// # Errors
    /// As [`Vm::pause`], [`Error::Unsupported`], [`Error::NoSlot`],
    /// [`Error::DeviceId`]. Nothing of the device is left then.
    fn attach(&mut self, id: &str, device: &Device) -> Result<Place, Error>;

    /// Removes a device that was attached under this id, whether or not the guest
    /// has let go of it, which its agent should have had it do first. The id is free
    /// again after [`VmEvent::Detached`].
    ///
    /// # Errors
    /// As [`Vm::pause`], [`Error::DeviceId`].
    fn detach(&mut self, id: &str) -> Result<(), Error>;

    /// Ends the machine at once, whatever it is doing, and returns when nothing
    /// of it is left. Its files are written by the host's devices, so nothing
    /// needs to be flushed. Idempotent; `None` for a machine that never ran.
    ///
    /// # Errors
    /// It is still there at the deadline.
    fn stop(&mut self, deadline: Duration) -> Result<Option<ExitStatus>, Error>;
}

/// What a hypervisor can do to a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub pause: bool,
    pub resize_vcpus: bool,
    pub resize_memory: bool,
    pub attach_block: bool,
    pub attach_net: bool,
    /// Machines can be saved and made of what was saved.
    pub templates: bool,
    /// Guest instructions are emulated: everything in the guest takes about ten
    /// times as long, so do the waits for it.
    pub emulated: bool,
}

/// What the devices that every machine has are connected to on the host.
#[derive(Debug)]
pub struct BackEnds {
    /// Takes the sockets of the guest's ports; the sandbox directory.
    pub sockets: OwnedFd,
    /// The guest's context id.
    pub guest_cid: u64,
    /// The directory that the guest sees as a file system.
    pub shared: OwnedFd,
}

/// A device that is being served.
#[derive(Debug)]
pub struct Served {
    pub name: &'static str,
    pub handle: devices::vhost_user::Handle,
}

/// The machine to boot. Names of logs are file names in `sandbox_dir`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Private, absolute directory of the sandbox; working directory of a
    /// hypervisor process.
    pub sandbox_dir: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Kernel parameters of the agent and the user. What the machine itself
    /// needs is put before them.
    pub kernel_params: String,
    pub size: VmSize,
    /// What it may be resized to later.
    pub most: VmSize,
    /// By which the guest mounts the pod's shared directory, at most 36 bytes.
    pub fs_tag: String,
    /// File that takes the guest's console; a file that reached
    /// `log_pump::LOG_LIMIT` becomes `<name>.1`. `None` drops the output.
    pub console_log: Option<String>,
    /// Lets the kernel print its messages, not only errors.
    pub verbose_console: bool,
    pub console: Console,
    pub huge_pages: HugePages,
    pub template: Templates,
}

/// What a machine has to do with templates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Templates {
    None,
    /// It may be made of one of this directory, if one fits, and is booted otherwise.
    Use {
        dir: PathBuf,
    },
    /// It is going to be one; the kernel parameter that tells its agent.
    Make {
        parameter: &'static str,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    pub vcpus: u32,
    pub memory_mib: u32,
}

/// A device that can be attached to a running machine.
#[allow(dead_code, reason = "see `Vm`")]
#[derive(Debug)]
pub enum Device {
    Block(BlockDevice),
    Net(NetDevice),
    VhostUser(VhostUserDevice),
    /// A function of a physical PCI device that the driver vfio-pci has.
    Vfio {
        address: String,
    },
}

/// Most devices that are attached at the same time, whatever the hypervisor.
pub const MAX_DEVICES: usize = 30;

/// A virtio-net device on the queues of a tap or macvtap interface. The hypervisor
/// gets copies of the descriptors.
#[derive(Debug)]
pub struct NetDevice {
    /// One per queue, with virtio-net headers (`IFF_VNET_HDR`).
    pub queues: Vec<OwnedFd>,
    /// One `/dev/vhost-net` per queue, or none.
    pub vhost: Vec<OwnedFd>,
    pub mac: [u8; 6],
}

/// A device that another program of the host serves over vhost-user. The hypervisor
/// gets a copy of the connection, on which nothing has been agreed yet.
#[derive(Debug)]
pub struct VhostUserDevice {
    pub socket: OwnedFd,
    pub kind: VhostUserKind,
}

/// What the program serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VhostUserKind {
    Block,
    /// A file system that the guest mounts by this tag, of at most 36 bytes.
    Fs {
        tag: String,
    },
    /// A network card with this hardware address.
    Net {
        mac: [u8; 6],
    },
}

/// Where an attached device is, as the guest's agent finds it
/// (`guest/src/hotplug.rs`): `LNRO0005:NN`, a place on the platform bus, or `pci:NN`, a
/// slot of the bridge, both in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(pub String);

/// Whether an id is fit for [`Vm::attach`]: a lower-case letter, then at most 31 of
/// lower-case letters, digits and `-`.
#[must_use]
pub fn valid_device_id(id: &str) -> bool {
    let fits = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    id.starts_with(|c: char| c.is_ascii_lowercase()) && id.len() <= 32 && id.bytes().all(fits)
}

/// A virtio-blk device whose serial number is the id it is attached under. The
/// hypervisor gets a copy of the descriptor.
#[derive(Debug)]
pub struct BlockDevice {
    /// A block device or an image file, raw, opened as it is to be used.
    pub file: OwnedFd,
    pub is_device: bool,
    pub read_only: bool,
}

/// What happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest reset itself: a kernel panic, a triple fault or a reboot. The
    /// console log tells which.
    GuestReset,
    /// The guest reported a kernel panic.
    GuestPanicked,
    /// The virtual CPUs run again after they had been stopped: the guest's clock
    /// stood still.
    Resumed,
    /// The hypervisor has stopped the virtual CPUs and they cannot go on, for
    /// instance after an internal error of KVM. Only `stop` is left.
    Stalled { reason: String },
    /// Nothing is left of a device after [`Vm::detach`].
    Detached { id: String },
    /// The machine has ended. The last event.
    Exited(VmExit),
}

/// How a hypervisor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// How its process ended, when it had one of its own.
    pub status: Option<ExitStatus>,
    /// Why it ended: the last line its process printed, if that did not end well.
    pub message: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the hypervisor {hypervisor} does not support {operation}")]
    Unsupported {
        hypervisor: &'static str,
        operation: &'static str,
    },
    /// A file of the installation is missing or cannot be used. `hint` says what
    /// to do about it.
    #[error("cannot use the {what} {}: {} ({hint})", path.display(), reason(source))]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
        hint: &'static str,
    },
    /// The size is beyond what the machine was booted for.
    #[error(
        "the virtual machine cannot grow to {} CPUs and {} MiB of memory: it was started for at most {} CPUs and {} MiB",
        wanted.vcpus, wanted.memory_mib, most.vcpus, most.memory_mib
    )]
    TooLarge { wanted: VmSize, most: VmSize },
    #[error("{wanted} needs KVM, which does not work on this machine: {reason}")]
    KvmUnusable {
        /// What asks for it.
        wanted: &'static str,
        reason: String,
    },
    /// The host's are too few, or switched off; the text says what to do.
    #[error("[vm] hugepages: {0}")]
    HugePages(String),
    #[error("KVM: {operation}: {}", reason(source))]
    Kvm {
        operation: &'static str,
        source: io::Error,
    },
    #[error("{0}")]
    Boot(#[source] builtin::BootError),
    #[error("template: {0}")]
    Template(#[from] template::Error),
    #[error("the virtual CPUs did not {operation} within {seconds} s")]
    Unanswered {
        operation: &'static str,
        seconds: u64,
    },
    #[error("cannot start {}: {step}: {}", path.display(), reason(source))]
    Spawn {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    /// `on_spawn` of [`Vm::boot`] failed.
    #[error("cannot record the hypervisor's process: {0}")]
    Record(#[source] io::Error),
    #[error("the virtual machine has no free slot: it takes {slots} devices while it runs")]
    NoSlot { slots: usize },
    #[error("there is no device {0}, or there is one already")]
    DeviceId(String),
    #[error("{operation} needs a running virtual machine")]
    NotRunning { operation: &'static str },
    #[error("the hypervisor process {pid} is still there {seconds} s after SIGKILL")]
    Undead { pid: i32, seconds: u64 },
    #[error("control connection to QEMU: {0}")]
    Qmp(#[from] qemu::QmpError),
    #[error("{context}: {source}")]
    Io {
        context: &'static str,
        source: io::Error,
    },
}

/// An error in other words than the C library's where engines match on those:
/// they take "no such file or directory" and "permission denied" for the
/// container's command.
fn reason(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::NotFound => "it does not exist".into(),
        io::ErrorKind::PermissionDenied => "it may not be used".into(),
        _ => e.to_string(),
    }
}

/// A machine that has not been booted yet, with the hypervisor the configuration
/// and this machine allow.
///
/// `cache_dir` holds the remembered answer of [`detect::kvm`].
///
/// # Errors
/// A missing or unusable binary, firmware, kernel or image; KVM configured where
/// it does not work.
pub fn create(config: &Config, vm: VmConfig, cache_dir: &Path) -> Result<Box<dyn Vm>, Error> {
    match selection::choose(config, || detect::kvm(cache_dir)) {
        Choice::Builtin => Ok(Box::new(builtin::BuiltinVm::new(config, vm, cache_dir)?)),
        Choice::Qemu => Ok(Box::new(qemu::QemuVm::new(config, vm, cache_dir)?)),
    }
}
