//! Limits of a container, checked and translated to the files of cgroup v2.
//!
//! The specification's limits are those of cgroup v1; the translation of their
//! values is runc's, so that a limit is the same whoever sets it. Everything that
//! can be known to be wrong is refused here, before anything is changed.

use kuasar_runv_protocol::agent::{CgroupSetting, CgroupWrite};

use super::resources::Resources;
use super::size::UNLIMITED;
use crate::vm::VmSize;

/// Bounds of `cpu.max` (kernel/sched/core.c), in microseconds.
const MIN_QUOTA: i64 = 1000;
const PERIODS: std::ops::RangeInclusive<u64> = 1000..=1_000_000;
/// Length of a period when nobody says (cgroup-v2.rst).
const DEFAULT_PERIOD: u64 = 100_000;
/// Shares of cgroup v1 (kernel/sched/sched.h).
const SHARES: (u64, u64) = (2, 262_144);
const BLKIO_WEIGHTS: std::ops::RangeInclusive<u16> = 10..=1000;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("invalid value for {name}: {reason}")]
    Invalid { name: &'static str, reason: String },
    #[error("unable to set swap limit without memory limit")]
    SwapWithoutMemory,
    #[error("memory+swap limit should be >= memory limit")]
    SwapBelowMemory,
    #[error(
        "the memory limit of {limit} bytes is more than the virtual machine may have ({max_mib} MiB): set max_memory_mib in section [vm] of the configuration, which holds for pods that are created afterwards"
    )]
    Memory { limit: i64, max_mib: u32 },
    #[error(
        "CPU {cpu} does not exist in the virtual machine, which may have {max}: set max_vcpus in section [vm] of the configuration, which holds for pods that are created afterwards"
    )]
    Cpu { cpu: u32, max: u32 },
    #[error("realtime limits cannot be set: cgroup v2, which the guest has, does not know them")]
    Realtime,
    #[error("unified resource {0:?} must be in the form CONTROLLER.PARAMETER")]
    Unified(String),
}

/// What to write so that the limits in `change` hold. `all` are the container's
/// limits with these, `most` is what their virtual machine may grow to; `None` is
/// unknown.
///
/// # Errors
/// The first limit that is wrong.
pub fn settings(
    all: &Resources,
    change: &Resources,
    most: Option<VmSize>,
) -> Result<Vec<CgroupSetting>, Error> {
    let mut settings = Vec::new();
    pids(change, &mut settings)?;
    memory(all, change, most, &mut settings)?;
    block_io(change, &mut settings)?;
    cpu(all, change, &mut settings)?;
    cpuset(change, most, &mut settings)?;
    for limit in &change.hugepage_limits {
        let file = format!("hugetlb.{}.max", limit.page_size);
        settings.push(setting(&file, limit.limit));
    }
    for (file, value) in &change.unified {
        match file.split_once('.') {
            Some((controller, _)) if controller != "cgroup" && !file.contains('/') => {
                settings.push(setting(file, value));
            }
            _ => return Err(Error::Unified(file.clone())),
        }
    }
    Ok(settings)
}

fn setting(file: &str, value: impl ToString) -> CgroupSetting {
    CgroupSetting {
        alternatives: vec![write(file, value)],
        ..Default::default()
    }
}

fn write(file: &str, value: impl ToString) -> CgroupWrite {
    CgroupWrite {
        file: file.to_owned(),
        value: value.to_string(),
        ..Default::default()
    }
}

fn invalid(name: &'static str, reason: impl Into<String>) -> Error {
    Error::Invalid {
        name,
        reason: reason.into(),
    }
}

/// A limit of cgroup v1 (-1: none) in the words of v2; `None` when it is not set.
fn limit(name: &'static str, value: Option<i64>) -> Result<Option<String>, Error> {
    match value {
        None | Some(0) => Ok(None),
        Some(-1) => Ok(Some("max".into())),
        Some(value) if value < 0 => Err(invalid(name, format!("{value} is negative"))),
        Some(value) => Ok(Some(value.to_string())),
    }
}

fn pids(change: &Resources, settings: &mut Vec<CgroupSetting>) -> Result<(), Error> {
    if let Some(max) = limit("pids-limit", change.pids.limit)? {
        settings.push(setting("pids.max", max));
    }
    Ok(())
}

fn memory(
    all: &Resources,
    change: &Resources,
    most: Option<VmSize>,
    settings: &mut Vec<CgroupSetting>,
) -> Result<(), Error> {
    let max = limit("memory", change.memory.limit)?;
    if let (Some(limit), Some(VmSize { memory_mib, .. })) = (change.memory.limit, most)
        && limit > i64::from(memory_mib) << 20
        && limit < UNLIMITED
    {
        return Err(Error::Memory {
            limit,
            max_mib: memory_mib,
        });
    }
    if (change.memory.limit.is_some() || change.memory.swap.is_some())
        && let Some(swap) = swap(all)?
    {
        settings.push(CgroupSetting {
            // A kernel without it has no swap.
            optional: true,
            ..setting("memory.swap.max", swap)
        });
    }
    settings.extend(max.map(|max| setting("memory.max", max)));
    let low = limit("memory-reservation", change.memory.reservation)?;
    settings.extend(low.map(|low| setting("memory.low", low)));
    Ok(())
}

/// Swap alone, from the limit of memory and swap together.
fn swap(all: &Resources) -> Result<Option<String>, Error> {
    let (memory, swap) = (all.memory.limit.unwrap_or(0), all.memory.swap.unwrap_or(0));
    match (memory, swap) {
        (_, ..=0) => limit("memory-swap", Some(swap)),
        (0 | -1, _) => Err(Error::SwapWithoutMemory),
        (memory, swap) if swap < memory => Err(Error::SwapBelowMemory),
        (memory, swap) => Ok(Some((swap - memory).to_string())),
    }
}

fn block_io(change: &Resources, settings: &mut Vec<CgroupSetting>) -> Result<(), Error> {
    match change.block_io.weight {
        None | Some(0) => Ok(()),
        Some(weight) if BLKIO_WEIGHTS.contains(&weight) => {
            // 10..1000 to 1..10000, unless the BFQ scheduler takes it as it is.
            let scaled = 1 + (u64::from(weight) - 10) * 9999 / 990;
            settings.push(CgroupSetting {
                alternatives: vec![write("io.bfq.weight", weight), write("io.weight", scaled)],
                ..Default::default()
            });
            Ok(())
        }
        Some(weight) => Err(invalid(
            "blkio-weight",
            format!("{weight} is not in the range from 10 to 1000"),
        )),
    }
}

fn cpu(
    all: &Resources,
    change: &Resources,
    settings: &mut Vec<CgroupSetting>,
) -> Result<(), Error> {
    let cpu = &change.cpu;
    if cpu.realtime_runtime.is_some_and(|v| v != 0) || cpu.realtime_period.is_some_and(|v| v != 0) {
        return Err(Error::Realtime);
    }
    if let Some(idle) = cpu.idle {
        if !matches!(idle, 0 | 1) {
            return Err(invalid("cpu-idle", format!("{idle} is neither 0 nor 1")));
        }
        settings.push(setting("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        settings.push(setting("cpu.weight", cpu_weight(shares)));
    }
    if (cpu.quota.is_some() || cpu.period.is_some())
        && let Some(max) = cpu_max(all)?
    {
        settings.push(setting("cpu.max", max));
    }
    if let Some(burst) = cpu.burst {
        settings.push(setting("cpu.max.burst", burst));
    }
    Ok(())
}

/// Shares of cgroup v1 as the weight of v2.
pub(super) fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(SHARES.0, SHARES.1) - 2) * 9999 / 262_142
}

fn cpu_max(all: &Resources) -> Result<Option<String>, Error> {
    let (quota, period) = (all.cpu.quota.unwrap_or(0), all.cpu.period.unwrap_or(0));
    if quota == 0 && period == 0 {
        return Ok(None);
    }
    let period = if period == 0 { DEFAULT_PERIOD } else { period };
    if !PERIODS.contains(&period) {
        return Err(invalid(
            "cpu-period",
            format!("{period} is not in the range from 1000 to 1000000 microseconds"),
        ));
    }
    let quota = match quota {
        ..=0 => "max".to_owned(),
        quota if quota < MIN_QUOTA => {
            return Err(invalid(
                "cpu-quota",
                format!("{quota} is less than {MIN_QUOTA} microseconds"),
            ));
        }
        quota => quota.to_string(),
    };
    Ok(Some(format!("{quota} {period}")))
}

fn cpuset(
    change: &Resources,
    most: Option<VmSize>,
    settings: &mut Vec<CgroupSetting>,
) -> Result<(), Error> {
    let named = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
    if let Some(cpus) = named(&change.cpu.cpus) {
        let last = last_of(&cpus).ok_or_else(|| invalid("cpuset-cpus", format!("{cpus:?}")))?;
        if let Some(VmSize { vcpus: max, .. }) = most
            && last >= max
        {
            return Err(Error::Cpu { cpu: last, max });
        }
        settings.push(setting("cpuset.cpus", cpus));
    }
    if let Some(mems) = named(&change.cpu.mems) {
        if last_of(&mems).is_none() {
            return Err(invalid("cpuset-mems", format!("{mems:?}")));
        }
        settings.push(setting("cpuset.mems", mems));
    }
    Ok(())
}

/// The largest number of a list like `0-2,4`; `None` when it is not one.
pub(super) fn last_of(list: &str) -> Option<u32> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.trim().parse::<u32>().ok();
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(last)
        })
        .try_fold(0, |max: u32, last| Some(max.max(last?)))
}

#[cfg(test)]
mod tests;
