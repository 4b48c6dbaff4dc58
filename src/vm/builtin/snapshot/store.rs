//! The directory of all templates.
//!
//! Each is a directory named by its key. A new one is made under a temporary name and
//! renamed; who makes or removes one holds a lock of the whole, who uses one does not: it has
//! the files open, or finds none.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Error;
use super::fit::MadeFor;
use super::format::State;
use crate::sys::lock::DirLock;
use crate::vm::builtin::memory::MemoryFile;

const MEMORY: &str = "memory";
const STATE: &str = "state";
/// What is being made or removed.
const TEMPORARY: &str = ".new-";
const REMOVED: &str = ".old-";
/// Another command makes one meanwhile, which takes as long as a boot.
const LOCK_DEADLINE: Duration = Duration::from_secs(300);

/// The directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A template that fits.
pub struct Template {
    pub state: State,
    pub memory: MemoryFile,
}

/// One of the list.
#[derive(Debug)]
pub struct Entry {
    pub key: String,
    /// Bytes on disk.
    pub disk: u64,
    pub state: Result<State, Error>,
}

/// The right to change what there is.
pub struct Changing {
    dir: PathBuf,
    _lock: DirLock,
}

/// A template that is being made; gone when dropped.
pub struct New {
    path: PathBuf,
}

impl Store {
    pub fn new(dir: &Path) -> Store {
        Store {
            dir: dir.to_owned(),
        }
    }

    /// The template for such a machine; `None` when there is none.
    ///
    /// # Errors
    /// There is one, and it cannot be used.
    pub fn find(&self, made_for: &MadeFor) -> Result<Option<Template>, Error> {
        let dir = self.dir.join(made_for.key());
        match fs::symlink_metadata(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::file(&dir)(e)),
            Ok(metadata) => check_owner(&dir, &metadata)?,
        }
        check_owner(
            &self.dir,
            &self
                .dir
                .symlink_metadata()
                .map_err(Error::file(&self.dir))?,
        )?;
        let state = State::read(&dir.join(STATE))?;
        if state.made_for != *made_for {
            return Err(Error::invalid(&dir, "it was made for another machine"));
        }
        let memory = open_memory(&dir.join(MEMORY), &state)?;
        Ok(Some(Template { state, memory }))
    }

    /// All there are, by key, without what is being made.
    ///
    /// # Errors
    /// The directory cannot be read. That it is not there is no error.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let failed = Error::file(&self.dir);
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(&failed)?,
        };
        let mut list = Vec::new();
        for entry in entries {
            let entry = entry.map_err(&failed)?;
            let Some(key) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            if !is_key(&key) {
                continue;
            }
            let dir = entry.path();
            let used = |name| fs::metadata(dir.join(name)).map_or(0, |m| m.blocks() * 512);
            list.push(Entry {
                key,
                disk: used(MEMORY) + used(STATE),
                state: State::read(&dir.join(STATE)),
            });
        }
        list.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(list)
    }

    /// Waits for the right to change something, with a directory that is there then.
    ///
    /// # Errors
    /// The directory cannot be made or belongs to somebody else; somebody else changes
    /// something all the time.
    pub fn change(&self) -> Result<Changing, Error> {
        let failed = Error::file(&self.dir);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.dir).map_err(&failed)?;
        let metadata = fs::symlink_metadata(&self.dir).map_err(&failed)?;
        check_owner(&self.dir, &metadata)?;
        let lock = DirLock::acquire(&self.dir, LOCK_DEADLINE).map_err(&failed)?;
        let changing = Changing {
            dir: self.dir.clone(),
            _lock: lock,
        };
        changing.clean_up()?;
        Ok(changing)
    }
}

/// Whether it may be a template's name.
pub fn is_key(name: &str) -> bool {
    name.len() == 8 && name.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// Nobody else may have put it there.
fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), Error> {
    let me = rustix::process::geteuid().as_raw();
    let what = if metadata.uid() != me && metadata.uid() != 0 {
        format!("it belongs to user {}", metadata.uid())
    } else if metadata.mode() & 0o022 != 0 {
        "others may write to it".to_owned()
    } else if metadata.file_type().is_symlink() {
        "it is a link".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::invalid(path, what))
}

/// Maps the memory of a template, whose state has been checked.
fn open_memory(path: &Path, state: &State) -> Result<MemoryFile, Error> {
    let failed = Error::file(path);
    let file = File::open(path).map_err(&failed)?;
    let metadata = file.metadata().map_err(&failed)?;
    check_owner(path, &metadata)?;
    let mib = |mib: u32| u64::from(mib) << 20;
    let (size, most) = (state.made_for.size, state.made_for.most);
    if metadata.len() != mib(size.memory_mib) {
        let what = format!(
            "it has {} bytes, not {}",
            metadata.len(),
            mib(size.memory_mib)
        );
        return Err(Error::invalid(path, what));
    }
    let room = mib(most.memory_mib.saturating_sub(size.memory_mib));
    MemoryFile::of_template(&file, &state.extents, mib(size.memory_mib), room).map_err(failed)
}

impl Changing {
    /// Whether there is such a template.
    pub fn has(&self, key: &str) -> bool {
        is_key(key) && self.dir.join(key).exists()
    }

    /// Removes a template; `false` when there is none. Machines that were made of it keep
    /// what they have.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, key: &str) -> Result<bool, Error> {
        if !self.has(key) {
            return Ok(false);
        }
        let (path, aside) = (self.dir.join(key), self.dir.join(format!("{REMOVED}{key}")));
        fs::rename(&path, &aside).map_err(Error::file(&path))?;
        fs::remove_dir_all(&aside).map_err(Error::file(&aside))?;
        Ok(true)
    }

    /// A place for a new one.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn start(&self) -> Result<New, Error> {
        let path = self.dir.join(format!("{TEMPORARY}{}", std::process::id()));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(Error::file(&path))?;
        Ok(New { path })
    }

    /// Puts a new one in its place, and what was there out of it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(&self, new: &New, key: &str) -> Result<(), Error> {
        let path = self.dir.join(key);
        let sync = |path: &Path| File::open(path)?.sync_all();
        sync(&new.path).map_err(Error::file(&new.path))?;
        self.remove(key)?;
        fs::rename(&new.path, &path).map_err(Error::file(&path))?;
        sync(&self.dir).map_err(Error::file(&self.dir))
    }

    /// Removes what was left by commands that were killed.
    fn clean_up(&self) -> Result<(), Error> {
        let failed = Error::file(&self.dir);
        for entry in fs::read_dir(&self.dir).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            let name = entry.file_name();
            let is_left = |prefix| name.as_encoded_bytes().starts_with(prefix);
            if is_left(TEMPORARY.as_bytes()) || is_left(REMOVED.as_bytes()) {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(Error::file(&path))?;
            }
        }
        Ok(())
    }
}

impl New {
    pub fn dir(&self) -> &Path {
        &self.path
    }

    pub fn memory(&self) -> PathBuf {
        self.path.join(MEMORY)
    }

    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }
}

impl Drop for New {
    fn drop(&mut self) {
        // After it was put into its place there is nothing of this name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::state;
    use super::*;
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use vm_memory::{Bytes, GuestAddress};

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("templates"));
        (dir, store)
    }

    fn put(store: &Store, state: &State) -> String {
        let changing = store.change().unwrap();
        let new = changing.start().unwrap();
        let memory = File::create(new.memory()).unwrap();
        memory.set_len(16 << 20).unwrap();
        memory.write_all_at(b"guest", 0x1_0000).unwrap();
        state.write(&new.state()).unwrap();
        let key = state.made_for.key();
        changing.finish(&new, &key).unwrap();
        key
    }

    fn reason(store: &Store) -> String {
        match store.find(&state().made_for) {
            Err(e) => e.to_string(),
            Ok(found) => panic!("{}", found.is_some()),
        }
    }

    #[test]
    fn a_template_is_found_by_what_it_was_made_for() {
        let (_dir, store) = store();
        assert!(store.find(&state().made_for).unwrap().is_none());
        assert!(store.list().unwrap().is_empty());
        let key = put(&store, &state());
        let found = store.find(&state().made_for).unwrap().unwrap();
        assert_eq!(found.state, state());
        let memory = found.memory.map::<()>().unwrap();
        let mut bytes = [0; 5];
        memory
            .read_slice(&mut bytes, GuestAddress(0x1_0000))
            .unwrap();
        assert_eq!(&bytes, b"guest");
        let mut other = state().made_for;
        other.parameters.push('x');
        assert!(store.find(&other).unwrap().is_none());
        let list = store.list().unwrap();
        assert_eq!((list.len(), &list[0].key), (1, &key));
        assert!(list[0].state.is_ok() && list[0].disk > 0);
        // Once more, over it; a machine that has it keeps it.
        put(&store, &state());
        assert!(store.change().unwrap().remove(&key).unwrap());
        assert!(!store.change().unwrap().remove(&key).unwrap());
        assert!(store.list().unwrap().is_empty());
        memory
            .read_slice(&mut bytes, GuestAddress(0x1_0000))
            .unwrap();
        assert_eq!(&bytes, b"guest");
    }

    #[test]
    fn a_template_that_cannot_be_used_says_why() {
        let (dir, store) = store();
        let path = dir.path().join("templates").join(put(&store, &state()));
        let memory = File::options().write(true).open(path.join(MEMORY)).unwrap();
        memory.set_len(15 << 20).unwrap();
        assert!(reason(&store).contains("15728640 bytes, not 16777216"));
        memory.set_len(16 << 20).unwrap();
        let others = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        others(&path, 0o770);
        assert!(reason(&store).contains("others may write"));
        others(&path, 0o700);
        others(&dir.path().join("templates"), 0o707);
        assert!(reason(&store).contains("others may write"));
        assert!(store.change().is_err());
        others(&dir.path().join("templates"), 0o700);
        let mut other = state();
        other.made_for.parameters.push('x');
        fs::remove_file(path.join(STATE)).unwrap();
        assert!(reason(&store).contains("No such file"));
        other.write(&path.join(STATE)).unwrap();
        assert!(reason(&store).contains("another machine"));
        fs::write(path.join(STATE), "kuasar").unwrap();
        assert!(reason(&store).contains("first line"));
        assert!(store.list().unwrap()[0].state.is_err());
    }

    #[test]
    fn what_was_not_finished_is_no_template_and_goes() {
        let (dir, store) = store();
        let templates = dir.path().join("templates");
        drop(store.change().unwrap().start().unwrap());
        assert_eq!(fs::read_dir(&templates).unwrap().count(), 0);
        for left in [".new-1", ".old-01234567"] {
            fs::create_dir(templates.join(left)).unwrap();
            fs::write(templates.join(left).join(MEMORY), "x").unwrap();
        }
        assert!(store.list().unwrap().is_empty());
        drop(store.change().unwrap());
        assert_eq!(fs::read_dir(&templates).unwrap().count(), 0);
    }

    #[test]
    fn names_that_are_no_keys_reach_nothing() {
        let (dir, store) = store();
        let changing = store.change().unwrap();
        fs::create_dir(dir.path().join("precious")).unwrap();
        for name in ["../precious", "", ".", "0123456", "0123456G", "012345678"] {
            assert!(!changing.remove(name).unwrap(), "{name}");
        }
        assert!(dir.path().join("precious").exists());
    }
}
