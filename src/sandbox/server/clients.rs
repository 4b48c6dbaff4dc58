//! The commands that are connected, and what they ask for.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::{Boot, End, Sandboxer};
use crate::sandbox::control::{self, Reply, Request};
use crate::sandbox::network::served::Served;
use crate::sys::seqpacket::{Channel, Message};

/// Commands connected at the same time: those that create containers for as long
/// as that takes.
const MAX_CLIENTS: usize = 256;

/// A command.
pub(super) struct Client {
    pub channel: Channel,
    /// It boots this VM: until it commits, its end is the end of the VM.
    pub is_creator: bool,
    pub waits_for_boot: bool,
    /// The disk whose removal it waits for.
    pub waits_for_removal: Option<String>,
    /// The container whose network it waits for.
    pub waits_for_network: Option<String>,
    /// The container whose notices it gets.
    pub listens_to: Option<String>,
}

impl Sandboxer {
    pub(super) fn answer_waiting(&mut self, reply: &Reply) {
        for client in self.clients.iter_mut().filter(|c| c.waits_for_boot) {
            client.waits_for_boot = false;
            // A command that is gone is noticed when its channel is read.
            let _ = control::reply(&client.channel, reply);
        }
    }

    pub(super) fn accept_client(&mut self) {
        match self.listener.accept() {
            // Dropped: the command sees that the connection is closed.
            Ok(_) if self.clients.len() >= MAX_CLIENTS => log::warn!("too many commands at once"),
            Ok(channel) => self.clients.push(Client {
                channel,
                is_creator: false,
                waits_for_boot: false,
                waits_for_removal: None,
                waits_for_network: None,
                listens_to: None,
            }),
            Err(e) => log::warn!("accepting a command: {e}"),
        }
    }

    pub(super) fn serve(&mut self, index: usize) -> Result<(), End> {
        let mut message = match self.clients[index].channel.recv(Duration::ZERO) {
            Ok(Some(message)) => message,
            closed => {
                if let Err(e) = closed {
                    log::debug!("a command's channel: {e}");
                }
                let client = self.clients.swap_remove(index);
                return if client.is_creator {
                    log::info!("the creating command ended before the container was complete");
                    Err(End::Quietly)
                } else {
                    Ok(())
                };
            }
        };
        let reply = match self.handle(index, &mut message) {
            Ok(Some(reply)) => reply,
            Ok(None) => return Ok(()),
            Err(e) => Reply {
                error: Some(e.to_string()),
                ..Reply::default()
            },
        };
        if let Err(e) = control::reply(&self.clients[index].channel, &reply) {
            log::debug!("answering a command: {e}");
        }
        Ok(())
    }

    /// `None`: the answer comes later.
    fn handle(&mut self, index: usize, message: &mut Message) -> io::Result<Option<Reply>> {
        match control::decode(message)? {
            Request::Share { container, name } => {
                let tree = taken(message)?;
                self.share.attach(&container, &name, tree)?;
                Ok(Some(Reply::default()))
            }
            Request::Withdraw { container, name } => {
                self.share.withdraw(&container, &name);
                Ok(Some(Reply::default()))
            }
            Request::ShareVolume {
                container,
                name,
                writes,
            } => {
                let tree = taken(message)?;
                self.share.attach_volume(&container, &name, writes, tree)?;
                Ok(Some(Reply::default()))
            }
            Request::UseDisk {
                container,
                key,
                mode,
            } => {
                let file = message.fds.pop();
                self.use_disk(&container, &key, mode, file).map(Some)
            }
            Request::UseVolume { container, key } => self.use_volume(&container, &key).map(Some),
            Request::UseSocket {
                container,
                key,
                identities,
            } => {
                let socket = taken(message)?;
                self.use_socket(&container, &key, identities, socket)
                    .map(Some)
            }
            Request::Unshare { container } => Ok(Some(self.unshare(&container))),
            Request::RemoveVolume { name } => self.remove_volume(index, name),
            Request::WaitReady => match &self.boot {
                Boot::Ready(info) => Ok(Some(Reply {
                    ready: Some(info.clone()),
                    ..Reply::default()
                })),
                Boot::Running { .. } => {
                    self.clients[index].waits_for_boot = true;
                    Ok(None)
                }
            },
            Request::Network { container, cards } => {
                let mut fds = std::mem::take(&mut message.fds).into_iter();
                let namespace = fds.next().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "no network namespace")
                })?;
                if cards.len() != fds.len() {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "as many connections as cards are needed",
                    ));
                }
                let served = cards.into_iter().zip(fds);
                let served = served.map(|(card, socket)| Served { card, socket });
                self.connect_network(index, container, namespace, served.collect())
            }
            Request::NoNetwork { container, heirs } => {
                Ok(self.disconnect_network(index, container, &heirs))
            }
            Request::Commit => {
                self.clients[index].is_creator = false;
                self.last = message.fds.pop();
                Ok(Some(Reply::default()))
            }
            Request::Reserve { container, demand } => self
                .reserve(&container, demand)
                .map(Some)
                .map_err(io::Error::other),
            Request::Subscribe { container } => self.subscribe(index, container).map(Some),
        }
    }
}

/// The mount tree or file that came with a request.
fn taken(message: &mut Message) -> io::Result<OwnedFd> {
    message
        .fds
        .pop()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "nothing came to be shared"))
}
