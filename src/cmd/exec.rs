//! `kuasar-runv exec`

use std::path::PathBuf;

use super::{Context, Failure};
use crate::container::exec::process::{Changes, Source};
use crate::container::exec::{Options, exec};
use crate::container::run::Outcome;

/// Exit code when the process could not be started, as runc's.
const NOT_STARTED: u8 = 255;

/// Run another process in a container
///
/// The process is the container's own with the changes given here, or the one of
/// --process. Without --detach the command stays until it ends, and exits as it did.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n    kuasar-runv exec mycontainer ps\n    kuasar-runv exec -t -e TERM=xterm mycontainer sh\n    kuasar-runv exec --detach --pid-file pid --process process.json mycontainer"
)]
pub struct Args {
    /// Unix socket that receives the master of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Set an environment variable (NAME=VALUE); may be repeated
    #[arg(long, short, value_name = "VARIABLE")]
    env: Vec<String>,
    /// Allocate a pseudo terminal
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true, value_name = "BOOL", hide_possible_values = true)]
    tty: bool,
    /// User of the process
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Additional group of the process; may be repeated
    #[arg(
        long,
        short = 'g',
        value_name = "GID",
        allow_negative_numbers = true,
        value_delimiter = ','
    )]
    additional_gids: Vec<i64>,
    /// Take the process from this JSON file
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return when the process has started
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true, value_name = "BOOL", hide_possible_values = true)]
    detach: bool,
    /// File for the pid of the process that stands for the container's
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// SELinux label; the virtual machine's boundary stands in for it
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// AppArmor profile; the virtual machine's boundary stands in for it
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Set the process's no_new_privs
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    no_new_privs: Option<bool>,
    /// Add a capability; may be repeated
    #[arg(long, short, value_name = "CAPABILITY", value_delimiter = ',')]
    cap: Vec<String>,
    /// Pass N additional file descriptors to the process (stdio + N in total)
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    preserve_fds: i64,
    /// Run the process in an existing cgroup below the container's
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    cgroup: Vec<String>,
    /// Allow it in a paused container; the process runs when that is resumed
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true, value_name = "BOOL", hide_possible_values = true)]
    ignore_paused: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// The program and its arguments
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<u8, Failure> {
    let process = match args.process {
        Some(path) => Source::File(path),
        None => Source::CommandLine(Changes {
            args: args.command,
            cwd: args.cwd,
            env: args.env,
            terminal: args.tty,
            user: args.user,
            additional_gids: args.additional_gids,
            process_label: args.process_label,
            apparmor: args.apparmor,
            no_new_privileges: args.no_new_privs,
            capabilities: args.cap,
        }),
    };
    let options = Options {
        id: args.id,
        process,
        pid_file: args.pid_file,
        console_socket: args.console_socket,
        detach: args.detach,
        // A negative number is none, as with runc.
        preserve_fds: u32::try_from(args.preserve_fds.max(0)).unwrap_or(u32::MAX),
        cgroups: args.cgroup,
        ignore_paused: args.ignore_paused,
    };
    match exec(&context.root, &options) {
        Ok(Outcome::Detached) => Ok(0),
        Ok(Outcome::Ended(code)) => Ok(code),
        Err(e) => Err(Failure {
            message: format!("exec failed: {e}"),
            code: NOT_STARTED,
        }),
    }
}
