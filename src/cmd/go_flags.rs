//! The command line as Go's flag package reads it, which scripts and engines written
//! for runc rely on: `-force` is `--force`, and a switch may have a value
//! (`--detach=true`).

use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgAction, Command};

/// Commands whose arguments after the first belong to somebody else's program.
const WITH_A_PROGRAM: [&str; 2] = ["exec", "ps"];

/// The arguments, program name first, as `cli` understands them. What is not known is
/// left as it is, for `cli` to complain about.
pub fn translated(args: impl IntoIterator<Item = OsString>, cli: &Command) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut all: Vec<OsString> = args.next().into_iter().collect();
    let mut command = cli;
    while let Some(arg) = args.next() {
        match Word::of(&arg, command) {
            Word::End => {
                all.push(arg);
                break;
            }
            Word::Other if std::ptr::eq(command, cli) => {
                let found = arg.to_str().and_then(|name| cli.find_subcommand(name));
                all.push(arg);
                match found {
                    Some(subcommand) => command = subcommand,
                    None => break,
                }
            }
            Word::Other => {
                all.push(arg);
                if WITH_A_PROGRAM.contains(&command.get_name()) {
                    break;
                }
            }
            Word::Unknown => all.push(arg),
            Word::Flags(flags) => all.extend(flags),
            Word::ValueFollows(flag) => {
                all.push(flag);
                all.extend(args.next());
            }
        }
    }
    all.extend(args);
    all
}

enum Word {
    /// `--`
    End,
    /// No flag.
    Other,
    /// None that is known.
    Unknown,
    /// It stands for itself.
    Flags(Option<OsString>),
    /// The next argument is its value.
    ValueFollows(OsString),
}

impl Word {
    fn of(arg: &OsStr, command: &Command) -> Word {
        // A value in another encoding belongs to a flag that is spelled as clap does.
        let Some(text) = arg.to_str() else {
            return Word::Other;
        };
        let Some(name) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
            return Word::Other;
        };
        if name.is_empty() {
            return if text == "--" { Word::End } else { Word::Other };
        }
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (name, None),
        };
        let Some(flag) = command.get_arguments().find(|flag| is_named(flag, name)) else {
            return Word::Unknown;
        };
        let is_short = flag.get_long() != Some(name);
        let spelled = match (is_short, value) {
            (true, _) => text.to_owned(),
            (false, None) => format!("--{name}"),
            (false, Some(value)) => format!("--{name}={value}"),
        };
        match flag.get_action() {
            ArgAction::SetTrue => match value.map(boolean) {
                None => Word::Flags(Some(spelled.into())),
                Some(Some(true)) if is_short => Word::Flags(Some(format!("-{name}").into())),
                Some(Some(true)) => Word::Flags(Some(format!("--{name}").into())),
                Some(Some(false)) => Word::Flags(None),
                Some(None) => Word::Unknown,
            },
            ArgAction::Set | ArgAction::Append if value.is_none() && needs_value(flag) => {
                Word::ValueFollows(spelled.into())
            }
            _ => match value.and_then(boolean) {
                // A switch of the other kind, which has two spellings of each value.
                Some(set) if !needs_value(flag) && !is_short => {
                    Word::Flags(Some(format!("--{name}={set}").into()))
                }
                _ => Word::Flags(Some(spelled.into())),
            },
        }
    }
}

fn is_named(flag: &Arg, name: &str) -> bool {
    let is_short = |short: char| name.len() == short.len_utf8() && name.starts_with(short);
    flag.get_long() == Some(name) || flag.get_short().is_some_and(is_short)
}

/// Whether it has to have a value.
fn needs_value(flag: &Arg) -> bool {
    flag.get_num_args().is_none_or(|n| n.min_values() > 0)
}

/// As strconv.ParseBool.
pub fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn read(line: &str) -> String {
        let args = line.split_whitespace().map(OsString::from);
        let words = translated(args, &super::super::Cli::command());
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn long_flags_may_have_one_hyphen_and_switches_a_value() {
        for (written, meant) in [
            ("x -debug list -quiet", "x --debug list --quiet"),
            ("x list -format json -q", "x list --format json -q"),
            (
                "x --debug=1 delete --force=T c",
                "x --debug delete --force c",
            ),
            ("x delete --force=false c", "x delete c"),
            ("x delete c -force", "x delete c --force"),
            ("x list -q=true", "x list -q"),
            ("x exec -tty=f c sh", "x exec c sh"),
            (
                "x exec -no-new-privs=f c sh",
                "x exec --no-new-privs=false c sh",
            ),
            ("x run -bundle=/b -d c", "x run --bundle=/b -d c"),
            ("x -root list state c", "x --root list state c"),
        ] {
            assert_eq!(read(written), meant);
        }
    }

    #[test]
    fn what_belongs_to_a_program_or_is_no_flag_stays_as_it_is() {
        for line in [
            "x exec c ls -user -env=1",
            "x exec -e -tty c ls -tty",
            "x ps c -format",
            "x kill c -- -all",
            "x list --no-such -x -",
            "x nonsense -force",
            "x update --memory -1 c",
            "x list --quiet=maybe",
            "x exec -it c sh",
        ] {
            assert_eq!(read(line), line);
        }
    }
}
