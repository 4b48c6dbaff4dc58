//! The VM and its devices: what is booted, and what happens to it.

use std::path::Path;
use std::time::Instant;

use kuasar_runv_protocol::{SHARE_TAG, cmdline};

use super::{DEVICE_GRACE, End, Sandboxer, clock};
use crate::config::{Config, HugePages};
use crate::container::execs;
use crate::sandbox::CONSOLE_LOG;
use crate::sandbox::control::{Reply, monotonic_us};
use crate::sandbox::size::{self, Demand};
use crate::vm::{self, Templates, Vm, VmConfig, VmEvent, VmSize};

impl Sandboxer {
    pub(super) fn vm_events(&mut self) -> Result<(), End> {
        loop {
            match self.vm.next_event() {
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    log::info!("virtual machine: {event:?}");
                    match event {
                        VmEvent::Exited(exit) => {
                            log::debug!("trace vm-exited {}", monotonic_us());
                            let why = match (exit.message, exit.status) {
                                (Some(message), Some(status)) => format!("{message} ({status})"),
                                (Some(message), None) => message,
                                (None, Some(status)) => format!("it ended with {status}"),
                                (None, None) => "it ended".to_owned(),
                            };
                            return Err(End::Failed(format!(
                                "{}: {why}{}",
                                self.vm.hypervisor(),
                                console_tail(&self.dir)
                            )));
                        }
                        VmEvent::Resumed => self.tell_agent(&clock::sync()),
                        VmEvent::Stalled { reason } => return Err(End::Failed(reason)),
                        // The end of the hypervisor follows.
                        VmEvent::Detached { id } => {
                            self.network.detached(&id);
                            self.detached(&id);
                        }
                        VmEvent::GuestShutdown | VmEvent::GuestReset | VmEvent::GuestPanicked => {}
                    }
                }
                Err(e) => log::warn!("virtual machine: {e}"),
            }
        }
    }

    /// Notes what a container asks for and lets the VM grow for it. When that fails,
    /// everything is as it was.
    pub(super) fn reserve(
        &mut self,
        container: &str,
        demand: Option<Demand>,
    ) -> Result<Reply, ReserveError> {
        let Some(demand) = demand else {
            self.demands.put(container, None);
            return Ok(Reply::default());
        };
        let before = self.demands.of(container);
        let wanted = self.demands.note(container, demand)?;
        let size = VmSize {
            vcpus: wanted.vcpus.max(self.size.now.vcpus),
            memory_mib: wanted.memory_mib.max(self.size.now.memory_mib),
        };
        if size != self.size.now {
            log::info!("growing to {} CPUs, {} MiB", size.vcpus, size.memory_mib);
            if let Err(e) = self.vm.resize(size) {
                self.demands.put(container, before);
                return Err(e.into());
            }
            self.size.now = size;
        }
        Ok(Reply {
            size: Some(self.size),
            ..Reply::default()
        })
    }

    /// The process of the container that the VM was made for has ended, with all that it
    /// has written. Who has only that container has nothing to wait for: the memory is
    /// given back now, and `delete`, which comes a moment later, finds nothing to end.
    pub(super) fn last_has_ended(&mut self) -> Result<(), End> {
        self.last = None;
        let id = self.dir.file_name().and_then(|name| name.to_str());
        let is_alone = id.is_some_and(|id| {
            !self.demands.has_others(id)
                // What is in the guest's own cache of a disk is for `delete` to write.
                && self.volumes.is_empty()
                && !self.oom.is_busy()
                && execs::running(&self.root, id).is_ok_and(|execs| execs.is_empty())
        });
        if !is_alone {
            return Ok(());
        }
        log::info!("the only container has ended");
        Err(End::Quietly)
    }

    /// A device has failed, which is the end of the VM, or the VMM has let go of
    /// it, after which the end of the VM is to follow.
    pub(super) fn device_event(&mut self, index: usize) -> Result<(), End> {
        // Whatever it was, the device has nothing more to say.
        let device = self.devices.swap_remove(index);
        match device.handle.failure() {
            Some(reason) => Err(End::Failed(format!(
                "the {} device failed: {reason}",
                device.name
            ))),
            None => {
                let deadline = Instant::now() + DEVICE_GRACE;
                self.vm_ends_by.get_or_insert(deadline);
                Ok(())
            }
        }
    }
}

/// Why a VM is not large enough for a container.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReserveError {
    #[error(transparent)]
    Size(#[from] size::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
}

/// What the guest printed last, for the message of a boot that failed: the log
/// itself is removed with everything else.
pub(in crate::sandbox) fn console_tail(dir: &Path) -> String {
    const KERNEL_PANIC: &str = "Kernel panic - not syncing";
    const LINES: usize = 4;
    const LINE_LEN: usize = 200;
    let text = std::fs::read(dir.join(CONSOLE_LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(8192)..]).into_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control())
                .take(LINE_LEN)
                .collect()
        })
        .filter(|line: &String| !line.trim().is_empty())
        .collect();
    // A panic is followed by a lot that says less.
    let panic = lines.iter().position(|line| line.contains(KERNEL_PANIC));
    let first = panic.unwrap_or(lines.len().saturating_sub(LINES));
    let last = &lines[first..lines.len().min(first + LINES)];
    if last.is_empty() {
        return String::new();
    }
    format!("; the guest's console ended with: {}", last.join(" | "))
}

/// What a VM may become that is booted with `size`.
pub(super) fn most(vm: &dyn Vm, size: VmSize, wanted: VmSize) -> VmSize {
    let can = vm.capabilities();
    let or = |can: bool, wanted: u32, size: u32| if can { wanted } else { size };
    VmSize {
        vcpus: or(can.resize_vcpus, wanted.vcpus, size.vcpus),
        memory_mib: or(can.resize_memory, wanted.memory_mib, size.memory_mib),
    }
}

/// The machine to boot, with files in `dir`.
pub(in crate::sandbox) fn vm_config(
    settings: &Config,
    size: VmSize,
    most: VmSize,
    dir: &Path,
) -> VmConfig {
    let mut params = format!(
        "{}={}",
        cmdline::LOG_LEVEL,
        if settings.debug {
            "debug"
        } else {
            settings.guest.agent_log.as_str()
        }
    );
    if settings.debug_console {
        params.push_str(&format!(" {}=1", cmdline::DEBUG_CONSOLE));
    }
    if !settings.guest.kernel_params.is_empty() {
        params.push(' ');
        params.push_str(&settings.guest.kernel_params);
    }
    VmConfig {
        sandbox_dir: dir.to_owned(),
        kernel: settings.guest.kernel.clone(),
        initrd: settings.guest.image.clone(),
        kernel_params: params,
        size,
        most,
        fs_tag: SHARE_TAG.to_owned(),
        console_log: settings.console_log.then(|| CONSOLE_LOG.to_owned()),
        verbose_console: settings.debug,
        // Memory of huge pages is not a template's.
        template: match settings.template.enabled && settings.vm.hugepages == HugePages::Off {
            true => Templates::Use {
                dir: settings.template.dir.clone(),
            },
            false => Templates::None,
        },
        console: settings.vm.console,
        huge_pages: settings.vm.hugepages,
    }
}
