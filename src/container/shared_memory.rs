//! `/dev/shm` of a pod.
//!
//! Engines mount a tmpfs on the host and bind it into every container that shares
//! the ipc namespace. Each bind would be a file system of its own in the guest, and
//! what two containers map there not the same memory. So the guest makes a tmpfs of
//! its own, of the same size and owner, one for each that the host has.

use std::os::fd::AsFd;
use std::path::Path;

use kuasar_runv_protocol::agent::SharedMemory;
use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags, fstatfs, open, stat, statx};

use super::guest_spec::Bind;

const DESTINATION: &str = "/dev/shm";
/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS: u64 = 0x0102_1994;

/// What the guest has instead of a bind mount; `None` for one that is not an
/// engine's `/dev/shm`: that is the root of a tmpfs, has nothing in it, and is not the
/// host's own, which is shared with the host as any other directory.
pub fn instead_of(bind: &Bind) -> Option<SharedMemory> {
    if bind.destination != Path::new(DESTINATION) {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = open(&bind.source, flags, Mode::empty()).ok()?;
    let found = statx(
        dir.as_fd(),
        "",
        AtFlags::EMPTY_PATH,
        StatxFlags::BASIC_STATS,
    )
    .ok()?;
    if !found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return None;
    }
    let of = rustix::fs::fstat(&dir).ok()?;
    let hosts = stat(DESTINATION).ok();
    if hosts.is_some_and(|hosts| (hosts.st_dev, hosts.st_ino) == (of.st_dev, of.st_ino)) {
        return None;
    }
    let filesystem = fstatfs(&dir).ok()?;
    if u64::try_from(filesystem.f_type) != Ok(TMPFS) || !is_empty(&bind.source) {
        return None;
    }
    // 0 blocks: without a limit.
    let block = u64::try_from(filesystem.f_bsize).unwrap_or(0);
    Some(SharedMemory {
        name: format!("{:x}-{:x}", of.st_dev, of.st_ino),
        size: filesystem.f_blocks.saturating_mul(block),
        mode: of.st_mode & 0o7777,
        uid: of.st_uid,
        gid: of.st_gid,
        ..SharedMemory::new()
    })
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}
