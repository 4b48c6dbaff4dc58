//! `kuasar-runv list`

use std::fmt::Write;
use std::io;

use clap::ValueEnum;

use super::{Context, Failure, print};
use crate::container::state::{ContainerRecord, RecordError, Status};

/// List the containers of the root directory
#[derive(clap::Args)]
#[command(after_help = "Example:\n    kuasar-runv list\n    kuasar-runv list --format json")]
pub struct Args {
    /// Format of the output
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Print only the names
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    let records = read_all(context)?;
    let text = match (args.quiet, args.format) {
        (true, _) => records.iter().map(|(r, _)| format!("{}\n", r.id)).collect(),
        (false, Format::Table) => table(&records),
        (false, Format::Json) => json(&records)?,
    };
    print(&text)?;
    Ok(0)
}

fn read_all(context: &Context) -> Result<Vec<(ContainerRecord, Status)>, Failure> {
    let entries = match std::fs::read_dir(context.root.containers()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut records = Vec::new();
    for entry in entries {
        let Ok(id) = entry?.file_name().into_string() else {
            continue;
        };
        match ContainerRecord::read(&context.root, &id) {
            Ok(record) => {
                let status = record.status(&context.root);
                records.push((record, status));
            }
            // Deleted meanwhile, or its `create` died before it wrote anything.
            Err(RecordError::NotFound) => {}
            Err(e) => log::warn!("{e}"),
        }
    }
    records.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
    Ok(records)
}

/// runc prints root by name here, unlike in `state`.
fn owner(record: &ContainerRecord) -> &str {
    if record.owner.is_empty() {
        "root"
    } else {
        &record.owner
    }
}

/// Columns as Go's tabwriter lays them out for runc: at least 12 wide, 3 apart.
fn table(records: &[(ContainerRecord, Status)]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(records.iter().map(|(record, status)| {
        [
            record.id.clone(),
            record.pid(*status).to_string(),
            status.to_string(),
            record.bundle.display().to_string(),
            record.created.clone(),
            owner(record).to_owned(),
        ]
    }));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (cell.chars().count() + 3).max(12).max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a string cannot fail.
            let _ = write!(text, "{cell:width$}");
        }
        text.push_str(&row[5]);
        text.push('\n');
    }
    text
}

fn json(records: &[(ContainerRecord, Status)]) -> Result<String, Failure> {
    if records.is_empty() {
        // Go's encoding of an empty list.
        return Ok("null\n".to_owned());
    }
    let states: Vec<_> = records
        .iter()
        .map(|(record, status)| record.to_oci_state(*status, owner(record)))
        .collect();
    Ok(serde_json::to_string(&states)? + "\n")
}
