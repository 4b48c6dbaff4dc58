//! The options of a bind mount, as far as the host has to know them.
//!
//! The guest mounts what the host puts into the pod's share, so most options are
//! the guest's to apply. The host enforces read-only, and whether later mounts of
//! its own appear below the source; and it hands on what the mount of the source
//! forbids (`nosuid` and its like), as a bind mount of the same kernel would.

use std::io;
use std::path::Path;

use rustix::fs::{StatVfsMountFlags, statvfs};

/// Every option that is honoured, in alphabetical order, as `features` lists them.
/// The others are data for a file system, which a bind mount has none of.
pub const KNOWN: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// How far down a property of a mount reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    Top,
    /// The mounts below as well.
    All,
}

/// What the options of a bind mount mean.
#[derive(Debug, PartialEq, Eq)]
pub struct BindOptions {
    pub read_only: Option<Depth>,
    /// Later mounts of the host do not appear.
    pub private: bool,
    /// With the mounts below the source.
    pub recursive: bool,
    /// For the guest, without what nobody knows.
    pub guest: Vec<String>,
}

/// An option that cannot be honoured, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused<'a> {
    pub option: &'a str,
    pub why: &'static str,
}

/// Reads the options of the bind mount on `destination`. Unknown ones are left
/// out with a warning; runc leaves them out without.
///
/// # Errors
/// [`Refused`].
pub fn bind<'a>(options: &[&'a str], destination: &Path) -> Result<BindOptions, Refused<'a>> {
    let mut read_only = None;
    let mut private = false;
    let mut guest = Vec::new();
    for option in options.iter().copied() {
        let refused = |why| Err(Refused { option, why });
        match option {
            "shared" | "rshared" => {
                return refused("mounts made in a virtual machine do not reach the host");
            }
            "idmap" | "ridmap" => {
                return refused("the guest's file system has no ID-mapped mounts");
            }
            "remount" => return refused("there is nothing mounted yet"),
            // The last of several wins, as with mount(8).
            "ro" => read_only = Some(Depth::Top),
            "rro" => read_only = Some(Depth::All),
            "rw" | "rrw" => read_only = None,
            "private" | "rprivate" => private = true,
            "slave" | "rslave" => private = false,
            other if KNOWN.binary_search(&other).is_err() => {
                log::warn!(
                    "ignoring the unknown option {other:?} of the bind mount on {}",
                    destination.display()
                );
                continue;
            }
            _ => {}
        }
        guest.push(option.to_owned());
    }
    let has = |wanted| options.contains(&wanted);
    Ok(BindOptions {
        read_only,
        private,
        recursive: has("rbind") || !has("bind"),
        guest,
    })
}

/// Adds what the mount of `source` forbids, unless the options allow it.
///
/// # Errors
/// As statvfs(2).
pub fn inherit(options: &mut Vec<String>, source: &Path) -> io::Result<()> {
    let flags = statvfs(source)?.f_flag;
    for (flag, forbids, allows) in [
        (StatVfsMountFlags::NOSUID, "nosuid", "suid"),
        (StatVfsMountFlags::NOEXEC, "noexec", "exec"),
        (StatVfsMountFlags::NODEV, "nodev", "dev"),
    ] {
        let given = |name: &str| options.iter().any(|option| option == name);
        if flags.contains(flag) && !given(forbids) && !given(allows) {
            options.insert(0, forbids.to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&'static str]) -> BindOptions {
        bind(options, Path::new("/x")).unwrap()
    }

    #[test]
    fn the_table_is_sorted() {
        assert!(KNOWN.is_sorted());
    }

    #[test]
    fn the_last_of_several_wins() {
        assert_eq!(parsed(&["bind", "rw", "ro"]).read_only, Some(Depth::Top));
        assert_eq!(parsed(&["bind", "ro", "rw"]).read_only, None);
        assert_eq!(parsed(&["rbind", "rro"]).read_only, Some(Depth::All));
        assert!(parsed(&["rbind", "rprivate"]).private);
        assert!(!parsed(&["rbind", "rprivate", "rslave"]).private);
    }

    #[test]
    fn what_nobody_knows_is_left_out_and_what_cannot_be_is_refused() {
        let options = parsed(&["bind", "bogus", "nosuid"]);
        assert_eq!(options.guest, ["bind", "nosuid"]);
        assert!(!options.recursive && parsed(&[]).recursive);
        for option in ["shared", "rshared", "idmap", "ridmap", "remount"] {
            assert_eq!(
                bind(&["rbind", option], Path::new("/x"))
                    .unwrap_err()
                    .option,
                option
            );
        }
    }

    #[test]
    fn what_the_source_forbids_is_forbidden_unless_it_is_allowed() {
        // A file system that is nosuid, nodev and noexec wherever it is mounted so.
        let source = Path::new("/proc");
        if !statvfs(source)
            .unwrap()
            .f_flag
            .contains(StatVfsMountFlags::NOSUID)
        {
            return;
        }
        let mut options = vec!["bind".to_owned()];
        inherit(&mut options, source).unwrap();
        assert!(options.contains(&"nosuid".to_owned()));
        let mut allowed = vec!["bind".to_owned(), "suid".to_owned()];
        inherit(&mut allowed, source).unwrap();
        assert!(!allowed.contains(&"nosuid".to_owned()));
    }
}
