//! Settings of an interface below /proc/sys/net, which shows the network namespace
//! of the thread that looks.

use std::fs;
use std::io;

use kuasar_runv_protocol::network::Sysctl;

/// Longest name and value, in bytes.
const MAX_LEN: usize = 64;

/// Whether it can only be a file of an interface.
pub fn is_valid(sysctl: &Sysctl) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    matches!(sysctl.family.as_str(), "ipv4" | "ipv6")
        && (1..=MAX_LEN).contains(&sysctl.name.len())
        && sysctl.name.chars().all(plain)
        && sysctl.value.len() <= MAX_LEN
}

/// Gives an interface these settings, as far as this kernel has them.
pub fn set(interface: &str, sysctls: &[Sysctl]) {
    for Sysctl {
        family,
        name,
        value,
        ..
    } in sysctls
    {
        let path = format!("/proc/sys/net/{family}/conf/{interface}/{name}");
        // Writing one that is set already would still wake everybody who watches.
        let result = match fs::read_to_string(&path) {
            Ok(current) if current.trim() == value => Ok(()),
            Ok(_) => fs::write(&path, value),
            Err(e) => Err(e),
        };
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => log::warn!("{path}: {e}"),
            _ => {}
        }
    }
}

/// Lets the kernel make link-local addresses again when the interface comes up.
pub fn generate_link_local(interface: &str) {
    // Without IPv6 there are none.
    let _ = fs::write(
        format!("/proc/sys/net/ipv6/conf/{interface}/addr_gen_mode"),
        "0",
    );
}
