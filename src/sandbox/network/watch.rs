//! The thread that looks after one container's network.
//!
//! It lives in the container's network namespace, with the capabilities it needs there. What only the owner of the VM can do, it asks for ([`Message`]).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::network::ApplyRequest;
use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use nix::sched::{CloneFlags, setns};
use rustix::thread::CapabilitySet;

use super::cards::{Card, Cards};
use super::guest;
use super::loopback::{self, Loopback};
use super::model::{self, Host};
use super::served::Served;
use super::snapshot::{NEWS, Snapshot};
use super::sysfs::Sysfs;
use crate::config::NetworkModel;
use crate::root::Root;
use crate::sandbox::Guest;
use crate::sys::capabilities::limit_to;
use crate::sys::seqpacket::wait_any_readable;
use crate::sys::wake::Wake;
use crate::vm::Device;

/// How long news are collected: engines make several changes in a row.
const CALM: Duration = Duration::from_millis(10);
/// How long the sandboxer may take over a device.
const DEVICE_DEADLINE: Duration = Duration::from_secs(60);
/// Pauses between attempts to repeat what failed, and their number.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRIES: u32 = 30;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{step}: {source}")]
    Io {
        step: &'static str,
        source: io::Error,
    },
    #[error("connecting the interface {name}: {reason}")]
    Connect { name: String, reason: String },
    #[error("setting up the network in the guest: {0}")]
    Guest(#[from] crate::sandbox::Error),
    #[error("the sandboxer is ending")]
    Ending,
}

pub(super) fn step(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { step, source }
}

/// What a watch asks of the sandboxer's main thread, or tells it.
pub enum Message {
    /// Answered with the id the device got, and the hardware address.
    Attach {
        device: NewDevice,
        answer: Sender<Result<Attached, String>>,
    },
    /// Of a device that the guest has let go of.
    Detach { id: String },
    /// The network of the container is complete for the first time, or cannot be
    /// completed; in that case the watch has ended.
    Settled {
        container: String,
        result: Result<(), String>,
    },
    /// The network of the container is another's from now on, and the guest knows.
    HandedOver {
        container: String,
        result: Result<(), String>,
    },
    /// The watch has disconnected everything; its last message.
    Ended { container: String },
}

/// A device that is to be attached.
pub enum NewDevice {
    Net {
        queues: Vec<OwnedFd>,
        /// Wanted, but not when another device has it.
        mac: Option<[u8; 6]>,
    },
    /// By a program of the host, to which this is a connection.
    Served {
        socket: OwnedFd,
        /// As of the others.
        mac: [u8; 6],
    },
    Other(Device),
}

/// A device that has been attached.
#[derive(Debug)]
pub struct Attached {
    pub id: String,
    pub mac: [u8; 6],
}

/// A watch's way to the sandboxer's main thread.
#[derive(Clone)]
pub struct Machine {
    pub messages: Sender<Message>,
    /// Wakes the main thread.
    pub wake: Arc<Wake>,
    /// Held from before a device is attached or detached until the guest has done
    /// its part: the guest looks for all devices there are, so one that is on its
    /// way out must not be there then.
    pub plugging: Arc<Mutex<()>>,
}

impl Machine {
    pub(super) fn tell(&self, message: Message) -> Result<(), Error> {
        self.messages.send(message).map_err(|_| Error::Ending)?;
        self.wake.wake().map_err(|_| Error::Ending)
    }

    pub(super) fn attach(&self, device: NewDevice) -> Result<Result<Attached, String>, Error> {
        let (answer, answered): (_, Receiver<_>) = channel();
        self.tell(Message::Attach { device, answer })?;
        match answered.recv_timeout(DEVICE_DEADLINE) {
            Ok(result) => Ok(result),
            Err(RecvTimeoutError::Timeout) => Ok(Err("the sandboxer does not answer".into())),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Ending),
        }
    }
}

/// What a watch has to know.
#[derive(Clone)]
pub struct Settings {
    pub root: Root,
    pub sandbox_id: String,
    pub container: String,
    pub model: NetworkModel,
    /// Queues of each interface.
    pub queues: u32,
}

/// A running watch. It ends when it is asked to, and with the process.
pub struct Watch {
    wake: Arc<Wake>,
    orders: Sender<Order>,
    thread: JoinHandle<()>,
    namespace: (u64, u64),
}

/// What a watch is told.
enum Order {
    /// Its container is about to be deleted, and this one goes on with the network.
    HandOver(String),
    /// Nobody uses the network any more: what becomes of it is of no interest.
    Rest,
    /// To disconnect all there is, and to end.
    End,
}

impl Watch {
    /// Starts to look after the network in `namespace`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        settings: Settings,
        machine: Machine,
        namespace: OwnedFd,
        served: Vec<Served>,
    ) -> io::Result<Watch> {
        let wake = Arc::new(Wake::new()?);
        let (orders, received) = channel();
        let orders_from = (Arc::clone(&wake), received);
        let stat = rustix::fs::fstat(&namespace)?;
        let thread = std::thread::Builder::new()
            .name("network".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let mut container = settings.container.clone();
                let messages = machine.clone();
                let ended = Watcher::enter(settings, machine, namespace, orders_from).and_then(
                    |mut watcher| {
                        watcher.served = served;
                        let ended = watcher.run();
                        container = watcher.settings.container;
                        ended
                    },
                );
                // Nobody is left to be told when the sandboxer ends.
                if let Err(e) = ended {
                    log::error!("the network of {container}: {e}");
                    let _ = messages.tell(Message::Settled {
                        container: container.clone(),
                        result: Err(e.to_string()),
                    });
                }
                let _ = messages.tell(Message::Ended { container });
            })?;
        Ok(Watch {
            wake,
            orders,
            thread,
            namespace: (stat.st_dev, stat.st_ino),
        })
    }

    /// Asks it to end, after it has disconnected the container's interfaces. Does not
    /// wait for it.
    pub fn ask_to_end(&self) {
        self.order(Order::End);
    }

    /// Leaves the network to another container that is in the same namespace. Does not
    /// wait for it: [`Message::HandedOver`].
    pub fn hand_over(&self, heir: &str) {
        self.order(Order::HandOver(heir.to_owned()));
    }

    /// The only container of the VM has ended. Engines take its network apart then, which
    /// need not be done again in the guest.
    pub fn rest(&self) {
        self.order(Order::Rest);
    }

    fn order(&self, order: Order) {
        // One that has ended has nothing to do, and has said so.
        if self.orders.send(order).is_ok()
            && let Err(e) = self.wake.wake()
        {
            log::warn!("waking the watch of a network: {e}");
        }
    }

    /// Device and inode of the namespace.
    #[must_use]
    pub fn namespace(&self) -> (u64, u64) {
        self.namespace
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

/// The thread's own state.
struct Watcher {
    settings: Settings,
    machine: Machine,
    wake: Arc<Wake>,
    orders: Receiver<Order>,
    netlink: Rtnetlink,
    news: Rtnetlink,
    sysfs: Option<Sysfs>,
    cards: Cards,
    /// Cards of programs that are not devices yet.
    served: Vec<Served>,
    /// What the guest was last told.
    applied: ApplyRequest,
    /// Names of interfaces that stay on the host, which is said once.
    ignored: HashSet<String>,
    loopback: Loopback,
    /// News are left alone.
    rests: bool,
}

impl Watcher {
    fn enter(
        settings: Settings,
        machine: Machine,
        namespace: OwnedFd,
        (wake, orders): (Arc<Wake>, Receiver<Order>),
    ) -> Result<Watcher, Error> {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .map_err(|e| step("entering the network namespace")(e.into()))?;
        drop(namespace);
        // Not everywhere, and not everybody needs it.
        let sysfs = Sysfs::mount()
            .inspect_err(|e| log::debug!("sysfs of the network namespace: {e}"))
            .ok();
        let loopback = Loopback::new(&settings.root, &settings.sandbox_id, &settings.container);
        let mut needed = CapabilitySet::NET_ADMIN | loopback::CAPABILITIES;
        if settings.model == NetworkModel::Macvtap {
            needed |= CapabilitySet::MKNOD;
        }
        limit_to(needed).map_err(step("giving up capabilities"))?;
        let netlink = Rtnetlink::new().map_err(step("a netlink socket"))?;
        let news = Rtnetlink::subscribed(&NEWS).map_err(step("a netlink socket"))?;
        Ok(Watcher {
            settings,
            machine,
            wake,
            orders,
            netlink,
            news,
            sysfs,
            cards: Cards::default(),
            served: Vec::new(),
            applied: ApplyRequest::default(),
            ignored: HashSet::new(),
            loopback,
            rests: false,
        })
    }

    fn run(&mut self) -> Result<(), Error> {
        if let Err(e) = self.settle() {
            self.leave();
            return Err(e);
        }
        self.machine.tell(Message::Settled {
            container: self.settings.container.clone(),
            result: Ok(()),
        })?;
        let mut failures = 0;
        loop {
            let patience = match failures {
                1..=MAX_RETRIES if !self.rests => RETRY,
                _ => Duration::from_secs(24 * 3600),
            };
            let fds = [self.wake.as_fd(), self.news.as_fd()];
            let fds = if self.rests { &fds[..1] } else { &fds };
            let ready = wait_any_readable(fds, patience).map_err(step("waiting for news"))?;
            if ready[0] && self.obey()? {
                return Ok(());
            }
            if self.rests {
                continue;
            }
            if ready.get(1) == Some(&true) {
                failures = 0;
                self.wait_for_calm()?;
            }
            match self.settle() {
                Ok(()) => failures = 0,
                Err(e) => {
                    failures += 1;
                    log::error!("the network of {}: {e}", self.settings.container);
                }
            }
        }
    }

    /// Does what it is told; whether that was to end.
    fn obey(&mut self) -> Result<bool, Error> {
        self.wake.reset().map_err(step("reading orders"))?;
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Rest => self.rests = true,
                Order::HandOver(heir) => {
                    self.rests = false;
                    let container = self.settings.container.clone();
                    let result = self.hand_over(heir).map_err(|e| e.to_string());
                    self.machine
                        .tell(Message::HandedOver { container, result })?;
                }
                Order::End => {
                    self.leave();
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// It is the heir's network from now on, whatever the guest says.
    fn hand_over(&mut self, heir: String) -> Result<(), Error> {
        let before = std::mem::replace(&mut self.settings.container, heir);
        let snapshot =
            Snapshot::take(&mut self.netlink).map_err(step("reading the network namespace"))?;
        let snapshot = self.cards.complete(snapshot);
        self.tell_guest(&snapshot, before)
    }

    /// Takes the news off the socket until there are none for a moment.
    fn wait_for_calm(&self) -> Result<(), Error> {
        let end = Instant::now() + CALM * 20;
        loop {
            self.news.drain_news().map_err(step("reading news"))?;
            let fds = [self.news.as_fd(), self.wake.as_fd()];
            let ready = wait_any_readable(&fds, CALM).map_err(step("waiting for news"))?;
            if !ready[0] || ready[1] || Instant::now() >= end {
                return Ok(());
            }
        }
    }

    /// Makes the VM's network what the namespace's is.
    fn settle(&mut self) -> Result<(), Error> {
        let plugging = Arc::clone(&self.machine.plugging);
        // Another watch that panicked has left nothing half-done that matters here.
        let plug = || plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let served = std::mem::take(&mut self.served);
        let mut plugs = (!served.is_empty()).then(plug);
        let snapshot =
            Snapshot::take(&mut self.netlink).map_err(step("reading the network namespace"))?;
        for served in served {
            self.cards.serve(&self.machine, &snapshot, served)?;
        }
        let snapshot = self.cards.complete(snapshot);
        let plan = self.cards.plan(&snapshot, &mut self.ignored);
        if (!plan.gone.is_empty() || !plan.new.is_empty()) && plugs.is_none() {
            plugs = Some(plug());
        }
        if !plan.gone.is_empty() {
            let gone = self.cards.take(&plan.gone);
            // What is gone on the host is gone, whatever the guest says.
            let told = self.apply(&snapshot);
            for card in gone {
                self.disconnect(&card);
            }
            told?;
        }
        for link in plan.new {
            let machine = self.machine.clone();
            let (cards, mut host) = self.parts();
            cards.connect(&mut host, &machine, &snapshot, &link)?;
        }
        let (cards, mut host) = self.parts();
        cards.follow(&mut host, &snapshot)?;
        self.apply(&snapshot)?;
        drop(plugs);
        self.loopback.settle(&mut self.netlink, &mut self.cards);
        Ok(())
    }

    fn parts(&mut self) -> (&mut Cards, Host<'_>) {
        let host = Host {
            netlink: &mut self.netlink,
            sysfs: self.sysfs.as_ref(),
            model: self.settings.model,
            queues: self.settings.queues,
            sandbox_dir: self.settings.root.sandbox(&self.settings.sandbox_id),
            owner: model::owner(&self.settings.sandbox_id),
        };
        (&mut self.cards, host)
    }

    /// Tells the guest what its network is, if that is news.
    fn apply(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        self.tell_guest(snapshot, String::new())
    }

    /// With the container whose network it was before, if it was another's.
    fn tell_guest(&mut self, snapshot: &Snapshot, heir_of: String) -> Result<(), Error> {
        let cards = self.cards.of(snapshot);
        let request = guest::request(&self.settings.container, &cards, snapshot);
        if request.interfaces.is_empty()
            && request.addresses.is_empty()
            && self.applied == ApplyRequest::default()
        {
            // Nothing but a loopback interface, as the guest has it from the start.
            return Ok(());
        }
        if request == self.applied {
            return Ok(());
        }
        let guest = Guest::open(&self.settings.root, &self.settings.sandbox_id)?;
        let agent = guest.agent()?;
        let told = ApplyRequest {
            heir_of,
            ..request.clone()
        };
        agent
            .apply_network(&told)
            .map_err(|e| Error::Guest(e.into()))?;
        self.applied = request;
        Ok(())
    }

    /// Takes a card out. What fails is logged: the interface is gone or about to be.
    fn disconnect(&mut self, card: &Card) {
        let machine = self.machine.clone();
        let (_, mut host) = self.parts();
        if let Err(e) = card.disconnect(&mut host, &machine) {
            log::warn!("disconnecting {}: {e}", card.link.name);
        }
    }

    /// Disconnects everything.
    fn leave(&mut self) {
        self.loopback.end();
        let plugging = Arc::clone(&self.machine.plugging);
        let _plugging = plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.cards.take_all();
        if all.is_empty() {
            return;
        }
        // The guest may be gone, or the container.
        if let Err(e) = self.apply(&Snapshot::default()) {
            log::debug!("{e}");
        }
        for card in all {
            self.disconnect(&card);
        }
    }
}
