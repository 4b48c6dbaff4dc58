//! `kuasar-runv template`

use std::fmt::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use super::{Failure, print};
use crate::config::Config;
use crate::sandbox::template;
use crate::sys::interrupt::Interrupt;
use crate::vm::template::{Listed, Status, Store, list};

/// Make, list and remove templates of virtual machines
///
/// A template is a virtual machine that was booted once and saved before it was any
/// pod's. With `enabled = true` in section [template] of the configuration, the machine
/// of a new pod is made of the template that fits instead of being booted. It takes
/// the built-in hypervisor.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n    kuasar-runv template create\n    kuasar-runv template list\n    \
                  kuasar-runv template rm --stale"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Boot a virtual machine of this configuration and save it as a template
    Create {
        /// Make it anew if there is one
        #[arg(long, short)]
        force: bool,
    },
    /// List templates, and whether they can be used
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove templates
    ///
    /// Virtual machines that were made of one are not touched.
    #[command(alias = "remove")]
    Rm {
        /// Templates to remove
        #[arg(value_name = "KEY", required_unless_present_any = ["all", "stale"])]
        keys: Vec<String>,
        /// Remove all templates
        #[arg(long, short, conflicts_with_all = ["keys", "stale"])]
        all: bool,
        /// Remove templates that can never be used again
        #[arg(long, conflicts_with = "keys")]
        stale: bool,
    },
}

pub fn run(args: &Args) -> Result<u8, Failure> {
    let config = Config::load()?;
    match &args.command {
        Command::Create { force } => create(&config, *force),
        Command::List { json } => show(&config, *json),
        Command::Rm { keys, all, stale } => remove(&config, keys, *all, *stale),
    }
}

fn create(config: &Config, again: bool) -> Result<u8, Failure> {
    let interrupt = Interrupt::new()?;
    let started = Instant::now();
    let mut progress = |step: &str| eprintln!("{step} ...");
    let made = template::create(config, again, interrupt.as_fd(), &mut progress)?;
    let all = listed(config)?;
    let Some(template) = all.iter().find(|template| template.key == made.key) else {
        return Err(failure(format!("the template {} was removed", made.key)));
    };
    let text = match made.is_new {
        true => format!(
            "{}  {}  {} on disk  {:.1} s\n",
            made.key,
            size(template),
            mib(template.disk),
            started.elapsed().as_secs_f64()
        ),
        false => format!("{}  {}  exists\n", made.key, size(template)),
    };
    print(&text)?;
    Ok(0)
}

fn show(config: &Config, json: bool) -> Result<u8, Failure> {
    let all = listed(config)?;
    let text = match json {
        true => format!("{}\n", serde_json::to_string_pretty(&all)?),
        false => table(&all),
    };
    print(&text)?;
    Ok(0)
}

fn remove(config: &Config, keys: &[String], all: bool, stale: bool) -> Result<u8, Failure> {
    let there = listed(config)?;
    let of_no_use = |template: &&Listed| {
        all || (stale && matches!(template.status, Status::Stale | Status::Broken))
    };
    let named = keys.iter().cloned();
    let found = there.iter().filter(of_no_use).map(|t| t.key.clone());
    let wanted: Vec<_> = named.chain(found).collect();
    if let Some(unknown) = keys.iter().find(|key| there.iter().all(|t| t.key != **key)) {
        return Err(failure(format!("there is no template {unknown}")));
    }
    if wanted.is_empty() {
        return Ok(0);
    }
    let changing = Store::new(&config.template.dir).change()?;
    for key in wanted {
        // Somebody else may have been faster.
        changing.remove(&key)?;
    }
    Ok(0)
}

fn listed(config: &Config) -> Result<Vec<Listed>, Failure> {
    let machine = template::machine(config, Path::new("/"))?;
    Ok(list(&Store::new(&config.template.dir), &machine)?)
}

fn failure(message: String) -> Failure {
    Failure { message, code: 1 }
}

fn table(templates: &[Listed]) -> String {
    let mut text = format!(
        "{:<10}{:<22}{:<18}{:<10}STATUS\n",
        "KEY", "CREATED", "MACHINE", "DISK"
    );
    for template in templates {
        let status = match template.status {
            Status::Current => "current",
            Status::Other => "for another configuration",
            Status::Stale => "stale",
            Status::Broken => "broken",
        };
        let reason = template
            .reason
            .as_ref()
            .map(|reason| format!(" ({reason})"));
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<10}{:<22}{:<18}{:<10}{status}{}",
            template.key,
            created(template),
            size(template),
            mib(template.disk),
            reason.unwrap_or_default()
        );
    }
    text
}

fn created(template: &Listed) -> String {
    let seconds = template
        .created
        .and_then(|seconds| i64::try_from(seconds).ok());
    let time = seconds.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    time.map_or_else(
        || "-".to_owned(),
        |time| time.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
    )
}

fn size(template: &Listed) -> String {
    template.size.map_or_else(
        || "-".to_owned(),
        |size| format!("{} CPU, {} MiB", size.vcpus, size.memory_mib),
    )
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmSize;

    #[test]
    fn the_list_says_of_each_whether_it_is_used_and_why_not() {
        let template = |key: &str, status, reason: Option<&str>| Listed {
            key: key.to_owned(),
            status,
            reason: reason.map(str::to_owned),
            created: Some(1_700_000_000),
            size: Some(VmSize {
                vcpus: 2,
                memory_mib: 512,
            }),
            disk: 50 << 20,
        };
        let broken = Listed {
            created: None,
            size: None,
            disk: 1,
            ..template("00000003", Status::Broken, Some("it was cut off"))
        };
        let text = table(&[
            template("00000001", Status::Current, None),
            template("00000002", Status::Stale, Some("another guest kernel")),
            broken,
        ]);
        let expected = "\
KEY       CREATED               MACHINE           DISK      STATUS
00000001  2023-11-14T22:13:20Z  2 CPU, 512 MiB    50 MiB    current
00000002  2023-11-14T22:13:20Z  2 CPU, 512 MiB    50 MiB    stale (another guest kernel)
00000003  -                     -                 1 MiB     broken (it was cut off)
";
        assert_eq!(text, expected);
    }
}
