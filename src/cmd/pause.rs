//! `kuasar-runv pause`

use super::{Context, Failure};

/// Suspend all processes of a container
///
/// They are frozen in the virtual machine until `kuasar-runv resume`. SIGKILL
/// still ends them; other signals arrive when they run again.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n    kuasar-runv pause mycontainer\n    kuasar-runv resume mycontainer"
)]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    crate::container::pause::pause(&context.root, &args.id)?;
    Ok(0)
}
