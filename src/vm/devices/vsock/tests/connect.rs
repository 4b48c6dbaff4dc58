//! How connections begin.

use std::io::Write;

use super::super::device::{LARGE_WINDOW, MAX_CONNECTIONS};
use super::super::packet::{HOST_CID, TYPE_STREAM, op, shutdown};
use super::guest::{CID, Peer, Vm, line, rest};

#[test]
fn a_client_reaches_a_port_of_the_guest() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONNECT 1024\n");
    let (request, _) = vm.expect(op::REQUEST);
    assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, CID));
    assert_eq!((request.dst_port, request.kind), (1024, TYPE_STREAM));
    assert_eq!(request.buf_alloc, LARGE_WINDOW);
    let peer = Peer {
        guest: 1024,
        host: request.src_port,
        credit: 1000,
    };
    vm.send(peer.header(op::RESPONSE), b"");
    assert_eq!(line(&mut client), format!("OK {}\n", peer.host));
    vm.expect_nothing();
}

#[test]
fn bytes_behind_the_connect_line_reach_the_guest() {
    let mut vm = Vm::new();
    let (_client, _) = vm.connected_with(b"CONNECT 1\nmore", 1000);
    let (_, payload) = vm.expect(op::RW);
    assert_eq!(payload, b"CONNECT 1\nmore");
}

#[test]
fn a_client_that_sends_and_leaves_is_delivered() {
    let mut vm = Vm::new();
    let client = vm.client(b"CONNECT 1024\nlast words");
    drop(client);
    let (request, _) = vm.expect(op::REQUEST);
    let peer = Peer {
        guest: 1024,
        host: request.src_port,
        credit: 1000,
    };
    vm.send(peer.header(op::RESPONSE), b"");
    let (_, payload) = vm.expect(op::RW);
    assert_eq!(payload, b"last words");
    let mut told = 0;
    while told != shutdown::BOTH {
        told |= vm.expect(op::SHUTDOWN).0.flags;
    }
    vm.send(peer.header(op::RST), b"");
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_refused_port_does_not_look_like_the_end_of_a_stream() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONNECT 9999\n");
    let (request, _) = vm.expect(op::REQUEST);
    let peer = Peer {
        guest: 9999,
        host: request.src_port,
        credit: 0,
    };
    vm.send(peer.header(op::RST), b"");
    assert_eq!(rest(&mut client), b"ERR connection refused\n");
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONNECT 1024\n");
    let (request, _) = vm.expect(op::REQUEST);
    vm.device.expire_all();
    assert_eq!(rest(&mut client), b"ERR connection timed out\n");
    // The guest hears about it, should it still answer.
    let (reset, _) = vm.expect(op::RST);
    assert_eq!(reset.src_port, request.src_port);
}

#[test]
fn a_client_that_says_nothing_is_given_up() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONN");
    vm.device.expire_all();
    assert_eq!(rest(&mut client), b"ERR no request\n");
    vm.expect_nothing();
}

#[test]
fn nonsense_is_answered() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"GET /\n");
    assert_eq!(rest(&mut client), b"ERR malformed request\n");
    vm.expect_nothing();
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut vm = Vm::new();
    let mut client = vm.client(b"CONNECT 10");
    vm.expect_nothing();
    client.write_all(b"24\n").unwrap();
    assert_eq!(vm.expect(op::REQUEST).0.dst_port, 1024);
}

#[test]
fn too_many_clients_are_turned_away() {
    let mut vm = Vm::new();
    // As many descriptors as the test process may have on any machine.
    let _clients: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| vm.client(b"CONNECT 1\n"))
        .collect();
    let mut one_more = vm.client(b"CONNECT 1\n");
    assert_eq!(rest(&mut one_more), b"ERR too many connections\n");
}

#[test]
fn the_guest_reaches_a_listener_on_the_host() {
    let mut vm = Vm::new();
    let listener = vm.listen(7000);
    let peer = Peer {
        guest: 55,
        host: 7000,
        credit: 1000,
    };
    vm.send(peer.header(op::REQUEST), b"");
    let (response, _) = vm.expect(op::RESPONSE);
    assert_eq!((response.src_port, response.dst_port), (7000, 55));
    assert!(response.buf_alloc > 0);
    let (mut server, _) = listener.accept().unwrap();
    vm.send(peer.header(op::RW), b"hello\n");
    assert_eq!(line(&mut server), "hello\n");
    server.write_all(b"back").unwrap();
    assert_eq!(vm.expect(op::RW).1, b"back");
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut vm = Vm::new();
    drop(vm.listen(7001));
    for host in [7000, 7001] {
        let peer = Peer {
            guest: 55,
            host,
            credit: 1000,
        };
        vm.send(peer.header(op::REQUEST), b"");
        let (reset, _) = vm.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (host, 55));
    }
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_client_may_come_before_the_driver() {
    let mut vm = Vm::without_buffers();
    let (mut early, mut greeting) = (vm.client(b"CONNECT 1024\n"), vm.client(b""));
    vm.device.reset();
    vm.post_buffers(8);
    let (request, _) = vm.expect(op::REQUEST);
    let peer = Peer {
        guest: 1024,
        host: request.src_port,
        credit: 0,
    };
    vm.send(peer.header(op::RESPONSE), b"");
    assert!(line(&mut early).starts_with("OK "));
    greeting.write_all(b"CONNECT 2\n").unwrap();
    assert_eq!(vm.expect(op::REQUEST).0.dst_port, 2);
}

#[test]
fn a_driver_that_starts_anew_knows_no_connection() {
    let mut vm = Vm::new();
    let (mut client, peer) = vm.connected();
    vm.device.reset();
    assert_eq!(rest(&mut client), b"");
    assert_eq!(vm.device.connections(), 0);
    vm.send(peer.header(op::RW), b"who?");
    vm.expect(op::RST);
}

#[test]
fn windows_shrink_with_the_number_of_connections() {
    let mut vm = Vm::new();
    let mut clients = Vec::new();
    let mut windows = Vec::new();
    for _ in 0..70 {
        clients.push(vm.client(b"CONNECT 1\n"));
        windows.push(vm.expect(op::REQUEST).0.buf_alloc);
    }
    assert_eq!(windows[7], LARGE_WINDOW);
    assert_eq!(windows[8], 256 * 1024);
    assert_eq!(windows[63], 256 * 1024);
    assert_eq!(windows[64], 32 * 1024);
}
