//! tap: an Ethernet interface with a program at the other end, such as slirp4netns
//! or pasta. It keeps its program; the VM gets a tap of its own, tied to this one.

use super::Endpoint;

pub struct Tap;

impl Endpoint for Tap {
    fn kind(&self) -> &'static str {
        "tun"
    }
}
