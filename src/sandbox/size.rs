//! The size of a pod's virtual machine: from the configuration, and what its
//! containers ask for.
//!
//! A machine has the configured size unless the limits of its containers, all
//! together and with what the guest itself needs, come to more. It grows when a
//! container joins it or gets other limits, and never shrinks: pages the guest
//! does not use go back to the host by themselves.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::config;
use crate::vm::VmSize;

/// Sizes are multiples of this, in MiB: what Linux plugs and unplugs as a whole on
/// x86-64 (the memory block of `Documentation/admin-guide/mm/memory-hotplug.rst`).
const MEMORY_STEP_MIB: u32 = 128;
/// Most containers whose demands are kept.
const MAX_CONTAINERS: usize = 4096;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error(
        "the containers' memory limits come to {wanted_mib} MiB, and a virtual machine may have at most {max_mib} MiB: lower them, or set max_memory_mib in section [vm] of the configuration, which holds for pods that are created afterwards"
    )]
    Memory { wanted_mib: u64, max_mib: u32 },
    #[error("more than {MAX_CONTAINERS} containers in one virtual machine")]
    TooMany,
}

/// What a container, or a pod, asks for. 0 is nothing in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Bytes.
    pub memory: u64,
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// CPUs that have to exist because they are named: the last and one more.
    pub named_cpus: u32,
}

/// What a machine is booted with and what it may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    pub least: VmSize,
    pub most: VmSize,
    /// What the guest needs besides its containers, in MiB.
    pub overhead_mib: u32,
}

impl Bounds {
    /// Those of the configuration on this host.
    #[must_use]
    pub fn of(vm: &config::Vm) -> Bounds {
        let or_host = |value: u32, host: fn() -> u32| match value {
            0 => host(),
            value => value,
        };
        let least = VmSize {
            vcpus: vm.vcpus,
            memory_mib: vm.memory_mib,
        };
        let memory_mib = or_host(vm.max_memory_mib, host_memory_mib);
        let room = memory_mib.saturating_sub(least.memory_mib);
        let most = VmSize {
            vcpus: or_host(vm.max_vcpus, host_cpus).max(least.vcpus),
            memory_mib: least.memory_mib + room - room % MEMORY_STEP_MIB,
        };
        Bounds {
            least,
            most,
            overhead_mib: vm.overhead_mib,
        }
    }
}

/// No more than the guest's kernel has room for (`CONFIG_NR_CPUS`).
fn host_cpus() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(64));
    u32::try_from(cpus).unwrap_or(1)
}

fn host_memory_mib() -> u32 {
    let info = rustix::system::sysinfo();
    let bytes = u128::from(info.totalram) * u128::from(info.mem_unit);
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// Who asks for what of one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Demands {
    bounds: Bounds,
    /// Of the pod as a whole, known from its start.
    pod: Demand,
    containers: HashMap<String, Demand>,
}

impl Demands {
    #[must_use]
    pub fn new(bounds: Bounds, pod: Demand) -> Demands {
        Demands {
            bounds,
            pod,
            containers: HashMap::new(),
        }
    }

    /// For a machine that cannot become all that it might.
    pub fn bound(&mut self, most: VmSize) {
        self.bounds.most = most;
    }

    /// Whether there are containers besides this one.
    #[must_use]
    pub fn has_others(&self, container: &str) -> bool {
        self.containers.keys().any(|other| other != container)
    }

    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Notes what a container asks for, instead of what it asked for before, and
    /// returns the size the machine needs with it.
    ///
    /// # Errors
    /// See [`Error`]; nothing is noted then.
    pub fn note(&mut self, container: &str, demand: Demand) -> Result<VmSize, Error> {
        if !self.containers.contains_key(container) && self.containers.len() >= MAX_CONTAINERS {
            return Err(Error::TooMany);
        }
        let before = self.containers.insert(container.to_owned(), demand);
        self.size().inspect_err(|_| self.put(container, before))
    }

    /// What the container asked for before it was noted; for taking that back.
    #[must_use]
    pub fn of(&self, container: &str) -> Option<Demand> {
        self.containers.get(container).copied()
    }

    /// Sets what a container asks for without asking whether there is room.
    pub fn put(&mut self, container: &str, demand: Option<Demand>) {
        match demand {
            Some(demand) => drop(self.containers.insert(container.to_owned(), demand)),
            None => drop(self.containers.remove(container)),
        }
    }

    /// The size the machine needs.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn size(&self) -> Result<VmSize, Error> {
        let sum = |part: fn(&Demand) -> u64| {
            let all = self.containers.values().map(part);
            all.fold(0, u64::saturating_add).max(part(&self.pod))
        };
        let named = self.containers.values().map(|d| d.named_cpus).max();
        Ok(VmSize {
            vcpus: self.vcpus(sum(|d| d.cpu_millis), named.unwrap_or(0)),
            memory_mib: self.memory_mib(sum(|d| d.memory))?,
        })
    }

    /// More CPUs than the host has would not make anything faster, so a quota
    /// beyond them is no mistake.
    fn vcpus(&self, millis: u64, named: u32) -> u32 {
        let Bounds { least, most, .. } = self.bounds;
        let for_quota = u32::try_from(millis.div_ceil(1000)).unwrap_or(u32::MAX);
        for_quota.max(named).max(least.vcpus).min(most.vcpus)
    }

    fn memory_mib(&self, bytes: u64) -> Result<u32, Error> {
        let Bounds { least, most, .. } = self.bounds;
        if bytes == 0 {
            return Ok(least.memory_mib);
        }
        let wanted_mib = bytes.div_ceil(1 << 20);
        if wanted_mib > u64::from(most.memory_mib) {
            return Err(Error::Memory {
                wanted_mib,
                max_mib: most.memory_mib,
            });
        }
        let with_guest = wanted_mib + u64::from(self.bounds.overhead_mib);
        // The configured size need not be a multiple: what is added to it is.
        let added = with_guest.saturating_sub(u64::from(least.memory_mib));
        let size = u64::from(least.memory_mib) + added.next_multiple_of(MEMORY_STEP_MIB.into());
        Ok(u32::try_from(size).unwrap_or(u32::MAX).min(most.memory_mib))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn demands(pod: Demand) -> Demands {
        let bounds = Bounds {
            least: VmSize {
                vcpus: 1,
                memory_mib: 500,
            },
            most: VmSize {
                vcpus: 4,
                memory_mib: 2036,
            },
            overhead_mib: 100,
        };
        Demands::new(bounds, pod)
    }

    fn memory(mib: u64) -> Demand {
        Demand {
            memory: mib * MIB,
            ..Demand::default()
        }
    }

    #[test]
    fn a_machine_has_the_configured_size_until_the_sum_is_more() {
        let mut demands = demands(Demand::default());
        assert_eq!(demands.size().unwrap().memory_mib, 500);
        assert_eq!(demands.note("a", memory(400)).unwrap().memory_mib, 500);
        assert_eq!(demands.note("b", memory(1)).unwrap().memory_mib, 628);
        // Other limits of the same container.
        assert_eq!(demands.note("b", memory(300)).unwrap().memory_mib, 884);
        demands.put("a", None);
        assert_eq!(demands.size().unwrap().memory_mib, 500);
    }

    #[test]
    fn too_much_is_refused_and_forgotten() {
        let mut demands = demands(Demand::default());
        demands.note("a", memory(1000)).unwrap();
        let error = Error::Memory {
            wanted_mib: 2037,
            max_mib: 2036,
        };
        assert_eq!(demands.note("b", memory(1037)), Err(error));
        assert_eq!(demands.of("b"), None);
        // What the guest needs itself makes no limit wrong that the host could give.
        assert_eq!(demands.note("b", memory(1036)).unwrap().memory_mib, 2036);
    }

    #[test]
    fn cpus_follow_from_quotas_and_from_names() {
        let mut demands = demands(Demand::default());
        let cpus = |cpu_millis, named_cpus| Demand {
            cpu_millis,
            named_cpus,
            ..Demand::default()
        };
        assert_eq!(demands.note("a", cpus(500, 0)).unwrap().vcpus, 1);
        assert_eq!(demands.note("b", cpus(600, 0)).unwrap().vcpus, 2);
        assert_eq!(demands.note("c", cpus(0, 3)).unwrap().vcpus, 3);
        assert_eq!(demands.note("d", cpus(64_000, 0)).unwrap().vcpus, 4);
    }

    #[test]
    fn a_pods_annotations_cover_its_containers() {
        let mut demands = demands(memory(1000));
        assert_eq!(demands.size().unwrap().memory_mib, 1140);
        assert_eq!(demands.note("a", memory(800)).unwrap().memory_mib, 1140);
        assert_eq!(demands.note("b", memory(300)).unwrap().memory_mib, 1268);
    }

    #[test]
    fn the_hosts_size_is_known() {
        let bounds = Bounds::of(&config::Vm::default());
        assert!(bounds.most.vcpus >= 1);
        assert!(bounds.most.memory_mib >= bounds.least.memory_mib);
    }
}
