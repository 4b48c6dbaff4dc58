//! `kuasar-runv man`: the manual, made from the same definitions as the command
//! line. For `make man`; nobody else needs it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::{Cli, Failure};

/// Commands of administrators, as runc's.
const SECTION: &str = "8";

/// Write the manual pages into a directory
#[derive(clap::Args)]
#[command(hide = true, after_help = "Example:\n    kuasar-runv man target/man")]
pub struct Args {
    /// Directory for the pages; made if it is missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(args: &Args) -> Result<u8, Failure> {
    fs::create_dir_all(&args.dir)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_page(&args.dir, &command)?;
    for subcommand in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        write_page(&args.dir, subcommand)?;
    }
    Ok(0)
}

fn write_page(dir: &Path, command: &Command) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let man = Man::new(command.clone())
        .title(name)
        .section(SECTION)
        .manual("kuasar-runv");
    fs::write(dir.join(format!("{name}.{SECTION}")), page(&man, command)?)
}

fn page(man: &Man, command: &Command) -> io::Result<String> {
    let mut roff = Vec::new();
    man.render_title(&mut roff)?;
    man.render_name_section(&mut roff)?;
    man.render_synopsis_section(&mut roff)?;
    man.render_description_section(&mut roff)?;
    man.render_options_section(&mut roff)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut roff)?;
    }
    let mut examples = Vec::new();
    man.render_extra_section(&mut examples)?;
    let examples = String::from_utf8_lossy(&examples).replacen("EXTRA", "EXAMPLES", 1);
    Ok(String::from_utf8_lossy(&roff).into_owned() + &examples)
}
