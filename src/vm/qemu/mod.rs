//! QEMU as the hypervisor, with KVM or with emulation.
//!
//! One QEMU process per VM. Four things of it are watched through one epoll
//! descriptor: its pidfd, the control connection ([`qmp`]), and the pipes that
//! take the guest's console and QEMU's own messages (`qemu.log`). QEMU gets the
//! kernel and the initramfs as open descriptors and finds its sockets by file
//! name in its working directory, so it needs no right to any other path.
//!
//! Nothing waits for QEMU's monitor during boot: requests lie in its socket
//! before QEMU exists.

mod block;
mod command_line;
mod events;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub(super) mod fuzzing;
mod hotplug;
mod qmp;
mod relay;
pub mod requirements;
mod resize;
mod vhost_user;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::event::epoll;

use self::command_line::{Accel, CommandLine};
use self::events::on_message;
use self::hotplug::HotPlug;
use self::qmp::Qmp;
use self::resize::Resizing;
use super::devices::{fs, vsock};
use super::log_pump::{LogPump, PERIOD};
use super::process::{FIRST_FD, Process, Spawn};
use super::template::New;
use super::{
    BackEnds, Capabilities, Device, Error, Place, Served, Vm, VmConfig, VmEvent, VmExit, VmSize,
    huge_pages,
};
use crate::config::{self, Config};
use crate::sys::unix_socket;

pub use qmp::QmpError;

const NAME: &str = "qemu";
/// QEMU's own messages, in the sandbox directory.
const QEMU_LOG: &str = "qemu.log";
/// The vhost-user sockets of the devices, in the sandbox directory: a whole path
/// may not fit a socket address.
const VSOCK_SOCKET: &str = "vsock-vhost.sock";
const FS_SOCKET: &str = "fs-vhost.sock";

/// A VM run by a QEMU process.
pub(super) struct QemuVm {
    vm: VmConfig,
    qemu: config::Qemu,
    accel: Accel,
    command_deadline: Duration,
    kernel: File,
    initrd: File,
    epoll: OwnedFd,
    timer: TimerFd,
    running: Option<Running>,
    exit: Option<ExitStatus>,
    events: VecDeque<VmEvent>,
}

/// What exists while the QEMU process does.
struct Running {
    process: Process,
    /// Gone when it broke.
    qmp: Option<Qmp>,
    /// Number of a `query-status` whose answer nobody waits for.
    status_query: Option<u64>,
    hotplug: HotPlug,
    console: LogPump,
    messages: LogPump,
    /// Those of [`VSOCK_SOCKET`] and [`FS_SOCKET`], until they are served.
    listeners: Option<(UnixListener, UnixListener)>,
}

/// What became readable, as epoll reports it.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Source {
    Process = 0,
    Qmp = 1,
    Console = 2,
    Messages = 3,
    Timer = 4,
}

impl QemuVm {
    /// See [`super::create`].
    pub(super) fn new(
        config: &Config,
        mut vm: VmConfig,
        cache_dir: &Path,
    ) -> Result<QemuVm, Error> {
        let qemu = config.qemu.clone();
        requirements::program(&qemu)?;
        requirements::firmware(&qemu)?;
        let kernel = requirements::kernel(&vm.kernel)?;
        let initrd = requirements::image(&vm.initrd)?;
        let accel = requirements::accel(qemu.accel, cache_dir)?;
        // A CPU that waits costs an emulated boot a thirtieth, so only who asks for it
        // has one.
        if matches!(accel, Accel::Tcg { .. }) && config.vm.max_vcpus == 0 {
            vm.most.vcpus = vm.size.vcpus;
        }

        vm.size = vm.huge_pages.round_size(vm.size);
        vm.most = vm.huge_pages.round_size(vm.most);
        huge_pages::check(vm.huge_pages, vm.size.memory_mib)?;

        let io = |source| Error::Io {
            context: "cannot watch QEMU",
            source,
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io(e.into()))?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )
        .map_err(|e| io(e.into()))?;
        watch(&epoll, &timer, Source::Timer, epoll::EventFlags::IN).map_err(io)?;
        Ok(QemuVm {
            command_deadline: config.timeouts.hypervisor(),
            vm,
            qemu,
            accel,
            kernel,
            initrd,
            epoll,
            timer,
            running: None,
            exit: None,
            events: VecDeque::new(),
        })
    }

    fn spawn(&mut self, on_spawn: &mut dyn FnMut(i32) -> io::Result<()>) -> Result<Running, Error> {
        let io = |context| move |source: io::Error| Error::Io { context, source };
        let log = |name: &str| {
            LogPump::new(Some(&self.vm.sandbox_dir.join(name)))
                .map_err(io("cannot create a log in the sandbox directory"))
        };
        let (messages, messages_sink) = log(QEMU_LOG)?;
        let (console, console_sink) = match &self.vm.console_log {
            Some(name) => log(name)?,
            None => LogPump::new(None).map_err(io("cannot create a pipe"))?,
        };
        let (mut qmp, qmp_peer) = Qmp::new().map_err(io("cannot create the control connection"))?;
        // What happened before the negotiation was not announced.
        let status_query = qmp.send("query-status", None)?;
        let sandbox_dir =
            File::open(&self.vm.sandbox_dir).map_err(io("cannot open the sandbox directory"))?;

        let bind = |name| {
            unix_socket::bind(&sandbox_dir, name).map_err(io("cannot make a device's socket"))
        };
        let listeners = (bind(VSOCK_SOCKET)?, bind(FS_SOCKET)?);

        let fds = [
            qmp_peer.as_fd(),
            self.kernel.as_fd(),
            self.initrd.as_fd(),
            console_sink.as_fd(),
        ];
        let spawn = Spawn {
            program: &self.qemu.path,
            args: self.command_line().args(),
            working_dir: sandbox_dir.as_fd(),
            output: messages_sink.as_fd(),
            fds: &fds,
            read_only: self.qemu.sandbox,
        };
        let process = Process::spawn(&spawn, on_spawn)?;
        let running = Running {
            process,
            qmp: Some(qmp),
            status_query: Some(status_query),
            hotplug: HotPlug::default(),
            console,
            messages,
            listeners: Some(listeners),
        };
        self.watch_all(&running).map_err(io("cannot watch QEMU"))?;
        Ok(running)
    }

    /// Its descriptors are in the order of `fds` in [`QemuVm::spawn`].
    fn command_line(&self) -> CommandLine<'_> {
        let name = self
            .vm
            .sandbox_dir
            .file_name()
            .and_then(|name| name.to_str());
        CommandLine {
            name: name.unwrap_or(env!("CARGO_PKG_NAME")),
            accel: self.accel,
            size: self.vm.size,
            most: self.vm.most,
            firmware: &self.qemu.firmware,
            qmp_fd: FIRST_FD,
            kernel_fd: FIRST_FD + 1,
            initrd_fd: FIRST_FD + 2,
            console_fd: FIRST_FD + 3,
            kernel_params: &self.vm.kernel_params,
            verbose_console: self.vm.verbose_console,
            console: self.vm.console,
            huge_pages: self.vm.huge_pages,
            vsock_socket: VSOCK_SOCKET,
            fs_socket: FS_SOCKET,
            fs_tag: &self.vm.fs_tag,
            sandbox: self.qemu.sandbox,
            extra_args: &self.qemu.extra_args,
        }
    }

    fn watch_all(&self, running: &Running) -> io::Result<()> {
        use epoll::EventFlags;
        let epoll = &self.epoll;
        watch(epoll, &running.process, Source::Process, EventFlags::IN)?;
        if let Some(qmp) = &running.qmp {
            watch(epoll, qmp, Source::Qmp, EventFlags::IN)?;
        }
        watch(epoll, &running.console, Source::Console, FIRST_BYTE)?;
        watch(epoll, &running.messages, Source::Messages, FIRST_BYTE)
    }

    fn handle(&mut self, source: u64) -> Result<(), Error> {
        let io = |source: io::Error| Error::Io {
            context: "cannot watch QEMU",
            source,
        };
        let is = |candidate: Source| source == candidate as u64;
        if is(Source::Process) {
            self.reap().map_err(io)
        } else if is(Source::Qmp) {
            self.read_qmp()
        } else if is(Source::Timer) {
            self.pump_logs().map_err(io)
        } else {
            // The first bytes of a log: the rest of the burst comes along later.
            let expiration = Expiration::OneShot(PERIOD.into());
            self.timer
                .set(expiration, TimerSetTimeFlags::empty())
                .map_err(|e| io(e.into()))
        }
    }

    fn pump_logs(&mut self) -> io::Result<()> {
        self.timer.wait().or_else(|e| match e {
            nix::errno::Errno::EAGAIN => Ok(()),
            e => Err(e),
        })?;
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        for (pump, source) in [
            (&mut running.console, Source::Console),
            (&mut running.messages, Source::Messages),
        ] {
            pump.pump();
            if pump.is_open() {
                let data = epoll::EventData::new_u64(source as u64);
                epoll::modify(&self.epoll, pump, data, FIRST_BYTE)?;
            }
        }
        Ok(())
    }

    /// Handles everything QEMU has said. When the connection breaks while QEMU
    /// lives, the error is reported once and the VM goes on without it.
    fn read_qmp(&mut self) -> Result<(), Error> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some(qmp) = &mut running.qmp else {
            return Ok(());
        };
        let error = loop {
            match qmp.next() {
                Ok(Some(message)) => {
                    let (query, hotplug) = (&mut running.status_query, &mut running.hotplug);
                    if let Err(e) = on_message(message, qmp, query, hotplug, &mut self.events) {
                        break e;
                    }
                }
                Ok(None) => return Ok(()),
                Err(e) => break e,
            }
        };
        // Closing the socket takes it out of the epoll set.
        running.qmp = None;
        match error {
            // QEMU is ending; its pidfd tells.
            QmpError::Closed => Ok(()),
            error => Err(error.into()),
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some(status) = running.process.try_wait()? else {
            return Ok(());
        };
        // Its last words are in the sockets and pipes.
        if let Err(e) = self.read_qmp() {
            log::warn!("{e}");
        }
        let message = self.finish(status);
        self.events.push_back(VmEvent::Exited(VmExit {
            status: Some(status),
            message: message.filter(|_| !status.success()),
        }));
        Ok(())
    }

    /// Lets go of a process that has ended and returns its last message.
    fn finish(&mut self, status: ExitStatus) -> Option<String> {
        self.exit = Some(status);
        // Dropping it closes its descriptors, which takes them out of the epoll
        // set: nobody else has copies.
        let mut running = self.running.take()?;
        running.console.pump();
        running.messages.pump();
        running.messages.last_line()
    }

    fn command(&mut self, operation: &'static str, command: &'static str) -> Result<(), Error> {
        self.with_qmp(operation, |qmp, _, deadline| {
            qmp.execute(command, None, deadline)?;
            Ok(())
        })
    }

    /// Does something that takes commands and answers.
    fn with_qmp<T>(
        &mut self,
        operation: &'static str,
        work: impl FnOnce(&mut Qmp, &mut HotPlug, Duration) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Some(running) = self.running.as_mut() else {
            return Err(Error::NotRunning { operation });
        };
        let qmp = running.qmp.as_mut();
        let qmp = qmp.ok_or(Error::NotRunning { operation })?;
        let result = work(qmp, &mut running.hotplug, self.command_deadline);
        // What came before the answer is off the socket, which stays silent.
        self.read_qmp()?;
        if !self.events.is_empty() {
            self.wake().map_err(|source| Error::Io {
                context: "cannot announce an event of QEMU",
                source,
            })?;
        }
        result
    }

    /// Makes the event descriptor readable.
    fn wake(&self) -> io::Result<()> {
        let at_once = Expiration::OneShot(Duration::from_nanos(1).into());
        self.timer.set(at_once, TimerSetTimeFlags::empty())?;
        Ok(())
    }
}

fn unsupported(operation: &'static str) -> Error {
    Error::Unsupported {
        hypervisor: NAME,
        operation,
    }
}

impl Vm for QemuVm {
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
            templates: false,
            emulated: matches!(self.accel, Accel::Tcg { .. }),
        }
    }

    fn boot(&mut self, on_spawn: &mut dyn FnMut(i32) -> io::Result<()>) -> Result<(), Error> {
        if self.running.is_some() || self.exit.is_some() {
            return Err(unsupported("a second boot"));
        }
        self.running = Some(self.spawn(on_spawn)?);
        Ok(())
    }

    fn serve(&mut self, back_ends: BackEnds) -> Result<Vec<Served>, Error> {
        let running = self.running.as_mut();
        let (vsock, fs) = running
            .and_then(|running| running.listeners.take())
            .ok_or(Error::NotRunning { operation: "serve" })?;
        let io = |source| Error::Io {
            context: "cannot start a device",
            source,
        };
        let served = |name, handle| Served { name, handle };
        let fs = fs::spawn(fs, back_ends.shared).map_err(io)?;
        let vsock = vsock::spawn(vsock, back_ends.sockets, back_ends.guest_cid).map_err(io)?;
        Ok(vec![served("vsock", vsock), served("virtio-fs", fs)])
    }

    fn is_restored(&self) -> bool {
        false
    }

    fn save(&mut self, _new: &New) -> Result<String, Error> {
        Err(unsupported("templates"))
    }

    fn pid(&self) -> Option<i32> {
        self.running.as_ref().map(|running| running.process.pid())
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
            let now = rustix::event::Timespec::default();
            match epoll::wait(&self.epoll, &mut ready, Some(&now)) {
                Ok(0) => return Ok(None),
                Ok(_) => {
                    let [event] = ready;
                    // Copied: the field is not aligned.
                    let source = event.data;
                    self.handle(source.u64())?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    return Err(Error::Io {
                        context: "cannot watch QEMU",
                        source: e.into(),
                    });
                }
            }
        }
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.command("pause", "stop")
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.command("resume", "cont")
    }

    fn resize(&mut self, wanted: VmSize) -> Result<(), Error> {
        let VmConfig { size, most, .. } = self.vm;
        if wanted.vcpus > most.vcpus || wanted.memory_mib > most.memory_mib {
            return Err(Error::TooLarge { wanted, most });
        }
        let emulated = matches!(self.accel, Accel::Tcg { .. });
        self.with_qmp("resize", |qmp, _, deadline| {
            let mut resizing = Resizing::new(qmp, deadline);
            // An emulated machine has them, see `CommandLine`.
            if wanted.vcpus > size.vcpus && !emulated {
                resizing.grow_vcpus(wanted.vcpus)?;
            }
            if wanted.memory_mib > size.memory_mib {
                resizing.grow_memory(wanted.memory_mib - size.memory_mib)?;
            }
            Ok(())
        })
    }

    fn attach(&mut self, id: &str, device: &Device) -> Result<Place, Error> {
        let directory = self.vm.sandbox_dir.clone();
        self.with_qmp("attaching a device", |qmp, hotplug, deadline| {
            hotplug.attach(qmp, id, device, &directory, deadline)
        })
    }

    fn detach(&mut self, id: &str) -> Result<(), Error> {
        self.with_qmp("detaching a device", |qmp, hotplug, deadline| {
            hotplug.detach(qmp, id, deadline)
        })
    }

    fn stop(&mut self, deadline: Duration) -> Result<Option<ExitStatus>, Error> {
        if let Some(running) = &mut self.running {
            let status = running.process.kill(deadline)?;
            self.finish(status);
        }
        Ok(self.exit)
    }
}

/// The first byte wakes, later ones wait for the timer.
const FIRST_BYTE: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);

fn watch(
    epoll: &OwnedFd,
    fd: &impl AsFd,
    source: Source,
    flags: epoll::EventFlags,
) -> io::Result<()> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(source as u64), flags)?;
    Ok(())
}

#[cfg(test)]
mod tests;
