//! The control connection of a process: signals, window sizes and hang-ups in,
//! the exit status out.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;

use kuasar_runv_protocol::stream::Frame;

use super::Connection;
use crate::cgroup::oom::OomWatch;
use crate::process::Process;
use crate::reaper::ExitStatus;

/// Serves the connection until the process has ended or the stand-in is gone;
/// in the latter case the process is killed. What the host is to know of the end of
/// a container's own process before its stand-in does is `oom`'s to say.
pub async fn serve(connection: Connection, process: Arc<Process>, oom: Option<Arc<OomWatch>>) {
    let frames = async {
        loop {
            match next_frame(&connection).await {
                Ok(Some(frame)) => handle(frame, &process),
                Ok(None) => return,
                Err(e) => {
                    log::warn!("control connection: {e}");
                    return;
                }
            }
        }
    };
    tokio::select! {
        biased;
        status = process.ended() => {
            let frame = match status {
                ExitStatus::Exited(code) => Frame::Exited(code),
                ExitStatus::Killed(signal) => Frame::Killed(signal),
            };
            if let Some(oom) = oom {
                oom.before_the_end().await;
            }
            // A stand-in that is gone does not need it.
            drop(connection.write_all(frame.encode().as_bytes()).await);
            connection.shutdown(Shutdown::Write);
        }
        () = frames => {
            // It may have ended at this moment.
            drop(process.signal(libc::SIGKILL));
        }
    }
}

async fn next_frame(connection: &Connection) -> io::Result<Option<Frame>> {
    let mut bytes = [0; Frame::LEN];
    match connection.read(&mut bytes).await? {
        0 => return Ok(None),
        n => connection.read_exact(&mut bytes[n..]).await?,
    }
    Frame::decode(bytes)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))
}

fn handle(frame: Frame, process: &Process) {
    let result = match frame {
        Frame::Signal(signal) => match i32::try_from(signal) {
            Ok(signal) => process.signal(signal).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        },
        Frame::WindowSize { rows, cols } => process.resize(rows, cols).map_err(|e| e.to_string()),
        Frame::Hangup => process.hang_up().map_err(|e| e.to_string()),
        Frame::Exited(_) | Frame::Killed(_) => Err("frame of the other direction".to_owned()),
    };
    if let Err(e) = result {
        // A signal may cross the exit status.
        log::debug!("control frame {frame:?}: {e}");
    }
}
