//! `kuasar-runv run`

use super::create::Common;
use super::{Context, Failure};
use crate::container::run::{Outcome, run as run_container};

/// Create and run a container
///
/// Without --detach the command stays until the container's process ends, and
/// exits as it did.
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv run --bundle mybundle mycontainer")]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Return when the container has started
    #[arg(long, short)]
    detach: bool,
    /// Do not delete the container after it exits
    #[arg(long)]
    keep: bool,
    /// Accepted for compatibility with runc
    #[arg(long)]
    no_subreaper: bool,
}

pub fn run(context: &Context, args: Args) -> Result<u8, Failure> {
    // There are no orphans of the container on the host to be adopted.
    let _ = args.no_subreaper;
    let options = args.common.into_options(context, !args.detach);
    match run_container(&context.root, &options, args.keep).map_err(Failure::of("run"))? {
        Outcome::Detached => Ok(0),
        Outcome::Ended(code) => Ok(code),
    }
}
