//! `kuasar-runv kill`

use super::{Context, Failure};
use crate::container::kill::kill;

/// Send a signal to the container's process
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv kill mycontainer KILL")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Name (with or without SIG) or number of the signal
    #[arg(default_value = "SIGTERM", allow_negative_numbers = true)]
    signal: String,
    /// Send it to all processes of the container
    #[arg(long, short)]
    all: bool,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    kill(&context.root, &args.id, &args.signal, args.all)?;
    Ok(0)
}
