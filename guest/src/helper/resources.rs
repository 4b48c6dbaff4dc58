//! Limits that only this machine can judge: they name processors, memory nodes or
//! block devices, and the caller may have meant the host's.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxResources};

use super::failure::Failure;
use crate::cgroup;

/// Refuses what does not exist in this machine.
pub fn check(resources: &LinuxResources) -> Result<(), Failure> {
    if let Some(cpu) = resources.cpu() {
        check_cpuset(cpu)?;
    }
    match resources.block_io() {
        Some(io) => check_block_devices(io),
        None => Ok(()),
    }
}

fn check_cpuset(cpu: &LinuxCpu) -> Result<(), Failure> {
    for (field, what, wanted, file) in [
        ("cpus", "processors", cpu.cpus(), "cpuset.cpus.effective"),
        ("mems", "memory nodes", cpu.mems(), "cpuset.mems.effective"),
    ] {
        let Some(wanted) = wanted.as_deref().filter(|list| !list.trim().is_empty()) else {
            continue;
        };
        let path = Path::new(cgroup::MOUNT_POINT).join(file);
        let there = fs::read_to_string(path)
            .map_err(Failure::io("reading the processors of the machine"))?;
        let there = there.trim();
        let (Some(asked), Some(available)) = (parse(wanted), parse(there)) else {
            return Err(Failure::invalid(format!(
                "resources.cpu.{field} {wanted:?} is not a list like \"0-2,4\""
            )));
        };
        if asked.iter().any(|n| !available.contains(n)) {
            return Err(Failure::invalid(format!(
                "resources.cpu.{field} {wanted:?} is not available: the {what} of the virtual machine are {there}"
            )));
        }
    }
    Ok(())
}

/// The numbers of a list as in cpuset(7), "List format"; `None` when it is none.
fn parse(list: &str) -> Option<Vec<u32>> {
    /// Beyond every machine, and small enough to be written out.
    const MAX: u32 = 8192;
    let mut numbers = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > MAX {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

fn check_block_devices(io: &LinuxBlockIo) -> Result<(), Failure> {
    let throttled = [
        io.throttle_read_bps_device(),
        io.throttle_write_bps_device(),
        io.throttle_read_iops_device(),
        io.throttle_write_iops_device(),
    ];
    let throttled = throttled.into_iter().flatten().flatten();
    let weighted = io.weight_device().iter().flatten();
    let devices = throttled
        .map(|d| (d.major(), d.minor()))
        .chain(weighted.map(|d| (d.major(), d.minor())));
    for (major, minor) in devices {
        if !Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists() {
            return Err(Failure::invalid(format!(
                "resources.blockIO: the virtual machine has no block device {major}:{minor}, and those of the host are not limited for one container"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_does() {
        assert_eq!(parse("0-2,4"), Some(vec![0, 1, 2, 4]));
        assert_eq!(parse(" 7 \n"), Some(vec![7]));
        for bad in ["x", "2-1", "1-", "0-4294967295"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
