//! veth: what most engines give a container; its other end is in the host's bridge.

use super::Endpoint;

pub struct Veth;

impl Endpoint for Veth {
    fn kind(&self) -> &'static str {
        "veth"
    }
}
