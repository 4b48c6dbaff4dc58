//! Which runtime the tests drive, and with which guest.

use std::env;
use std::path::{Path, PathBuf};

/// The two ways the guest kernel is made. Both pass the same core of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The project's own kernel, built from the distribution's source package.
    Source,
    /// The distribution's packaged kernel with its modules in the initramfs.
    Packaged,
}

impl Flavour {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Source => "source",
            Flavour::Packaged => "packaged",
        }
    }

    /// `vmlinux`, `initramfs.img` or another artefact of this flavour.
    ///
    /// # Panics
    /// When it has not been built: a test without its guest has failed.
    #[must_use]
    pub fn artefact(self, name: &str) -> PathBuf {
        let path = guest_dir().join(self.name()).join(name);
        assert!(
            path.exists(),
            "{} is missing: run `make image` first",
            path.display()
        );
        path
    }
}

/// Where `make image` and `make floor` put what the guest is made of.
#[must_use]
pub fn guest_dir() -> PathBuf {
    env::var_os("KUASAR_RUNV_GUEST_DIR")
        .map_or_else(|| repository().join("target/guest"), PathBuf::from)
}

/// The checkout the tests were built from.
#[must_use]
pub fn repository() -> &'static Path {
    let harness = Path::new(env!("CARGO_MANIFEST_DIR"));
    harness
        .ancestors()
        .nth(2)
        .expect("tests/harness is two levels down")
}

/// The binary under test.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub binary: PathBuf,
    /// False for runc and its like: no guest, no configuration file.
    pub is_ours: bool,
}

impl Runtime {
    /// `$RUNTIME`, or the binary cargo built beside the running test.
    ///
    /// # Panics
    /// When there is no such file.
    #[must_use]
    pub fn under_test() -> Runtime {
        match env::var_os("RUNTIME") {
            Some(path) => Runtime::at(PathBuf::from(path)),
            None => Runtime::built(),
        }
    }

    /// The binary cargo built: beside the test's `deps` directory, or beside the
    /// benchmark.
    ///
    /// # Panics
    /// When it has not been built.
    #[must_use]
    pub fn built() -> Runtime {
        let mut dir = env::current_exe().expect("/proc is mounted");
        dir.pop();
        if dir.ends_with("deps") {
            dir.pop();
        }
        Runtime::at(dir.join("kuasar-runv"))
    }

    /// # Panics
    /// When there is no such file.
    #[must_use]
    pub fn at(binary: PathBuf) -> Runtime {
        assert!(binary.exists(), "no runtime at {}", binary.display());
        let is_ours = binary
            .file_name()
            .is_some_and(|name| name.to_string_lossy().contains("kuasar-runv"));
        Runtime { binary, is_ours }
    }
}
