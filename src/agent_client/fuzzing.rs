//! What a hostile guest answers, for [`crate::fuzzing`]: on the wire ([`agent_client`]),
//! and what it means ([`agent_answers`]).

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::agent::{
    CreateContainerResponse, ExecProcessResponse, GetInfoResponse, GetStatsResponse,
    ListProcessesResponse,
};
use kuasar_runv_protocol::loopback::{self, MAX_PORTS, Query, decode_ports, encode_ports};
use kuasar_runv_protocol::network::StatsResponse;
use kuasar_runv_protocol::resources::GrowResponse;
use kuasar_runv_protocol::socket::Hello;
use kuasar_runv_protocol::storage::{AddVolumeRequest, AddVolumeResponse};
use kuasar_runv_protocol::stream::Frame;
use protobuf::Message;

use super::vsock::{Dialing, MAX_LINE};
use super::{Agent, Error, MAX_ERROR_TEXT};
use crate::container::fuzzing as container;
use crate::fuzzing::Input;
use crate::sandbox::server::fuzzing::events;

/// How long a call may take; the guest hangs up long before.
const DEADLINE: Duration = Duration::from_secs(5);
/// Kind of a frame that answers (ttrpc).
const RESPONSE: u8 = 2;

/// Frames of any kind as the answers to calls.
pub fn agent_client(input: &[u8]) {
    let mut input = Input::new(input);
    let which = input.byte();
    let threads = Threads::count();
    let (ours, guest) = UnixStream::pair().expect("sockets");
    let agent = Agent::new(ours, DEADLINE).expect("a client");
    let words = input.rest();
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| answer(guest, words));
        let error = match which % 5 {
            0 => agent.stats("c").map(|stats| {
                container::statistics(stats, &StatsResponse::new());
            }),
            1 => agent.list_processes("c").map(container::processes),
            2 => agent.network_stats("c").map(|network| {
                container::statistics(GetStatsResponse::new(), &network);
            }),
            3 => agent.add_volume(&AddVolumeRequest::new()).map(drop),
            _ => agent.start_container("c"),
        };
        if let Err(Error::Refused { message, .. } | Error::Broken(message)) = error {
            assert!(message.chars().count() <= MAX_ERROR_TEXT);
            assert!(!message.contains(char::is_control), "{message:?}");
        }
        guest.join().expect("a call");
    });
    drop(agent);
    threads.wait();
}

/// The threads of this process. Those of the client end by themselves and nobody can join
/// them; what they still hold is no leak.
struct Threads(usize);

impl Threads {
    fn now() -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").expect("proc");
        tasks.count()
    }

    fn count() -> Threads {
        Threads(Threads::now())
    }

    /// Until there are no more than there were. Other tests have threads of their own.
    fn wait(self) {
        let end = Instant::now() + DEADLINE;
        while !cfg!(test) && Threads::now() > self.0 {
            assert!(Instant::now() < end, "a thread of the client stays");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Waits for a call, and says what it has to say.
fn answer(mut guest: UnixStream, words: &[u8]) {
    let mut header = [0; 10];
    guest.read_exact(&mut header).expect("a call");
    let [a, b, c, d, ..] = header;
    let mut call = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
    guest.read_exact(&mut call).expect("a call");
    let mut input = Input::new(words);
    while !input.is_empty() {
        let how = input.byte();
        let len = usize::from(input.u16()) & 0xfff;
        let body = input.bytes(len);
        // What is announced and does not come is at most 16 MiB, and the last there is: for
        // bytes that it skips, ttrpc reads once per page, also when there are none.
        let missing = match how >> 6 {
            0 => u32::from(input.u16()) << 8,
            _ => 0,
        };
        let claimed = body.len() as u32 + missing;
        let stream = u32::from(how >> 2 & 3) | 1;
        let mut frame = claimed.to_be_bytes().to_vec();
        frame.extend(stream.to_be_bytes());
        frame.extend([RESPONSE + (how >> 4 & 1), how >> 5 & 1]);
        frame.extend(body);
        // The client may have hung up.
        let _ = guest.write_all(&frame);
        if missing > 0 {
            break;
        }
    }
    let _ = guest.shutdown(Shutdown::Both);
}

/// Messages of any content where they are decoded and used.
pub fn agent_answers(input: &[u8]) {
    let mut input = Input::new(input);
    match input.byte() % 10 {
        0 => events(&mut input),
        1 => {
            if let Ok(answer) = ListProcessesResponse::parse_from_bytes(input.rest()) {
                container::processes(answer);
            }
        }
        2 => {
            if let Ok(answer) = GetStatsResponse::parse_from_bytes(input.rest()) {
                container::statistics(answer, &StatsResponse::new());
            }
        }
        3 => {
            if let Ok(network) = StatsResponse::parse_from_bytes(input.rest()) {
                container::statistics(GetStatsResponse::new(), &network);
            }
        }
        4 => {
            let bytes = input.rest();
            ports(bytes);
            datagrams(bytes);
        }
        5 => {
            let mut queries = input.rest();
            while let Ok(query) = Query::read(&mut queries) {
                let again = query.encode().expect("it came that way");
                let mut again = again.as_slice();
                assert_eq!(Query::read(&mut again).expect("the same"), query);
            }
        }
        6 => {
            for bytes in input.rest().chunks(Frame::LEN) {
                if let Ok(bytes) = <[u8; Frame::LEN]>::try_from(bytes)
                    && let Ok(frame) = Frame::decode(bytes)
                {
                    let again = frame.encode();
                    let again = again.as_bytes().try_into().expect("as long");
                    assert_eq!(Frame::decode(again), Ok(frame));
                }
            }
        }
        7 => {
            if let Some(bytes) = input.rest().first_chunk::<{ Hello::LEN }>() {
                assert_eq!(Hello::decode(bytes).encode(), *bytes);
            }
        }
        8 => dialled(input.rest()),
        _ => {
            let bytes = input.rest();
            let _ = CreateContainerResponse::parse_from_bytes(bytes);
            let _ = ExecProcessResponse::parse_from_bytes(bytes);
            let _ = GetInfoResponse::parse_from_bytes(bytes);
            let _ = GrowResponse::parse_from_bytes(bytes);
            let _ = AddVolumeResponse::parse_from_bytes(bytes);
        }
    }
}

fn ports(mut bytes: &[u8]) {
    while let Ok(Some((ports, len))) = decode_ports(bytes) {
        assert!(ports.len() <= MAX_PORTS && len <= bytes.len());
        let again = encode_ports(&ports);
        let (same, _) = decode_ports(&again).expect("ports").expect("all");
        assert_eq!(same, ports);
        bytes = &bytes[len..];
    }
}

/// Frames of datagrams, one after the other.
fn datagrams(mut bytes: &[u8]) {
    while let Ok(Some((frame, len))) = loopback::Frame::decode(bytes) {
        let again = frame.encode().expect("not too long");
        assert_eq!(
            loopback::Frame::decode(&again),
            Ok(Some((frame, again.len())))
        );
        bytes = &bytes[len..];
    }
}

/// The line of the device that says whether the guest has accepted.
fn dialled(line: &[u8]) {
    let (ours, mut device) = UnixStream::pair().expect("sockets");
    device
        .write_all(&line[..line.len().min(4096)])
        .expect("room");
    drop(device);
    if let Err(e) = Dialing::of_stream(ours).finish(DEADLINE) {
        // Three bytes for each that is no text.
        assert!(e.to_string().len() <= 3 * MAX_LINE);
    }
}
