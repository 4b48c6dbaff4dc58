//! macvlan: an interface with a hardware address of its own on top of one that stays
//! on the host.
//!
//! A macvtap on top of it would be one on top of the host's interface, past it; so
//! the model macvtap is tcfilter here.

use std::io;

use super::{Connected, Endpoint};
use crate::config::NetworkModel;
use crate::sandbox::network::model::{self, Host};
use crate::sandbox::network::snapshot::Link;

pub struct Macvlan;

impl Endpoint for Macvlan {
    fn kind(&self) -> &'static str {
        "macvlan"
    }

    fn connect(&self, host: &mut Host<'_>, link: &Link) -> io::Result<Connected> {
        model::tie(host, link, without_macvtap(host.model)).map(Connected::Tied)
    }
}

/// The model for what cannot have a macvtap on top.
pub(super) fn without_macvtap(model: NetworkModel) -> NetworkModel {
    match model {
        NetworkModel::Macvtap => NetworkModel::Tcfilter,
        other => other,
    }
}
