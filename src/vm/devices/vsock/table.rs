//! The connections of a device, found by slot or by ports.

use std::collections::HashMap;

use super::connection::{Connection, Ports};

/// Names a connection for as long as it lives; never names a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    slot: u32,
    generation: u32,
}

impl Token {
    /// As the event loop's 64 bits of user data.
    #[must_use]
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    #[must_use]
    pub fn from_u64(data: u64) -> Self {
        Self {
            slot: data as u32,
            generation: (data >> 32) as u32,
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    connection: Option<Connection>,
}

/// All connections.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, Token>,
}

impl Table {
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds a connection that the guest cannot name yet.
    pub fn insert(&mut self, connection: Connection) -> Token {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            // The device bounds the number of connections far below 2^32.
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.connection = Some(connection);
        Token {
            slot,
            generation: entry.generation,
        }
    }

    /// Lets the guest name the connection by its ports.
    pub fn publish(&mut self, token: Token) {
        if let Some(connection) = self.get(token) {
            let ports = connection.ports;
            self.by_ports.insert(ports, token);
        }
    }

    /// The guest can no longer name the connection.
    pub fn unpublish(&mut self, token: Token) {
        let Some(ports) = self.get(token).map(|c| c.ports) else {
            return;
        };
        if self.by_ports.get(&ports) == Some(&token) {
            self.by_ports.remove(&ports);
        }
    }

    #[must_use]
    pub fn find(&self, ports: Ports) -> Option<Token> {
        self.by_ports.get(&ports).copied()
    }

    #[must_use]
    pub fn get(&self, token: Token) -> Option<&Connection> {
        let slot = self.slots.get(token.slot as usize)?;
        slot.connection
            .as_ref()
            .filter(|_| slot.generation == token.generation)
    }

    pub fn get_mut(&mut self, token: Token) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(token.slot as usize)?;
        slot.connection
            .as_mut()
            .filter(|_| slot.generation == token.generation)
    }

    /// Removes the connection, which closes its socket.
    pub fn remove(&mut self, token: Token) {
        if self.get(token).is_none() {
            return;
        }
        self.unpublish(token);
        let slot = &mut self.slots[token.slot as usize];
        slot.connection = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(token.slot);
    }

    /// Tokens of the connections that `wanted` picks.
    pub fn select(&self, wanted: impl Fn(&Connection) -> bool) -> Vec<Token> {
        let numbered = self.slots.iter().zip(0u32..);
        numbered
            .filter(|(slot, _)| slot.connection.as_ref().is_some_and(&wanted))
            .map(|(slot, index)| Token {
                slot: index,
                generation: slot.generation,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::Phase;
    use super::*;
    use std::os::unix::net::UnixStream;

    fn connection(guest: u32) -> Connection {
        let (socket, _) = UnixStream::pair().unwrap();
        let ports = Ports { guest, host: 1 };
        Connection::new(socket, ports, Phase::Established, 1)
    }

    #[test]
    fn a_token_never_names_a_later_connection() {
        let mut table = Table::default();
        let old = table.insert(connection(1));
        table.publish(old);
        table.remove(old);
        let new = table.insert(connection(1));
        table.publish(new);
        assert!(table.get(old).is_none());
        assert!(table.get(Token::from_u64(new.to_u64())).is_some());
        // Removing what is gone does not touch its successor.
        table.remove(old);
        assert_eq!(table.find(Ports { guest: 1, host: 1 }), Some(new));
        assert_eq!(table.len(), 1);
    }
}
