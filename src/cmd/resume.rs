//! `kuasar-runv resume`

use super::{Context, Failure};

/// Let the processes of a paused container run again
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv resume mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    crate::container::pause::resume(&context.root, &args.id)?;
    Ok(0)
}
