//! Huge pages of the host for the memory of guests.
//!
//! Pages of hugetlbfs are reserved by the administrator, and a guest's are taken when
//! its machine is made: a page that is missing later would be a bus error in the
//! middle of the guest. So memory of them does not go back to the host before the
//! machine ends. Transparent huge pages are the kernel's to make, when the guest
//! touches memory, and to split, when it gives some back.

use std::fs;
use std::path::Path;

use super::{Error, VmSize};
use crate::config::HugePages;

const POOLS: &str = "/sys/kernel/mm/hugepages";
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

impl HugePages {
    /// Size of the pages in bytes, of those that are reserved.
    #[must_use]
    pub fn reserved(self) -> Option<u64> {
        match self {
            HugePages::Off | HugePages::Transparent => None,
            HugePages::Mib2 => Some(2 << 20),
            HugePages::Gib1 => Some(1 << 30),
        }
    }

    /// The smallest size of memory that is made of such pages and not below `mib`.
    #[must_use]
    pub fn round(self, mib: u32) -> u32 {
        // At most 1024.
        let page = self.reserved().unwrap_or(1 << 20) >> 20;
        mib.next_multiple_of(page as u32)
    }

    /// A machine's memory in whole pages.
    #[must_use]
    pub fn round_size(self, size: VmSize) -> VmSize {
        VmSize {
            memory_mib: self.round(size.memory_mib),
            ..size
        }
    }
}

/// Checks that the host has the pages for so many MiB. They may be gone a moment
/// later, which is an error where they are taken.
///
/// # Errors
/// [`Error::HugePages`].
pub fn check(kind: HugePages, mib: u32) -> Result<(), Error> {
    check_in(Path::new(POOLS), Path::new(TRANSPARENT), kind, mib)
}

fn check_in(pools: &Path, transparent: &Path, kind: HugePages, mib: u32) -> Result<(), Error> {
    let Some(page) = kind.reserved() else {
        return match kind == HugePages::Transparent {
            true => check_transparent(transparent),
            false => Ok(()),
        };
    };
    let kib = page >> 10;
    let pool = pools.join(format!("hugepages-{kib}kB"));
    let read = |name: &str| {
        fs::read_to_string(pool.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let wanted = u64::from(mib).div_ceil(page >> 20);
    let Some(free): Option<u64> = read("free_hugepages") else {
        return Err(Error::HugePages(format!(
            "this machine has no huge pages of {kib} KiB"
        )));
    };
    // Promised to somebody who has not touched them yet.
    let promised: u64 = read("resv_hugepages").unwrap_or(0);
    let free = free.saturating_sub(promised);
    if free < wanted {
        return Err(too_few(kib, wanted, &free.to_string()));
    }
    Ok(())
}

/// There are not as many as are wanted.
pub fn too_few(kib: u64, wanted: u64, free: &str) -> Error {
    Error::HugePages(format!(
        "the guest's memory takes {wanted} huge pages of {kib} KiB, and {free} are free: raise \
         {POOLS}/hugepages-{kib}kB/nr_hugepages"
    ))
}

fn check_transparent(path: &Path) -> Result<(), Error> {
    // The one in effect is in brackets.
    let modes = fs::read_to_string(path).unwrap_or_default();
    let mode = modes.split(['[', ']']).nth(1).unwrap_or("never");
    if matches!(mode, "never" | "deny") {
        return Err(Error::HugePages(format!(
            "transparent huge pages of shared memory are off: write \"advise\" to {TRANSPARENT}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_pages() {
        assert_eq!(HugePages::Off.round(513), 513);
        assert_eq!(HugePages::Transparent.round(513), 513);
        assert_eq!(HugePages::Mib2.round(513), 514);
        assert_eq!(HugePages::Gib1.round(1025), 2048);
    }

    #[test]
    fn a_lack_of_pages_is_an_error_that_says_where_to_get_some() {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB");
        fs::create_dir(&pool).unwrap();
        let transparent = dir.path().join("shmem_enabled");
        let check = |kind, mib| check_in(dir.path(), &transparent, kind, mib);
        let message = |kind, mib| check(kind, mib).unwrap_err().to_string();
        assert!(message(HugePages::Mib2, 2).contains("no huge pages of 2048 KiB"));
        fs::write(pool.join("free_hugepages"), "100\n").unwrap();
        fs::write(pool.join("resv_hugepages"), "36\n").unwrap();
        check(HugePages::Mib2, 128).unwrap();
        let lack = message(HugePages::Mib2, 130);
        assert!(
            lack.contains("takes 65 huge pages of 2048 KiB, and 64 are free"),
            "{lack}"
        );
        assert!(message(HugePages::Gib1, 1024).contains("no huge pages of 1048576 KiB"));
        check(HugePages::Off, 1 << 20).unwrap();
        for (modes, works) in [
            ("always within_size [advise] never deny force", true),
            ("always within_size advise [never] deny force", false),
            ("", false),
        ] {
            fs::write(&transparent, modes).unwrap();
            assert_eq!(check(HugePages::Transparent, 512).is_ok(), works, "{modes}");
        }
    }
}
