use super::*;
use crate::reaper::ExitStatus;
use crate::sys;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use tokio::sync::watch;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn id(kind: Kind) -> StreamId {
    StreamId {
        container_id: "c1".into(),
        exec_id: String::new(),
        kind,
    }
}

fn header(kind: Kind) -> Vec<u8> {
    Header {
        kind,
        container_id: "c1".into(),
        exec_id: String::new(),
    }
    .encode()
    .unwrap()
}

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(OwnedFd::from(ours)).unwrap(), theirs)
}

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_connection_may_come_before_its_process() {
    runtime().block_on(async {
        let streams = Arc::new(Streams::default());
        let (connection, mut host) = pair();
        host.write_all(&header(Kind::Stdout)).unwrap();
        host.write_all(b"rest").unwrap();
        streams.admit(connection);
        settle().await;
        let connection = streams.claim(id(Kind::Stdout)).await.unwrap();
        let mut rest = [0; 4];
        connection.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"rest");
        assert_eq!(streams.lock().waiting, 0);
    });
}

#[test]
fn a_connection_may_come_after_its_process() {
    runtime().block_on(async {
        let streams = Arc::new(Streams::default());
        let (connection, mut host) = pair();
        let claim = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.claim(id(Kind::Control)).await }
        });
        settle().await;
        streams.admit(connection);
        host.write_all(&header(Kind::Control)).unwrap();
        assert!(claim.await.unwrap().is_some());
        assert_eq!(streams.lock().waiting, 0);
    });
}

#[test]
fn what_is_not_a_stream_is_closed() {
    runtime().block_on(async {
        let streams = Arc::new(Streams::default());
        let (connection, mut host) = pair();
        streams.admit(connection);
        host.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        settle().await;
        assert_eq!(streams.lock().waiting, 0);
        host.set_nonblocking(true).unwrap();
        // Closed with unread bytes: the end, or a reset.
        assert!(!matches!(host.read(&mut [0]), Err(e) if sys::would_block(&e)));
    });
}

#[test]
fn waiting_connections_are_bounded() {
    runtime().block_on(async {
        let streams = Arc::new(Streams::default());
        let mut hosts = Vec::new();
        for _ in 0..MAX_WAITING + 5 {
            let (connection, host) = pair();
            streams.admit(connection);
            hosts.push(host);
        }
        assert_eq!(streams.lock().waiting, MAX_WAITING);
    });
}

#[test]
fn a_container_that_is_gone_takes_its_connections_along() {
    runtime().block_on(async {
        let streams = Arc::new(Streams::default());
        let (connection, mut host) = pair();
        host.write_all(&header(Kind::Stdin)).unwrap();
        streams.admit(connection);
        settle().await;
        streams.forget("other");
        assert_eq!(streams.lock().waiting, 1);
        streams.forget("c1");
        assert_eq!(streams.lock().waiting, 0);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    });
}

fn running() -> (
    watch::Sender<Option<ExitStatus>>,
    crate::reaper::ExitReceiver,
) {
    watch::channel(None)
}

#[test]
fn output_is_complete_and_ends_with_the_last_writer() {
    const LEN: usize = 5_000_000;
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, mut host) = pair();
        let (_exit, exited) = running();
        let writer = std::thread::spawn(move || {
            let mut file = std::fs::File::from(write);
            file.write_all(&vec![7; LEN]).unwrap();
        });
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            host.read_to_end(&mut all).unwrap();
            all
        });
        relay_output(read, connection, OutputEnd::new(exited, false)).await;
        writer.join().unwrap();
        assert_eq!(reader.join().unwrap(), vec![7; LEN]);
    });
}

#[test]
fn a_writer_that_outlives_the_process_neither_holds_its_output_open_nor_breaks() {
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, mut host) = pair();
        let (exit, exited) = running();
        let mut background = std::fs::File::from(write);
        background.write_all(b"before").unwrap();
        exit.send_replace(Some(ExitStatus::Exited(0)));
        let end = OutputEnd::new(exited, false);
        let relay = tokio::spawn(relay_output(read, connection, end));
        settle().await;
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        assert_eq!(all, "before");
        // More than the pipe holds.
        let writer = std::thread::spawn(move || background.write_all(&vec![0; 1 << 20]));
        relay.await.unwrap();
        writer.join().unwrap().unwrap();
    });
}

#[test]
fn output_that_outlives_the_process_is_complete() {
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, mut host) = pair();
        let (exit, exited) = running();
        let mut background = std::fs::File::from(write);
        background.write_all(b"before").unwrap();
        exit.send_replace(Some(ExitStatus::Exited(0)));
        let end = OutputEnd::new(exited, true);
        let relay = tokio::spawn(relay_output(read, connection, end));
        settle().await;
        background.write_all(b" and after").unwrap();
        drop(background);
        relay.await.unwrap();
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        assert_eq!(all, "before and after");
    });
}

/// A relayed socket: the process's end, the host's, and what ends the process.
struct Relayed {
    process: UnixStream,
    host: UnixStream,
    exit: watch::Sender<Option<ExitStatus>>,
    relay: tokio::task::JoinHandle<()>,
}

fn relayed() -> Relayed {
    let (ours, process) = UnixStream::pair().unwrap();
    let (connection, host) = pair();
    let (exit, exited) = running();
    let end = OutputEnd::new(exited, false);
    let relay = tokio::spawn(relay_socket(ours.into(), connection, end));
    for end in [&process, &host] {
        end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    Relayed {
        process,
        host,
        exit,
        relay,
    }
}

#[test]
fn each_direction_of_a_socket_ends_by_itself() {
    runtime().block_on(async {
        let mut r = relayed();
        r.host.write_all(b"question").unwrap();
        r.host.shutdown(std::net::Shutdown::Write).unwrap();
        settle().await;
        let mut question = String::new();
        r.process.read_to_string(&mut question).unwrap();
        assert_eq!(question, "question");
        r.process.write_all(b"answer").unwrap();
        settle().await;
        assert!(!r.relay.is_finished());
        drop(r.process);
        r.relay.await.unwrap();
        let mut answer = String::new();
        r.host.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    });
}

#[test]
fn a_socket_that_the_process_closes_is_closed_without_writing() {
    runtime().block_on(async {
        let mut r = relayed();
        // Half of it first: the host may still write then.
        r.process.shutdown(std::net::Shutdown::Write).unwrap();
        settle().await;
        assert_eq!(r.host.read(&mut [0]).unwrap(), 0);
        r.host.write_all(b"x").unwrap();
        settle().await;
        r.process.read_exact(&mut [0]).unwrap();
        drop(r.process);
        r.relay.await.unwrap();
        assert!(r.host.write_all(b"x").is_err());
    });
}

#[test]
fn a_socket_ends_with_the_process_whoever_has_it() {
    runtime().block_on(async {
        let mut r = relayed();
        r.process.write_all(b"last words").unwrap();
        r.exit.send_replace(Some(ExitStatus::Exited(0)));
        r.relay.await.unwrap();
        let mut all = String::new();
        r.host.read_to_string(&mut all).unwrap();
        assert_eq!(all, "last words");
        assert_eq!(r.process.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn a_host_that_is_gone_breaks_the_pipe() {
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, host) = pair();
        let (_exit, exited) = running();
        drop(host);
        let mut process = std::fs::File::from(write);
        process.write_all(b"x").unwrap();
        relay_output(read, connection, OutputEnd::new(exited, false)).await;
        assert_eq!(
            process.write_all(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    });
}

#[test]
fn the_end_of_the_input_reaches_the_process() {
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, mut host) = pair();
        let (_exit, exited) = running();
        let sender = std::thread::spawn(move || {
            host.write_all(&vec![3; 300_000]).unwrap();
            host.shutdown(std::net::Shutdown::Write).unwrap();
            host
        });
        let process = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::fs::File::from(read).read_to_end(&mut all).unwrap();
            all
        });
        relay_input(connection, write, exited).await;
        assert_eq!(process.join().unwrap(), vec![3; 300_000]);
        drop(sender.join().unwrap());
    });
}

#[test]
fn a_process_that_closes_its_input_is_noticed_without_writing() {
    runtime().block_on(async {
        let (read, write) = sys::pipe().unwrap();
        let (connection, mut host) = pair();
        let (_exit, exited) = running();
        drop(read);
        relay_input(connection, write, exited).await;
        assert!(host.write_all(b"x").is_err());
    });
}
