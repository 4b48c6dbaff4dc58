//! vlan: one VLAN of an interface that stays on the host.

use super::Endpoint;

pub struct Vlan;

impl Endpoint for Vlan {
    fn kind(&self) -> &'static str {
        "vlan"
    }
}
