//! `none`: the VM gets a tap, and connecting it is somebody else's business.

use std::io;

use super::{Host, Tied, step};
use crate::config::NetworkModel;
use crate::sandbox::network::snapshot::Link;
use crate::sandbox::network::tap::Tap;

pub(super) fn tie(host: &mut Host<'_>, link: &Link) -> io::Result<Tied> {
    let tap = Tap::create(host.netlink, host.queues, link.mtu).map_err(step("making a tap"))?;
    log::info!("the interface {} is the tap {}", link.name, tap.name);
    Ok(Tied {
        queues: tap.queues,
        index: tap.index,
        model: NetworkModel::None,
    })
}
