//! The loopback interface of the network namespace on the host, which is not that of
//! the container: the container's is in the guest (docs/network.md, "Loopback").
//!
//! Two things engines do there are made to work:
//!
//! - They connect to the container from within the namespace: to `localhost`, for a
//!   port-forward or a health check, and to the address of a card, where an engine without
//!   root publishes ports. The ports that the guest listens on are listened on here as well
//!   ([`listeners`]); connections go on to the guest ([`relay`](crate::sandbox::relay)),
//!   and so do datagrams ([`datagrams`]).
//! - They answer names there (docker, at 127.0.0.11). What the guest asks that address
//!   is asked from here ([`resolver`]).
//!
//! All threads are in the namespace; what the guest says and asks for is bounded in
//! number, size and rate, and leads nowhere but to this loopback interface: packets for
//! the addresses of cards that come from elsewhere do not get here.

mod datagrams;
mod listeners;
mod packet;
mod resolver;

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use rustix::thread::CapabilitySet;

use self::listeners::Listeners;
use self::resolver::Resolver;
use super::cards::Cards;
use super::sysfs;
use crate::root::Root;
use crate::sandbox::Guest;

/// What a thread needs that listens on ports below 1024.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// First port from which programs in the namespace ask others when there is a name
/// server; the last is 65535. The guest's programs by default use other ones, so the
/// answers can be told apart. One bit pattern, so that one mask finds them.
const FIRST_PORT: u16 = 0xff00;

/// The container's way to its guest.
#[derive(Clone)]
struct Way {
    root: Root,
    sandbox_id: String,
    container: String,
}

impl Way {
    fn guest(&self) -> io::Result<Guest> {
        Guest::open(&self.root, &self.sandbox_id).map_err(io::Error::other)
    }
}

/// What is done for one container. It ends with this value.
pub struct Loopback {
    way: Way,
    /// proc(5) to set what is to be set; the sandboxer's own is read-only.
    proc: Option<OwnedFd>,
    listeners: Option<Listeners>,
    /// By address; none for one that could not be served.
    resolvers: HashMap<Ipv4Addr, Option<Resolver>>,
}

impl Loopback {
    /// To be called while file systems may be mounted.
    #[must_use]
    pub fn new(root: &Root, sandbox_id: &str, container: &str) -> Loopback {
        Loopback {
            // Not everywhere, and not everybody needs it.
            proc: sysfs::mount("proc")
                .inspect_err(|e| log::debug!("mounting a proc file system: {e}"))
                .ok(),
            way: Way {
                root: root.clone(),
                sandbox_id: sandbox_id.to_owned(),
                container: container.to_owned(),
            },
            listeners: None,
            resolvers: HashMap::new(),
        }
    }

    /// Does what is to be done now for a container that has these cards. To be called in
    /// the network namespace.
    ///
    /// It is an addition: what fails is logged.
    pub fn settle(&mut self, netlink: &mut Rtnetlink, cards: &mut Cards) {
        // Who has no network is not expected to be reached.
        if cards.is_empty() {
            return;
        }
        if let Err(e) = self.serve_names(netlink, cards) {
            log::warn!("name servers of {}: {e}", self.way.container);
        }
        if self.listeners.is_none() {
            match Listeners::start(self.way.clone()) {
                Ok(listeners) => self.listeners = Some(listeners),
                Err(e) => log::warn!("the ports of {}: {e}", self.way.container),
            }
        }
    }

    /// Ends it.
    pub fn end(&mut self) {
        self.listeners = None;
        self.resolvers.clear();
    }

    fn serve_names(&mut self, netlink: &mut Rtnetlink, cards: &mut Cards) -> io::Result<()> {
        let there = resolver::addresses()?;
        self.resolvers.retain(|address, _| there.contains(address));
        if there.is_empty() {
            return Ok(());
        }
        if self.resolvers.is_empty() {
            // Names of the engine's own networks need no others to be asked.
            let passes = resolver::limit_ports(self.proc.as_ref(), FIRST_PORT)
                .and_then(|()| cards.pass_answers(netlink, FIRST_PORT));
            if let Err(e) = passes {
                log::warn!("name servers cannot ask others: {e}");
            }
        } else {
            cards.pass_answers(netlink, FIRST_PORT)?;
        }
        for address in there {
            self.resolvers.entry(address).or_insert_with(|| {
                Resolver::start(&self.way, address)
                    .inspect_err(|e| log::warn!("the name server {address}: {e}"))
                    .ok()
            });
        }
        Ok(())
    }
}
