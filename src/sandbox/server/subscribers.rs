//! Commands that listen for what happens to a container (`events`).
//!
//! They stay as long as the container, and may stop reading: they have fewer
//! places than there are clients, and nothing here ever waits for one.

use std::io;

use rustix::net::{Shutdown, shutdown};

use super::Sandboxer;
use crate::sandbox::control::{Notice, Reply};

/// Most listeners at the same time.
const MAX: usize = 16;

impl Sandboxer {
    /// Makes a client a listener.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn subscribe(&mut self, index: usize, container: String) -> io::Result<Reply> {
        let listeners = self.clients.iter().filter(|c| c.listens_to.is_some());
        if listeners.count() >= MAX {
            return Err(io::Error::other("too many commands listen for events"));
        }
        self.clients[index].listens_to = Some(container);
        Ok(Reply::default())
    }

    /// Tells everybody who listens to `container`.
    pub(super) fn notify(&self, container: &str, notice: Notice) {
        let reply = Reply {
            notice: Some(notice),
            ..Reply::default()
        };
        let Ok(message) = serde_json::to_vec(&reply) else {
            return;
        };
        for client in &self.clients {
            if client.listens_to.as_deref() != Some(container) {
                continue;
            }
            let sent = client.channel.try_send(&message);
            // For one that does not read, a report less among many is no loss;
            // the end must arrive, and a closed channel says it as well.
            if !matches!(sent, Ok(true)) && notice == Notice::Ended {
                // It may be closed already.
                let _ = shutdown(&client.channel, Shutdown::Both);
            }
        }
    }
}
