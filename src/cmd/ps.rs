//! `kuasar-runv ps`

use super::{Context, Failure, print};
use crate::container::ps;

/// List the processes of a container
///
/// The table shows the processes in the virtual machine, with pids of its own.
/// JSON is the list of the processes that stand for the container's own and for
/// those of exec, with pids of this host.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n    kuasar-runv ps mycontainer\n    kuasar-runv ps mycontainer aux\n    kuasar-runv ps mycontainer -o pid,user,args\n    kuasar-runv ps --format json mycontainer"
)]
pub struct Args {
    /// table or json
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    format: String,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Options of ps(1) for the table [default: -ef]
    #[arg(
        value_name = "PS-OPTION",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    ps_options: Vec<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    let output = match args.format.as_str() {
        "table" => ps::table(&context.root, &args.id, &args.ps_options)?,
        "json" => ps::json(&context.root, &args.id)?,
        _ => {
            // The container has to exist first, as with runc.
            ps::json(&context.root, &args.id)?;
            return Err(ps::Error::Format.into());
        }
    };
    print(&output)?;
    Ok(0)
}
