//! `events`: what happens to a container while it lives.
//!
//! Statistics are asked of the agent at intervals. What happens by itself comes
//! from the agent to the sandboxer, which passes it on to whoever listens; the
//! end of the container comes the same way, so that it is never seen before what
//! led to it. The stand-in is watched for the case that the guest says nothing.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::state::{ContainerRecord, Status};
use super::stats::Stats;
use super::{Error, check_id, context, start};
use crate::agent_client::Agent;
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::sandbox::control::Notice;
use crate::sys::process::ProcessRef;
use crate::sys::seqpacket::wait_any_readable;

/// How long after the end of the stand-in the guest may take to say so.
const END_DEADLINE: Duration = Duration::from_secs(2);
/// As good as for ever, and far from overflowing.
const LONG: Duration = Duration::from_secs(86400);

/// What `events` prints.
#[derive(Debug)]
pub enum Happening {
    Stats(Box<Stats>),
    /// A process was killed because there was no memory left.
    Oom,
}

/// The container's statistics now.
///
/// # Errors
/// [`Error::NoEvents`] when it has stopped, else see [`Error`].
pub fn stats(root: &Root, id: &str) -> Result<Stats, Error> {
    let record = live(root, id)?;
    let agent = start::connect(root, &record.sandbox_id)?;
    ask(&agent, id)
}

/// Reports to `sink` until the container ends or `sink` fails, whose error is
/// the end then: nobody reads any more.
///
/// # Errors
/// [`Error::NoEvents`] when it has stopped, else see [`Error`].
pub fn follow(
    root: &Root,
    id: &str,
    interval: Duration,
    sink: &mut dyn FnMut(Happening) -> io::Result<()>,
) -> Result<(), Error> {
    let record = live(root, id)?;
    let sandbox = Sandbox::open(root, &record.sandbox_id)?;
    sandbox.subscribe(id)?;
    let agent = sandbox.agent()?;
    agent.watch_oom(id).map_err(Error::Agent)?;
    let mut ending = Ending::of(record.standin)?;
    let mut next = Instant::now() + interval;
    loop {
        match ending.wait(&sandbox, next)? {
            Woken::Notice => match sandbox.notice()? {
                Some(Notice::Oom) => {
                    if sink(Happening::Oom).is_err() {
                        return Ok(());
                    }
                }
                // The container has ended, or its virtual machine.
                Some(Notice::Ended) | None => return Ok(()),
            },
            Woken::Ended => return Ok(()),
            Woken::Nothing if Instant::now() < next => {}
            Woken::Nothing => {
                match ask(&agent, id) {
                    Ok(stats) => {
                        if sink(Happening::Stats(Box::new(stats))).is_err() {
                            return Ok(());
                        }
                    }
                    // As runc: the next time it may work again.
                    Err(e) => log::error!("{e}"),
                }
                next = Instant::now() + interval;
            }
        }
    }
}

fn live(root: &Root, id: &str) -> Result<ContainerRecord, Error> {
    check_id(id)?;
    let record = ContainerRecord::read(root, id)?;
    match record.status(root) {
        Status::Created | Status::Running | Status::Paused => Ok(record),
        Status::Stopped | Status::Creating => Err(Error::NoEvents(id.to_owned())),
    }
}

fn ask(agent: &Agent, id: &str) -> Result<Stats, Error> {
    let stats = agent.stats(id).map(Stats::from).map_err(Error::Agent)?;
    match agent.network_stats(id) {
        Ok(network) => Ok(stats.with_network(&network)),
        // Its process has ended, and its network with it.
        Err(e) if e.is_wrong_state() => Ok(stats),
        Err(e) => Err(Error::Agent(e)),
    }
}

/// Why a wait is over.
enum Woken {
    Notice,
    Ended,
    Nothing,
}

/// The stand-in's end, and how long to wait after it.
struct Ending {
    /// `None` once it has ended.
    standin: Option<std::os::fd::OwnedFd>,
    since: Option<Instant>,
}

impl Ending {
    fn of(standin: Option<ProcessRef>) -> Result<Ending, Error> {
        let standin = standin
            .map(ProcessRef::pidfd)
            .transpose()
            .map_err(context("watching the stand-in"))?
            .flatten();
        Ok(Ending {
            since: standin.is_none().then(Instant::now),
            standin,
        })
    }

    /// Waits for the sandboxer, the end, or until `next`.
    fn wait(&mut self, sandbox: &Sandbox, next: Instant) -> Result<Woken, Error> {
        let now = Instant::now();
        let until = match self.since {
            Some(since) => next.min(since + END_DEADLINE),
            None => next,
        };
        let mut fds = vec![sandbox.as_fd()];
        fds.extend(self.standin.as_ref().map(AsFd::as_fd));
        let ready = wait_any_readable(&fds, until.saturating_duration_since(now).min(LONG))
            .map_err(context("waiting for events"))?;
        if ready[0] {
            return Ok(Woken::Notice);
        }
        if ready.get(1) == Some(&true) {
            self.standin = None;
            self.since = Some(Instant::now());
        }
        match self.since {
            Some(since) if since.elapsed() >= END_DEADLINE => Ok(Woken::Ended),
            _ => Ok(Woken::Nothing),
        }
    }
}
