//! runc's command line, which is ours.

/// Commands and flags of runc 1.1.5, from `runc --help` and `runc COMMAND --help`; a second
/// name is the short form.
pub const COMMANDS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "--debug",
            "--log",
            "--log-format",
            "--root",
            "--criu",
            "--systemd-cgroup",
            "--rootless",
            "--help -h",
            "--version -v",
        ],
    ),
    (
        "checkpoint",
        &[
            "--image-path",
            "--work-path",
            "--parent-path",
            "--leave-running",
            "--tcp-established",
            "--ext-unix-sk",
            "--shell-job",
            "--lazy-pages",
            "--status-fd",
            "--page-server",
            "--file-locks",
            "--pre-dump",
            "--manage-cgroups-mode",
            "--empty-ns",
            "--auto-dedup",
        ],
    ),
    (
        "create",
        &[
            "--bundle -b",
            "--console-socket",
            "--pid-file",
            "--no-pivot",
            "--no-new-keyring",
            "--preserve-fds",
        ],
    ),
    ("delete", &["--force -f"]),
    ("events", &["--interval", "--stats"]),
    (
        "exec",
        &[
            "--console-socket",
            "--cwd",
            "--env -e",
            "--tty -t",
            "--user -u",
            "--additional-gids -g",
            "--process -p",
            "--detach -d",
            "--pid-file",
            "--process-label",
            "--apparmor",
            "--no-new-privs",
            "--cap -c",
            "--preserve-fds",
            "--cgroup",
            "--ignore-paused",
        ],
    ),
    ("features", &[]),
    ("kill", &["--all -a"]),
    ("list", &["--format -f", "--quiet -q"]),
    ("pause", &[]),
    ("ps", &["--format -f"]),
    (
        "restore",
        &[
            "--console-socket",
            "--image-path",
            "--work-path",
            "--tcp-established",
            "--ext-unix-sk",
            "--shell-job",
            "--file-locks",
            "--manage-cgroups-mode",
            "--bundle -b",
            "--detach -d",
            "--pid-file",
            "--no-subreaper",
            "--no-pivot",
            "--empty-ns",
            "--auto-dedup",
            "--lazy-pages",
            "--lsm-profile",
            "--lsm-mount-context",
        ],
    ),
    ("resume", &[]),
    (
        "run",
        &[
            "--bundle -b",
            "--console-socket",
            "--detach -d",
            "--keep",
            "--pid-file",
            "--no-subreaper",
            "--no-pivot",
            "--no-new-keyring",
            "--preserve-fds",
        ],
    ),
    ("spec", &["--bundle -b", "--rootless"]),
    ("start", &[]),
    ("state", &[]),
    (
        "update",
        &[
            "--resources -r",
            "--blkio-weight",
            "--cpu-period",
            "--cpu-quota",
            "--cpu-share",
            "--cpu-rt-period",
            "--cpu-rt-runtime",
            "--cpuset-cpus",
            "--cpuset-mems",
            "--memory",
            "--memory-reservation",
            "--memory-swap",
            "--pids-limit",
            "--l3-cache-schema",
            "--mem-bw-schema",
        ],
    ),
];

/// The flags of a command by their long names.
///
/// # Panics
/// For a command that runc does not have.
#[must_use]
pub fn flags(command: &str) -> Vec<&'static str> {
    let (_, flags) = COMMANDS
        .iter()
        .find(|(name, _)| *name == command)
        .unwrap_or_else(|| panic!("runc has no {command}"));
    let long = |flag: &&'static str| flag.split(' ').next().unwrap_or_default();
    flags.iter().map(long).collect()
}
