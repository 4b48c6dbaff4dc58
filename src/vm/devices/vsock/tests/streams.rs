//! Data, credit and the ends of streams.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::super::device::LARGE_WINDOW;
use super::super::packet::{Header, op, shutdown};
use super::guest::{Peer, Vm, rest};

/// Bytes in which any loss or disorder shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// Sends as much of `bytes` as the device has granted credit for; returns how much.
fn send_all(vm: &mut Vm, peer: Peer, bytes: &[u8]) {
    for chunk in bytes.chunks(60_000) {
        vm.send(peer.header(op::RW), chunk);
    }
}

/// The next packet that is not about credit is a reset.
#[track_caller]
fn expect_reset(vm: &mut Vm) {
    let mut packet = vm.packet().unwrap();
    while packet.0.op == op::CREDIT_UPDATE {
        packet = vm.packet().unwrap();
    }
    assert_eq!(packet.0.op, op::RST);
}

#[test]
fn data_flows_both_ways_in_order() {
    let mut vm = Vm::new();
    let (mut client, mut peer) = vm.connected();
    let bytes = pattern(1_000_000);
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        let mut writer = client.try_clone().unwrap();
        let bytes = &bytes;
        scope.spawn(move || writer.write_all(bytes).unwrap());
        while received.len() < bytes.len() {
            let (_, payload) = vm.expect(op::RW);
            received.extend_from_slice(&payload);
            let update = Header {
                fwd_cnt: received.len() as u32,
                ..peer.header(op::CREDIT_UPDATE)
            };
            vm.send(update, b"");
        }
    });
    assert!(received == bytes);
    peer.credit = 0;
    send_all(&mut vm, peer, &bytes[..200_000]);
    let mut echoed = vec![0; 200_000];
    client.read_exact(&mut echoed).unwrap();
    assert!(echoed == bytes[..200_000]);
}

#[test]
fn the_guest_never_gets_more_than_its_credit() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected_with(b"", 10_000);
    client.write_all(&pattern(50_000)).unwrap();
    let mut got = 0;
    while let Some((header, _)) = vm.packet() {
        assert_eq!(header.op, op::RW);
        got += header.len;
    }
    assert_eq!(got, 10_000);
    let update = Header {
        fwd_cnt: 10_000,
        buf_alloc: 4_000,
        ..peer.header(op::CREDIT_UPDATE)
    };
    vm.send(update, b"");
    assert_eq!(vm.expect(op::RW).0.len, 4_000);
    vm.expect_nothing();
}

#[test]
fn a_slow_reader_stalls_only_itself() {
    let mut vm = Vm::new();
    let (mut slow, slow_peer) = vm.connected();
    let (mut quick, quick_peer) = vm.connected();
    let bytes = pattern(LARGE_WINDOW as usize);
    send_all(&mut vm, slow_peer, &bytes);
    // Its window is used up, in the socket and in the backlog.
    send_all(&mut vm, quick_peer, b"ping");
    let mut pong = [0; 4];
    quick.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
    // Reading opens the window again, and nothing is lost.
    let mut got = vec![0; bytes.len()];
    let mut at = 0;
    while at < got.len() {
        at += slow.read(&mut got[at..]).unwrap();
        vm.run();
    }
    assert!(got == bytes);
    let (mut credit, mut forwarded) = (0, 0);
    while let Some((header, _)) = vm.packet() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
        (credit, forwarded) = (header.buf_alloc, header.fwd_cnt);
    }
    assert!(credit - (bytes.len() as u32 - forwarded) >= LARGE_WINDOW / 2);
}

#[test]
fn credit_is_told_when_asked() {
    let mut vm = Vm::new();
    let (_client, peer) = vm.connected();
    vm.send(peer.header(op::RW), b"12345");
    vm.expect_nothing();
    vm.send(peer.header(op::CREDIT_REQUEST), b"");
    let (update, _) = vm.expect(op::CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (LARGE_WINDOW, 5));
}

#[test]
fn the_host_ends_its_stream_and_still_listens() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    client.write_all(b"the end").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(vm.expect(op::RW).1, b"the end");
    assert_eq!(vm.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
    vm.send(peer.header(op::RW), b"answer");
    vm.send(peer.shutdown(shutdown::BOTH), b"");
    vm.expect(op::RST);
    assert_eq!(rest(&mut client), b"answer");
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn the_guest_ends_its_stream_and_still_listens() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    vm.send(peer.header(op::RW), b"the end");
    vm.send(peer.shutdown(shutdown::SEND), b"");
    assert_eq!(rest(&mut client), b"the end");
    client.write_all(b"answer").unwrap();
    assert_eq!(vm.expect(op::RW).1, b"answer");
    drop(client);
    // Each direction has ended; the guest confirms.
    let mut told = 0;
    while let Some((header, _)) = vm.packet() {
        assert_eq!(header.op, op::SHUTDOWN);
        told |= header.flags;
    }
    assert_eq!(told, shutdown::BOTH);
    vm.send(peer.header(op::RST), b"");
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_guest_that_no_longer_reads_breaks_the_pipe() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    vm.send(peer.shutdown(shutdown::RECEIVE), b"");
    let error = client.write_all(b"lost").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    vm.send(peer.header(op::RW), b"still here");
    let mut got = [0; 10];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
    vm.expect_nothing();
}

#[test]
fn a_host_that_no_longer_reads_is_reported() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    client.shutdown(Shutdown::Read).unwrap();
    vm.send(peer.header(op::RW), b"lost");
    assert_eq!(vm.expect(op::SHUTDOWN).0.flags, shutdown::RECEIVE);
    client.write_all(b"still here").unwrap();
    assert_eq!(vm.expect(op::RW).1, b"still here");
}

#[test]
fn a_host_that_closes_is_reported_at_once() {
    let mut vm = Vm::new();
    // The guest takes nothing, so the end of the stream cannot be reached.
    let (mut client, peer) = vm.connected_with(b"", 0);
    client.write_all(b"unsent").unwrap();
    drop(client);
    assert_eq!(vm.expect(op::SHUTDOWN).0.flags, shutdown::RECEIVE);
    // What crossed is dropped, and costs the guest no credit.
    vm.send(peer.header(op::RW), &pattern(50_000));
    let update = Header {
        buf_alloc: 100,
        ..peer.header(op::CREDIT_UPDATE)
    };
    vm.send(update, b"");
    assert_eq!(vm.expect(op::RW).1, b"unsent");
    assert_eq!(vm.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
}

#[test]
fn bytes_before_the_guests_close_are_delivered_to_a_slow_reader() {
    for end in [op::SHUTDOWN, op::RST] {
        let mut vm = Vm::new();
        let (mut client, peer) = vm.connected();
        let bytes = pattern(LARGE_WINDOW as usize);
        send_all(&mut vm, peer, &bytes);
        vm.send(
            Header {
                op: end,
                ..peer.shutdown(shutdown::BOTH)
            },
            b"",
        );
        if end == op::SHUTDOWN {
            expect_reset(&mut vm);
        }
        // The guest may use its port again while the host still reads.
        assert_eq!(vm.device.connections(), 1);
        vm.send(peer.header(op::RW), b"stray");
        expect_reset(&mut vm);
        let mut got = Vec::new();
        let mut chunk = [0; 10_000];
        loop {
            let count = client.read(&mut chunk).unwrap();
            if count == 0 {
                break;
            }
            got.extend_from_slice(&chunk[..count]);
            vm.run();
        }
        assert!(got == bytes);
        assert_eq!(vm.device.connections(), 0);
    }
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut vm = Vm::new();
    let (client, _) = vm.connected();
    drop(client);
    assert_eq!(vm.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
    vm.expect_nothing();
    vm.device.expire_all();
    vm.expect(op::RST);
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_stalled_connection_wakes_nobody() {
    let mut vm = Vm::new();
    let (mut client, _) = vm.connected_with(b"", 0);
    client.write_all(b"no credit for this").unwrap();
    vm.run();
    let mut fd = libc::pollfd {
        fd: vm.device.poll_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&mut fd, 1, 50) }, 0);
}

#[test]
fn what_the_guest_sent_outlives_the_vm() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    let (mut idle, _) = vm.connected();
    let bytes = pattern(LARGE_WINDOW as usize);
    send_all(&mut vm, peer, &bytes);
    let mut pending = vm.client(b"CONNECT 1\n");
    let reader = std::thread::spawn(move || rest(&mut client));
    vm.device.finish();
    assert!(reader.join().unwrap() == bytes);
    assert_eq!(rest(&mut idle), b"");
    assert_eq!(rest(&mut pending), b"ERR connection refused\n");
    assert!(!vm.root.path().join("vsock.sock").exists());
}

#[test]
fn a_client_that_takes_nothing_does_not_hold_up_the_end() {
    let mut vm = Vm::new();
    let (_client, peer) = vm.connected();
    send_all(&mut vm, peer, &pattern(LARGE_WINDOW as usize));
    let start = std::time::Instant::now();
    vm.device.finish();
    assert!(start.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn no_news_is_lost_while_the_guest_provides_no_buffers() {
    // Just enough for the requests of two connections.
    let mut vm = Vm::without_buffers();
    vm.refill = false;
    vm.post_buffers(2);
    let (mut reader, peer) = vm.connected();
    let (writer, _) = vm.connected();
    // Now there is credit to grant, and the end of a stream to report.
    send_all(&mut vm, peer, &pattern(200_000));
    reader.read_exact(&mut vec![0; 200_000]).unwrap();
    drop(writer);
    vm.expect_nothing();
    vm.refill = true;
    vm.post_buffers(64);
    let mut got = Vec::new();
    while let Some((header, _)) = vm.packet() {
        got.push((header.op, header.fwd_cnt));
    }
    assert!(got.contains(&(op::CREDIT_UPDATE, 200_000)), "{got:?}");
    assert!(got.iter().any(|(op, _)| *op == op::SHUTDOWN), "{got:?}");
}

#[test]
fn a_guest_with_a_small_buffer_hears_of_the_room_in_time() {
    for credit in [1, 10_000] {
        let mut vm = Vm::new();
        let (mut client, peer) = vm.connected_with(b"", credit);
        // All that Linux sends before it hears that the host has read.
        vm.send(peer.header(op::RW), &pattern(credit as usize));
        client.read_exact(&mut vec![0; credit as usize]).unwrap();
        assert_eq!(vm.expect(op::CREDIT_UPDATE).0.fwd_cnt, credit);
        vm.expect_nothing();
    }
}
