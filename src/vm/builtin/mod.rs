//! The built-in VMM: a machine on KVM inside the sandboxer's process.
//!
//! There is no other program. The guest's memory is a memfd ([`memory`]) into which
//! [`boot`] puts kernel and image; a thread per virtual processor runs the guest
//! ([`processors`], [`vcpu`]) and serves its accesses to the [`machine`]'s board:
//! I/O [`ports`] and the registers of [`virtio`] devices. A thread per device works
//! on its queues. Kicks and interrupts are event descriptors between KVM and those
//! threads, so that the processors' threads only see what is rare.
//!
//! The machine itself (interrupt controllers, timer, clock) is KVM's.

mod acpi;
mod boot;
mod cpuid;
mod devices;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub(super) mod fuzzing;
mod layout;
mod machine;
mod memory;
mod ports;
mod processors;
mod seccomp;
mod setup;
mod slots;
pub mod snapshot;
mod vcpu;
mod virtio;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::event::epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::devices::Growth;
use self::memory::{MemoryFile, Range};
use self::processors::{Processors, Report};
use self::setup::{Machine, Plan};
use self::slots::Slots;
use self::snapshot::fit::MadeFor;
use self::snapshot::format::State;
use self::snapshot::restore::Restored;
use self::snapshot::store::{New, Store};
use self::snapshot::{self as saved, pages};
use super::log_pump::{LogPump, PERIOD};
use super::{
    BackEnds, Capabilities, Device, Error, Place, Served, Templates, Vm, VmConfig, VmEvent, VmExit,
    VmSize, huge_pages, requirements,
};
use crate::config::{Config, Console};

pub use boot::Error as BootError;

pub const NAME: &str = "builtin";

/// Most virtual processors: an id is 8 bits wide, and the guest's kernel has room
/// for as many.
pub const MAX_VCPUS: u32 = 64;

/// A VM inside this process.
pub struct BuiltinVm {
    vm: VmConfig,
    command_deadline: Duration,
    kernel: File,
    image: File,
    epoll: OwnedFd,
    timer: TimerFd,
    /// Readable when a processor has something to report.
    reported: EventFd,
    /// Devices that have been attached.
    slots: Slots,
    /// How the guest gets more memory, and where.
    growth: Option<(Growth, Range, MemoryFile)>,
    /// Memory and purpose of a machine that is to be saved.
    to_save: Option<(MemoryFile, MadeFor)>,
    is_restored: bool,
    state: Stage,
    events: VecDeque<VmEvent>,
}

/// How far the machine has come.
enum Stage {
    New,
    /// Its logs are there.
    Ready {
        console: LogPump,
        sink: OwnedFd,
    },
    /// A thread makes it, and sends what it has made.
    Starting {
        console: LogPump,
        machine: Receiver<Result<Machine, Error>>,
    },
    Running {
        console: LogPump,
        machine: Box<Machine>,
    },
    Ended,
}

/// What became readable, as epoll reports it.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Source {
    Reports = 0,
    Console = 1,
    Timer = 2,
    /// One that has been attached.
    Device = 3,
}

/// The first byte wakes, later ones wait for the timer.
const FIRST_BYTE: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);

impl BuiltinVm {
    /// See [`super::create`].
    pub(super) fn new(config: &Config, mut vm: VmConfig, cache_dir: &Path) -> Result<Self, Error> {
        requirements::kvm("hypervisor = \"builtin\"", cache_dir)?;
        let kernel = requirements::kernel(&vm.kernel)?;
        let image = requirements::image(&vm.initrd)?;
        if vm.size.vcpus > MAX_VCPUS {
            return Err(Self::unsupported("more than 64 virtual CPUs"));
        }
        vm.most = most(&vm);
        vm.size = vm.huge_pages.round_size(vm.size);
        vm.most = vm.huge_pages.round_size(vm.most);
        huge_pages::check(vm.huge_pages, vm.size.memory_mib)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| watching(e.into()))?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )
        .map_err(|e| watching(e.into()))?;
        let reported = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(watching)?;
        let built = BuiltinVm {
            command_deadline: config.timeouts.hypervisor(),
            vm,
            kernel,
            image,
            epoll,
            timer,
            reported,
            slots: Slots::default(),
            growth: None,
            to_save: None,
            is_restored: false,
            state: Stage::New,
            events: VecDeque::new(),
        };
        built.watch(&built.timer, Source::Timer, epoll::EventFlags::IN)?;
        // SAFETY: the descriptor is open as long as the value lives.
        let reported = unsafe { BorrowedFd::borrow_raw(built.reported.as_raw_fd()) };
        built.watch(&reported, Source::Reports, epoll::EventFlags::IN)?;
        Ok(built)
    }

    fn watch(&self, fd: &impl AsFd, source: Source, flags: epoll::EventFlags) -> Result<(), Error> {
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&self.epoll, fd, data, flags).map_err(|e| watching(e.into()))
    }

    fn console(&self) -> io::Result<(LogPump, OwnedFd)> {
        let path = self.vm.console_log.as_ref();
        let path = path.map(|name| self.vm.sandbox_dir.join(name));
        LogPump::new(path.as_deref())
    }

    fn handle(&mut self, source: u64) -> Result<(), Error> {
        let is = |candidate: Source| source == candidate as u64;
        if is(Source::Reports) {
            self.read_reports();
            Ok(())
        } else if is(Source::Timer) {
            self.pump_console()
        } else if is(Source::Device) {
            let stalled = |reason| VmEvent::Stalled { reason };
            self.events.extend(self.slots.failure().map(stalled));
            Ok(())
        } else {
            let expiration = Expiration::OneShot(PERIOD.into());
            self.timer
                .set(expiration, TimerSetTimeFlags::empty())
                .map_err(|e| watching(e.into()))
        }
    }

    fn pump_console(&mut self) -> Result<(), Error> {
        self.timer.wait().or_else(|e| match e {
            nix::errno::Errno::EAGAIN => Ok(()),
            e => Err(watching(e.into())),
        })?;
        let (Stage::Ready { console, .. }
        | Stage::Starting { console, .. }
        | Stage::Running { console, .. }) = &mut self.state
        else {
            return Ok(());
        };
        console.pump();
        if console.is_open() {
            let data = epoll::EventData::new_u64(Source::Console as u64);
            epoll::modify(&self.epoll, &*console, data, FIRST_BYTE)
                .map_err(|e| watching(e.into()))?;
        }
        Ok(())
    }

    /// Takes the machine over from the thread that has made it, without waiting
    /// longer than `deadline`.
    fn take_over(&mut self, deadline: Duration) {
        let Stage::Starting { machine, .. } = &self.state else {
            return;
        };
        let made = match machine.recv_timeout(deadline) {
            Ok(made) => made,
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => Err(Error::Io {
                context: "making the machine",
                source: io::Error::other("the thread has panicked"),
            }),
        };
        let Stage::Starting { console, .. } = std::mem::replace(&mut self.state, Stage::Ended)
        else {
            return;
        };
        match made {
            Ok(machine) => {
                let machine = Box::new(machine);
                self.state = Stage::Running { console, machine };
            }
            Err(e) => self.events.push_back(VmEvent::Exited(VmExit {
                status: None,
                message: Some(e.to_string()),
            })),
        }
    }

    /// Draws the consequences of what the processors say.
    fn read_reports(&mut self) {
        // Fails only when it was not set.
        let _ = self.reported.read();
        self.take_over(Duration::ZERO);
        let Stage::Running { machine, .. } = &self.state else {
            return;
        };
        let mut end = None;
        for report in machine.processors.reports() {
            let (event, message) = match report {
                Report::Panic => (VmEvent::GuestPanicked, None),
                Report::PowerOff => (
                    VmEvent::GuestShutdown,
                    Some("the guest powered itself off".to_owned()),
                ),
                Report::Reset => (
                    VmEvent::GuestReset,
                    Some("the guest reset itself".to_owned()),
                ),
                Report::TripleFault(place) => (
                    VmEvent::GuestReset,
                    Some(format!(
                        "a processor of the guest has triple-faulted ({place})"
                    )),
                ),
                Report::Broken(reason) => (VmEvent::Stalled { reason }, None),
            };
            self.events.push_back(event);
            end = end.or(message);
        }
        if let Some(message) = end {
            // What is left of threads that do not end only touches the guest's own
            // memory, and ends with the process.
            if let Err(e) = self.end(self.command_deadline) {
                log::error!("{e}");
            }
            self.events.push_back(VmEvent::Exited(VmExit {
                status: None,
                message: Some(message),
            }));
        }
    }

    /// Ends the threads and lets go of the machine.
    fn end(&mut self, deadline: Duration) -> Result<(), Error> {
        self.take_over(deadline);
        let ended = match &mut self.state {
            Stage::Running { machine, .. } => machine.processors.end(deadline),
            Stage::Starting { .. } => false,
            _ => true,
        };
        if !ended {
            return Err(Error::Unanswered {
                operation: "stop",
                seconds: deadline.as_secs(),
            });
        }
        if let Stage::Running {
            mut console,
            machine,
        } = std::mem::replace(&mut self.state, Stage::Ended)
        {
            let accesses = machine.board.serial_accesses();
            log::debug!("accesses to the serial port: {accesses}");
            console.pump();
        }
        Ok(())
    }

    /// The machine of a template, if one fits and can be used.
    fn of_template(&self) -> Option<Restored> {
        let Templates::Use { dir } = &self.vm.template else {
            return None;
        };
        let restore = || -> Result<Option<Restored>, saved::Error> {
            let made_for = MadeFor::now(&self.vm)?;
            let Some(template) = Store::new(dir).find(&made_for)? else {
                log::info!("no template in {} fits: booting", dir.display());
                return Ok(None);
            };
            let restored = Restored::new(template)?;
            log::info!("made of the template {}", made_for.key());
            Ok(Some(restored))
        };
        restore().unwrap_or_else(|e| {
            log::warn!("booting, because the template cannot be used: {e}");
            None
        })
    }

    fn save_running(&self, machine: &Machine, new: &New) -> Result<String, Error> {
        let to_save = self.to_save.as_ref();
        let Some((memory, made_for)) = to_save.and_then(|(m, f)| Some((m.file()?, f))) else {
            return Err(Error::NotRunning { operation: "save" });
        };
        // The devices have stopped with this, so that the memory stays as it is.
        let machine = machine.save()?;
        let size = u64::from(self.vm.size.memory_mib) << 20;
        let path = new.memory();
        let extents = pages::write(memory, size, &path).map_err(saved::Error::file(&path))?;
        let since_1970 = std::time::UNIX_EPOCH.elapsed();
        let state = State {
            made_for: made_for.clone(),
            created: since_1970.map_or(0, |time| time.as_secs()),
            extents,
            chips: machine.chips,
            processors: machine.processors,
            serial: machine.serial,
            devices: machine.devices,
        };
        state.write(&new.state())?;
        Ok(made_for.key())
    }

    fn processors(&self, operation: &'static str) -> Result<&Processors, Error> {
        match &self.state {
            Stage::Running { machine, .. } => Ok(&machine.processors),
            _ => Err(Error::NotRunning { operation }),
        }
    }

    fn unsupported(operation: &'static str) -> Error {
        Error::Unsupported {
            hypervisor: NAME,
            operation,
        }
    }
}

/// What a machine of this configuration may become.
fn most(vm: &VmConfig) -> VmSize {
    let VmConfig { size, most, .. } = vm;
    VmSize {
        vcpus: most.vcpus.clamp(size.vcpus, MAX_VCPUS.max(size.vcpus)),
        memory_mib: most.memory_mib.max(size.memory_mib),
    }
}

fn watching(source: io::Error) -> Error {
    Error::Io {
        context: "cannot watch the virtual machine",
        source,
    }
}

impl Vm for BuiltinVm {
    fn hypervisor(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            pause: true,
            resize_vcpus: self.vm.most.vcpus > self.vm.size.vcpus,
            resize_memory: self.vm.most.memory_mib > self.vm.size.memory_mib,
            attach_block: true,
            attach_net: true,
            templates: true,
            emulated: false,
        }
    }

    fn boot(&mut self, _on_spawn: &mut dyn FnMut(i32) -> io::Result<()>) -> Result<(), Error> {
        if !matches!(self.state, Stage::New) {
            return Err(Self::unsupported("a second boot"));
        }
        let (console, sink) = self.console().map_err(|source| Error::Io {
            context: "cannot create a log in the sandbox directory",
            source,
        })?;
        self.watch(&console, Source::Console, FIRST_BYTE)?;
        self.state = Stage::Ready { console, sink };
        Ok(())
    }

    fn serve(&mut self, back_ends: BackEnds) -> Result<Vec<Served>, Error> {
        let Stage::Ready { console, sink } = std::mem::replace(&mut self.state, Stage::Ended)
        else {
            return Err(Error::NotRunning { operation: "serve" });
        };
        let starting = |source| Error::Io {
            context: "cannot start the virtual machine",
            source,
        };
        let VmConfig { size, most, .. } = self.vm;
        let bytes = |mib: u32| u64::from(mib) << 20;
        let room = bytes(most.memory_mib - size.memory_mib);
        let restored = self.of_template();
        let memory = match &restored {
            Some(restored) => restored.memory.clone(),
            None => MemoryFile::of_huge_pages(bytes(size.memory_mib), room, self.vm.huge_pages)?,
        };
        // What does not fit into the pipe is lost: nobody in the guest waits for the host.
        rustix::io::ioctl_fionbio(&sink, true).map_err(|e| starting(e.into()))?;
        let (serial, virtio) = match self.vm.console {
            Console::Serial => (Some(sink), None),
            Console::Virtio => (None, Some(sink)),
            Console::None => (None, None),
        };
        let devices::Started {
            planned,
            served,
            growth,
        } = devices::start(&memory, &self.vm, back_ends, virtio)?;
        self.growth = growth
            .zip(memory.room())
            .map(|(growth, room)| (growth, room, memory.clone()));
        if let Some(restored) = restored {
            let reported = self.reported.try_clone().map_err(starting)?;
            let machine = Box::new(restored.start(planned, serial, reported)?);
            self.is_restored = true;
            self.state = Stage::Running { console, machine };
            return Ok(served);
        }
        if matches!(self.vm.template, Templates::Make { .. }) {
            self.to_save = Some((memory.clone(), MadeFor::now(&self.vm)?));
        }
        let plan = Plan {
            config: self.vm.clone(),
            kernel: self.kernel.try_clone().map_err(starting)?,
            image: self.image.try_clone().map_err(starting)?,
            memory,
            devices: planned,
            serial,
            reported: self.reported.try_clone().map_err(starting)?,
        };
        let reported = self.reported.try_clone().map_err(starting)?;
        let (sender, machine) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("boot".to_owned())
            .spawn(move || {
                // The machine ends with the receiver.
                let _ = sender.send(setup::start(plan));
                let _ = reported.write(1);
            })
            .map_err(starting)?;
        self.state = Stage::Starting { console, machine };
        Ok(served)
    }

    fn is_restored(&self) -> bool {
        self.is_restored
    }

    fn save(&mut self, new: &New) -> Result<String, Error> {
        self.pause()?;
        match &self.state {
            Stage::Running { machine, .. } => self.save_running(machine, new),
            _ => Err(Error::NotRunning { operation: "save" }),
        }
    }

    fn pid(&self) -> Option<i32> {
        None
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn next_event(&mut self) -> Result<Option<VmEvent>, Error> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let mut ready = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }; 1];
            let no_wait = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            match epoll::wait(&self.epoll, &mut ready, Some(&no_wait)) {
                Ok(0) => return Ok(None),
                Ok(_) => {
                    let [event] = ready;
                    // Copied: the field is not aligned.
                    let source = event.data;
                    self.handle(source.u64())?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(watching(e.into())),
            }
        }
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.take_over(self.command_deadline);
        let processors = self.processors("pause")?;
        if processors.pause(self.command_deadline) {
            return Ok(());
        }
        processors.resume();
        Err(Error::Unanswered {
            operation: "pause",
            seconds: self.command_deadline.as_secs(),
        })
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.processors("resume")?.resume();
        Ok(())
    }

    fn resize(&mut self, wanted: VmSize) -> Result<(), Error> {
        self.take_over(self.command_deadline);
        let operation = "resize";
        let Stage::Running { machine, .. } = &mut self.state else {
            return Err(Error::NotRunning { operation });
        };
        let VmConfig { size, most, .. } = self.vm;
        if wanted.vcpus > most.vcpus || wanted.memory_mib > most.memory_mib {
            return Err(Error::TooLarge { wanted, most });
        }
        machine.grow_vcpus(wanted.vcpus)?;
        if wanted.memory_mib > size.memory_mib
            && let Some((growth, room, file)) = &self.growth
        {
            let wanted = self.vm.huge_pages.round_size(wanted);
            let added = u64::from(wanted.memory_mib - size.memory_mib) << 20;
            file.reserve(room.offset, added)?;
            machine.grow_memory(added, *room)?;
            growth.offer(added);
        }
        Ok(())
    }

    fn attach(&mut self, id: &str, device: &Device) -> Result<Place, Error> {
        let operation = "attaching a device";
        self.take_over(self.command_deadline);
        let Stage::Running { machine, .. } = &self.state else {
            return Err(Error::NotRunning { operation });
        };
        let vcpus = self.vm.size.vcpus;
        let deadline = self.command_deadline;
        let (place, handles) = self.slots.attach(machine, vcpus, id, device, deadline)?;
        for handle in handles {
            let data = epoll::EventData::new_u64(Source::Device as u64);
            let once = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
            epoll::add(&self.epoll, handle, data, once).map_err(|e| watching(e.into()))?;
        }
        Ok(place)
    }

    fn detach(&mut self, id: &str) -> Result<(), Error> {
        let operation = "detaching a device";
        let Stage::Running { machine, .. } = &self.state else {
            return Err(Error::NotRunning { operation });
        };
        self.slots.detach(machine, id)?;
        self.events
            .push_back(VmEvent::Detached { id: id.to_owned() });
        // The event descriptor is to become readable. Fails only when it is.
        let _ = self.reported.write(1);
        Ok(())
    }

    fn stop(&mut self, deadline: Duration) -> Result<Option<ExitStatus>, Error> {
        self.end(deadline).map(|()| None)
    }
}
