//! The network cards of one container: which interface of its namespace is which
//! device of the VM.

use std::collections::HashSet;
use std::io;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;

use super::MAX_INTERFACES;
use super::endpoint::{self, Connected, Connection};
use super::guest;
use super::model::{self, Host};
use super::served::Served;
use super::snapshot::{Link, Snapshot, route_interfaces};
use super::tap::{self, NAME_PREFIX};
use super::watch::{Error, Machine, Message, NewDevice, step};
use crate::vm::Device;

/// An interface that is a device of the VM.
#[derive(Debug)]
pub struct Card {
    /// As it was when it was looked at last.
    pub link: Link,
    /// Of the device.
    id: String,
    device_mac: [u8; 6],
    connection: Connection,
    /// Of an interface that has left the host altogether: what was set up on it.
    frozen: Option<Snapshot>,
    /// Whether answers for a name server in the namespace pass by the guest.
    passes_answers: bool,
}

impl Card {
    /// Takes the device out of the VM, and off the interface what was put there.
    ///
    /// # Errors
    /// The kernel's; an interface that is gone is no error.
    pub fn disconnect(&self, host: &mut Host<'_>, machine: &Machine) -> io::Result<()> {
        let told = machine.tell(Message::Detach {
            id: self.id.clone(),
        });
        endpoint::disconnect(host, self.link.index, &self.connection)?;
        told.map_err(io::Error::other)
    }
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// Indices of interfaces that are gone.
    pub gone: Vec<u32>,
    pub new: Vec<Link>,
}

/// All cards of a container.
#[derive(Debug, Default)]
pub struct Cards(Vec<Card>);

impl Cards {
    /// A snapshot with the interfaces that have left the host for the VM.
    pub fn complete(&self, mut snapshot: Snapshot) -> Snapshot {
        for frozen in self.0.iter().filter_map(|card| card.frozen.as_ref()) {
            snapshot.links.extend(frozen.links.iter().cloned());
            snapshot.addresses.extend(frozen.addresses.iter().cloned());
            snapshot.routes.extend(frozen.routes.iter().cloned());
            snapshot
                .neighbours
                .extend(frozen.neighbours.iter().cloned());
        }
        snapshot
    }

    /// Compares what there is with what there was.
    pub fn plan(&self, snapshot: &Snapshot, ignored: &mut HashSet<String>) -> Plan {
        let mut plan = Plan::default();
        for card in &self.0 {
            // An interface with another address is another one, whose index is used
            // again.
            let is_there = snapshot
                .links
                .iter()
                .any(|link| link.index == card.link.index && link.mac == card.link.mac);
            if !is_there {
                plan.gone.push(card.link.index);
            }
        }
        for link in &snapshot.links {
            let is_known = self
                .0
                .iter()
                .any(|card| card.link.index == link.index && !plan.gone.contains(&link.index));
            if is_known || link.is_loopback || link.name.starts_with(NAME_PREFIX) {
                continue;
            }
            if endpoint::of(link).is_some() {
                plan.new.push(link.clone());
            } else if ignored.insert(link.name.clone()) {
                log::warn!(
                    "the interface {} ({}) cannot be in a virtual machine and stays on the host",
                    link.name,
                    link.kind.as_deref().unwrap_or("of an unknown kind"),
                );
            }
        }
        plan
    }

    /// Removes these from the list.
    pub fn take(&mut self, indices: &[u32]) -> Vec<Card> {
        let (gone, left) = std::mem::take(&mut self.0)
            .into_iter()
            .partition(|card| indices.contains(&card.link.index));
        self.0 = left;
        gone
    }

    pub fn take_all(&mut self) -> Vec<Card> {
        std::mem::take(&mut self.0)
    }

    /// Makes an interface a device of the VM.
    ///
    /// # Errors
    /// [`Error::Connect`]; nothing is left then.
    pub fn connect(
        &mut self,
        host: &mut Host<'_>,
        machine: &Machine,
        snapshot: &Snapshot,
        link: &Link,
    ) -> Result<(), Error> {
        let failed = |reason: String| Error::Connect {
            name: link.name.clone(),
            reason,
        };
        if self.0.len() >= MAX_INTERFACES {
            return Err(failed(format!("there are already {MAX_INTERFACES}")));
        }
        let Some(kind) = endpoint::of(link) else {
            return Err(failed("it is of a kind that cannot be connected".into()));
        };
        let connected = kind
            .connect(host, link)
            .map_err(|e| failed(e.to_string()))?;
        let mut frozen = None;
        let (device, connection) = match connected {
            Connected::Tied(tied) => {
                let connection = Connection::Tied(tied.to());
                let device = NewDevice::Net {
                    queues: tied.queues,
                    mac: link.mac.filter(|_| kind.has_own_mac()),
                };
                (device, connection)
            }
            Connected::Passed(passed) => {
                frozen = Some(part_of(snapshot, link));
                let device = NewDevice::Other(Device::Vfio {
                    address: passed.address.clone(),
                });
                (device, Connection::Passed(passed))
            }
        };
        let attached = match machine.attach(device)? {
            Ok(attached) => attached,
            Err(reason) => {
                // The reason is what is to be reported.
                let _ = endpoint::disconnect(host, link.index, &connection);
                return Err(failed(reason));
            }
        };
        log::info!("{} ({}) is {}", link.name, kind.kind(), attached.id);
        let device_mac = match (&connection, link.mac) {
            // The hardware's own.
            (Connection::Passed(_), Some(mac)) => mac,
            _ => attached.mac,
        };
        self.0.push(Card {
            link: link.clone(),
            id: attached.id,
            device_mac,
            connection,
            frozen,
            passes_answers: false,
        });
        Ok(())
    }

    /// Makes a card of a program a device of the VM.
    ///
    /// # Errors
    /// [`Error::Connect`]; nothing is left then.
    pub fn serve(
        &mut self,
        machine: &Machine,
        snapshot: &Snapshot,
        served: Served,
    ) -> Result<(), Error> {
        let Served { card, socket } = served;
        let failed = |reason: String| Error::Connect {
            name: card.name.clone(),
            reason,
        };
        if self.0.len() >= MAX_INTERFACES {
            return Err(failed(format!("there are already {MAX_INTERFACES}")));
        }
        let becomes_a_card = |link: &Link| endpoint::of(link).is_some();
        let mut others = snapshot.links.iter().filter(|link| becomes_a_card(link));
        if others.any(|link| link.name == card.name) {
            return Err(failed(
                "the network namespace has an interface of this name".into(),
            ));
        }
        let frozen = card.snapshot(self.0.len());
        let device = NewDevice::Served {
            socket,
            mac: card.mac,
        };
        let attached = machine.attach(device)?.map_err(failed)?;
        log::info!("{} (vhost-user) is {}", card.name, attached.id);
        self.0.extend(frozen.links.first().map(|link| Card {
            link: link.clone(),
            id: attached.id,
            device_mac: attached.mac,
            connection: Connection::Served,
            frozen: Some(frozen.clone()),
            passes_answers: false,
        }));
        Ok(())
    }

    /// Brings what lies between interface and device up to date.
    ///
    /// # Errors
    /// The kernel's.
    pub fn follow(&mut self, host: &mut Host<'_>, snapshot: &Snapshot) -> Result<(), Error> {
        for card in &mut self.0 {
            let Some(link) = find(snapshot, card.link.index) else {
                continue;
            };
            if link.mtu != card.link.mtu
                && let Connection::Tied(tied) = &card.connection
            {
                tap::set_mtu(host.netlink, tied.index, link.mtu)
                    .map_err(step("changing the MTU of a tap"))?;
            }
            card.link = link.clone();
        }
        Ok(())
    }

    /// Lets a name server in the namespace have its answers, at ports from `first` on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pass_answers(&mut self, netlink: &mut Rtnetlink, first: u16) -> io::Result<()> {
        for card in self.0.iter_mut().filter(|card| !card.passes_answers) {
            let passes = match &card.connection {
                Connection::Tied(tied) => {
                    model::pass_answers(netlink, card.link.index, tied, first)?
                }
                Connection::Passed(_) | Connection::Served => false,
            };
            if !passes {
                log::warn!(
                    "a name server in the network namespace cannot ask others by {}",
                    card.link.name
                );
            }
            card.passes_answers = true;
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The cards as the guest is told about them.
    pub fn of<'a>(&self, snapshot: &'a Snapshot) -> Vec<guest::Card<'a>> {
        self.0
            .iter()
            .filter_map(|card| {
                Some(guest::Card {
                    link: find(snapshot, card.link.index)?,
                    device_mac: card.device_mac,
                })
            })
            .collect()
    }
}

fn find(snapshot: &Snapshot, index: u32) -> Option<&Link> {
    snapshot.links.iter().find(|link| link.index == index)
}

/// What concerns one interface.
fn part_of(snapshot: &Snapshot, link: &Link) -> Snapshot {
    let index = link.index;
    Snapshot {
        links: vec![link.clone()],
        addresses: snapshot
            .addresses
            .iter()
            .filter(|address| address.header.index == index)
            .cloned()
            .collect(),
        routes: snapshot
            .routes
            .iter()
            .filter(|route| route_interfaces(route).contains(&index))
            .cloned()
            .collect(),
        neighbours: snapshot
            .neighbours
            .iter()
            .filter(|neighbour| neighbour.header.ifindex == index)
            .cloned()
            .collect(),
        rules: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::TiedTo;
    use super::*;
    use crate::config::NetworkModel;

    fn link(index: u32, kind: &str, last: u8) -> Link {
        Link {
            index,
            name: format!("{kind}{index}"),
            kind: Some(kind.into()),
            alias: None,
            mac: Some([2, 0, 0, 0, 0, last]),
            is_loopback: false,
            mtu: 1500,
            up: true,
            arp: true,
        }
    }

    fn card(link: Link) -> Card {
        Card {
            link,
            id: "net0".into(),
            device_mac: [2, 0, 0, 0, 0, 1],
            connection: Connection::Tied(TiedTo {
                index: 9,
                model: NetworkModel::Tcfilter,
            }),
            frozen: None,
            passes_answers: false,
        }
    }

    fn snapshot(links: &[Link]) -> Snapshot {
        Snapshot {
            links: links.to_vec(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn what_is_new_and_what_is_gone_is_told_by_index_and_address() {
        let cards = Cards(vec![card(link(2, "veth", 1)), card(link(3, "veth", 2))]);
        let mut ignored = HashSet::new();
        let now = snapshot(&[
            link(2, "veth", 1),
            link(3, "veth", 7),
            link(4, "macvlan", 3),
        ]);
        let plan = cards.plan(&now, &mut ignored);
        assert_eq!(plan.gone, [3]);
        let new: Vec<_> = plan.new.iter().map(|link| link.index).collect();
        assert_eq!(new, [3, 4]);
    }

    #[test]
    fn taps_of_ours_and_what_cannot_be_connected_stay() {
        let mut ours = link(5, "tun", 1);
        ours.name = "runv0".into();
        let mut ignored = HashSet::new();
        let plan = Cards::default().plan(&snapshot(&[ours, link(6, "dummy", 2)]), &mut ignored);
        assert!(plan.gone.is_empty() && plan.new.is_empty());
        assert_eq!(ignored.into_iter().collect::<Vec<_>>(), ["dummy6"]);
    }
}
