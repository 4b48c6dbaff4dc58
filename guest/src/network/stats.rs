//! What the kernel counts for the interfaces of a network namespace.

use std::fs;
use std::io;

use kuasar_runv_protocol::network::InterfaceStats;

/// Most interfaces that are reported.
const MAX_INTERFACES: usize = 256;

/// The interfaces that a process sees.
///
/// # Errors
/// As reading the file.
pub fn of_process(pid: i32) -> io::Result<Vec<InterfaceStats>> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    Ok(text.lines().filter_map(line).take(MAX_INTERFACES).collect())
}

/// proc_pid_net(5): a name, eight numbers about what was received, then eight about
/// what was sent.
fn line(line: &str) -> Option<InterfaceStats> {
    let (name, numbers) = line.split_once(':')?;
    let name = name.trim();
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .map_while(|number| number.parse().ok())
        .collect();
    let (received, sent) = (numbers.get(..4)?, numbers.get(8..12)?);
    (name != "lo").then(|| InterfaceStats {
        name: name.to_owned(),
        rx_bytes: received[0],
        rx_packets: received[1],
        rx_errors: received[2],
        rx_dropped: received[3],
        tx_bytes: sent[0],
        tx_packets: sent[1],
        tx_errors: sent[2],
        tx_dropped: sent[3],
        ..InterfaceStats::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let stats = line("  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16").unwrap();
        assert_eq!(stats.name, "eth0");
        assert_eq!((stats.rx_bytes, stats.rx_dropped), (1, 4));
        assert_eq!((stats.tx_bytes, stats.tx_dropped), (9, 12));
        assert!(line("    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16").is_none());
        assert!(line(" face |bytes    packets errs drop fifo frame").is_none());
    }
}
