//! `kuasar-runv restore`: the command line is there, the function is not.

use std::path::PathBuf;

use super::{Context, Failure};
use crate::container::{Error, check_id};

/// Not supported: restore a container from a checkpoint
///
/// The options are those of runc's command, so that callers can look them up; the
/// command itself fails.
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv restore --image-path image mycontainer")]
// The flags are runc's.
#[allow(clippy::struct_excessive_bools)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Unix socket that receives the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Directory of the image files
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for work files and logs
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Allow open TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Allow external unix sockets
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow shell jobs
    #[arg(long)]
    shell_job: bool,
    /// Handle file locks
    #[arg(long)]
    file_locks: bool,
    /// Mode of cgroups: soft, full or strict
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    /// Directory of the bundle
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Return when the container has started
    #[arg(long, short)]
    detach: bool,
    /// File for the pid
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted for compatibility with runc
    #[arg(long)]
    no_subreaper: bool,
    /// Do not use pivot_root
    #[arg(long)]
    no_pivot: bool,
    /// Create a namespace, but do not restore its properties
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<String>,
    /// Deduplicate memory images
    #[arg(long)]
    auto_dedup: bool,
    /// Restore memory lazily through userfaultfd
    #[arg(long)]
    lazy_pages: bool,
    /// LSM profile of the restored processes
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,
    /// LSM mount context of the restored mounts
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
}

pub fn run(_: &Context, args: &Args) -> Result<u8, Failure> {
    check_id(&args.id)?;
    Err(Error::Checkpoint("restored").into())
}
