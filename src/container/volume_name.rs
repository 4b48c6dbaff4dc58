//! Which bind mounts are the same volume of the pod.
//!
//! The name that a volume has in the shared directory says what it is a clone of,
//! and how: two mounts with one name can stand for each other.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatVfsMountFlags, StatxFlags, statvfs, statx};

use super::mount_options::{BindOptions, Depth};

/// The name of the volume that a bind mount of `source` is.
///
/// Directories are the same if they are in the same mount of the host, because the
/// mounts below them belong to that, now and later. Files have no mounts below.
///
/// # Errors
/// As statx(2).
pub fn of(source: &Path, options: &BindOptions) -> io::Result<String> {
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    let stat = statx(CWD, source, AtFlags::empty(), wanted)?;
    let (major, minor, inode) = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
    let mut name = format!("{major:x}:{minor:x}-{inode:x}");
    if FileType::from_raw_mode(stat.stx_mode.into()).is_dir() {
        name.push_str(&format!("-m{:x}", stat.stx_mnt_id));
        if !options.recursive {
            name.push_str("-alone");
        }
        if options.private {
            name.push_str("-private");
        }
        // Which of the mounts below were writable cannot be found out later.
        if options.read_only == Some(Depth::All) {
            name.push_str("-rro");
        }
    } else if statvfs(source)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        name.push_str("-ro");
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::super::mount_options;
    use super::*;

    fn name(source: &Path, options: &[&'static str]) -> String {
        of(source, &mount_options::bind(options, source).unwrap()).unwrap()
    }

    #[test]
    fn what_can_stand_for_each_other_has_one_name() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, link) = ["a", "b", "link"].map(|n| dir.path().join(n)).into();
        for made in [&a, &b] {
            std::fs::create_dir(made).unwrap();
        }
        std::os::unix::fs::symlink(&a, &link).unwrap();
        let plain = name(&a, &["rbind"]);
        assert_eq!(name(&link, &["rbind", "ro", "nosuid"]), plain);
        for (source, options) in [
            (&b, &["rbind"][..]),
            (&a, &["bind"]),
            (&a, &["rbind", "rprivate"]),
            (&a, &["rbind", "rro"]),
        ] {
            assert_ne!(name(source, options), plain, "{options:?}");
        }
        std::fs::write(a.join("file"), "").unwrap();
        let file = a.join("file");
        assert_eq!(name(&file, &["bind"]), name(&file, &["rbind", "rprivate"]));
        assert!(!plain.contains('/'));
    }
}
