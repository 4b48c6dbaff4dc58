//! The VM and its devices: what is booted, and what happens to it.

use std::path::Path;
use std::time::Instant;

use kuasar_runv_protocol::{SHARE_TAG, cmdline};

use super::{DEVICE_GRACE, End, Sandboxer};
use crate::sandbox::CONSOLE_LOG;
use crate::sandbox::control::SandboxerConfig;
use crate::vm::{VmConfig, VmEvent, VmSize};

impl Sandboxer {
    pub(super) fn vm_events(&mut self) -> Result<(), End> {
        loop {
            match self.vm.next_event() {
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    log::info!("virtual machine: {event:?}");
                    match event {
                        VmEvent::Exited(exit) => {
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

/// What the guest printed last, for the message of a boot that failed: the log
/// itself is removed with everything else.
pub(super) fn console_tail(dir: &Path) -> String {
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
    let last = &lines[lines.len().saturating_sub(LINES)..];
    if last.is_empty() {
        return String::new();
    }
    format!("; the guest's console ended with: {}", last.join(" | "))
}

pub(super) fn vm_config(config: &SandboxerConfig, dir: &Path) -> VmConfig {
    let settings = &config.config;
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
        size: VmSize {
            vcpus: settings.vm.vcpus,
            memory_mib: settings.vm.memory_mib,
        },
        fs_tag: SHARE_TAG.to_owned(),
        console_log: settings.console_log.then(|| CONSOLE_LOG.to_owned()),
        verbose_console: settings.debug,
    }
}
