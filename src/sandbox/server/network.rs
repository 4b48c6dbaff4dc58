//! The main thread's part of the network: devices for the watches
//! (`sandbox::network::watch`), answers for the commands that wait for them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use super::Sandboxer;
use crate::config::{self, Vhost};
use crate::root::Root;
use crate::sandbox::control::{self, Heir, Reply, SandboxerConfig};
use crate::sandbox::network::served::Served;
use crate::sandbox::network::watch::{Attached, Machine, Message, NewDevice, Settings, Watch};
use crate::sys::wake::Wake;
use crate::vm::{Device, NetDevice, VhostUserDevice, VhostUserKind};

const VHOST_DEVICE: &str = "/dev/vhost-net";

/// The networks of all containers of the pod that have one of their own.
pub(super) struct Network {
    root: Root,
    sandbox_id: String,
    settings: config::Network,
    vcpus: u32,
    watches: HashMap<String, Watch>,
    machine: Machine,
    messages: Receiver<Message>,
    /// Devices there are, with their hardware addresses.
    devices: HashMap<String, [u8; 6]>,
    /// Devices there have been.
    count: u32,
}

impl AsFd for Network {
    /// Readable when there are messages.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.machine.wake.as_fd()
    }
}

impl Network {
    pub(super) fn new(config: &SandboxerConfig) -> io::Result<Network> {
        let wake = Arc::new(Wake::new()?);
        let (sender, messages) = channel();
        Ok(Network {
            root: Root::new(Some(config.root.clone())),
            sandbox_id: config.id.clone(),
            settings: config.config.network.clone(),
            vcpus: config.config.vm.vcpus,
            watches: HashMap::new(),
            machine: Machine {
                messages: sender,
                wake,
                plugging: Arc::new(Mutex::new(())),
            },
            messages,
            devices: HashMap::new(),
            count: 0,
        })
    }

    fn watch(
        &mut self,
        container: &str,
        namespace: OwnedFd,
        served: Vec<Served>,
    ) -> io::Result<()> {
        let settings = Settings {
            root: self.root.clone(),
            sandbox_id: self.sandbox_id.clone(),
            container: container.to_owned(),
            model: self.settings.model,
            queues: self.settings.queues(self.vcpus),
        };
        let watch = Watch::start(settings, self.machine.clone(), namespace, served)?;
        self.watches.insert(container.to_owned(), watch);
        Ok(())
    }

    /// The process of the only container has ended.
    pub(super) fn container_ended(&self, container: &str) {
        if let Some(watch) = self.watches.get(container) {
            watch.rest();
        }
    }

    /// A device is gone.
    pub(super) fn detached(&mut self, id: &str) {
        self.devices.remove(id);
    }

    /// An id for a new device, and a hardware address no other has.
    fn name(&mut self, wanted: Option<[u8; 6]>) -> Attached {
        self.count += 1;
        let [_, _, high, low] = self.count.to_be_bytes();
        // Locally administered (IEEE 802), and only until the guest has found it.
        let own = [0x02, b'r', b'u', b'n', high, low];
        let is_free = |mac: &[u8; 6]| !self.devices.values().any(|other| other == mac);
        Attached {
            id: format!("net{}", self.count),
            mac: wanted.filter(is_free).unwrap_or(own),
        }
    }
}

impl Sandboxer {
    /// Starts to look after a container's network; the client is answered when the
    /// guest has it.
    pub(super) fn connect_network(
        &mut self,
        index: usize,
        container: String,
        namespace: OwnedFd,
        served: Vec<Served>,
    ) -> io::Result<Option<Reply>> {
        if self
            .network
            .watches
            .get(&container)
            .is_some_and(|watch| !watch.has_ended())
        {
            // A `start` that was killed before it could write the record.
            return Ok(Some(Reply::default()));
        }
        self.network.watch(&container, namespace, served)?;
        self.clients[index].waits_for_network = Some(container);
        Ok(None)
    }

    /// Ends the watch of a container, or leaves it to another one that is in the same
    /// namespace; the client is answered when the guest knows of it.
    pub(super) fn disconnect_network(
        &mut self,
        index: usize,
        container: String,
        heirs: &[Heir],
    ) -> Option<Reply> {
        let watches = &mut self.network.watches;
        let Some(watch) = watches.remove(&container) else {
            return Some(Reply::default());
        };
        // One whose stand-in lives has not come here to be disconnected itself:
        // `delete` kills that first.
        let heir = heirs.iter().find(|heir| {
            heir.namespace == watch.namespace()
                && heir.standin.is_alive()
                && !watches.contains_key(&heir.id)
        });
        let name = match heir {
            Some(heir) => {
                watch.hand_over(&heir.id);
                heir.id.clone()
            }
            None => {
                watch.ask_to_end();
                container.clone()
            }
        };
        watches.insert(name, watch);
        self.clients[index].waits_for_network = Some(container);
        None
    }

    pub(super) fn network_messages(&mut self) {
        // What woke us is in the channel.
        if let Err(e) = self.network.machine.wake.reset() {
            log::warn!("reading an event descriptor: {e}");
        }
        while let Ok(message) = self.network.messages.try_recv() {
            match message {
                Message::Attach { device, answer } => {
                    let attached = self.attach(device);
                    // A watch that is gone has nothing to do with the device.
                    if let Err(e) = answer.send(attached)
                        && let Ok(attached) = e.0
                    {
                        self.detach(&attached.id);
                    }
                }
                Message::Detach { id } => self.detach(&id),
                Message::Settled { container, result } => self.settled(&container, result),
                Message::HandedOver { container, result } => self.settled(&container, result),
                Message::Ended { container } => {
                    self.network.watches.remove(&container);
                    self.settled(&container, Ok(()));
                }
            }
        }
    }

    fn attach(&mut self, device: NewDevice) -> Result<Attached, String> {
        let wanted = match &device {
            NewDevice::Net { mac, .. } => *mac,
            NewDevice::Served { mac, .. } => Some(*mac),
            NewDevice::Other(_) => None,
        };
        let attached = self.network.name(wanted);
        let device = match device {
            NewDevice::Net { queues, .. } => Device::Net(NetDevice {
                vhost: self.vhost(queues.len())?,
                queues,
                mac: attached.mac,
            }),
            NewDevice::Served { socket, .. } => Device::VhostUser(VhostUserDevice {
                socket,
                kind: VhostUserKind::Net { mac: attached.mac },
            }),
            NewDevice::Other(device) => device,
        };
        self.vm
            .attach(&attached.id, &device)
            .map_err(|e| e.to_string())?;
        self.network
            .devices
            .insert(attached.id.clone(), attached.mac);
        Ok(attached)
    }

    fn detach(&mut self, id: &str) {
        if let Err(e) = self.vm.detach(id) {
            log::warn!("detaching {id}: {e}");
        }
    }

    /// `/dev/vhost-net` for each queue, or nothing.
    fn vhost(&self, queues: usize) -> Result<Vec<OwnedFd>, String> {
        let wanted = self.network.settings.vhost;
        let emulated = self.vm.capabilities().emulated;
        if wanted == Vhost::Off || (wanted == Vhost::Auto && emulated) {
            return Ok(Vec::new());
        }
        let open = || File::options().read(true).write(true).open(VHOST_DEVICE);
        let opened: io::Result<Vec<OwnedFd>> =
            (0..queues).map(|_| open().map(OwnedFd::from)).collect();
        match opened {
            Err(e) if wanted == Vhost::On => Err(format!("network.vhost: {VHOST_DEVICE}: {e}")),
            opened => Ok(opened.unwrap_or_default()),
        }
    }

    fn settled(&mut self, container: &str, result: Result<(), String>) {
        let reply = Reply {
            error: result.err(),
            ..Reply::default()
        };
        for client in &mut self.clients {
            if client.waits_for_network.as_deref() == Some(container) {
                client.waits_for_network = None;
                // A command that is gone is noticed when its channel is read.
                let _ = control::reply(&client.channel, &reply);
            }
        }
    }
}
