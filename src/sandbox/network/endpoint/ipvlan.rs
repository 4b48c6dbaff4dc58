//! ipvlan: an interface that shares its hardware address with the host's interface
//! below and all others on top of that; frames are told apart by their IP addresses,
//! which the interface keeps on the host. In its L3 modes it resolves no addresses,
//! and neither does the guest's.

use std::io;

use super::macvlan::without_macvtap;
use super::{Connected, Endpoint};
use crate::sandbox::network::model::{self, Host};
use crate::sandbox::network::snapshot::Link;

pub struct Ipvlan;

impl Endpoint for Ipvlan {
    fn kind(&self) -> &'static str {
        "ipvlan"
    }

    fn has_own_mac(&self) -> bool {
        false
    }

    fn connect(&self, host: &mut Host<'_>, link: &Link) -> io::Result<Connected> {
        model::tie(host, link, without_macvtap(host.model)).map(Connected::Tied)
    }
}
