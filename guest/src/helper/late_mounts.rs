//! Properties of mounts that libcontainer leaves out, set from outside when the
//! container's mount namespace is complete and its program has not run.
//!
//! | option | libcontainer 0.7 | here |
//! |---|---|---|
//! | `ro` of `/dev` | left out, as it fills `/dev` later | set at the end |
//! | `shared`, `unbindable`, recursive or not | ignored | set at the end; `shared` of a bind mount is refused |
//! | `private`, `slave` | ignored | what every mount of a guest is |
//! | `rootfsPropagation: shared` | pivot_root fails | set at the end |
//! | `nosymfollow`, `symfollow` | unknown | set at the end |
//! | `sync`, `dirsync` of a file system | ignored | handed to the file system |
//! | `sync`, `dirsync`, `lazytime` of a bind mount | ignored | left out: properties of the file system, as with runc |
//! | `mand`, `iversion`, `silent` and their opposites | of the last two unknown | left out: the kernel has them no longer, or nobody sees them |

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{Mount, Spec};

use super::failure::Failure;
use super::spec::is_bind;
use crate::sys;

const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

/// What is to be set of one mount.
#[derive(Debug, PartialEq, Eq)]
pub struct LateMount {
    /// In the container.
    path: PathBuf,
    attr: MountAttr,
    recursive: bool,
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Takes what is left for the end out of the spec.
pub fn take(spec: &mut Spec) -> Vec<LateMount> {
    let mut late = Vec::new();
    if let Some(linux) = spec.linux_mut() {
        let given = linux.rootfs_propagation().as_deref();
        if let Some("shared" | "rshared") = given {
            late.push(propagate(
                Path::new("/"),
                "shared",
                given == Some("rshared"),
            ));
            linux.set_rootfs_propagation(None);
        }
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        take_from(mount, &mut late);
    }
    late
}

fn propagate(path: &Path, kind: &str, recursive: bool) -> LateMount {
    let propagation = match kind {
        "shared" => libc::MS_SHARED,
        _ => libc::MS_UNBINDABLE,
    };
    LateMount {
        path: path.to_owned(),
        attr: MountAttr {
            propagation,
            ..MountAttr::default()
        },
        recursive,
    }
}

fn take_from(mount: &mut Mount, late: &mut Vec<LateMount>) {
    let bind = is_bind(mount);
    let path = mount.destination().clone();
    let Some(options) = mount.options_mut() else {
        return;
    };
    let set = |attr| LateMount {
        path: path.clone(),
        attr,
        recursive: false,
    };
    options.retain_mut(|option| {
        match option.as_str() {
            // Left in: libcontainer makes nothing of it, as is right here.
            "ro" if path == Path::new("/dev") => {
                late.push(set(MountAttr {
                    set: libc::MOUNT_ATTR_RDONLY,
                    ..MountAttr::default()
                }));
                return true;
            }
            "nosymfollow" => late.push(set(MountAttr {
                set: MOUNT_ATTR_NOSYMFOLLOW,
                ..MountAttr::default()
            })),
            "symfollow" => late.push(set(MountAttr {
                clear: MOUNT_ATTR_NOSYMFOLLOW,
                ..MountAttr::default()
            })),
            "shared" | "rshared" if bind => return true,
            "shared" | "unbindable" => late.push(propagate(&path, option, false)),
            "rshared" | "runbindable" => late.push(propagate(&path, &option[1..], true)),
            "private" | "rprivate" | "slave" | "rslave" => {}
            "mand" | "nomand" | "iversion" | "noiversion" | "silent" | "loud" | "async" => {}
            "sync" | "dirsync" | "lazytime" | "nolazytime" if bind => {}
            // As a key of the file system, which the kernel takes for the flag
            // (vfs_parse_sb_flag); libcontainer does not know it in this form.
            "sync" | "dirsync" => {
                option.push('=');
                return true;
            }
            _ => return true,
        }
        false
    });
}

/// Sets it in the mount namespace of the process `pid`. This process stays there.
pub fn apply(pid: i32, late: &[LateMount]) -> Result<(), Failure> {
    if late.is_empty() {
        return Ok(());
    }
    sys::pidfd_open(pid)
        .and_then(|process| Ok(setns(&process, CloneFlags::CLONE_NEWNS)?))
        .map_err(Failure::io("entering the container's mount namespace"))?;
    for mount in late {
        let path = CString::new(mount.path.as_os_str().as_bytes())
            .map_err(|_| Failure::invalid("the destination of a mount has a NUL"))?;
        let flags = if mount.recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
        // SAFETY: the path is a C string, attr has the size that is given.
        sys::check(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                libc::AT_FDCWD,
                path.as_ptr(),
                flags,
                &raw const mount.attr,
                std::mem::size_of::<MountAttr>(),
            )
        })
        .map_err(Failure::io(format!(
            "changing the mount on {}",
            mount.path.display()
        )))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn taken(typ: &str, options: Value) -> (Vec<LateMount>, Vec<String>) {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/"},
            "mounts": [{"destination": "/x", "type": typ, "source": "s", "options": options}],
        }))
        .unwrap();
        let late = take(&mut spec);
        let mounts = spec.mounts().clone().unwrap();
        (late, mounts[0].options().clone().unwrap())
    }

    #[test]
    fn ordinary_options_are_left_alone() {
        let (late, options) = taken("tmpfs", json!(["nosuid", "size=1m", "ro", "relatime"]));
        assert!(late.is_empty());
        assert_eq!(options, ["nosuid", "size=1m", "ro", "relatime"]);
    }

    #[test]
    fn propagation_is_left_for_the_end() {
        let (late, options) = taken("tmpfs", json!(["runbindable", "private", "mode=1"]));
        assert_eq!(options, ["mode=1"]);
        assert_eq!(late[0].attr.propagation, libc::MS_UNBINDABLE);
        assert!(late[0].recursive);
        let (late, options) = taken("bind", json!(["rbind", "rshared"]));
        assert!(late.is_empty());
        assert_eq!(options, ["rbind", "rshared"]);
    }

    #[test]
    fn synchronous_is_the_file_systems() {
        assert_eq!(
            taken("tmpfs", json!(["sync", "dirsync"])).1,
            ["sync=", "dirsync="]
        );
        assert!(
            taken("bind", json!(["sync", "dirsync", "lazytime"]))
                .1
                .is_empty()
        );
    }

    #[test]
    fn a_shared_root_is_made_shared_at_the_end() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "linux": {"rootfsPropagation": "rshared"},
        }))
        .unwrap();
        let late = take(&mut spec);
        assert_eq!(late, [propagate(Path::new("/"), "shared", true)]);
        assert!(
            spec.linux()
                .as_ref()
                .unwrap()
                .rootfs_propagation()
                .is_none()
        );
    }
}
