//! The kinds of namespaces that containers can share.

/// A kind of namespace. All but mount namespaces: every container has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Pid,
    Network,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

impl Kind {
    pub const ALL: [Kind; 7] = [
        Kind::Pid,
        Kind::Network,
        Kind::Ipc,
        Kind::Uts,
        Kind::User,
        Kind::Cgroup,
        Kind::Time,
    ];

    /// As `type` of config.json's namespaces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Network => "network",
            other => other.file(),
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Its file in `/proc/PID/ns`.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Kind::Pid => "pid",
            Kind::Network => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::User => "user",
            Kind::Cgroup => "cgroup",
            Kind::Time => "time",
        }
    }

    /// `CLONE_NEW...` of linux/sched.h, for setns(2).
    #[must_use]
    pub fn flag(self) -> i32 {
        match self {
            Kind::Pid => 0x2000_0000,
            Kind::Network => 0x4000_0000,
            Kind::Ipc => 0x0800_0000,
            Kind::Uts => 0x0400_0000,
            Kind::User => 0x1000_0000,
            Kind::Cgroup => 0x0200_0000,
            Kind::Time => 0x80,
        }
    }

    /// Its place in a set of kinds.
    #[must_use]
    pub fn bit(self) -> u8 {
        1 << self as u8
    }

    /// The kinds of a set, in the order of [`Kind::ALL`].
    pub fn of_set(set: u8) -> impl Iterator<Item = Kind> {
        Kind::ALL.into_iter().filter(move |k| set & k.bit() != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names_that_are_their_own() {
        for kind in Kind::ALL {
            assert_eq!(Kind::named(kind.name()), Some(kind));
        }
        assert_eq!(Kind::named("mount"), None);
    }

    #[test]
    fn a_set_has_its_kinds() {
        let set = Kind::Time.bit() | Kind::Pid.bit();
        assert_eq!(
            Kind::of_set(set).collect::<Vec<_>>(),
            [Kind::Pid, Kind::Time]
        );
    }
}
