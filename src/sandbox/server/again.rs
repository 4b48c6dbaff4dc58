//! A machine of a template that does not come up is given up, and one is booted instead: a
//! template that was damaged, or a host that does not restore what it saved, costs time and
//! no pod.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::{EVENT_PORT, GUEST_CID};

use super::{Boot, Error, Sandboxer, context, privileges};
use crate::config::Config;
use crate::sandbox::VSOCK_SOCKET;
use crate::sys::unix_socket;
use crate::vm::{self, BackEnds, Templates, VmConfig};

/// How long a device may take to end without a machine.
const DEVICE_DEADLINE: Duration = Duration::from_secs(15);

/// What it takes to boot a machine, kept until that of a template is ready.
pub(super) struct Spare {
    config: Config,
    machine: VmConfig,
    /// What is known of this host.
    known: PathBuf,
}

impl Spare {
    pub(super) fn new(config: &Config, machine: VmConfig, known: PathBuf) -> Spare {
        let template = Templates::None;
        Spare {
            config: config.clone(),
            machine: VmConfig {
                template,
                ..machine
            },
            known,
        }
    }
}

impl Sandboxer {
    /// Boots a machine in the place of one that was made of a template and has failed before
    /// it was ready; `false` when this is no such machine.
    ///
    /// # Errors
    /// What is left of it does not end, or no machine can be made.
    pub(super) fn boot_instead(&mut self, reason: &str) -> Result<bool, Error> {
        let Some(spare) = self.spare.take() else {
            return Ok(false);
        };
        log::warn!("the machine of a template is given up, and one is booted instead: {reason}");
        // Those that talk to its guest first: its sockets end with them.
        self.identity = None;
        self.agent = None;
        self.vm_ends_by = None;
        self.vm.stop(self.stop_deadline)?;
        for device in self.devices.drain(..) {
            if !device.handle.end(DEVICE_DEADLINE) {
                let what = format!("the {} device does not end", device.name);
                return Err(context("after a template")(io::Error::other(what)));
            }
        }
        let sockets =
            unix_socket::open_dir(&self.dir).map_err(context("opening the sandbox directory"))?;
        if self.event_listener.is_none() {
            let name = format!("{VSOCK_SOCKET}_{EVENT_PORT}");
            let listener = unix_socket::bind(sockets.as_fd(), &name);
            self.event_listener = Some(listener.map_err(context("making a socket"))?);
        }
        let shared =
            unix_socket::open_dir(self.share.dir()).map_err(context("the shared directory"))?;
        self.vm = vm::create(&spare.config, spare.machine.clone(), &spare.known)?;
        // Machines of templates have no process besides this one.
        self.vm.boot(&mut |_| Ok(()))?;
        self.devices = self.vm.serve(BackEnds {
            sockets,
            guest_cid: GUEST_CID.into(),
            shared,
        })?;
        self.has_booted(&spare.config)?;
        let timeout = spare.config.timeouts.boot(self.vm.capabilities().emulated);
        self.boot = Boot::Running {
            deadline: Instant::now() + timeout,
        };
        Ok(true)
    }

    /// No other machine will be made.
    pub(super) fn has_booted(&self, config: &Config) -> Result<(), Error> {
        privileges::keep_running(config.network.model).map_err(context("giving up capabilities"))
    }

    /// The guest is ready.
    pub(super) fn forget_spare(&mut self) -> Result<(), Error> {
        let spare = self.spare.take();
        spare.map_or(Ok(()), |spare| self.has_booted(&spare.config))
    }
}
