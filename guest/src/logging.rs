//! Where the agent's words go: the kernel log.
//!
//! The serial console is slow (a character is an exit to the hypervisor), so
//! only what a person would act on is logged by default. Records go through
//! `/dev/kmsg`, whose level decides whether they reach the console at all.
//!
//! A panic or another fatal error of PID 1 ends the machine: the host sees that
//! at once, while a machine that hangs would be seen only by a deadline.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use kuasar_runv_protocol::stream::{FIRST_PRESERVED, MAX_PRESERVED};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::sys;

/// Above every number of a preserved descriptor.
const ABOVE_PRESERVED: i32 = FIRST_PRESERVED + MAX_PRESERVED as i32;
/// Longest record /dev/kmsg takes in one write is a little under 1 KiB.
const MAX_RECORD: usize = 900;

static KMSG: OnceLock<File> = OnceLock::new();
/// False in the zygote and its descendants, whose end must not be the machine's.
static OWNS_MACHINE: AtomicBool = AtomicBool::new(true);

struct KernelLog;

static LOGGER: KernelLog = KernelLog;

impl Log for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Dependencies log per connection and per message; only their
        // complaints are of interest.
        metadata.level() <= log::max_level()
            && (metadata.level() <= Level::Warn || metadata.target().starts_with("kuasar"))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let priority = match record.level() {
            // Both reach the console, and so the host's log.
            Level::Error | Level::Warn => 3,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        write_record(priority, &record.args().to_string());
    }

    fn flush(&self) {}
}

fn write_record(priority: u8, message: &str) {
    let mut line = format!("<{priority}>kuasar-agent: {}", message.replace('\n', " "));
    if line.len() > MAX_RECORD {
        let mut end = MAX_RECORD;
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
    }
    line.push('\n');
    match KMSG.get() {
        // One write is one record. There is nowhere left to report a failure.
        Some(mut kmsg) => drop(kmsg.write_all(line.as_bytes())),
        None => drop(std::io::stderr().write_all(line.as_bytes())),
    }
}

/// Starts logging to the kernel log.
pub fn init(level: LevelFilter) {
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg");
    // Helpers put what a process is to have at low numbers, whatever is there.
    if let Ok(kmsg) = kmsg.and_then(|file| sys::move_above(file.into(), ABOVE_PRESERVED)) {
        // A second call keeps the first file, which is as good.
        drop(KMSG.set(kmsg.into()));
    }
    if level >= LevelFilter::Debug {
        // The kernel drops more than a few records per second otherwise. Only a
        // loss of debug output if it fails.
        drop(std::fs::write("/proc/sys/kernel/printk_devkmsg", "on"));
    }
    // Fails only when a logger is set already.
    drop(log::set_logger(&LOGGER));
    log::set_max_level(level);
}

/// Called in every process that is not PID 1 of the machine.
pub fn disown_machine() {
    OWNS_MACHINE.store(false, Ordering::Relaxed);
}

/// Makes a panic of PID 1 end the machine.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        write_record(0, &format!("panic: {info}"));
        power_off();
    }));
}

/// Reports an error that PID 1 cannot go on from and ends the machine.
pub fn fatal(message: &str) {
    write_record(0, &format!("fatal: {message}"));
    power_off();
}

/// Ends the machine, if this process is in charge of one.
pub fn power_off() {
    if !OWNS_MACHINE.load(Ordering::Relaxed) || std::process::id() != 1 {
        return;
    }
    // SAFETY: plain integers. Both return only on failure; then the kernel
    // panics when PID 1 exits.
    unsafe {
        libc::reboot(libc::RB_POWER_OFF);
        libc::reboot(libc::RB_AUTOBOOT);
    }
}
