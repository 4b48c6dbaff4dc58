//! Statistics as `runc events` prints them: the structure of runc's
//! `types/events.go`, filled as runc fills it on a host with cgroup v2.
//!
//! The numbers come from the guest and may be anything; of texts and lists only
//! what the kernel can have written is passed on.

use std::collections::BTreeMap;

use kuasar_runv_protocol::agent::{GetStatsResponse, IoStats};
use kuasar_runv_protocol::network::StatsResponse;
use serde::Serialize;

/// Most lines of memory.stat and most devices that are passed on; the kernel has
/// about 60 lines.
const MAX_ENTRIES: usize = 1024;
/// Longest name, in bytes.
const MAX_NAME: usize = 64;
/// Largest number of a CPU or memory node that is passed on.
const MAX_CPU: u16 = 8192;

#[derive(Debug, Default, Serialize)]
pub struct Stats {
    cpu: Cpu,
    cpuset: Cpuset,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Hugetlb>,
    /// There is none in a virtual machine.
    intel_rdt: BTreeMap<String, u64>,
    /// runc counts only interfaces it made itself, which its command line cannot
    /// ask for, and prints `null`; here they are those of the container.
    network_interfaces: Option<Vec<NetworkInterface>>,
}

/// runc's structure has no names of its own for JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkInterface {
    name: String,
    rx_bytes: u64,
    rx_packets: u64,
    rx_errors: u64,
    rx_dropped: u64,
    tx_bytes: u64,
    tx_packets: u64,
    tx_errors: u64,
    tx_dropped: u64,
}

#[derive(Debug, Default, Serialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
}

/// Nanoseconds.
#[derive(Debug, Default, Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "is_zero")]
    total: u64,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

/// Of the rest cgroup v2 knows nothing.
#[derive(Debug, Default, Serialize)]
struct Cpuset {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u16>,
    cpu_exclusive: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mems: Vec<u16>,
    mem_hardwall: u64,
    mem_exclusive: u64,
    memory_migrate: u64,
    memory_spread_page: u64,
    memory_spread_slab: u64,
    memory_pressure: u64,
    sched_load_balance: u64,
    sched_relax_domain_level: i64,
}

#[derive(Debug, Default, Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: MemoryEntry,
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
}

#[derive(Debug, Default, Serialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Debug, Default, Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry>,
}

#[derive(Debug, Default, Serialize)]
struct BlkioEntry {
    #[serde(skip_serializing_if = "is_zero")]
    major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    minor: u64,
    op: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    value: u64,
}

#[derive(Debug, Default, Serialize)]
struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    failcnt: u64,
}

// serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl From<GetStatsResponse> for Stats {
    fn from(stats: GetStatsResponse) -> Stats {
        Stats {
            cpu: cpu(&stats),
            cpuset: Cpuset {
                cpus: numbers(&stats.cpus),
                mems: numbers(&stats.mems),
                ..Cpuset::default()
            },
            memory: memory(&stats),
            pids: Pids {
                current: stats.pids.current,
                limit: limited(stats.pids.limit),
            },
            blkio: blkio(&stats.io),
            hugetlb: stats
                .hugetlb
                .iter()
                .take(MAX_ENTRIES)
                .filter(|h| is_name(&h.page_size))
                .map(|h| {
                    let entry = Hugetlb {
                        usage: h.usage,
                        failcnt: h.failures,
                    };
                    (h.page_size.clone(), entry)
                })
                .collect(),
            ..Stats::default()
        }
    }
}

impl Stats {
    /// Adds what the guest has counted for the container's interfaces.
    #[must_use]
    pub fn with_network(mut self, answer: &StatsResponse) -> Stats {
        let interfaces: Vec<_> = answer
            .interfaces
            .iter()
            .filter(|interface| is_interface(&interface.name))
            .take(MAX_ENTRIES)
            .map(|interface| NetworkInterface {
                name: interface.name.clone(),
                rx_bytes: interface.rx_bytes,
                rx_packets: interface.rx_packets,
                rx_errors: interface.rx_errors,
                rx_dropped: interface.rx_dropped,
                tx_bytes: interface.tx_bytes,
                tx_packets: interface.tx_packets,
                tx_errors: interface.tx_errors,
                tx_dropped: interface.tx_dropped,
            })
            .collect();
        self.network_interfaces = (!interfaces.is_empty()).then_some(interfaces);
        self
    }
}

/// Whether it can be the name of an interface, and be printed.
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic() && c != '/')
}

fn cpu(stats: &GetStatsResponse) -> Cpu {
    let nanoseconds = |us: u64| us.saturating_mul(1000);
    let cpu = &stats.cpu;
    Cpu {
        usage: CpuUsage {
            total: nanoseconds(cpu.usage_us),
            kernel: nanoseconds(cpu.system_us),
            user: nanoseconds(cpu.user_us),
        },
        throttling: Throttling {
            periods: cpu.periods,
            throttled_periods: cpu.throttled_periods,
            throttled_time: nanoseconds(cpu.throttled_us),
        },
    }
}

fn memory(stats: &GetStatsResponse) -> Memory {
    let memory = &stats.memory;
    let usage = MemoryEntry {
        limit: memory.limit,
        usage: memory.usage,
        max: memory.peak,
        failcnt: 0,
    };
    // As in cgroup v1: memory and swap together.
    let swap_limit = match memory.swap_usage {
        Some(_) => memory.swap_limit,
        None => 0,
    };
    Memory {
        cache: memory.stat.get("file").copied().unwrap_or(0),
        swap: MemoryEntry {
            limit: swap_limit.saturating_add(memory.limit),
            usage: memory.usage.saturating_add(memory.swap_usage.unwrap_or(0)),
            ..MemoryEntry::default()
        },
        usage,
        kernel: MemoryEntry::default(),
        kernel_tcp: MemoryEntry::default(),
        raw: memory
            .stat
            .iter()
            .take(MAX_ENTRIES)
            .filter(|(name, _)| is_name(name))
            .map(|(name, value)| (name.clone(), *value))
            .collect(),
    }
}

fn blkio(devices: &[IoStats]) -> Blkio {
    let entry = |device: &IoStats, op, value| BlkioEntry {
        major: device.major.into(),
        minor: device.minor.into(),
        op,
        value,
    };
    let mut blkio = Blkio::default();
    for device in devices.iter().take(MAX_ENTRIES) {
        blkio.io_service_bytes_recursive.extend([
            entry(device, "Read", device.read_bytes),
            entry(device, "Write", device.write_bytes),
        ]);
        blkio.io_serviced_recursive.extend([
            entry(device, "Read", device.reads),
            entry(device, "Write", device.writes),
        ]);
    }
    blkio
}

/// runc shows no limit of processes as none.
fn limited(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The numbers of a list like `0-2,4`, as far as it is one.
fn numbers(list: &str) -> Vec<u16> {
    let mut numbers = Vec::new();
    for range in list.split(',').take(MAX_ENTRIES) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
            break;
        };
        let room = usize::from(MAX_CPU).saturating_sub(numbers.len());
        numbers.extend((first..=last.min(MAX_CPU)).take(room));
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_runv_protocol::agent::MemoryStats;

    #[test]
    fn an_empty_answer_is_what_runc_prints_of_an_idle_container() {
        let text = serde_json::to_string(&Stats::from(GetStatsResponse::new())).unwrap();
        assert_eq!(
            text,
            concat!(
                r#"{"cpu":{"usage":{"kernel":0,"user":0},"throttling":{}},"#,
                r#""cpuset":{"cpu_exclusive":0,"mem_hardwall":0,"mem_exclusive":0,"#,
                r#""memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"#,
                r#""memory_pressure":0,"sched_load_balance":0,"sched_relax_domain_level":0},"#,
                r#""memory":{"usage":{"limit":0,"failcnt":0},"swap":{"limit":0,"failcnt":0},"#,
                r#""kernel":{"limit":0,"failcnt":0},"kernelTCP":{"limit":0,"failcnt":0}},"#,
                r#""pids":{},"blkio":{},"hugetlb":{},"intel_rdt":{},"network_interfaces":null}"#
            )
        );
    }

    #[test]
    fn interfaces_are_those_with_names() {
        use kuasar_runv_protocol::network::InterfaceStats;
        let interface = |name: &str| InterfaceStats {
            name: name.into(),
            rx_bytes: 7,
            ..InterfaceStats::default()
        };
        let answer = StatsResponse {
            interfaces: vec![interface("eth0"), interface("\u{1b}[31m"), interface("")],
            ..StatsResponse::default()
        };
        let stats = Stats::from(GetStatsResponse::new()).with_network(&answer);
        let json = serde_json::to_value(&stats).unwrap();
        let listed = json["network_interfaces"].as_array().unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (&listed[0]["Name"], &listed[0]["RxBytes"]),
            (&"eth0".into(), &7.into())
        );
        let none = Stats::from(GetStatsResponse::new()).with_network(&StatsResponse::default());
        assert!(none.network_interfaces.is_none());
    }

    #[test]
    fn swap_includes_memory_and_cannot_overflow() {
        let mut answer = GetStatsResponse::new();
        answer.memory = protobuf::MessageField::some(MemoryStats {
            usage: 10,
            limit: u64::MAX,
            swap_usage: Some(5),
            swap_limit: 7,
            ..MemoryStats::new()
        });
        let memory = Stats::from(answer).memory;
        assert_eq!((memory.swap.usage, memory.swap.limit), (15, u64::MAX));
    }

    #[test]
    fn lists_of_the_guest_are_bounded() {
        assert_eq!(numbers("0-2,4"), [0, 1, 2, 4]);
        assert_eq!(numbers(""), [0_u16; 0]);
        assert!(numbers(&"0-65535,".repeat(4000)).len() <= usize::from(MAX_CPU));
        let mut answer = GetStatsResponse::new();
        let stat = &mut answer.memory.mut_or_insert_default().stat;
        stat.insert("x".repeat(1000), 1);
        stat.insert("a\u{1b}[31m".into(), 1);
        stat.insert("anon".into(), 1);
        let raw = Stats::from(answer).memory.raw;
        assert_eq!(raw.into_iter().collect::<Vec<_>>(), [("anon".into(), 1)]);
    }
}
