//! What is behind the I/O ports: a serial port for the console, and the ways in
//! which a guest ends its machine.

use std::fs::File;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::acpi::SOFT_OFF;
use super::layout::{KEYBOARD_PORT, PANIC_PORT, PM_CONTROL_LEN, PM_CONTROL_PORT, SERIAL_PORT};

/// What the guest has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    PowerOff,
    Reset,
    /// It goes on, usually with a reset.
    ReportPanic,
}

/// Control register of power management (ACPI 6.5, 4.8.3.2.1).
const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Pulses the reset line of the processor.
const KEYBOARD_RESET: u8 = 0xfe;
/// Supported events, and the one that is a panic.
const PANIC_EVENTS: u8 = 1;

/// The interrupt line of the serial port.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the console's output goes: a pipe that never blocks. What does not fit is
/// lost, because the guest's processors do not wait for the host.
pub struct Console(pub Option<File>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(pipe) = &mut self.0 {
            // A full pipe, or nobody who reads.
            let _ = pipe.write(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The registers of the serial port. Nothing is ever in its buffer: nobody types.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

/// All ports.
pub struct Ports {
    serial: Serial<Line, NoEvents, Console>,
    /// Each is an exit of a processor.
    serial_accesses: u64,
}

impl Ports {
    pub fn new(line: Line, console: Console) -> Ports {
        Ports {
            serial: Serial::new(line, console),
            serial_accesses: 0,
        }
    }

    /// How often the guest has touched the serial port.
    pub fn serial_accesses(&self) -> u64 {
        self.serial_accesses
    }

    /// The only ones that remember something.
    pub fn save(&self) -> SavedSerial {
        let state = self.serial.state();
        SavedSerial {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// Ports that go on where saved ones were.
    ///
    /// # Errors
    /// An interrupt that was due cannot be signalled.
    pub fn restore(saved: &SavedSerial, line: Line, console: Console) -> io::Result<Ports> {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: Vec::new(),
        };
        let serial = Serial::from_state(&state, line, NoEvents, console)
            .map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Ports {
            serial,
            serial_accesses: 0,
        })
    }

    /// The guest reads. What is not there reads as ones.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (SERIAL_PORT.., [value]) if port < SERIAL_PORT + 8 => {
                self.serial_accesses += 1;
                // Below 8.
                *value = self.serial.read((port - SERIAL_PORT) as u8);
            }
            // Neither input nor output is waiting.
            (KEYBOARD_PORT, [value]) => *value = 0,
            (PANIC_PORT, [value]) => *value = PANIC_EVENTS,
            (PM_CONTROL_PORT, data) => {
                let value = SCI_ENABLED.to_le_bytes();
                let len = data.len().min(value.len());
                data[..len].copy_from_slice(&value[..len]);
            }
            (port, data) if is_power_management(port) => data.fill(0),
            _ => {}
        }
    }

    /// The guest writes.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<Request> {
        match (port, data) {
            (SERIAL_PORT.., [value]) if port < SERIAL_PORT + 8 => {
                self.serial_accesses += 1;
                // It fails when the line's counter is full, that is, when it is set.
                let _ = self.serial.write((port - SERIAL_PORT) as u8, *value);
                None
            }
            (KEYBOARD_PORT, [KEYBOARD_RESET]) => Some(Request::Reset),
            (PANIC_PORT, [event]) if event & PANIC_EVENTS != 0 => Some(Request::ReportPanic),
            (PM_CONTROL_PORT, [low, high]) => {
                let value = u16::from_le_bytes([*low, *high]);
                let kind = value >> SLEEP_TYPE_SHIFT & 7;
                let off = value & SLEEP_ENABLE != 0 && kind == u16::from(SOFT_OFF);
                off.then_some(Request::PowerOff)
            }
            _ => None,
        }
    }
}

fn is_power_management(port: u16) -> bool {
    use super::layout::PM_EVENT_PORT;
    (PM_EVENT_PORT..PM_CONTROL_PORT + u16::from(PM_CONTROL_LEN)).contains(&port)
}

#[cfg(test)]
mod tests {
    use super::super::layout::PM_EVENT_PORT;
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Read;

    fn ports() -> (Ports, File) {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
        let line = Line(EventFd::new(0).unwrap());
        let console = Console(Some(File::from(writer)));
        (Ports::new(line, console), reader.into())
    }

    #[test]
    fn each_way_to_end_is_told_from_the_others() {
        let (mut ports, _) = ports();
        let off = (1u16 << 13 | 5 << 10).to_le_bytes();
        assert_eq!(ports.write(PM_CONTROL_PORT, &off), Some(Request::PowerOff));
        let sleep = (1u16 << 13 | 3 << 10).to_le_bytes();
        assert_eq!(ports.write(PM_CONTROL_PORT, &sleep), None);
        assert_eq!(ports.write(KEYBOARD_PORT, &[0xfe]), Some(Request::Reset));
        assert_eq!(ports.write(KEYBOARD_PORT, &[0xfe, 0]), None);
        assert_eq!(ports.write(PANIC_PORT, &[1]), Some(Request::ReportPanic));
        assert_eq!(ports.write(PANIC_PORT, &[2]), None);
    }

    #[test]
    fn nothing_but_what_is_there_answers() {
        let (mut ports, _) = ports();
        let mut read = |port, len| {
            let mut data = vec![7; len];
            ports.read(port, &mut data);
            data
        };
        assert_eq!(read(0x80, 4), [0xff; 4]);
        assert_eq!(read(SERIAL_PORT, 2), [0xff; 2]);
        assert_eq!(read(SERIAL_PORT + 8, 1), [0xff]);
        assert_eq!(read(KEYBOARD_PORT, 1), [0]);
        assert_eq!(read(PM_CONTROL_PORT, 2), [1, 0]);
        assert_eq!(read(PM_CONTROL_PORT, 4), [1, 0, 0xff, 0xff]);
        assert_eq!(read(PM_EVENT_PORT, 4), [0; 4]);
    }

    #[test]
    fn the_console_takes_more_than_anybody_reads() {
        let (mut ports, mut reader) = ports();
        for byte in b"hello\n" {
            assert_eq!(ports.write(SERIAL_PORT, &[*byte]), None);
        }
        let mut text = [0; 6];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello\n");
        assert_eq!(ports.serial_accesses(), 6);
        for _ in 0..100_000 {
            ports.write(SERIAL_PORT, b"x");
        }
        drop(reader);
        ports.write(SERIAL_PORT, b"x");
    }

    #[test]
    fn saved_registers_are_those_of_the_ports_that_go_on() {
        let (mut ports, _reader) = ports();
        for (offset, value) in [
            (1, 2),
            (3, 0x83),
            (0, 12),
            (1, 34),
            (3, 3),
            (4, 11),
            (7, 99),
        ] {
            assert_eq!(ports.write(SERIAL_PORT + offset, &[value]), None);
        }
        let saved = ports.save();
        let json = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<SavedSerial>(&json).unwrap(), saved);
        let line = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let interrupts = line.try_clone().unwrap();
        let mut restored = Ports::restore(&saved, Line(line), Console(None)).unwrap();
        assert_eq!(restored.save(), saved);
        for offset in [1, 3, 4, 7] {
            let mut values = [[0], [0]];
            ports.read(SERIAL_PORT + offset, &mut values[0]);
            restored.read(SERIAL_PORT + offset, &mut values[1]);
            assert_eq!(values[0], values[1], "{offset}");
        }
        // An interrupt that was due comes.
        assert_eq!(ports.write(SERIAL_PORT, b"x"), None);
        let line = interrupts.try_clone().unwrap();
        let _ = Ports::restore(&ports.save(), Line(line), Console(None)).unwrap();
        assert!(interrupts.read().is_ok());
    }
}
