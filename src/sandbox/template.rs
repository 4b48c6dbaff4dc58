//! Making a template: a machine that belongs to no pod is booted in this process, saved when
//! its agent waits for that, and ended.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::template::Prepared;
use kuasar_runv_protocol::{GUEST_CID, PROTOCOL_VERSION, TEMPLATE_PORT, cmdline};

use super::VSOCK_SOCKET;
use super::server::machine::{console_tail, vm_config};
use super::size::{Bounds, Demand, Demands};
use crate::config::{Config, HugePages};
use crate::root::{self, Root};
use crate::sys::seqpacket::wait_any_readable;
use crate::sys::unix_socket;
use crate::vm::template::{self, New, Store};
use crate::vm::{self, BackEnds, Served, Templates, Vm, VmConfig, VmEvent};

/// How long the agent may take to say what it has connected for.
const GUEST_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Vm(#[from] vm::Error),
    #[error(transparent)]
    Template(#[from] template::Error),
    #[error(transparent)]
    Size(#[from] super::size::Error),
    #[error("{context}: {source}")]
    Io {
        context: &'static str,
        source: io::Error,
    },
    #[error("templates have no huge pages: set hugepages in section [vm] to false")]
    HugePages,
    #[error("interrupted")]
    Interrupted,
    #[error("the virtual machine ended: {0}")]
    Ended(String),
    #[error("the guest was not ready to be saved within {} s{console}", .deadline.as_secs())]
    Late { deadline: Duration, console: String },
    #[error(
        "the guest image speaks version {0} of the protocol, this kuasar-runv {PROTOCOL_VERSION}: build the image anew"
    )]
    Protocol(u32),
}

fn context(context: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { context, source }
}

/// What was made, or was there.
#[derive(Debug)]
pub struct Made {
    pub key: String,
    pub is_new: bool,
}

/// The machine of a pod that asks for nothing in particular, with its files in `dir`.
///
/// # Errors
/// [`super::size::Error`], which no demand leads to.
pub fn machine(config: &Config, dir: &Path) -> Result<VmConfig, super::size::Error> {
    let bounds = Bounds::of(&config.vm);
    let size = Demands::new(bounds, Demand::default()).size()?;
    Ok(vm_config(config, size, bounds.most, dir))
}

/// Makes the template of this configuration, unless there is one; `again`: also then.
/// `interrupt` becomes readable when it is to give up.
///
/// # Errors
/// See [`Error`]; nothing is left behind then.
pub fn create(
    config: &Config,
    again: bool,
    interrupt: BorrowedFd<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<Made, Error> {
    if config.vm.hugepages != HugePages::Off {
        return Err(Error::HugePages);
    }
    // What is wrong with the configuration is said before anything is made.
    let known = Root::of_machine().map_err(context("the directory for what is detected"))?;
    let wanted = machine(config, Path::new("/"))?;
    let probe = vm::create(config, wanted.clone(), &known)?;
    if !probe.capabilities().templates {
        return Err(Error::Vm(vm::Error::Unsupported {
            hypervisor: probe.hypervisor(),
            operation: "templates, which need hypervisor = \"builtin\"",
        }));
    }
    drop(probe);
    let store = Store::new(&config.template.dir);
    let changing = store.change()?;
    let key = template::key(&wanted)?;
    if !again && changing.has(&key) {
        return Ok(Made { key, is_new: false });
    }
    let new = changing.start()?;
    let key = save(config, &new, &known, interrupt, progress)?;
    changing.finish(&new, &key)?;
    Ok(Made { key, is_new: true })
}

/// Boots a machine and saves it.
fn save(
    config: &Config,
    new: &New,
    known: &Path,
    interrupt: BorrowedFd<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<String, Error> {
    let dir = new.dir().join("machine");
    root::create_private_dir(&dir).map_err(context("a directory for the machine"))?;
    progress("booting a virtual machine");
    let booting = Booting::start(config, &dir, known)?;
    let deadline = config.timeouts.boot(false);
    let Booting { mut vm, .. } = booting.wait(deadline, interrupt, &dir)?;
    progress("saving it");
    let saved = vm.save(new);
    let stopped = vm.stop(config.timeouts.stop());
    let key = saved?;
    stopped?;
    std::fs::remove_dir_all(&dir).map_err(context("the directory of the machine"))?;
    Ok(key)
}

/// A machine that is on its way.
struct Booting {
    vm: Box<dyn Vm>,
    /// Takes the agent's connection.
    listener: UnixListener,
    devices: Vec<Served>,
}

impl Booting {
    fn start(config: &Config, dir: &Path, known: &Path) -> Result<Booting, Error> {
        let sockets = unix_socket::open_dir(dir).map_err(context("the machine's directory"))?;
        let name = format!("{VSOCK_SOCKET}_{TEMPLATE_PORT}");
        let listener =
            unix_socket::bind(sockets.as_fd(), &name).map_err(context("making a socket"))?;
        let share = dir.join("share");
        root::create_private_dir(&share).map_err(context("the shared directory"))?;
        let shared = unix_socket::open_dir(&share).map_err(context("the shared directory"))?;
        let vm_config = VmConfig {
            template: Templates::Make {
                parameter: cmdline::TEMPLATE_ON,
            },
            ..machine(config, dir)?
        };
        let mut vm = vm::create(config, vm_config, known)?;
        vm.boot(&mut |_| Ok(()))?;
        let devices = vm.serve(BackEnds {
            sockets,
            guest_cid: GUEST_CID.into(),
            shared,
        })?;
        Ok(Booting {
            vm,
            listener,
            devices,
        })
    }

    /// Waits until the guest may be saved.
    fn wait(
        mut self,
        deadline: Duration,
        interrupt: BorrowedFd<'_>,
        dir: &Path,
    ) -> Result<Booting, Error> {
        let end = Instant::now() + deadline;
        loop {
            let mut fds = vec![self.listener.as_fd(), interrupt, self.vm.event_fd()];
            fds.extend(self.devices.iter().map(|device| device.handle.as_fd()));
            let left = end.saturating_duration_since(Instant::now());
            let ready = wait_any_readable(&fds, left).map_err(context("poll"))?;
            if ready[0] {
                self.hear()?;
                return Ok(self);
            } else if ready[1] {
                return Err(Error::Interrupted);
            } else if ready[2] {
                self.events(dir)?;
            } else if let Some(at) = ready[3..].iter().position(|ready| *ready) {
                let device = &self.devices[at];
                let reason = device.handle.failure().unwrap_or("it ended");
                return Err(Error::Ended(format!("the {}: {reason}", device.name)));
            } else if left.is_zero() {
                let console = console_tail(dir);
                return Err(Error::Late { deadline, console });
            }
        }
    }

    /// Hears what the agent has connected for. It waits for nothing from here: what was
    /// said to it now might arrive after it has been saved.
    fn hear(&self) -> Result<(), Error> {
        let hear = || -> io::Result<Prepared> {
            let (mut agent, _) = self.listener.accept()?;
            agent.set_read_timeout(Some(GUEST_DEADLINE))?;
            let mut bytes = [0; Prepared::LEN];
            agent.read_exact(&mut bytes)?;
            Ok(Prepared::decode(&bytes))
        };
        let prepared = hear().map_err(context("the agent's connection"))?;
        match prepared.protocol_version {
            PROTOCOL_VERSION => Ok(()),
            other => Err(Error::Protocol(other)),
        }
    }

    fn events(&mut self, dir: &Path) -> Result<(), Error> {
        while let Some(event) = self.vm.next_event()? {
            match event {
                VmEvent::Exited(exit) => {
                    let why = exit.message.unwrap_or_else(|| "for no known reason".into());
                    return Err(Error::Ended(format!("{why}{}", console_tail(dir))));
                }
                VmEvent::Stalled { reason } => return Err(Error::Ended(reason)),
                _ => {}
            }
        }
        Ok(())
    }
}
