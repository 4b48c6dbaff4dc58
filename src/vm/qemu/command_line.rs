//! QEMU's command line as data: [`CommandLine`] says what the machine is,
//! [`CommandLine::args`] spells it.
//!
//! What is chosen here for the start-up time was measured under emulation; the
//! figures are in docs/configuration.md.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::hotplug::{BOOT_SLOT, BUS};
use crate::config::{Console, HugePages};
use crate::vm::VmSize;

/// How QEMU executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accel {
    Kvm,
    /// With the frequency of the host's time stamp counter, when it has one that
    /// can serve as a clock.
    Tcg {
        tsc_khz: Option<u32>,
    },
}

/// A QEMU process of one VM. Descriptors are numbers in that process.
#[derive(Debug)]
pub(super) struct CommandLine<'a> {
    pub name: &'a str,
    pub accel: Accel,
    pub size: VmSize,
    /// What it may grow to.
    pub most: VmSize,
    pub firmware: &'a Path,
    pub kernel_fd: i32,
    pub initrd_fd: i32,
    pub kernel_params: &'a str,
    pub verbose_console: bool,
    pub console: Console,
    pub huge_pages: HugePages,
    pub vsock_socket: &'a str,
    pub fs_socket: &'a str,
    pub fs_tag: &'a str,
    /// Takes the guest's console.
    pub console_fd: i32,
    /// QEMU's end of the control connection.
    pub qmp_fd: i32,
    /// Confine QEMU with its seccomp filter.
    pub sandbox: bool,
    pub extra_args: &'a [String],
}

impl CommandLine<'_> {
    pub(super) fn args(&self) -> Vec<OsString> {
        let mut args = Args::default();
        self.machine(&mut args);
        self.boot(&mut args);
        self.devices(&mut args);
        self.control(&mut args);
        args.0.extend(self.extra_args.iter().map(OsString::from));
        args.0
    }

    fn machine(&self, args: &mut Args) {
        args.flag("-no-user-config").flag("-nodefaults");
        args.option("-name", Props::of(self.name));
        args.option(
            "-machine",
            Props::of("q35")
                .with("memory-backend", "ram")
                .with("dump-guest-core", "off")
                .with("graphics", "off")
                .with("sata", "off")
                .with("smbus", "off")
                .with("usb", "off")
                .with("vmport", "off")
                .with("hpet", "off"),
        );
        match self.accel {
            Accel::Kvm => {
                args.option("-accel", Props::of("kvm"));
                args.option("-cpu", Props::of("host"));
            }
            Accel::Tcg { .. } => {
                args.option("-accel", Props::of("tcg").with("tb-size", TB_SIZE_MIB));
                // With these features the guest copies by `rep movsb`, which an
                // emulator executes one byte at a time.
                let cpu = Props::of("max").with("erms", "off").with("fsrm", "off");
                args.option("-cpu", cpu);
            }
        }
        self.processors(args);
        let memory = format!("{}M", self.size.memory_mib);
        let mut size = Props::of(&memory);
        if self.most.memory_mib > self.size.memory_mib {
            size = size.with("maxmem", format!("{}M", self.most.memory_mib));
        }
        args.option("-m", size);
        // Shared, because vhost-user back ends map it.
        let ram = Props::of("memory-backend-memfd")
            .with("id", "ram")
            .with("size", memory)
            .with("share", "on");
        let ram = self.of_pages(ram);
        // Or a page that is missing later is a bus error.
        let prealloc = self.huge_pages.reserved().is_some();
        args.option(
            "-object",
            if prealloc {
                ram.with("prealloc", "on")
            } else {
                ram
            },
        );
        // Tables for hot-plug that nobody reads.
        args.option(
            "-global",
            Props::of("ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
        );
        args.option("-display", Props::of("none"));
        args.flag("-no-reboot");
    }

    /// CPUs, and places for those that are plugged in later. Linux does not believe in
    /// free places unless it knows the hypervisor, and emulation it does not know
    /// (`acpi_is_processor_usable` of arch/x86/kernel/acpi/boot.c): there all CPUs
    /// are present from the start, and the kernel uses as many as it is told to.
    fn processors(&self, args: &mut Args) {
        let Self { size, most, .. } = self;
        let cpus = match self.accel {
            Accel::Tcg { .. } => Props::of(most.vcpus.to_string()),
            Accel::Kvm if most.vcpus > size.vcpus => {
                Props::of(size.vcpus.to_string()).with("maxcpus", most.vcpus.to_string())
            }
            Accel::Kvm => Props::of(size.vcpus.to_string()),
        };
        args.option("-smp", cpus);
    }

    /// What gives memory to the guest and takes it back. Neither has a cost on the
    /// host before the guest touches it.
    fn memory_devices(&self, args: &mut Args) {
        let room = self.most.memory_mib.saturating_sub(self.size.memory_mib);
        if room > 0 {
            let ram = Props::of("memory-backend-memfd")
                .with("id", "more-ram")
                .with("size", format!("{room}M"))
                .with("share", "on");
            let device = Props::of("virtio-mem-pci")
                .with("id", MORE_MEMORY)
                .with("memdev", "more-ram")
                .with("requested-size", "0");
            // Reserved pages are taken when the guest gets them.
            let (ram, device) = match self.huge_pages.reserved() {
                Some(_) => (ram.with("reserve", "off"), device.with("prealloc", "on")),
                None => (ram, device),
            };
            args.option("-object", self.of_pages(ram));
            args.option("-device", device);
        }
        // They do not go back to the host before the end.
        let reports = if self.huge_pages.reserved().is_some() {
            "off"
        } else {
            "on"
        };
        args.option(
            "-device",
            Props::of("virtio-balloon-pci").with("free-page-reporting", reports),
        );
    }

    /// Memory of the pages that are wanted. Transparent ones QEMU asks for by itself.
    fn of_pages(&self, ram: Props) -> Props {
        match self.huge_pages.reserved() {
            Some(page) => ram
                .with("hugetlb", "on")
                .with("hugetlbsize", format!("{}M", page >> 20)),
            None => ram,
        }
    }

    fn console(&self, args: &mut Args) {
        let chardev = |args: &mut Args| {
            args.option(
                "-chardev",
                Props::of("file")
                    .with("id", "console")
                    .with("path", fd_path(self.console_fd)),
            );
        };
        match self.console {
            Console::Serial => {
                chardev(args);
                args.option("-serial", Props::of("chardev:console"));
            }
            Console::Virtio => {
                chardev(args);
                args.option(
                    "-device",
                    Props::of("virtio-serial-pci").with("max_ports", "1"),
                );
                args.option(
                    "-device",
                    Props::of("virtconsole").with("chardev", "console"),
                );
            }
            Console::None => {}
        }
    }

    fn boot(&self, args: &mut Args) {
        args.value("-bios", self.firmware);
        args.value("-kernel", fd_path(self.kernel_fd));
        args.value("-initrd", fd_path(self.initrd_fd));
        args.value("-append", self.append());
    }

    /// The machine's own parameters, then those of the agent and the user,
    /// who can override them: the kernel takes the last.
    fn append(&self) -> String {
        // panic=-1 resets at once, which ends QEMU; reboot=t because the triple
        // fault works without a keyboard controller or ACPI.
        let mut params = String::from(match self.console {
            Console::Serial => "console=ttyS0 ",
            Console::Virtio => "console=hvc0 8250.nr_uarts=0 ",
            Console::None => "8250.nr_uarts=0 ",
        });
        params.push_str("panic=-1 reboot=t");
        if !self.verbose_console {
            params.push_str(" quiet loglevel=4");
        }
        if self.most.memory_mib > self.size.memory_mib {
            // Memory that is plugged in is used at once, part of it by the kernel
            // itself, which needs more the more there is.
            params.push_str(" memhp_default_state=online");
        }
        if let Accel::Tcg { tsc_khz } = self.accel {
            // The check of the timer interrupt fails when the host is busy.
            params.push_str(" no_timer_check");
            // With one CPU the kernel takes the lock prefix out of 8,000
            // instructions, a tenth of the boot; emulation ignores it anyway.
            params.push_str(" noreplace-smp");
            // The file server is another process: QEMU does not see it write to the
            // guest's memory, and would go on executing what it has translated of a page
            // that was reused for another program's code. It sees the guest clear it.
            params.push_str(" init_on_alloc=1");
            if self.most.vcpus > self.size.vcpus {
                params.push_str(&format!(" maxcpus={}", self.size.vcpus));
            }
            if let Some(khz) = tsc_khz {
                // So does the guest's measurement, and then the kernel's watchdog
                // takes the counter for broken.
                params.push_str(&format!(" tsc=reliable tsc_early_khz={khz}"));
            }
        }
        if !self.kernel_params.is_empty() {
            params.push(' ');
            params.push_str(self.kernel_params);
        }
        params
    }

    fn devices(&self, args: &mut Args) {
        args.option(
            "-chardev",
            Props::of("socket")
                .with("id", "vsock")
                .with("path", self.vsock_socket),
        );
        args.option(
            "-device",
            Props::of("vhost-user-vsock-pci").with("chardev", "vsock"),
        );
        args.option(
            "-chardev",
            Props::of("socket")
                .with("id", "fs")
                .with("path", self.fs_socket),
        );
        args.option(
            "-device",
            Props::of("vhost-user-fs-pci")
                .with("chardev", "fs")
                .with("tag", self.fs_tag)
                .with("queue-size", "1024"),
        );
        args.option(
            "-device",
            Props::of("pci-bridge")
                .with("id", BUS)
                .with("chassis_nr", "1"),
        );
        args.option(
            "-device",
            Props::of("virtio-rng-pci")
                .with("bus", BUS)
                .with("addr", BOOT_SLOT)
                .with("disable-legacy", "on"),
        );
        self.memory_devices(args);
        self.console(args);
    }

    fn control(&self, args: &mut Args) {
        args.option(
            "-chardev",
            Props::of("socket")
                .with("id", "qmp")
                .with("fd", self.qmp_fd.to_string()),
        );
        args.option("-mon", Props::of("chardev=qmp").with("mode", "control"));
        if self.sandbox {
            args.option(
                "-sandbox",
                Props::of("on")
                    .with("obsolete", "deny")
                    .with("elevateprivileges", "deny")
                    .with("spawn", "deny")
                    .with("resourcecontrol", "deny"),
            );
        }
    }
}

/// Id of the device that gives the guest more memory.
pub(super) const MORE_MEMORY: &str = "more-memory";

/// Translated code of a guest, in MiB. QEMU would reserve an eighth of the host's
/// memory, 1 GiB at most.
const TB_SIZE_MIB: &str = "256";

/// A path that opens descriptor `fd` of the process itself anew, so that it need
/// not be able to reach the file by name.
fn fd_path(fd: i32) -> String {
    format!("/proc/self/fd/{fd}")
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, flag: &str) -> &mut Args {
        self.0.push(flag.into());
        self
    }

    /// An option whose value is taken as it is.
    fn value(&mut self, flag: &str, value: impl AsRef<OsStr>) {
        self.0.push(flag.into());
        self.0.push(value.as_ref().into());
    }

    /// An option whose value is a list of properties.
    fn option(&mut self, flag: &str, props: Props) {
        self.0.push(flag.into());
        self.0.push(props.0.into());
    }
}

/// `first,key=value,...`; a comma in a value is written twice.
struct Props(String);

impl Props {
    fn of(first: impl AsRef<str>) -> Props {
        Props(first.as_ref().replace(',', ",,"))
    }

    fn with(mut self, key: &str, value: impl AsRef<str>) -> Props {
        self.0.push(',');
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(&value.as_ref().replace(',', ",,"));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command_line() -> CommandLine<'static> {
        CommandLine {
            name: "pod,1",
            accel: Accel::Kvm,
            size: VmSize {
                vcpus: 2,
                memory_mib: 768,
            },
            most: VmSize {
                vcpus: 2,
                memory_mib: 768,
            },
            firmware: Path::new("/usr/share/qemu/qboot.rom"),
            qmp_fd: 3,
            kernel_fd: 4,
            initrd_fd: 5,
            console_fd: 6,
            kernel_params: "kuasar.log=info user=1",
            verbose_console: false,
            console: Console::Serial,
            huge_pages: HugePages::Off,
            vsock_socket: "vsock.sock",
            fs_socket: "fs.sock",
            fs_tag: "kuasar-share",
            sandbox: true,
            extra_args: &[],
        }
    }

    fn lines(command_line: &CommandLine<'_>) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for arg in command_line.args() {
            let arg = arg.into_string().unwrap();
            match lines.last_mut() {
                Some(line) if !arg.starts_with('-') => *line = format!("{line} {arg}"),
                _ => lines.push(arg),
            }
        }
        lines
    }

    const WITH_KVM: &str = "\
-no-user-config
-nodefaults
-name pod,,1
-machine q35,memory-backend=ram,dump-guest-core=off,graphics=off,sata=off,smbus=off,usb=off,vmport=off,hpet=off
-accel kvm
-cpu host
-smp 2
-m 768M
-object memory-backend-memfd,id=ram,size=768M,share=on
-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off
-display none
-no-reboot
-bios /usr/share/qemu/qboot.rom
-kernel /proc/self/fd/4
-initrd /proc/self/fd/5
-append console=ttyS0 panic=-1 reboot=t quiet loglevel=4 kuasar.log=info user=1
-chardev socket,id=vsock,path=vsock.sock
-device vhost-user-vsock-pci,chardev=vsock
-chardev socket,id=fs,path=fs.sock
-device vhost-user-fs-pci,chardev=fs,tag=kuasar-share,queue-size=1024
-device pci-bridge,id=hotplug,chassis_nr=1
-device virtio-rng-pci,bus=hotplug,addr=1f,disable-legacy=on
-device virtio-balloon-pci,free-page-reporting=on
-chardev file,id=console,path=/proc/self/fd/6
-serial chardev:console
-chardev socket,id=qmp,fd=3
-mon chardev=qmp,mode=control
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

    #[test]
    fn with_kvm() {
        assert_eq!(lines(&command_line()), WITH_KVM.lines().collect::<Vec<_>>());
    }

    #[test]
    fn with_emulation() {
        let emulated = CommandLine {
            accel: Accel::Tcg {
                tsc_khz: Some(2_445_426),
            },
            ..command_line()
        };
        let expected = WITH_KVM
            .replace("-accel kvm", "-accel tcg,tb-size=256")
            .replace("-cpu host", "-cpu max,erms=off,fsrm=off")
            .replace(
                "loglevel=4",
                "loglevel=4 no_timer_check noreplace-smp init_on_alloc=1 tsc=reliable tsc_early_khz=2445426",
            );
        assert_eq!(lines(&emulated), expected.lines().collect::<Vec<_>>());
    }

    #[test]
    fn a_machine_that_may_grow_has_places_for_it() {
        let growing = CommandLine {
            most: VmSize {
                vcpus: 4,
                memory_mib: 1024,
            },
            ..command_line()
        };
        let emulated = CommandLine {
            accel: Accel::Tcg { tsc_khz: None },
            kernel_params: "",
            ..growing
        };
        let (lines, emulated) = (lines(&growing), lines(&emulated));
        assert!(emulated.iter().any(|l| l == "-smp 4"));
        assert!(
            emulated.iter().any(|l| l.ends_with(" maxcpus=2")),
            "{emulated:#?}"
        );
        for line in [
            "-smp 2,maxcpus=4",
            "-m 768M,maxmem=1024M",
            "-object memory-backend-memfd,id=ram,size=768M,share=on",
            "-object memory-backend-memfd,id=more-ram,size=256M,share=on",
            "-device virtio-mem-pci,id=more-memory,memdev=more-ram,requested-size=0",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn consoles_are_what_the_kernel_is_told() {
        let with = |console| {
            lines(&CommandLine {
                console,
                ..command_line()
            })
        };
        let virtio = with(Console::Virtio);
        for line in [
            "-append console=hvc0 8250.nr_uarts=0 panic=-1 reboot=t quiet loglevel=4 kuasar.log=info user=1",
            "-chardev file,id=console,path=/proc/self/fd/6",
            "-device virtio-serial-pci,max_ports=1",
            "-device virtconsole,chardev=console",
        ] {
            assert!(virtio.iter().any(|l| l == line), "{line} in {virtio:#?}");
        }
        assert!(!virtio.iter().any(|l| l.starts_with("-serial")));
        let none = with(Console::None);
        assert!(!none.iter().any(|l| l.contains("console")), "{none:#?}");
    }

    #[test]
    fn huge_pages_are_taken_when_the_guest_gets_them_and_kept() {
        let huge = CommandLine {
            huge_pages: HugePages::Mib2,
            most: VmSize {
                vcpus: 2,
                memory_mib: 1024,
            },
            ..command_line()
        };
        let lines = lines(&huge);
        for line in [
            "-object memory-backend-memfd,id=ram,size=768M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on",
            "-object memory-backend-memfd,id=more-ram,size=256M,share=on,reserve=off,hugetlb=on,hugetlbsize=2M",
            "-device virtio-mem-pci,id=more-memory,memdev=more-ram,requested-size=0,prealloc=on",
            "-device virtio-balloon-pci,free-page-reporting=off",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn the_user_has_the_last_word() {
        let extra = ["-device".to_owned(), "pvpanic".to_owned()];
        let changed = CommandLine {
            accel: Accel::Tcg { tsc_khz: None },
            kernel_params: "",
            verbose_console: true,
            sandbox: false,
            extra_args: &extra,
            ..command_line()
        };
        let lines = lines(&changed);
        assert!(lines.contains(
            &"-append console=ttyS0 panic=-1 reboot=t no_timer_check noreplace-smp init_on_alloc=1".into()
        ));
        assert!(!lines.iter().any(|line| line.starts_with("-sandbox")));
        assert_eq!(lines.last().unwrap(), "-device pvpanic");
    }
}
