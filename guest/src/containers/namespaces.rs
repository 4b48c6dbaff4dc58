//! The namespaces of a container, kept for those that join them.
//!
//! An open descriptor keeps a namespace, so that network, ipc and uts can be joined
//! as long as the container exists, also when its process has ended.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use kuasar_runv_protocol::agent::NamespaceJoin;
use kuasar_runv_protocol::namespace::Kind;

use super::{Container, ContainerError, Containers, Entry, Result};

/// A container's namespaces in the order of [`Kind::ALL`]; those are missing that
/// the kernel has not.
pub struct Namespaces(Vec<Option<OwnedFd>>);

impl Namespaces {
    /// Those of the process `pid`, which must be there.
    ///
    /// # Errors
    /// It is not, or there are no descriptors.
    pub fn of(pid: i32) -> io::Result<Namespaces> {
        let open = |kind: Kind| match File::open(format!("/proc/{pid}/ns/{}", kind.file())) {
            Ok(file) => Ok(Some(OwnedFd::from(file))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        Kind::ALL
            .into_iter()
            .map(open)
            .collect::<io::Result<_>>()
            .map(Namespaces)
    }

    fn get(&self, kind: Kind) -> Option<&OwnedFd> {
        let place = Kind::ALL.iter().position(|k| *k == kind)?;
        self.0.get(place)?.as_ref()
    }
}

/// What a container is to join. Keeps the containers whose namespaces they are.
#[derive(Default)]
pub struct Joins(Vec<(Kind, Arc<Container>)>);

impl Joins {
    /// Kinds as [`Kind::bit`]s.
    pub fn set(&self) -> u8 {
        self.0.iter().fold(0, |set, (kind, _)| set | kind.bit())
    }

    /// Their descriptors, in the order of [`Kind::ALL`].
    pub fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        self.0
            .iter()
            .filter_map(|(kind, of)| of.namespaces.get(*kind))
    }
}

impl Containers {
    /// The network namespace of a container, also when its process has ended: others
    /// may be in it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn network_namespace(&self, id: &str) -> Result<OwnedFd> {
        let container = self.get(id)?;
        let kept = container.namespaces.get(Kind::Network);
        kept.ok_or_else(|| io::ErrorKind::NotFound.into())
            .and_then(OwnedFd::try_clone)
            .map_err(ContainerError::io("the network namespace"))
    }

    /// Whether no program of any container runs or has run, so that nobody else is at
    /// the machine's networks, and nobody waits for the agent.
    pub fn none_started(&self) -> bool {
        let entries = self.lock();
        entries.values().all(|entry| match entry {
            Entry::Reserved => true,
            Entry::Ready(container) => {
                let execs = &container.execs;
                let execs = execs.lock().unwrap_or_else(PoisonError::into_inner);
                !container.process.is_started() && execs.is_empty()
            }
        })
    }

    /// Finds what a container is to join.
    ///
    /// # Errors
    /// `Invalid`, `CannotJoin`.
    pub(super) fn find_joins(&self, wanted: &[NamespaceJoin]) -> Result<Joins> {
        let mut joins = Vec::new();
        for join in wanted {
            let kind = Kind::named(&join.type_).ok_or_else(|| {
                ContainerError::Invalid(format!("{:?} namespaces cannot be joined", join.type_))
            })?;
            if joins.iter().any(|(known, _)| *known == kind) {
                return Err(ContainerError::Invalid(format!(
                    "two {} namespaces cannot be joined",
                    kind.name()
                )));
            }
            joins.push((kind, self.find_joined(kind, &join.container_id)?));
        }
        joins.sort_by_key(|(kind, _)| *kind);
        Ok(Joins(joins))
    }

    fn find_joined(&self, kind: Kind, id: &str) -> Result<Arc<Container>> {
        let cannot = |why: String| {
            Err(ContainerError::CannotJoin {
                kind: kind.name(),
                id: id.to_owned(),
                why,
            })
        };
        let container = match self.get(id) {
            Ok(container) => container,
            Err(e) => return cannot(e.to_string()),
        };
        // Nothing can be started in a pid namespace whose first process has ended.
        if kind == Kind::Pid && container.process.has_ended() {
            return cannot("its process has ended".to_owned());
        }
        match container.namespaces.get(kind) {
            Some(_) => Ok(container),
            None => cannot("the guest's kernel has none".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespaces_of_a_process_are_kept() {
        use std::os::fd::AsRawFd;
        let own = Namespaces::of(std::process::id().try_into().unwrap()).unwrap();
        for kind in [Kind::Pid, Kind::Network, Kind::Ipc, Kind::Uts] {
            let kept = own.get(kind).unwrap().as_raw_fd();
            let link = |path: String| std::fs::read_link(path).unwrap();
            assert_eq!(
                link(format!("/proc/self/fd/{kept}")),
                link(format!("/proc/self/ns/{}", kind.file()))
            );
        }
        assert!(Namespaces::of(i32::MAX).is_ok_and(|n| n.get(Kind::Ipc).is_none()));
    }
}
