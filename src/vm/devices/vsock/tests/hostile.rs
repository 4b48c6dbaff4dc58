//! Guests that break the rules.

use super::super::device::{LARGE_WINDOW, MAX_GUEST_CONNECTIONS, Progress};
use super::super::packet::{HEADER_LEN, op, shutdown};
use super::guest::{Peer, Vm, WRITE, rest};

const STRANGER: Peer = Peer {
    guest: 1,
    host: 2,
    credit: 0,
};

#[test]
fn packets_for_no_connection_are_reset() {
    let mut vm = Vm::new();
    for op in [
        op::RESPONSE,
        op::RW,
        op::SHUTDOWN,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        99,
    ] {
        vm.send(STRANGER.header(op), b"");
        let (reset, _) = vm.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (2, 1));
    }
    // A reset is never answered with a reset.
    vm.send(STRANGER.header(op::RST), b"");
    vm.expect_nothing();
}

#[test]
fn other_kinds_of_sockets_are_refused() {
    let mut vm = Vm::new();
    let mut header = STRANGER.header(op::REQUEST);
    header.kind = 2;
    vm.send(header, b"");
    assert_eq!(vm.expect(op::RST).0.kind, 2);
}

#[test]
fn foreign_context_ids_are_ignored() {
    let mut vm = Vm::new();
    let _listener = vm.listen(2);
    for (src, dst) in [(4, 2), (3, 1), (3, 4), (2, 3), (u64::MAX, u64::MAX)] {
        let mut header = STRANGER.header(op::REQUEST);
        (header.src_cid, header.dst_cid) = (src, dst);
        vm.send(header, b"");
    }
    vm.expect_nothing();
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn data_beyond_the_credit_ends_the_connection() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    let chunk = vec![7; 64 * 1024];
    for _ in 0..LARGE_WINDOW as usize / chunk.len() {
        vm.send(peer.header(op::RW), &chunk);
    }
    // Nobody has read, so whatever the socket did not take is outstanding.
    for _ in 0..8 {
        vm.send(peer.header(op::RW), &chunk);
    }
    loop {
        let (header, _) = vm.packet().unwrap();
        if header.op == op::RST {
            break;
        }
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    // What was within the rules is still delivered.
    let reader = std::thread::spawn(move || rest(&mut client).len());
    while !reader.is_finished() {
        vm.run();
    }
    assert!(reader.join().unwrap() >= LARGE_WINDOW as usize);
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn data_after_the_end_of_the_stream_ends_the_connection() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    vm.send(peer.shutdown(shutdown::SEND), b"");
    vm.send(peer.header(op::RW), b"late");
    vm.expect(op::RST);
    assert_eq!(rest(&mut client), b"");
}

#[test]
fn operations_out_of_turn_end_the_connection() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let mut vm = Vm::new();
        let (mut client, peer) = vm.connected();
        vm.send(peer.header(op), b"");
        vm.expect(op::RST);
        assert_eq!(rest(&mut client), b"", "operation {op}");
        assert_eq!(vm.device.connections(), 0);
    }
}

#[test]
fn data_before_the_answer_ends_the_connection() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONNECT 1024\n");
    let (request, _) = vm.expect(op::REQUEST);
    let peer = Peer {
        guest: 1024,
        host: request.src_port,
        credit: 0,
    };
    vm.send(peer.header(op::RW), b"early");
    vm.expect(op::RST);
    assert_eq!(rest(&mut client), b"ERR connection refused\n");
}

#[test]
fn payload_may_be_cut_anywhere() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    let mut header = peer.header(op::RW);
    header.len = 10;
    let bytes = [header.to_bytes().as_slice(), b"0123456789"].concat();
    for parts in [
        vec![(54, 0)],
        vec![(44, 0), (10, 0)],
        vec![(1, 0), (42, 0), (0, 0), (5, 0), (6, 0)],
        vec![(40, 0), (14, 0), (20, 0)],
    ] {
        vm.send_raw(&bytes, &parts);
        let mut got = [0; 10];
        std::io::Read::read_exact(&mut client, &mut got).unwrap();
        assert_eq!(&got, b"0123456789");
    }
}

#[test]
fn chains_that_are_no_packets_are_ignored() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    let mut header = peer.header(op::RW);
    header.len = 10;
    let bytes = [header.to_bytes().as_slice(), b"0123456789"].concat();
    // Too short for a header, of the wrong direction, too many parts.
    vm.send_raw(&bytes, &[(43, 0)]);
    vm.send_raw(&bytes, &[(0, 0)]);
    vm.send_raw(&bytes, &[(54, WRITE)]);
    vm.send_raw(&bytes, &[(44, 0), (10, WRITE)]);
    vm.send_raw(&[0; 200], &[(1, 0); 100]);
    vm.send_raw(&bytes, &[[(0, 0); 100].as_slice(), &[(54, 0)]].concat());
    // Outside of memory, and wrapping around it.
    vm.send_chain(&[(1 << 40, 54, 0)]);
    vm.send_chain(&[(u64::MAX - 10, 54, 0)]);
    vm.send_chain(&[(0x10_0000, u32::MAX, 0)]);
    vm.expect_nothing();
    // The connection has not noticed.
    vm.send(peer.header(op::RW), b"fine");
    vm.send(peer.shutdown(shutdown::BOTH), b"");
    assert_eq!(rest(&mut client), b"fine");
}

#[test]
fn a_packet_longer_than_its_buffer_ends_the_connection() {
    for len in [11, 1 << 20, u32::MAX] {
        let mut vm = Vm::new();
        let (mut client, peer) = vm.connected();
        let mut header = peer.header(op::RW);
        header.len = len;
        let bytes = [header.to_bytes().as_slice(), b"0123456789"].concat();
        vm.send_raw(&bytes, &[(54, 0)]);
        vm.expect(op::RST);
        assert_eq!(rest(&mut client), b"");
    }
}

#[test]
fn useless_receive_buffers_are_returned() {
    let mut vm = Vm::without_buffers();
    vm.refill = false;
    let _client = vm.client(b"CONNECT 1\n");
    let at = 0x10_0000;
    vm.post_raw(0, &[(at, HEADER_LEN as u32 - 1, WRITE)]);
    vm.post_raw(1, &[(at, 4096, 0)]);
    vm.post_raw(2, &[(1 << 40, 4096, WRITE)]);
    vm.post_raw(3, &[(at, 10, WRITE), (at, 4096, 0)]);
    vm.expect_nothing();
    vm.post_buffers(1);
    vm.expect(op::REQUEST);
}

#[test]
fn a_buffer_without_room_for_payload_is_no_trap() {
    let mut vm = Vm::new();
    let (mut client, _) = vm.connected();
    vm.refill = false;
    // Use up the good buffers, then offer only headers.
    std::io::Write::write_all(&mut client, &[1; 100_000]).unwrap();
    while vm.packet().is_some() {}
    for slot in 0..64 {
        vm.post_raw(slot, &[(0x10_0000, HEADER_LEN as u32, WRITE)]);
    }
    vm.run();
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let mut vm = Vm::new();
    let _listener = vm.listen(2);
    let mut open = 0;
    for guest in 0..2 * MAX_GUEST_CONNECTIONS as u32 {
        vm.send(Peer { guest, ..STRANGER }.header(op::REQUEST), b"");
        let (answer, _) = vm.packet().unwrap();
        open += usize::from(answer.op == op::RESPONSE);
    }
    assert_eq!(open, MAX_GUEST_CONNECTIONS);
    assert_eq!(vm.device.connections(), open);
    // The host is not locked out.
    let _client = vm.client(b"CONNECT 5\n");
    vm.expect(op::REQUEST);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut vm = Vm::without_buffers();
    let mut ignored = false;
    for _ in 0..40 {
        for _ in 0..16 {
            vm.send(STRANGER.header(op::RW), b"");
        }
        ignored |= vm.transmit().unwrap() == Progress::Idle;
        if ignored {
            break;
        }
    }
    assert!(ignored);
    assert!(vm.device.waiting().0 <= 256);
    // It goes on when the guest does.
    vm.post_buffers(64);
    while vm.packet().is_some() {}
    assert_eq!(vm.device.waiting(), (0, 0));
}

#[test]
fn connections_that_come_and_go_leave_nothing_behind() {
    let mut vm = Vm::without_buffers();
    let listener = vm.listen(2);
    for _ in 0..100 {
        vm.send(STRANGER.header(op::REQUEST), b"");
        vm.send(STRANGER.header(op::RST), b"");
        drop(listener.accept().unwrap());
    }
    assert_eq!(vm.device.waiting(), (0, 0));
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_broken_ring_is_an_error() {
    let mut vm = Vm::new();
    vm.break_transmit_ring();
    assert!(vm.transmit().is_err());
}

#[test]
fn random_packets_do_no_harm() {
    let mut vm = Vm::new();
    let listener = vm.listen(2);
    listener.set_nonblocking(true).unwrap();
    let mut clients: Vec<_> = (0..4).map(|_| vm.connected()).collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        // xorshift64
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..20_000 {
        let peer = match random() % 3 {
            0 => clients[random() as usize % clients.len()].1,
            1 => Peer {
                guest: (random() % 8) as u32,
                ..STRANGER
            },
            _ => STRANGER,
        };
        let mut header = peer.header((random() % 9) as u16);
        header.flags = (random() % 5) as u32;
        header.buf_alloc = random() as u32;
        header.fwd_cnt = random() as u32;
        header.len = [0, 0, 10, 1000, 70_000][random() as usize % 5];
        let mut bytes = header.to_bytes().to_vec();
        if random() % 8 == 0 {
            let at = random() as usize % HEADER_LEN;
            bytes[at] = random() as u8;
        }
        bytes.resize(1044, 1);
        let cut = random() as usize % 1044;
        let flags = if random() % 16 == 0 { WRITE } else { 0 };
        vm.send_raw(&bytes, &[(cut, 0), (1044 - cut, flags)]);
        while listener.accept().is_ok() {}
        while vm.pop().is_some() {}
        if round % 100 == 0 {
            let slot = random() as usize % clients.len();
            clients[slot] = vm.fresh_connection();
        }
    }
    assert!(vm.device.waiting().0 <= 256);
    drop(clients);
    vm.device.reset();
    vm.run();
}

#[test]
fn a_packet_may_have_as_many_buffers_as_linux_gives_it() {
    // MAX_SKB_FRAGS: 17, here pages of a pipe, none of them beside the next.
    const PAGE: usize = 4096;
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    let payload: Vec<u8> = (0..17 * PAGE).map(|n| (n / 7 % 256) as u8).collect();
    let mut header = peer.header(op::RW);
    header.len = payload.len() as u32;
    let mut parts = vec![(HEADER_LEN, 0)];
    parts.extend([(PAGE, 0); 17]);
    let bytes = [header.to_bytes().as_slice(), &payload].concat();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 17 * PAGE];
        std::io::Read::read_exact(&mut client, &mut got).unwrap();
        got
    });
    vm.send_raw(&bytes, &parts);
    assert!(reader.join().unwrap() == payload);
}
