//! `tcfilter`: whatever arrives at the endpoint is sent out of a tap, and the other
//! way round, by a traffic control filter at the ingress of each (tc-mirred(8)).
//!
//! The host's own network stack is behind the filter and sees nothing of it, so the
//! endpoint's addresses stay where the engine has put them. The filter is a `u32`
//! that matches every packet, because not every kernel has `matchall`. It is known
//! by its preference: what a dead VM has left can be told from what an engine has
//! set up, by anybody who can see the interface.

use std::io;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::{Host, Tied, step};
use crate::config::NetworkModel;
use crate::sandbox::network::snapshot::Link;
use crate::sandbox::network::tap::Tap;

/// Preference of our filters: "RV".
const PREFERENCE: u16 = 0x5256;
/// Where filters at the ingress belong, under `ingress` and under `clsact`.
const AT_INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};
/// The ingress queueing discipline itself.
const QDISC: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

pub(super) fn tie(host: &mut Host<'_>, link: &Link) -> io::Result<Tied> {
    let netlink = &mut *host.netlink;
    if clean(netlink, link.index).map_err(step("looking for filters of an earlier VM"))? {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another virtual machine is connected to it",
        ));
    }
    let tap = Tap::create(netlink, host.queues, link.mtu).map_err(step("making a tap"))?;
    // The tap takes its own along when it goes.
    add_qdisc(netlink, tap.index).map_err(step("adding an ingress qdisc to the tap"))?;
    add_filter(netlink, tap.index, link.index).map_err(step("adding a filter to the tap"))?;
    add_qdisc(netlink, link.index).map_err(step("adding an ingress qdisc"))?;
    if let Err(e) = add_filter(netlink, link.index, tap.index) {
        // The first error is the one to report.
        let _ = untie(netlink, link.index);
        return Err(step("adding a filter")(e));
    }
    Ok(Tied {
        queues: tap.queues,
        index: tap.index,
        model: NetworkModel::Tcfilter,
    })
}

/// Takes our filter off an interface, and the qdisc, if nobody else has a filter
/// there.
///
/// # Errors
/// The kernel's; an interface that is gone is no error.
pub(super) fn untie(netlink: &mut Rtnetlink, index: u32) -> io::Result<()> {
    let mut filter = TcMessage::with_index(signed(index));
    filter.header.parent = AT_INGRESS;
    filter.header.info = filter_info();
    let delete = RouteNetlinkMessage::DelTrafficFilter(filter);
    gone_is_fine(netlink.request(delete, 0))?;
    if filters(netlink, index)?.is_empty() && has_ingress(netlink, index)? {
        let mut qdisc = TcMessage::with_index(signed(index));
        qdisc.header.parent = TcHandle::INGRESS;
        qdisc.header.handle = QDISC;
        let delete = RouteNetlinkMessage::DelQueueDiscipline(qdisc);
        gone_is_fine(netlink.request(delete, 0))?;
    }
    Ok(())
}

/// Removes what a VM that is gone has left at an interface. Whether a VM that lives
/// is connected to it.
///
/// # Errors
/// The kernel's; an interface that is gone is no error.
pub fn clean(netlink: &mut Rtnetlink, index: u32) -> io::Result<bool> {
    let ours: Vec<_> = filters(netlink, index)?
        .into_iter()
        .filter(|filter| filter.header.info >> 16 == u32::from(PREFERENCE))
        .collect();
    if ours.is_empty() {
        return Ok(false);
    }
    // The kernel forgets the target of a filter when the target goes.
    if ours.iter().any(|filter| redirects_to(filter) != 0) {
        return Ok(true);
    }
    untie(netlink, index)?;
    Ok(false)
}

fn add_qdisc(netlink: &mut Rtnetlink, index: u32) -> io::Result<()> {
    let mut qdisc = TcMessage::with_index(signed(index));
    qdisc.header.parent = TcHandle::INGRESS;
    qdisc.header.handle = QDISC;
    qdisc.attributes.push(TcAttribute::Kind("ingress".into()));
    let add = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
    match netlink.request(add, NLM_F_CREATE | NLM_F_EXCL) {
        // An engine's, for instance one that limits the bandwidth.
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

fn add_filter(netlink: &mut Rtnetlink, from: u32, to: u32) -> io::Result<()> {
    let mut redirect = TcMirror::default();
    redirect.generic.action = TcActionType::Stolen;
    redirect.eaction = TcMirrorActionType::EgressRedir;
    redirect.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            redirect,
        ))]),
    ];
    let mut everything = TcU32Selector::default();
    everything.flags = TcU32SelectorFlags::Terminal;
    everything.nkeys = 1;
    everything.keys = vec![TcU32Key::default()];
    let mut filter = TcMessage::with_index(signed(from));
    filter.header.parent = AT_INGRESS;
    filter.header.info = filter_info();
    filter.attributes = vec![
        TcAttribute::Kind("u32".into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(everything)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    let add = RouteNetlinkMessage::NewTrafficFilter(filter);
    netlink.request(add, NLM_F_CREATE | NLM_F_EXCL)
}

/// `tcm_info` of a filter: preference and protocol, which is `ETH_P_ALL` in network
/// byte order.
fn filter_info() -> u32 {
    (u32::from(PREFERENCE) << 16) | u32::from((libc::ETH_P_ALL as u16).to_be())
}

fn filters(netlink: &mut Rtnetlink, index: u32) -> io::Result<Vec<TcMessage>> {
    let mut get = TcMessage::with_index(signed(index));
    get.header.parent = AT_INGRESS;
    let found = match netlink.dump(RouteNetlinkMessage::GetTrafficFilter(get)) {
        // No such interface, or no qdisc for ingress.
        Err(e) if is_gone(&e) => Vec::new(),
        other => other?,
    };
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
            _ => None,
        })
        .collect())
}

fn has_ingress(netlink: &mut Rtnetlink, index: u32) -> io::Result<bool> {
    let get = TcMessage::with_index(signed(index));
    let qdiscs = netlink.dump(RouteNetlinkMessage::GetQueueDiscipline(get))?;
    Ok(qdiscs.iter().any(|message| {
        let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = message else {
            return false;
        };
        qdisc.header.index == signed(index)
            && qdisc
                .attributes
                .contains(&TcAttribute::Kind("ingress".into()))
    }))
}

/// Index of the interface a filter sends packets to; 0 when that is gone.
fn redirects_to(filter: &TcMessage) -> u32 {
    let options = filter.attributes.iter().filter_map(|a| match a {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|a| match a {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    let mut targets = options.flatten().filter_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(parms)) => Some(parms.ifindex),
        _ => None,
    });
    targets.find(|index| *index != 0).unwrap_or(0)
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if is_gone(&e) => Ok(()),
        other => other,
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
    )
}

/// Interface indices are positive ints in the kernel.
fn signed(index: u32) -> i32 {
    index.cast_signed()
}
