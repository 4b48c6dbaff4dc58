//! Growing a running machine.
//!
//! CPUs are plugged into places the machine was started with (`-smp maxcpus=`),
//! memory comes from a virtio-mem device that had none to give at first. QEMU
//! answers as soon as the guest has been told; taking the new parts into use is
//! the guest's.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::command_line::MORE_MEMORY;
use super::qmp::{Qmp, QmpError};

/// Most places for CPUs that are looked at.
const MAX_PLACES: usize = 1024;

/// Sends the requests of one change, which share a deadline.
pub(super) struct Resizing<'a> {
    qmp: &'a mut Qmp,
    end: Instant,
}

impl Resizing<'_> {
    pub(super) fn new(qmp: &mut Qmp, deadline: Duration) -> Resizing<'_> {
        let end = Instant::now() + deadline;
        Resizing { qmp, end }
    }

    /// Plugs CPUs in until there are `wanted`. Those that were plugged in before a
    /// failure stay, unused.
    pub(super) fn grow_vcpus(&mut self, wanted: u32) -> Result<(), QmpError> {
        let places = self.call("query-hotpluggable-cpus", None)?;
        let places = places.as_array().map_or(&[][..], Vec::as_slice);
        let places = &places[..places.len().min(MAX_PLACES)];
        let taken = |place: &&Value| place["qom-path"].is_string();
        let present = places.iter().filter(taken).count();
        let missing = usize::try_from(wanted).unwrap_or(usize::MAX);
        let mut missing = missing.saturating_sub(present);
        // QEMU lists the last place first.
        for place in places.iter().rev().filter(|place| !taken(place)) {
            if missing == 0 {
                break;
            }
            self.call("device_add", Some(cpu(place)?))?;
            missing -= 1;
        }
        match missing {
            0 => Ok(()),
            _ => Err(QmpError::Malformed(
                "fewer places for CPUs than it was started with".into(),
            )),
        }
    }

    /// Offers the guest so much besides what it was started with.
    pub(super) fn grow_memory(&mut self, added_mib: u32) -> Result<(), QmpError> {
        let arguments = json!({
            "path": format!("/machine/peripheral/{MORE_MEMORY}"),
            "property": "requested-size",
            "value": u64::from(added_mib) << 20,
        });
        self.call("qom-set", Some(arguments)).map(drop)
    }

    fn call(&mut self, command: &'static str, arguments: Option<Value>) -> Result<Value, QmpError> {
        let left = self.end.saturating_duration_since(Instant::now());
        self.qmp.execute(command, arguments, left)
    }
}

/// The arguments of `device_add` for a place.
fn cpu(place: &Value) -> Result<Value, QmpError> {
    let malformed = || QmpError::Malformed("a place for a CPU without type or place".into());
    let mut arguments = place["props"].as_object().ok_or_else(malformed)?.clone();
    let driver = place["type"].as_str().ok_or_else(malformed)?;
    arguments.insert("driver".into(), json!(driver));
    Ok(Value::Object(arguments))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    /// Answers one request after the other and returns what was asked.
    fn qemu(socket: UnixStream, answers: Vec<Value>) -> Vec<Value> {
        let mut writer = socket.try_clone().unwrap();
        let mut requests = Vec::new();
        let mut lines = BufReader::new(socket).lines();
        let _negotiation = lines.next();
        for (answer, line) in answers.into_iter().zip(lines) {
            let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let mut answer = answer;
            answer["id"] = request["id"].clone();
            writeln!(writer, "{answer}").unwrap();
            requests.push(request);
        }
        requests
    }

    fn places() -> Value {
        let place = |core: u32| {
            json!({"type": "max-x86_64-cpu", "vcpus-count": 1,
            "props": {"core-id": core, "thread-id": 0, "socket-id": 0}})
        };
        let mut first = place(0);
        first["qom-path"] = json!("/machine/unattached/device[0]");
        json!({"return": [place(2), place(1), first]})
    }

    #[test]
    fn cpus_are_plugged_into_the_first_free_places() {
        let (mut qmp, socket) = Qmp::new().unwrap();
        let answers = vec![places(), json!({"return": {}})];
        let other = thread::spawn(|| qemu(socket, answers));
        Resizing::new(&mut qmp, DEADLINE).grow_vcpus(2).unwrap();
        let requests = other.join().unwrap();
        assert_eq!(requests[1]["execute"], "device_add");
        let expected =
            json!({"driver": "max-x86_64-cpu", "core-id": 1, "thread-id": 0, "socket-id": 0});
        assert_eq!(requests[1]["arguments"], expected);
    }

    #[test]
    fn nonsense_about_cpus_is_an_error() {
        for answer in [
            json!({"return": {}}),
            json!({"return": []}),
            json!({"return": [{"type": 5}, {}]}),
            json!({"error": {"desc": "no"}}),
        ] {
            let (mut qmp, socket) = Qmp::new().unwrap();
            let other = thread::spawn(|| qemu(socket, vec![answer]));
            assert!(Resizing::new(&mut qmp, DEADLINE).grow_vcpus(2).is_err());
            other.join().unwrap();
        }
    }

    #[test]
    fn memory_is_what_was_added_to_the_start() {
        let (mut qmp, socket) = Qmp::new().unwrap();
        let other = thread::spawn(|| qemu(socket, vec![json!({"return": {}})]));
        Resizing::new(&mut qmp, DEADLINE).grow_memory(256).unwrap();
        let requests = other.join().unwrap();
        assert_eq!(requests[0]["arguments"]["value"], 256 << 20);
    }
}
