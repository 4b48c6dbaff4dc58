//! `kuasar-runv check`

use std::fmt::Write;
use std::io;

use anstream::{AutoStream, ColorChoice};

use super::{Context, Failure, print};
use crate::check::{self, Finding, Level};

/// Check whether this machine can run virtual machines
///
/// Says for each thing that is needed whether it is there, and what to do if not.
/// No virtual machine is started. The exit code is 1 when none could be.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n    kuasar-runv check\n    kuasar-runv check --json\n\n\
                  Colours: on a terminal, and not when NO_COLOR is set"
)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    let findings = check::all(&context.root);
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&findings)?))?;
    } else {
        let colour = AutoStream::choice(&io::stdout()) != ColorChoice::Never;
        print(&table(&findings, colour))?;
    }
    let failed = findings.iter().any(|f| f.level == Level::Fail);
    Ok(u8::from(failed))
}

fn table(findings: &[Finding], colour: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let (word, code) = match finding.level {
            Level::Ok => ("OK", 32),
            Level::Warn => ("WARN", 33),
            Level::Fail => ("FAIL", 31),
        };
        let word = format!("{word:<4}");
        let word = if colour {
            format!("\x1b[{code}m{word}\x1b[0m")
        } else {
            word
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{word}  {:<14} {}", finding.name, finding.text);
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(text, "{:>6}{:<14} -> {remedy}", "", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_level_and_each_problem_its_remedy() {
        let findings = [
            Finding::ok("vsock", "in user space"),
            Finding::fail("QEMU", "it does not exist", "install it"),
        ];
        let plain = "OK    vsock          in user space\n\
                     FAIL  QEMU           it does not exist\n\
                     \x20                    -> install it\n";
        assert_eq!(table(&findings, false), plain);
        let coloured = table(&findings, true);
        assert!(
            coloured.starts_with("\x1b[32mOK  \x1b[0m  vsock"),
            "{coloured:?}"
        );
    }
}
