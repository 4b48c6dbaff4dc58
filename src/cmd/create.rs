//! `kuasar-runv create`

use std::path::PathBuf;

use super::{Context, Failure};
use crate::container::create::{Options, create, default_bundle};

/// Flags that `create` and `run` share.
#[derive(clap::Args)]
pub struct Common {
    /// Name of the container, unique on this host
    #[arg(value_name = "CONTAINER-ID")]
    pub id: String,
    /// Directory of the bundle [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Unix socket that receives the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the pid of the process that stands for the container's
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Do not use pivot_root in the guest
    #[arg(long)]
    pub no_pivot: bool,
    /// Keep the session keyring of the guest's agent
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Pass N additional file descriptors to the process (stdio + $LISTEN_FDS + N in total)
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub preserve_fds: i64,
}

impl Common {
    pub fn into_options(self, context: &Context, foreground: bool) -> Options {
        Options {
            id: self.id,
            bundle: self.bundle.unwrap_or_else(default_bundle),
            pid_file: self.pid_file,
            console_socket: self.console_socket,
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            // A negative number is none, as with runc.
            preserve_fds: u32::try_from(self.preserve_fds.max(0)).unwrap_or(u32::MAX),
            foreground,
            systemd_cgroup: context.systemd_cgroup,
            debug: context.debug,
        }
    }
}

/// Create a container
///
/// Boots the container's virtual machine and sets the container up in it. Its
/// process waits for `kuasar-runv start`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n    kuasar-runv create --bundle mybundle --pid-file pid mycontainer\n    kuasar-runv start mycontainer"
)]
pub struct Args {
    #[command(flatten)]
    common: Common,
}

pub fn run(context: &Context, args: Args) -> Result<u8, Failure> {
    let options = args.common.into_options(context, false);
    create(&context.root, &options)
        .and_then(|created| created.keep())
        .map_err(Failure::of("create"))?;
    Ok(0)
}
