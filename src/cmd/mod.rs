//! The command line: one file per command, flags and examples beside the code.
//! Nothing here decides anything; it parses, calls, prints.

mod check;
mod checkpoint;
mod completion;
mod create;
mod delete;
mod env;
mod events;
mod exec;
mod features;
mod go_flags;
mod kill;
mod list;
mod man;
mod pause;
mod ps;
mod restore;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod template;
mod update;
mod values;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::logging::{self, Format};
use crate::root::Root;
use crate::sys::inherited;

/// Version of the runtime specification that is implemented.
pub const OCI_VERSION: &str = "1.2.0";

struct Cli {
    global: Global,
    command: Command,
}

impl Parser for Cli {}

impl CommandFactory for Cli {
    fn command() -> clap::Command {
        Command::augment_subcommands(without_commands())
    }

    fn command_for_update() -> clap::Command {
        Command::augment_subcommands_for_update(without_commands())
    }
}

impl FromArgMatches for Cli {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Cli, clap::Error> {
        Ok(Cli {
            global: Global::from_arg_matches(matches)?,
            command: Command::from_arg_matches(matches)?,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        self.global.update_from_arg_matches(matches)?;
        self.command.update_from_arg_matches(matches)
    }
}

fn without_commands() -> clap::Command {
    Global::command()
        .subcommand_required(true)
        .arg_required_else_help(true)
}

/// Adds a command's flags and examples to its name.
type Define = fn(clap::Command) -> clap::Command;

/// The commands that engines call.
const OFTEN: [(&str, Define); 14] = [
    ("create", create::Args::augment_args),
    ("delete", delete::Args::augment_args),
    ("events", events::Args::augment_args),
    ("exec", exec::Args::augment_args),
    ("features", features::Args::augment_args),
    ("kill", kill::Args::augment_args),
    ("list", list::Args::augment_args),
    ("pause", pause::Args::augment_args),
    ("ps", ps::Args::augment_args),
    ("resume", resume::Args::augment_args),
    ("run", run::Args::augment_args),
    ("start", start::Args::augment_args),
    ("state", state::Args::augment_args),
    ("update", update::Args::augment_args),
];

/// The command line with nothing but the command of [`OFTEN`] that `args` seem to
/// mean: to define all of them is a good part of what a short one does. When it does
/// not take `args`, the whole has to decide.
fn narrowed(args: &[OsString]) -> Option<clap::Command> {
    let called = |arg: &OsString| OFTEN.iter().find(|(name, _)| arg == name);
    let (name, define) = args.iter().skip(1).find_map(called)?;
    Some(without_commands().subcommand(define(clap::Command::new(*name))))
}

/// Takes the command line apart, as `command` understands it.
fn parse(args: &[OsString], command: &mut clap::Command) -> Result<Cli, clap::Error> {
    let args = go_flags::translated(args.iter().cloned(), command);
    command
        .try_get_matches_from_mut(args)
        .and_then(|matches| Cli::from_arg_matches(&matches))
}

/// OCI runtime that runs every pod in its own virtual machine.
///
/// The command line is runc's. Containers live in a virtual machine per pod;
/// the process in the pid file stands for the container's process on the host.
#[derive(Parser)]
#[command(
    name = "kuasar-runv",
    version = version_text(),
    disable_version_flag = true,
    // As with runc, the last one counts.
    args_override_self = true,
    max_term_width = 100,
    after_help = "Example: run a bundle (a directory with config.json and rootfs/)\n    \
                  kuasar-runv spec --bundle mybundle\n    \
                  kuasar-runv run --bundle mybundle mycontainer\n\n\
                  Configuration: /etc/kuasar-runv/config.toml"
)]
struct Global {
    /// Directory for the state of containers (should be on a tmpfs)
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// File for log messages [default: standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of log messages
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    log_format: Format,
    /// Log debug messages
    #[arg(long)]
    debug: bool,
    /// Expect cgroupsPath to be of the form "slice:prefix:name"
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted for compatibility with runc: true, false or auto
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = values::rootless)]
    rootless: String,
    /// Accepted for compatibility with runc
    #[arg(long, value_name = "FILE", hide = true)]
    criu: Option<PathBuf>,
    /// Print the version
    #[arg(long, short = 'v', action = clap::ArgAction::Version)]
    version: Option<bool>,
}

#[derive(Subcommand)]
enum Command {
    Check(check::Args),
    Checkpoint(checkpoint::Args),
    Completion(completion::Args),
    Create(create::Args),
    Delete(delete::Args),
    Env(env::Args),
    Events(events::Args),
    Exec(exec::Args),
    Features(features::Args),
    Kill(kill::Args),
    List(list::Args),
    Man(man::Args),
    Pause(pause::Args),
    Ps(ps::Args),
    Restore(restore::Args),
    Resume(resume::Args),
    Run(run::Args),
    Spec(spec::Args),
    Start(start::Args),
    State(state::Args),
    Template(template::Args),
    Update(update::Args),
}

/// What every command knows besides its own arguments.
struct Context {
    root: Root,
    systemd_cgroup: bool,
    debug: bool,
}

/// A command that failed: what to say and how to exit.
struct Failure {
    message: String,
    code: u8,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure {
            message: error.to_string(),
            code: 1,
        }
    }
}

impl Failure {
    /// Puts the command's name before the message, as runc does.
    fn of(command: &'static str) -> impl Fn(crate::container::Error) -> Failure {
        move |error| Failure {
            message: format!("kuasar-runv {command} failed: {error}"),
            code: 1,
        }
    }
}

/// Exit codes of a command line that cannot be understood, as runc's.
const USAGE: u8 = 1;
const UNKNOWN_COMMAND: u8 = 3;

/// Runs the command line and returns the exit code.
pub fn run() -> u8 {
    inherited::note();
    let args: Vec<OsString> = std::env::args_os().collect();
    let quickly = narrowed(&args).and_then(|mut command| parse(&args, &mut command).ok());
    let parsed = match quickly {
        Some(cli) => Ok(cli),
        None => {
            let mut command = Cli::command();
            parse(&args, &mut command).map_err(|e| e.format(&mut command))
        }
    };
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => {
            // To a closed pipe there is nothing more to say.
            let _ = e.print();
            if e.use_stderr() {
                log_usage_error(&args, &e);
            }
            return match e.kind() {
                _ if !e.use_stderr() => 0,
                clap::error::ErrorKind::InvalidSubcommand => UNKNOWN_COMMAND,
                _ => USAGE,
            };
        }
    };
    let global = cli.global;
    // Accepted and without meaning here: a VM runs with what rights the user has.
    let _ = (global.rootless, global.criu);
    if let Err(e) = logging::init(global.log.as_deref(), global.log_format, global.debug) {
        // Without a file it cannot fail.
        let _ = logging::init(None, global.log_format, global.debug);
        logging::fatal(&e.to_string());
        return 1;
    }
    let context = Context {
        root: Root::new(global.root),
        systemd_cgroup: global.systemd_cgroup,
        debug: global.debug,
    };
    let done = match cli.command {
        Command::Check(args) => check::run(&context, &args),
        Command::Checkpoint(args) => checkpoint::run(&context, &args),
        Command::Completion(args) => completion::run(&args),
        Command::Create(args) => create::run(&context, args),
        Command::Delete(args) => delete::run(&context, &args),
        Command::Env(args) => env::run(&context, &args),
        Command::Events(args) => events::run(&context, &args),
        Command::Exec(args) => exec::run(&context, args),
        Command::Features(args) => features::run(&context, &args),
        Command::Kill(args) => kill::run(&context, &args),
        Command::List(args) => list::run(&context, &args),
        Command::Man(args) => man::run(&args),
        Command::Pause(args) => pause::run(&context, &args),
        Command::Ps(args) => ps::run(&context, &args),
        Command::Restore(args) => restore::run(&context, &args),
        Command::Resume(args) => resume::run(&context, &args),
        Command::Run(args) => run::run(&context, args),
        Command::Spec(args) => spec::run(&context, &args),
        Command::Start(args) => start::run(&context, &args),
        Command::State(args) => state::run(&context, &args),
        Command::Template(args) => template::run(&args),
        Command::Update(args) => update::run(&context, &args),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            logging::fatal(&failure.message);
            failure.code
        }
    }
}

/// Puts what is wrong with the command line into the log, if it names one: that is
/// where engines look for the reason why a command failed.
fn log_usage_error(args: &[OsString], error: &clap::Error) {
    let Ok(matches) = Cli::command()
        .ignore_errors(true)
        .try_get_matches_from(args)
    else {
        return;
    };
    let Some(path) = matches.get_one::<PathBuf>("log") else {
        return;
    };
    let format = matches.get_one("log_format").copied();
    if logging::init(Some(path), format.unwrap_or(Format::Text), false).is_ok() {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        log::error!("{}", line.strip_prefix("error: ").unwrap_or(line));
    }
}

/// What `--version` prints; docker reads the first two lines.
fn version_text() -> &'static str {
    concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0")
}

/// Prints to standard output; a reader that went away is no error of ours.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        assert!(version_text().ends_with(OCI_VERSION));
    }

    /// Who asks for help wants to see how it is done.
    #[test]
    fn every_command_has_an_example_and_help_for_every_argument() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let after = command.get_after_help().map(ToString::to_string);
            let example = format!("kuasar-runv {name}");
            assert!(after.is_some_and(|text| text.contains(&example)), "{name}");
            assert!(command.get_about().is_some(), "{name}");
            for argument in command.get_arguments() {
                let id = argument.get_id();
                assert!(argument.get_help().is_some(), "{name} {id}");
            }
        }
    }

    #[test]
    fn every_command_of_the_narrowed_line_is_that_of_the_whole() {
        let whole = Cli::command();
        let mut narrow = 0;
        for command in whole.get_subcommands() {
            let name = command.get_name();
            let args: Vec<OsString> = vec!["kuasar-runv".into(), name.into()];
            let Some(narrowed) = narrowed(&args) else {
                continue;
            };
            narrow += 1;
            narrowed.clone().debug_assert();
            let other = narrowed.find_subcommand(name).unwrap();
            let help = |command: &clap::Command| command.clone().render_long_help().to_string();
            assert_eq!(help(other), help(command));
        }
        assert_eq!(narrow, OFTEN.len());
    }

    #[test]
    fn a_value_that_is_the_name_of_a_command_does_not_confuse() {
        let args = ["kuasar-runv", "--root", "state", "list"].map(OsString::from);
        assert!(parse(&args, &mut narrowed(&args).unwrap()).is_err());
        let cli = parse(&args, &mut Cli::command()).unwrap();
        assert!(matches!(cli.command, Command::List(_)));
        assert_eq!(cli.global.root, Some("state".into()));
    }

    #[test]
    fn a_mistyped_command_gets_a_suggestion() {
        for (typed, meant) in [("strat", "start"), ("creat", "create"), ("lsit", "list")] {
            let Err(error) = Cli::try_parse_from(["kuasar-runv", typed, "c"]) else {
                panic!("{typed} was taken");
            };
            assert_eq!(error.kind(), clap::error::ErrorKind::InvalidSubcommand);
            let text = error.to_string();
            assert!(text.contains(&format!("'{meant}'")), "{text}");
        }
    }

    #[test]
    fn engines_calls_are_understood() {
        let calls: [&[&str]; 7] = [
            &[
                "--log-format=json",
                "--log",
                "/x/oci-log",
                "create",
                "--bundle",
                "/b",
                "--pid-file",
                "/p",
                "id",
            ],
            &[
                "--root",
                "/r",
                "--log",
                "/l",
                "--log-format",
                "json",
                "delete",
                "--force",
                "id",
            ],
            &[
                "--systemd-cgroup",
                "create",
                "--bundle",
                "/b",
                "--console-socket",
                "/c",
                "--preserve-fds",
                "2",
                "id",
            ],
            &["kill", "id", "15"],
            &["kill", "--all", "id", "9"],
            &["--rootless", "true", "list", "-q"],
            &["state", "id"],
        ];
        for call in calls {
            let line = ["kuasar-runv"].iter().chain(call);
            assert!(Cli::try_parse_from(line).is_ok(), "{call:?}");
        }
    }
}
