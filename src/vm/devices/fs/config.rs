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

/// # Errors
/// /proc is not mounted.
pub fn config() -> io::Result<Config> {
    Ok(Config {
        // What the guard decides, it decides for every reply that matters.
        entry_timeout: Duration::ZERO,
        attr_timeout: Duration::ZERO,
        cache_policy: CachePolicy::Auto,
        writeback: false,
        root_dir: "/".into(),
        xattr: true,
        proc_sfd_rawfd: Some(
            File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY)
                .open("/proc/self/fd")?,
        ),
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        allow_direct_io: true,
        // Offered to the guest; done by the guard.
        killpriv_v2: true,
        posix_acl: NegotiationMode::Auto,
        security_label: NegotiationMode::Never,
        guest_fd_limit: descriptor_limit(),
        ..Config::default()
    })
}

/// Descriptors the guest may make this process hold: nearly all it can have.
fn descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    // The limit of the whole process; raising it to the hard one needs no privilege.
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    limit.saturating_sub(RESERVED_DESCRIPTORS).max(limit / 2)
}
