//! How an endpoint in the network namespace and a device of the VM are tied
//! together: one file per interworking model of `[network] model`.

mod macvtap;
mod none;
mod tcfilter;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;

use super::snapshot::Link;
use super::sysfs::Sysfs;
use crate::config::NetworkModel;

/// What a thread in the network namespace works with.
pub struct Host<'a> {
    pub netlink: &'a mut Rtnetlink,
    /// The namespace's own view of the interfaces' devices, where it can be had.
    pub sysfs: Option<&'a Sysfs>,
    pub model: NetworkModel,
    /// Queues of each interface.
    pub queues: u32,
    /// For notes of what is to be undone.
    pub sandbox_dir: PathBuf,
    /// Alias of what stays when a VM dies, see [`owner`].
    pub owner: String,
}

/// The alias of interfaces that belong to a sandbox.
#[must_use]
pub fn owner(sandbox_id: &str) -> String {
    format!("kuasar-runv:{sandbox_id}")
}

/// Removes what a VM that is gone has left at this interface.
///
/// # Errors
/// The kernel's.
pub fn clean(netlink: &mut Rtnetlink, link: &Link, owner: &str) -> io::Result<()> {
    if link.alias.as_deref() == Some(owner) {
        return macvtap::remove(netlink, link.index);
    }
    tcfilter::clean(netlink, link.index).map(drop)
}

/// An endpoint that is tied to the queues of a device.
#[derive(Debug)]
pub struct Tied {
    pub queues: Vec<OwnedFd>,
    /// Index of the interface these are queues of.
    pub index: u32,
    pub model: NetworkModel,
}

impl Tied {
    /// What is left to remember when the queues are handed over.
    #[must_use]
    pub fn to(&self) -> TiedTo {
        TiedTo {
            index: self.index,
            model: self.model,
        }
    }
}

/// Ties an endpoint to a new interface by the given model.
///
/// # Errors
/// The kernel's, with the step that failed. Nothing is left then.
pub fn tie(host: &mut Host<'_>, link: &Link, model: NetworkModel) -> io::Result<Tied> {
    match model {
        NetworkModel::Tcfilter => tcfilter::tie(host, link),
        NetworkModel::Macvtap => macvtap::tie(host, link),
        NetworkModel::None => none::tie(host, link),
    }
}

/// Undoes what [`tie`] did to the endpoint itself; the new interface goes with its
/// queues.
///
/// # Errors
/// The kernel's; an endpoint that is gone is no error.
pub fn untie(netlink: &mut Rtnetlink, endpoint: u32, tied: &TiedTo) -> io::Result<()> {
    match tied.model {
        NetworkModel::Tcfilter => tcfilter::untie(netlink, endpoint),
        NetworkModel::Macvtap => macvtap::remove(netlink, tied.index),
        NetworkModel::None => Ok(()),
    }
}

/// Lets answers to questions for names, of which the first port is `first`, reach the
/// namespace's own network stack; whether the model can.
///
/// # Errors
/// The kernel's.
pub fn pass_answers(
    netlink: &mut Rtnetlink,
    endpoint: u32,
    tied: &TiedTo,
    first: u16,
) -> io::Result<bool> {
    match tied.model {
        NetworkModel::Tcfilter => {
            tcfilter::pass_answers(netlink, endpoint, tied.index, first).map(|()| true)
        }
        NetworkModel::Macvtap | NetworkModel::None => Ok(false),
    }
}

/// What is remembered of a [`Tied`] when its queues have been handed over.
#[derive(Clone, Copy, Debug)]
pub struct TiedTo {
    pub index: u32,
    pub model: NetworkModel,
}

/// Adds what was being done to an error.
fn step(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}
