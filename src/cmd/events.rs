//! `kuasar-runv events`

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::values::duration;
use super::{Context, Failure};
use crate::container::events::{Happening, follow, stats};
use crate::container::state::ContainerRecord;
use crate::container::stats::Stats;

/// Print what happens to a container, as JSON
///
/// Prints its statistics (CPU, memory, processes, I/O) at intervals, and when a
/// process was killed because there was no memory left. Ends with the container.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n    \
    kuasar-runv events --stats mycontainer\n    \
    kuasar-runv events --interval 1s mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Time between two statistics
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration, allow_hyphen_values = true)]
    interval: Duration,
    /// Print the statistics once
    #[arg(long)]
    stats: bool,
}

fn print(id: &str, kind: &'static str, data: Option<&Stats>) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Line { kind, id, data })?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}

/// One line of the output, as runc's.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a Stats>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    if args.interval.is_zero() {
        // As with runc, a container that does not exist is the first mistake.
        crate::container::check_id(&args.id)?;
        ContainerRecord::read(&context.root, &args.id)?;
        return Err(Failure {
            message: "duration interval must be greater than 0".into(),
            code: 1,
        });
    }
    if args.stats {
        print(&args.id, "stats", Some(&stats(&context.root, &args.id)?))?;
        return Ok(0);
    }
    follow(
        &context.root,
        &args.id,
        args.interval,
        &mut |happening| match happening {
            Happening::Stats(stats) => print(&args.id, "stats", Some(&stats)),
            Happening::Oom => print(&args.id, "oom", None),
        },
    )?;
    Ok(0)
}
