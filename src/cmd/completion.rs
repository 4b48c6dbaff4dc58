//! `kuasar-runv completion`

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use super::{Cli, Failure, print};

/// Print a script that lets a shell complete this command line
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n    kuasar-runv completion bash >/etc/bash_completion.d/kuasar-runv\n    \
                  kuasar-runv completion zsh >/usr/local/share/zsh/site-functions/_kuasar-runv\n    \
                  kuasar-runv completion fish >~/.config/fish/completions/kuasar-runv.fish"
)]
pub struct Args {
    /// The shell
    shell: Shell,
}

pub fn run(args: &Args) -> Result<u8, Failure> {
    let mut script = Vec::new();
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    generate(args.shell, &mut command, name, &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
