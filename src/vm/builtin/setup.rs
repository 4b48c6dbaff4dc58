//! Making a machine: KVM's part of it, the memory, the board with its devices, and
//! its processors.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::boot;
use super::devices::Planned;
use super::layout::{KVM_IDENTITY_MAP, KVM_TSS, SERIAL_LINE};
use super::machine::Board;
use super::memory::{MemoryFile, Range, ranges};
use super::ports::{Console, Line, Ports, SavedSerial};
use super::processors::Processors;
use super::snapshot::format::{Chips, Processor};
use super::snapshot::{self, chips, processor};
use super::vcpu;
use super::virtio::rings::Events;
use super::virtio::saved::SavedDevice;
use crate::config;
use crate::vm::{Error, Templates, VmConfig};

/// What keeps a running machine together.
pub struct Machine {
    pub processors: Processors,
    kvm: Kvm,
    /// Most processors.
    places: u8,
    /// Regions KVM knows of.
    regions: u32,
    /// Memory that has been added, in bytes.
    added: u64,
    /// The devices' wires end here.
    pub vm: VmFd,
    pub board: Arc<Board>,
    /// The mapping KVM works with, which has to outlive the machine.
    pub memory: GuestMemoryMmap,
    /// The processors once more, of a machine that is to be saved.
    spare: Vec<VcpuFd>,
}

impl Machine {
    /// Makes more processors, which wait for the guest to start them.
    ///
    /// # Errors
    /// KVM refuses, or no thread is to be had; those that were made stay.
    pub fn grow_vcpus(&mut self, wanted: u32) -> Result<(), Error> {
        while (self.processors.count() as u32) < wanted {
            // Fewer than MAX_VCPUS.
            let number = self.processors.count() as u8;
            let vcpu = vcpu::create(&self.kvm, &self.vm, number, self.places)
                .map_err(kvm_error("making a virtual CPU"))?;
            self.processors.add(vcpu).map_err(|source| Error::Io {
                context: "cannot start a virtual CPU",
                source,
            })?;
        }
        Ok(())
    }

    /// Everything but the memory. The processors have been stopped, and the devices
    /// have when this returns: the machine is of no use any more.
    ///
    /// # Errors
    /// KVM refuses, or a device cannot be saved.
    pub fn save(&self) -> Result<Saved, snapshot::Error> {
        let (serial, devices) = self.board.save().map_err(|e| snapshot::Error::Unsavable {
            what: "machine's devices",
            reason: e.to_string(),
        })?;
        let msrs = processor::msrs(&self.kvm)?;
        let save = |vcpu| processor::save(vcpu, &msrs);
        Ok(Saved {
            processors: self.spare.iter().map(save).collect::<Result<_, _>>()?,
            chips: chips::save(&self.vm)?,
            serial,
            devices,
        })
    }

    /// Puts memory where there was room for it, up to this many bytes.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn grow_memory(&mut self, wanted: u64, room: Range) -> Result<(), Error> {
        let wanted = wanted.min(room.len);
        if wanted <= self.added {
            return Ok(());
        }
        let region = self.memory.find_region(GuestAddress(room.address));
        let start = region.map(|region| region.as_ptr() as u64).unwrap_or(0);
        let description = kvm_userspace_memory_region {
            slot: self.regions,
            guest_phys_addr: room.address + self.added,
            memory_size: wanted - self.added,
            userspace_addr: start + self.added,
            flags: 0,
        };
        // SAFETY: the range is part of a region that is mapped as long as the VM.
        unsafe { self.vm.set_user_memory_region(description) }
            .map_err(kvm_error("adding memory"))?;
        self.regions += 1;
        self.added = wanted;
        Ok(())
    }
}

/// What [`Machine::save`] says.
pub struct Saved {
    pub processors: Vec<Processor>,
    pub chips: Chips,
    pub serial: SavedSerial,
    pub devices: Vec<SavedDevice>,
}

fn kvm_error(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Kvm {
        operation,
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// What it takes to make a machine.
pub struct Plan {
    pub config: VmConfig,
    pub kernel: File,
    pub image: File,
    pub memory: MemoryFile,
    pub devices: Vec<Planned>,
    /// Takes the serial port's output, if anybody wants it.
    pub serial: Option<OwnedFd>,
    /// Becomes readable when a processor has something to report.
    pub reported: EventFd,
}

/// Makes the machine, loads what it boots, and starts it.
///
/// # Errors
/// KVM or the host refuse something, or the guest cannot be loaded.
pub fn start(plan: Plan) -> Result<Machine, Error> {
    let Plan { config, memory, .. } = plan;
    let (mut kernel, mut image) = (plan.kernel, plan.image);
    let size = memory.size();
    let memory: GuestMemoryMmap = memory.map().map_err(memory_error)?;
    let kvm = Kvm::new().map_err(kvm_error("opening /dev/kvm"))?;
    let vm = create_vm(&kvm).map_err(|(operation, e)| kvm_error(operation)(e))?;
    let regions = add_memory(&vm, &memory, size).map_err(kvm_error("adding memory"))?;
    // At most MAX_VCPUS.
    let (count, places) = (config.size.vcpus as u8, config.most.vcpus as u8);
    let mut line = parameters(&config);
    let is_template = match config.template {
        Templates::Make { parameter } => {
            line.insert_str(0, &format!("{parameter} "));
            true
        }
        Templates::None | Templates::Use { .. } => false,
    };
    let entry =
        boot::load(&memory, size, places, &mut kernel, &mut image, &line).map_err(Error::Boot)?;
    let vcpus = (0..count)
        .map(|number| vcpu::create(&kvm, &vm, number, places))
        .collect::<Result<Vec<_>, _>>()
        .map_err(kvm_error("making a virtual CPU"))?;
    if let Some(first) = vcpus.first() {
        vcpu::set_entry(first, entry).map_err(kvm_error("setting the first CPU up"))?;
    }
    let spare = match is_template {
        true => once_more(&vm, &vcpus)?,
        false => Vec::new(),
    };
    let board = board(serial(&vm, plan.serial, Ports::new)?)?;
    for (slot, device) in plan.devices.into_iter().enumerate() {
        insert(&board, &vm, slot, device)?;
    }
    Kvms {
        kvm,
        vm,
        vcpus,
        memory,
        regions,
    }
    .start(board, places, plan.reported, spare)
}

/// What is KVM's of a machine.
pub struct Kvms {
    pub kvm: Kvm,
    pub vm: VmFd,
    pub vcpus: Vec<VcpuFd>,
    pub memory: GuestMemoryMmap,
    pub regions: u32,
}

impl Kvms {
    /// Starts the processors.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn start(
        self,
        board: Board,
        places: u8,
        reported: EventFd,
        spare: Vec<VcpuFd>,
    ) -> Result<Machine, Error> {
        board
            .show(&self.vm, self.regions)
            .map_err(kvm_error("showing the devices' registers"))?;
        let board = Arc::new(board);
        let processors =
            Processors::start(self.vcpus, &board, reported).map_err(|source| Error::Io {
                context: "cannot start the virtual CPUs",
                source,
            })?;
        Ok(Machine {
            processors,
            kvm: self.kvm,
            places,
            regions: self.regions + 1,
            added: 0,
            vm: self.vm,
            board,
            memory: self.memory,
            spare,
        })
    }
}

/// The board with empty slots.
///
/// # Errors
/// As mmap(2).
pub fn board(ports: Ports) -> Result<Board, Error> {
    Board::new(ports).map_err(|source| Error::Io {
        context: "cannot make the registers of devices",
        source,
    })
}

/// Puts a device of every machine into its slot; returns its events.
///
/// # Errors
/// KVM refuses.
pub fn insert(
    board: &Board,
    vm: &VmFd,
    slot: usize,
    device: Planned,
) -> Result<Arc<Events>, Error> {
    board
        .insert(vm, slot, device.identity, device.rings, &device.events)
        .map_err(kvm_error("wiring a device"))?;
    Ok(device.events)
}

/// The same processors for somebody else than their threads.
fn once_more(vm: &VmFd, vcpus: &[VcpuFd]) -> Result<Vec<VcpuFd>, Error> {
    let again = |vcpu: &VcpuFd| {
        // SAFETY: the descriptor is open as long as the value lives.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let fd = fd.try_clone_to_owned().map_err(|source| Error::Io {
            context: "a descriptor",
            source,
        })?;
        // SAFETY: a descriptor of a processor that nobody else has.
        unsafe { vm.create_vcpu_from_rawfd(fd.into_raw_fd()) }
            .map_err(kvm_error("a virtual CPU once more"))
    };
    vcpus.iter().map(again).collect()
}

fn memory_error(source: io::Error) -> Error {
    Error::Io {
        context: "cannot create the guest's memory",
        source,
    }
}

/// An empty machine.
///
/// # Errors
/// KVM refuses; which operation.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, (&'static str, kvm_ioctls::Error)> {
    let at = |operation| move |e| (operation, e);
    let vm = loop {
        match kvm.create_vm() {
            // A signal in the middle of what may take a while.
            Err(e) if e.errno() == libc::EINTR => {}
            result => break result.map_err(at("making a virtual machine"))?,
        }
    };
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(at("placing the identity map"))?;
    vm.set_tss_address(KVM_TSS)
        .map_err(at("placing the task state"))?;
    vm.create_irq_chip()
        .map_err(at("making the interrupt controllers"))?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    })
    .map_err(at("making the timer"))?;
    Ok(vm)
}

/// Hands the memory the machine begins with to KVM; the number of its regions.
///
/// # Errors
/// KVM refuses.
pub fn add_memory(
    vm: &VmFd,
    memory: &GuestMemoryMmap,
    size: u64,
) -> Result<u32, kvm_ioctls::Error> {
    let booted = ranges(size).len();
    for (slot, region) in memory.iter().take(booted).enumerate() {
        let description = kvm_userspace_memory_region {
            // Two at most.
            slot: slot as u32,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, and its mapping is kept as long as the VM.
        unsafe { vm.set_user_memory_region(description) }?;
    }
    Ok(booted as u32)
}

/// The ports, of which the console's writes to `sink`.
///
/// # Errors
/// No descriptor is to be had, or KVM refuses.
pub fn serial<P>(
    vm: &VmFd,
    sink: Option<OwnedFd>,
    make: impl FnOnce(Line, Console) -> P,
) -> Result<P, Error> {
    let io = |source| Error::Io {
        context: "cannot make the console",
        source,
    };
    let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(io)?;
    vm.register_irqfd(&line, SERIAL_LINE)
        .map_err(kvm_error("wiring the console"))?;
    Ok(make(Line(line), Console(sink.map(Into::into))))
}

/// The machine's own parameters, then those of the agent and the user, who can
/// override them: the kernel takes the last.
pub fn parameters(config: &VmConfig) -> String {
    // reboot=k resets by the keyboard controller's port, which is told from a
    // triple fault. There is no PCI to be looked for.
    let mut line = String::from(match config.console {
        config::Console::Serial => "console=ttyS0 8250.nr_uarts=1",
        config::Console::Virtio => "console=hvc0 8250.nr_uarts=0",
        config::Console::None => "8250.nr_uarts=0",
    });
    line.push_str(" panic=-1 reboot=k pci=off");
    if !config.verbose_console {
        line.push_str(" quiet loglevel=4");
    }
    if config.most.vcpus > config.size.vcpus {
        line.push_str(&format!(" maxcpus={}", config.size.vcpus));
    }
    if config.most.memory_mib > config.size.memory_mib {
        // Memory that is added is used at once, part of it by the kernel itself, which
        // needs more the more there is.
        line.push_str(" memhp_default_state=online");
    }
    if !config.kernel_params.is_empty() {
        line.push(' ');
        line.push_str(&config.kernel_params);
    }
    line
}
