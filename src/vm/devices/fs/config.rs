//! How the file server is configured, and why.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode};

/// Descriptors that the guest cannot use up: sockets, pipes and memory of the
/// rest of the process.
const RESERVED_DESCRIPTORS: u64 = 2048;

/// Most descriptors the guest may make this process hold, whatever the limits of
/// the process are: each comes with about 600 bytes of memory.
const MAX_DESCRIPTORS: u64 = 65_536;

/// The server's options. To be called before the thread changes its root.
///
/// # Errors
/// /proc is not mounted.
pub fn config() -> io::Result<Config> {
    Ok(Config {
        root_dir: "/".into(),
        // Where descriptors of files are turned into files that can be read; out
        // of reach once the root has changed.
        proc_sfd_rawfd: Some(
            File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY)
                .open("/proc/self/fd")?,
        ),
        // The guard decides what the guest may trust, and sets it in every reply
        // that matters.
        entry_timeout: Duration::ZERO,
        attr_timeout: Duration::ZERO,
        // Files are mapped and cached as usual, and dropped when they are opened
        // again, unless the guard says that they have not changed.
        cache_policy: CachePolicy::Auto,
        // What the guest writes is on the host when write(2) returns.
        writeback: false,
        // A walk looks every name up anyway; this saves a request for each. The
        // guest decides directory by directory.
        readdirplus: true,
        announce_submounts: true,
        xattr: true,
        // If the guest's driver can. The host then applies default ACLs and umask.
        posix_acl: NegotiationMode::Auto,
        // Labels of the host mean nothing in the guest, and the other way round.
        security_label: NegotiationMode::Never,
        // Offered to the guest; done by the guard.
        killpriv_v2: true,
        allow_direct_io: true,
        // A descriptor follows a file wherever it is renamed to, works on every
        // file system and needs no privilege. Handles would spare descriptors, but
        // not on overlayfs, where most containers are, and they need the mount
        // table and CAP_DAC_READ_SEARCH.
        inode_file_handles: InodeFileHandlesMode::Never,
        guest_fd_limit: descriptor_limit(),
        ..Config::default()
    })
}

/// Descriptors the guest may make this process hold.
fn descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    // The limit of the whole process; raising it to the hard one needs no privilege.
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    let free = limit.saturating_sub(RESERVED_DESCRIPTORS).max(limit / 2);
    free.min(MAX_DESCRIPTORS)
}
