//! `kuasar-runv start`

use super::{Context, Failure};

/// Execute the process of a created container
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv start mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    crate::container::start::start(&context.root, &args.id)?;
    Ok(0)
}
