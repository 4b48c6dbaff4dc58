//! The world of one test: a directory, a state root, ids of its own, and the leak
//! check at its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::container::Container;
use crate::invocation::{Invocation, Output};
use crate::leaks::{self, MARKER};
use crate::process;
use crate::runtime::{Flavour, Runtime};
use crate::wait::{SHORT, holds_within};
use crate::{Bundle, reaper};

/// What an interactive shell would give the runtime.
const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Everything one test makes. Dropping it deletes its containers and fails the test
/// when something is left.
pub struct World {
    pub runtime: Runtime,
    name: String,
    dir: PathBuf,
    /// `--root` of every call.
    pub root: PathBuf,
    config_file: Option<PathBuf>,
    bundles: AtomicU32,
}

impl World {
    /// A world for the runtime under test with the default guest.
    #[must_use]
    pub fn new() -> World {
        World::with(Runtime::under_test(), Flavour::Source)
    }

    /// # Panics
    /// When the runtime is ours and its guest has not been built.
    #[must_use]
    pub fn with(runtime: Runtime, flavour: Flavour) -> World {
        reaper::install();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // The closing letter keeps -1 from being a prefix of -11.
        let name = format!("{}{}-{number}x", leaks::prefix(), std::process::id());
        let dir = std::env::temp_dir().join(&name);
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut world = World {
            root: dir.join("root"),
            config_file: None,
            bundles: AtomicU32::new(0),
            runtime,
            name,
            dir,
        };
        if world.runtime.is_ours {
            world.configure(&configuration(flavour));
        }
        world
    }

    /// Writes the configuration file of the runtime (`KUASAR_RUNV_CONFIG`).
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn configure(&mut self, toml: &str) {
        let path = self.dir.join("config.toml");
        fs::write(&path, toml).expect("configuration file");
        self.config_file = Some(path);
    }

    /// The directory of this world. Its name is in everything the test makes.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path in the world's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A container id of this world.
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// A new bundle that runs `/bin/sh`.
    #[must_use]
    pub fn bundle(&self) -> Bundle {
        let number = self.bundles.fetch_add(1, Ordering::Relaxed);
        Bundle::create(self.dir.join(format!("bundle{number}")))
    }

    /// A call of the runtime with this world's root.
    #[must_use]
    pub fn call<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.bare_call().arg("--root").arg(&self.root).args(args)
    }

    /// A call without `--root` or any other argument.
    #[must_use]
    pub fn bare_call(&self) -> Invocation {
        let mut call = Invocation::new(&self.runtime.binary)
            .env("PATH", HOST_PATH)
            .env("HOME", "/root")
            .env(MARKER, &self.name);
        if let Some(path) = &self.config_file {
            call = call.env("KUASAR_RUNV_CONFIG", path);
        }
        call
    }

    /// `run` in the foreground, to its end.
    #[must_use]
    pub fn run(&self, bundle: &Bundle, name: &str) -> Output {
        self.run_call(bundle, name).output()
    }

    /// `run` in the foreground, not yet started.
    #[must_use]
    pub fn run_call(&self, bundle: &Bundle, name: &str) -> Invocation {
        self.call(["run", "--bundle"])
            .arg(bundle.path())
            .arg(self.id(name))
    }

    /// Runs a shell script in a container of its own, to its end.
    #[must_use]
    pub fn run_script(&self, script: &str) -> Output {
        let bundle = self.bundle().sh(script);
        let number = self.bundles.load(Ordering::Relaxed);
        self.run(&bundle, &format!("script{number}"))
    }

    /// `create`, which must succeed.
    #[must_use]
    pub fn create(&self, bundle: &Bundle, name: &str) -> Container<'_> {
        Container::create(self, bundle, name)
    }

    /// `create`, expected to fail, with stderr collected.
    #[must_use]
    pub fn try_create(&self, bundle: &Bundle, name: &str) -> Output {
        self.create_call(bundle.path(), name).output()
    }

    /// `create` with a pid file, not yet started.
    #[must_use]
    pub fn create_call(&self, bundle: &Path, name: &str) -> Invocation {
        self.call(["create", "--bundle"])
            .arg(bundle)
            .arg("--pid-file")
            .arg(self.pid_file(name))
            .arg(self.id(name))
    }

    /// `create` and `start`.
    #[must_use]
    pub fn start(&self, bundle: &Bundle, name: &str) -> Container<'_> {
        let container = self.create(bundle, name);
        container.start();
        container
    }

    #[must_use]
    pub fn pid_file(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.pid"))
    }

    /// A new file in the world for the output of a container.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn output_file(&self, name: &str) -> File {
        File::create(self.path(name)).expect("output file")
    }

    /// What a delete leaves of this world, one line each.
    #[must_use]
    pub fn leaks(&self) -> Vec<String> {
        leaks::of_world(&self.name, &self.root)
    }

    /// Asserts that nothing of this world is left, giving a dying VM time to go.
    ///
    /// # Panics
    /// With everything that is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        if !holds_within(SHORT, || self.leaks().is_empty()) {
            panic!("left behind:\n{}", self.leaks().join("\n"));
        }
    }

    /// Ids `list -q` prints and every directory where a container could be.
    fn container_ids(&self) -> Vec<String> {
        [self.root.clone(), self.root.join("containers")]
            .iter()
            .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains(&self.name))
            .collect()
    }

    fn delete_containers(&self) {
        for id in self.container_ids() {
            let call = self.call(["delete", "--force", &id]);
            let mut running = call.deadline(SHORT).spawn();
            if reaper::wait(running.pid, SHORT).is_none() {
                running.kill();
            }
        }
    }

    /// Ends and removes what the runtime did not, so that one failure stays one.
    fn clean_up_by_hand(&self) {
        for leaked in leaks::processes(&self.name) {
            // It may be gone by now.
            let _ = process::signal(leaked.pid, libc::SIGKILL);
        }
        holds_within(SHORT, || leaks::processes(&self.name).is_empty());
        unmount_below(&self.dir);
        // The deepest come last and must go first.
        for cgroup in leaks::cgroups(&self.name).iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

impl Default for World {
    fn default() -> Self {
        World::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.delete_containers();
        let clean = holds_within(SHORT, || self.leaks().is_empty());
        let left = self.leaks();
        self.clean_up_by_hand();
        if leaks::mounts(&self.name).is_empty() {
            // What cannot be removed is found by the final leak check.
            let _ = fs::remove_dir_all(&self.dir);
        }
        if clean {
            return;
        }
        let report = format!("left behind after the test:\n{}", left.join("\n"));
        if thread::panicking() {
            eprintln!("{report}");
        } else {
            panic!("{report}");
        }
    }
}

/// The hypervisor of the tests' configuration.
#[must_use]
pub fn hypervisor() -> String {
    std::env::var("KUASAR_RUNV_TEST_HYPERVISOR").unwrap_or_else(|_| "qemu".into())
}

/// A configuration for this flavour: the guest, and how its instructions are
/// executed, of templates in the directory `KUASAR_RUNV_TEST_TEMPLATES` if that is set.
/// QEMU's emulation unless `KUASAR_RUNV_TEST_HYPERVISOR` and
/// `KUASAR_RUNV_TEST_ACCEL` say otherwise, so that no test depends on what the
/// runtime finds out about the machine.
#[must_use]
pub fn configuration(flavour: Flavour) -> String {
    let variable = |name, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    let hypervisor = hypervisor();
    let accel = variable("KUASAR_RUNV_TEST_ACCEL", "tcg");
    let mut text = format!("hypervisor = {hypervisor:?}\n");
    if accel != "tcg" || hypervisor != "qemu" {
        // KVM that is emulated itself (scripts/l1) is no faster than emulation.
        text.push_str("[timeouts]\nboot_s = 120\n");
    }
    text.push_str(&format!(
        "[qemu]\naccel = {accel:?}\n[guest]\nkernel = {:?}\nimage = {:?}\n",
        flavour.artefact("vmlinux"),
        flavour.artefact("initramfs.img"),
    ));
    if let Ok(dir) = std::env::var("KUASAR_RUNV_TEST_TEMPLATES") {
        text.push_str(&format!("[template]\nenabled = true\ndir = {dir:?}\n"));
    }
    text
}

/// Lazily unmounts everything below a directory, newest first.
fn unmount_below(dir: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|target| Path::new(target).starts_with(dir))
        .collect();
    for target in targets.iter().rev() {
        let Ok(path) = std::ffi::CString::new(*target) else {
            continue;
        };
        // SAFETY: `path` is a C string that outlives the call.
        let rc = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        if rc != 0 {
            thread::sleep(Duration::from_millis(10));
        }
    }
}
