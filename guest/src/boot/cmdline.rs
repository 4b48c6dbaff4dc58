//! The kernel command line.

use std::fs;
use std::io;
use std::path::Path;

use kuasar_runv_protocol::cmdline;
use log::LevelFilter;

/// What the host set for the agent. Unknown parameters are the kernel's.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    pub log_level: LevelFilter,
    pub debug_console: bool,
    /// The machine is to be saved before it goes on.
    pub template: bool,
}

/// # Errors
/// Of reading the file.
pub fn read(path: &Path) -> io::Result<Config> {
    Ok(parse(&fs::read_to_string(path)?))
}

fn parse(line: &str) -> Config {
    let mut config = Config {
        log_level: LevelFilter::Info,
        debug_console: false,
        template: false,
    };
    for parameter in line.split_whitespace() {
        match parameter.split_once('=') {
            Some((cmdline::LOG_LEVEL, level)) => {
                // A misspelt level must not keep the machine from starting.
                config.log_level = level.parse().unwrap_or(config.log_level);
            }
            Some((cmdline::DEBUG_CONSOLE, value)) => config.debug_console = value == "1",
            Some((cmdline::TEMPLATE, value)) => config.template = value == "1",
            _ => {}
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_parameters_are_read() {
        let config = parse("quiet kuasar.log=debug x=y kuasar.debug_console=1 kuasar.template=1\n");
        assert_eq!(config.log_level, LevelFilter::Debug);
        assert!(config.debug_console && config.template);
    }

    #[test]
    fn the_defaults_are_quiet() {
        let config = parse("kuasar.log=loud kuasar.debug_console=yes");
        assert_eq!(config.log_level, LevelFilter::Info);
        assert!(!config.debug_console && !config.template);
    }
}
