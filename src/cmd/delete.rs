//! `kuasar-runv delete`

use super::{Context, Failure};

/// Delete a container that has stopped
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv delete mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Kill it if it still runs; one that does not exist is no error
    #[arg(long, short)]
    force: bool,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    crate::container::delete::delete(&context.root, &args.id, args.force)?;
    Ok(0)
}
