//! Entry points for fuzz targets: where the agent reads what others have written, called
//! with any bytes. `fuzz/` has the targets; `docs/testing.md` says how to run them.

use std::path::Path;

use kuasar_runv_protocol::agent::{
    CreateContainerRequest, ExecProcessRequest, SignalProcessRequest, UpdateContainerRequest,
};
use kuasar_runv_protocol::event::decode_from_host;
use kuasar_runv_protocol::loopback::{
    Frame as LoopbackFrame, REQUEST_PREFIX_LEN, Request as LoopbackRequest,
};
use kuasar_runv_protocol::network::ApplyRequest;
use kuasar_runv_protocol::resources::GrowRequest;
use kuasar_runv_protocol::storage::{AddVolumeRequest, RemoveVolumeRequest};
use kuasar_runv_protocol::stream::{Frame, HEADER_PREFIX_LEN, Header, MAX_ID_LEN};
use oci_spec::runtime::{LinuxDeviceCgroup, Process, Spec};
use protobuf::Message;

use crate::cgroup::{devices, settings};
use crate::helper::{passwd, spec};
use crate::zygote::request::Request;
use crate::{network, storage};

/// Longest name of an interface (linux/if.h).
const MAX_INTERFACE: usize = 15;

/// Requests of the host, a container's /etc/passwd, and what the agent's processes say to
/// each other: the first byte says which.
///
/// # Panics
/// What the fuzzer looks for.
pub fn agent_requests(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else {
        return;
    };
    match which % 10 {
        0 => container(bytes),
        1 => network_of(bytes),
        2 => zygote(bytes),
        3 => stream(bytes),
        4 => loopback(bytes),
        5 => drop(decode_from_host(bytes)),
        6 => specification(bytes),
        7 => home(bytes),
        8 => limits(bytes),
        _ => volumes(bytes),
    }
}

fn container(bytes: &[u8]) {
    if let Ok(request) = CreateContainerRequest::parse_from_bytes(bytes) {
        specification(&request.spec_json);
    }
    if let Ok(request) = ExecProcessRequest::parse_from_bytes(bytes) {
        let _ = serde_json::from_slice::<Process>(&request.process_json);
    }
    let _ = SignalProcessRequest::parse_from_bytes(bytes);
    let _ = GrowRequest::parse_from_bytes(bytes);
}

fn network_of(bytes: &[u8]) {
    let Ok(request) = ApplyRequest::parse_from_bytes(bytes) else {
        return;
    };
    let (is_fine, messages) = network::judge(&request);
    if is_fine {
        for interface in &request.interfaces {
            let name = &interface.name;
            assert!((1..=MAX_INTERFACE).contains(&name.len()));
            assert!(!name.contains('/') && name != "." && name != "..");
        }
    }
    for message in messages {
        assert!(message.len() >= 16);
    }
}

fn zygote(bytes: &[u8]) {
    if let Some(request) = Request::decode(bytes) {
        assert_eq!(Request::decode(&request.encode()), Some(request));
    }
}

fn stream(bytes: &[u8]) {
    if let Some((prefix, ids)) = bytes.split_first_chunk::<HEADER_PREFIX_LEN>()
        && let Ok((_, len)) = Header::decode_prefix(*prefix)
        && let Some(ids) = ids.get(..len)
        && let Ok(header) = Header::decode(*prefix, ids)
        && header.container_id.len().max(header.exec_id.len()) <= MAX_ID_LEN
    {
        let again = header.encode();
        assert_eq!(again.as_deref(), Ok(&bytes[..HEADER_PREFIX_LEN + len]));
    }
    if let Some(frame) = bytes.first_chunk::<{ Frame::LEN }>() {
        let _ = Frame::decode(*frame);
    }
}

fn loopback(bytes: &[u8]) {
    if let Some(prefix) = bytes.first_chunk::<REQUEST_PREFIX_LEN>()
        && let Ok((_, len)) = LoopbackRequest::decode_prefix(*prefix)
    {
        assert!((1..=255).contains(&len));
    }
    let _ = LoopbackFrame::decode(bytes);
}

fn specification(bytes: &[u8]) {
    if let Ok(mut spec) = serde_json::from_slice::<Spec>(bytes) {
        let _ = spec::normalise(&mut spec, Path::new("/sys/fs/cgroup/c"));
        // What was made of it is a specification too.
        assert!(serde_json::to_vec(&spec).is_ok());
    }
    if let Ok(given) = serde_json::from_slice::<Vec<LinuxDeviceCgroup>>(bytes)
        && let Ok(rules) = devices::rules(&given)
    {
        // Jumps are 16 bits wide.
        assert!(devices::program_len(&rules) <= i16::MAX as usize);
    }
}

fn home(bytes: &[u8]) {
    for uid in [0, 7, u32::MAX] {
        if let Some(home) = passwd::home_in(bytes, uid) {
            assert!(!home.is_empty() && !home.contains('\n'));
        }
    }
}

fn limits(bytes: &[u8]) {
    if let Ok(request) = UpdateContainerRequest::parse_from_bytes(bytes) {
        let writes = request
            .settings
            .iter()
            .flat_map(|setting| &setting.alternatives);
        for write in writes.filter(|write| settings::is_limit(&write.file)) {
            assert!(!write.file.contains('/') && !write.file.starts_with("cgroup."));
        }
    }
}

fn volumes(bytes: &[u8]) {
    let _ = AddVolumeRequest::parse_from_bytes(bytes);
    if let Ok(request) = RemoveVolumeRequest::parse_from_bytes(bytes)
        && storage::is_plain(&request.name)
    {
        assert_eq!(Path::new(&request.name).components().count(), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_that_was_kept_still_does_no_harm() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/agent_requests");
        let mut count = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            agent_requests(&std::fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "the corpus is empty");
    }
}
