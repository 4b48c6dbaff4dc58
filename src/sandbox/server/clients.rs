//! The commands that are connected, and what they ask for.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use super::{Boot, End, Sandboxer};
use crate::sandbox::control::{self, Reply, Request};
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
                waits_for_network: None,
                listens_to: None,
            }),
            Err(e) => log::warn!("accepting a command: {e}"),
        }
    }

    pub(super) fn serve(&mut self, index: usize) -> Result<(), End> {
        let message = match self.clients[index].channel.recv(Duration::ZERO) {
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
        let reply = match self.handle(index, &message) {
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
    fn handle(&mut self, index: usize, message: &Message) -> io::Result<Option<Reply>> {
        match control::decode(message)? {
            Request::Share { container, name } => {
                let tree = message.fds.first().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "no mount tree to share")
                })?;
                self.share.attach(&container, &name, tree.as_fd())?;
                Ok(Some(Reply::default()))
            }
            Request::Unshare { container } => {
                self.share.detach(&container)?;
                Ok(Some(Reply::default()))
            }
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
            Request::Network { container } => {
                let namespace = message.fds.first().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "no network namespace")
                })?;
                self.connect_network(index, container, namespace.as_fd())
            }
            Request::NoNetwork { container } => {
                self.network.disconnect(&container);
                Ok(Some(Reply::default()))
            }
            Request::Commit => {
                self.clients[index].is_creator = false;
                Ok(Some(Reply::default()))
            }
            Request::Subscribe { container } => self.subscribe(index, container).map(Some),
        }
    }
}
