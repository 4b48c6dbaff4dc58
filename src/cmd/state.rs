//! `kuasar-runv state`

use super::{Context, Failure, print};
use crate::container::state::ContainerRecord;

/// Print the state of a container as JSON
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv state mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    crate::container::check_id(&args.id)?;
    let record = ContainerRecord::read(&context.root, &args.id)?;
    let state = record.to_oci_state(record.status(&context.root), &record.owner);
    // Without a newline at the end, as runc.
    print(&serde_json::to_string_pretty(&state)?)?;
    Ok(0)
}
