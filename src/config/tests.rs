//! The configuration as an administrator meets it.

use std::path::Path;

use super::load::{Missing, load};
use super::*;

/// Writes files below a fresh directory; the first one is `config.toml`.
fn load_files(main: &str, fragments: &[(&str, &str)]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, main).unwrap();
    std::fs::create_dir(dir.path().join("config.d")).unwrap();
    for (name, text) in fragments {
        std::fs::write(dir.path().join("config.d").join(name), text).unwrap();
    }
    load(&path, Missing::IsAnError).map_err(|e| {
        let prefix = format!("{}/", dir.path().display());
        e.to_string().replace(&prefix, "")
    })
}

fn error_of(text: &str) -> String {
    load_files(text, &[]).unwrap_err()
}

#[test]
fn a_missing_file_means_the_defaults_unless_it_was_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    assert_eq!(
        load(&path, Missing::MeansDefaults).unwrap(),
        Config::default()
    );
    let error = load(&path, Missing::IsAnError).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read the configuration "),
        "{error}"
    );
}

#[test]
fn fragments_are_read_without_a_main_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("config.d")).unwrap();
    std::fs::write(dir.path().join("config.d/10.toml"), "debug = true").unwrap();
    let config = load(&dir.path().join("config.toml"), Missing::MeansDefaults).unwrap();
    assert!(config.debug);
}

#[test]
fn a_later_file_wins_key_by_key() {
    let config = load_files(
        "debug = true\n[vm]\nvcpus = 2\nmemory_mib = 256\n[qemu]\nextra_args = [\"-a\"]\n",
        &[
            ("20-b.toml", "[vm]\nmemory_mib = 1024\n"),
            (
                "10-a.toml",
                "[vm]\nmemory_mib = 512\nvcpus = 3\n[qemu]\nextra_args = []\n",
            ),
            ("30-c.toml.bak", "nonsense"),
        ],
    )
    .unwrap();
    assert!(config.debug);
    assert_eq!((config.vm.vcpus, config.vm.memory_mib), (3, 1024));
    assert!(config.qemu.extra_args.is_empty());
}

#[test]
fn an_unknown_key_is_reported_with_its_line_and_the_likely_name() {
    assert_eq!(
        error_of("# size\n[vm]\n\nvcpu = 2\n"),
        "config.toml:4: unknown key \"vcpu\" in [vm], did you mean \"vcpus\"?"
    );
    assert_eq!(
        error_of("debugconsole = true"),
        "config.toml:1: unknown key \"debugconsole\", did you mean \"debug_console\"?"
    );
    assert_eq!(
        error_of("\n[zebra]\nx = 1\n"),
        "config.toml:2: unknown key \"zebra\", there are console_log, debug, debug_console, \
         guest, hypervisor, network, qemu, template, timeouts, vm"
    );
    assert_eq!(
        load_files("[vm]\nvcpus = 1\n", &[("1.toml", "\nvm.memory = 1\n")]).unwrap_err(),
        "config.d/1.toml:2: unknown key \"memory\" in [vm], there are console, hugepages, max_memory_mib, \
         max_vcpus, memory_mib, overhead_mib, vcpus"
    );
}

#[test]
fn wrong_values_are_reported_with_line_and_key() {
    for (text, expected) in [
        (
            "[vm]\nvcpus = 0\n",
            "config.toml:2: vm.vcpus: must be between 1 and 255, not 0",
        ),
        (
            "[vm]\nhugepages = \"4M\"\n",
            "config.toml:2: vm.hugepages: must be false, \"2M\", \"1G\" or \"thp\"",
        ),
        (
            "[vm]\nhugepages = true\n",
            "config.toml:2: vm.hugepages: must be false, \"2M\", \"1G\" or \"thp\"",
        ),
        (
            "[vm]\nmemory_mib = 64\n",
            "config.toml:2: vm.memory_mib: must be between 128 and 4194304, not 64",
        ),
        (
            "[vm]\nvcpus = 1\nmemory_mib = -1\n",
            "config.toml:3: vm.memory_mib: must be between 128 and 4194304, not -1",
        ),
        (
            "[vm]\nmax_memory_mib = 100\n",
            "config.toml:2: vm.max_memory_mib: must be 0 or between 128 and 4194304, not 100",
        ),
        (
            "[vm]\nvcpus = \"2\"\n",
            "config.toml:2: vm.vcpus: invalid type: string \"2\", expected i64",
        ),
        (
            "debug = false\n[qemu]\npath = \"qemu-system-x86_64\"\n",
            "config.toml:3: qemu.path: must be an absolute path, not \"qemu-system-x86_64\"",
        ),
        (
            "hypervisor = \"firecracker\"",
            "config.toml:1: hypervisor: \"firecracker\" is not built into this version, it has \
             \"auto\", \"builtin\", \"qemu\"",
        ),
        (
            "\nhypervisor = \"xen\"",
            "config.toml:2: hypervisor: no hypervisor is called \"xen\", there are \"auto\", \
             \"builtin\", \"qemu\"",
        ),
        (
            "[qemu]\naccel = \"hvf\"",
            "config.toml:2: qemu.accel: unknown variant `hvf`, expected one of `auto`, `kvm`, \
             `tcg`",
        ),
        (
            "[guest]\nkernel_params = \"a\\nb\"",
            "config.toml:2: guest.kernel_params: must be one line without control characters",
        ),
        (
            "[timeouts]\nstop_s = 0",
            "config.toml:2: timeouts.stop_s: must be between 1 and 86400, not 0",
        ),
        (
            "vm = 3",
            "config.toml:1: vm: invalid type: integer `3`, expected struct Vm",
        ),
    ] {
        assert_eq!(error_of(text), expected);
    }
}

#[test]
fn what_is_not_toml_is_reported_with_its_line() {
    let error = error_of("debug = true\n[vm\n");
    assert!(error.starts_with("config.toml:2: "), "{error}");
    let error = error_of("debug = true\ndebug = false\n");
    assert!(error.starts_with("config.toml:2: "), "{error}");
    assert!(load(Path::new("/dev/zero"), Missing::IsAnError).is_err());
}

#[test]
fn the_boot_timeout_depends_on_the_accelerator_unless_it_is_set() {
    let mut timeouts = Timeouts::default();
    assert!(timeouts.boot(true) > timeouts.boot(false));
    timeouts.boot_s = 7;
    assert_eq!(timeouts.boot(true), Duration::from_secs(7));
}

/// The shipped example holds every key as a comment (`#key = value`, prose is
/// `# text`), with the value it has by default.
#[test]
fn the_shipped_example_shows_every_default() {
    let example = include_str!("../../etc/config.toml");
    assert_eq!(load_files(example, &[]).unwrap(), Config::default());

    let uncommented: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if setting.starts_with(|c: char| c.is_ascii_lowercase()) => setting,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let shown: toml::Table = toml::from_str(&uncommented).unwrap();
    let mut defaults = Config::default();
    defaults.guest.kernel = "/usr/lib/kuasar-runv/vmlinux".into();
    defaults.guest.image = "/usr/lib/kuasar-runv/initramfs.img".into();
    assert_eq!(shown, toml::Table::try_from(&defaults).unwrap());
}
