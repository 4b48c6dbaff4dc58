//! Huge pages: a hugetlbfs of the guest whose pages are reserved when it is made.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::storage;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Error, Result, make_place};

const POOLS: &str = "/sys/kernel/mm/hugepages";
/// How long processes may hold pages after their container is gone.
const FREED: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// A mounted hugetlbfs.
pub struct HugePages {
    place: PathBuf,
    is_mounted: bool,
    pool: Pool,
    pages: u64,
}

impl HugePages {
    /// Takes the pages out of the guest's memory and mounts them.
    ///
    /// # Errors
    /// `Invalid` when there is no such size of page, or not enough memory in one
    /// piece; nothing is taken then.
    pub fn reserve(name: &str, wanted: &storage::HugePages) -> Result<HugePages> {
        let pool = Pool::of(wanted.page_size)?;
        let pages = wanted.size.div_ceil(wanted.page_size);
        pool.grow(pages)?;
        match mount_pages(name, wanted.page_size, pages) {
            Ok(place) => Ok(HugePages {
                place,
                is_mounted: true,
                pool,
                pages,
            }),
            Err(e) => {
                pool.shrink(pages)?;
                Err(e)
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.place
    }

    /// Gives the pages back.
    ///
    /// # Errors
    /// They are still in use at the deadline.
    pub fn remove(&mut self) -> Result<()> {
        if self.is_mounted {
            umount2(&self.place, MntFlags::MNT_DETACH)
                .map_err(Error::io(format!("unmounting {}", self.place.display())))?;
            // Empty, and nobody else's.
            drop(fs::remove_dir(&self.place));
            self.is_mounted = false;
        }
        let deadline = Instant::now() + FREED;
        // Pages that are in use would only become surplus ones.
        while self.pool.read("free_hugepages")? < self.pages {
            if Instant::now() >= deadline {
                return Err(Error::Deadline("huge pages are still in use".into()));
            }
            sleep(POLL);
        }
        self.pool.shrink(self.pages)
    }
}

fn mount_pages(name: &str, page_size: u64, pages: u64) -> Result<PathBuf> {
    let place = make_place(name)?;
    let data = format!("pagesize={page_size},size={}", pages * page_size);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let done = mount(
        Some("hugetlbfs"),
        &place,
        Some("hugetlbfs"),
        flags,
        Some(data.as_str()),
    );
    if let Err(e) = done {
        // Still empty.
        drop(fs::remove_dir(&place));
        return Err(Error::io("mounting huge pages")(e));
    }
    Ok(place)
}

/// The kernel's pages of one size.
struct Pool {
    dir: PathBuf,
    page_kib: u64,
}

impl Pool {
    fn of(page_size: u64) -> Result<Pool> {
        let page_kib = page_size / 1024;
        let dir = Path::new(POOLS).join(format!("hugepages-{page_kib}kB"));
        if page_size == 0 || !dir.is_dir() {
            return Err(Error::Invalid(format!(
                "the guest has no huge pages of {page_kib} KiB"
            )));
        }
        Ok(Pool { dir, page_kib })
    }

    fn read(&self, file: &str) -> Result<u64> {
        let path = self.dir.join(file);
        let text =
            fs::read_to_string(&path).map_err(Error::io(format!("reading {}", path.display())))?;
        let number = text.trim().parse();
        number.map_err(|_| Error::Invalid(format!("{} has {text:?}", path.display())))
    }

    fn write(&self, pages: u64) -> Result<()> {
        let path = self.dir.join("nr_hugepages");
        fs::write(&path, pages.to_string())
            .map_err(Error::io(format!("writing {}", path.display())))
    }

    fn grow(&self, pages: u64) -> Result<()> {
        let before = self.read("nr_hugepages")?;
        self.write(before.saturating_add(pages))?;
        // The kernel takes what it can get.
        let got = self.read("nr_hugepages")?.saturating_sub(before);
        if got < pages {
            self.write(before)?;
            return Err(Error::Invalid(format!(
                "the virtual machine has memory for {got} of {pages} huge pages of {} KiB \
                 (its size is [vm] memory_mib)",
                self.page_kib
            )));
        }
        Ok(())
    }

    fn shrink(&self, pages: u64) -> Result<()> {
        let now = self.read("nr_hugepages")?;
        self.write(now.saturating_sub(pages))
    }
}
