//! `kuasar-runv checkpoint`: the command line is there, the function is not.

use std::path::PathBuf;

use super::{Context, Failure};
use crate::container::state::ContainerRecord;
use crate::container::{Error, check_id};

/// Not supported: save the state of a container
///
/// The options are those of runc's command, so that callers can look them up; the
/// command itself fails. A container in a virtual machine has no processes on the
/// host that CRIU could save.
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv checkpoint --image-path image mycontainer")]
// The flags are runc's.
#[allow(clippy::struct_excessive_bools)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Directory for the image files
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for work files and logs
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Directory of the image files of an earlier pre-dump
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Leave the processes running
    #[arg(long)]
    leave_running: bool,
    /// Allow open TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Allow external unix sockets
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow shell jobs
    #[arg(long)]
    shell_job: bool,
    /// Restore memory lazily through userfaultfd
    #[arg(long)]
    lazy_pages: bool,
    /// Descriptor that is written to when lazy pages are ready
    #[arg(long, value_name = "FD", default_value_t = -1, allow_negative_numbers = true)]
    status_fd: i32,
    /// Address and port of the page server
    #[arg(long, value_name = "ADDRESS:PORT")]
    page_server: Option<String>,
    /// Handle file locks
    #[arg(long)]
    file_locks: bool,
    /// Only save memory, and leave the container running
    #[arg(long)]
    pre_dump: bool,
    /// Mode of cgroups: soft, full or strict
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    /// Create a namespace, but do not restore its properties
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<String>,
    /// Deduplicate memory images
    #[arg(long)]
    auto_dedup: bool,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    check_id(&args.id)?;
    ContainerRecord::read(&context.root, &args.id).map_err(Error::from)?;
    Err(Error::Checkpoint("checkpointed").into())
}
