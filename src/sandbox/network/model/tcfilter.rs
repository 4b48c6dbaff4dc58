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
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
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
/// Those of the filters for what is not only the guest's, which are asked before: of
/// answers to "who has", and of name servers.
const PREFERENCE_ARP: u16 = PREFERENCE - 2;
const PREFERENCE_DNS: u16 = PREFERENCE - 1;
/// Of both in IPv6. Filters of one preference are about one protocol.
const PREFERENCE_IPV6: u16 = PREFERENCE - 3;
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
    if let Err(e) = without_queue(netlink, tap.index) {
        log::debug!("the tap keeps its queueing discipline: {e}");
    }
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
    for info in [
        filter_info(),
        info_of(PREFERENCE_ARP, libc::ETH_P_ARP),
        info_of(PREFERENCE_DNS, libc::ETH_P_IP),
        info_of(PREFERENCE_IPV6, libc::ETH_P_IPV6),
    ] {
        let mut filter = TcMessage::with_index(signed(index));
        filter.header.parent = AT_INGRESS;
        filter.header.info = info;
        let delete = RouteNetlinkMessage::DelTrafficFilter(filter);
        gone_is_fine(netlink.request(delete, 0))?;
    }
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

/// Packets go to the tap's queues at once: these are where they wait for the guest, and
/// the tap never asks its queueing discipline to hold anything back (tun_net_xmit in
/// drivers/net/tun.c), so that one only costs time.
fn without_queue(netlink: &mut Rtnetlink, tap: u32) -> io::Result<()> {
    let mut qdisc = TcMessage::with_index(signed(tap));
    qdisc.header.parent = TcHandle::ROOT;
    qdisc.attributes.push(TcAttribute::Kind("noqueue".into()));
    let replace = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
    netlink.request(replace, NLM_F_CREATE | NLM_F_REPLACE)
}

fn add_filter(netlink: &mut Rtnetlink, from: u32, to: u32) -> io::Result<()> {
    let everything = vec![TcU32Key::default()];
    let redirect = mirred(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen);
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let filter = u32_filter(from, filter_info(), everything, Some(redirect));
    netlink.request(RouteNetlinkMessage::NewTrafficFilter(filter), flags)
}

/// Has the namespace's own network stack see the answers to its questions for names,
/// which go out by themselves: those of name servers to its ports from `first` to
/// 65535, and who has which address. The latter the guest sees as well, which may have
/// asked itself.
///
/// # Errors
/// The kernel's.
pub(super) fn pass_answers(
    netlink: &mut Rtnetlink,
    endpoint: u32,
    tap: u32,
    first: u16,
) -> io::Result<()> {
    /// ARPOP_REPLY, behind two lengths (RFC 826).
    const REPLY: (i32, u32, u32) = (4, 0x0000_ffff, 0x0000_0002);
    /// ICMPv6 that no router has passed on, and in it a neighbour advertisement (RFC 4861,
    /// sections 4.4 and 7.1.2).
    const ADVERTISEMENT: [(i32, u32, u32); 2] = [
        (4, 0x0000_ffff, 58 << 8 | 255),
        (40, 0xff00_0000, 136 << 24),
    ];
    let mirror = || mirred(tap, TcMirrorActionType::EgressMirror, TcActionType::Ok);
    let arp = info_of(PREFERENCE_ARP, libc::ETH_P_ARP);
    let dns = info_of(PREFERENCE_DNS, libc::ETH_P_IP);
    let ipv6 = info_of(PREFERENCE_IPV6, libc::ETH_P_IPV6);
    let mut filters = vec![
        u32_filter(endpoint, arp, keys(&[REPLY]), Some(mirror())),
        u32_filter(endpoint, ipv6, keys(&ADVERTISEMENT), Some(mirror())),
    ];
    // Of a name server to one of the ports. `first` is a power of two below 65536.
    let ports = |offset| {
        (
            offset,
            0xffff_0000 | u32::from(first),
            53 << 16 | u32::from(first),
        )
    };
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        // RFC 791: a header without options, not a fragment, the protocol; then both
        // ports.
        let answer = [
            (0, 0x0f00_0000, 0x0500_0000),
            (4, 0x0000_3fff, 0),
            (8, 0x00ff_0000, protocol.cast_unsigned() << 16),
            ports(20),
        ];
        filters.push(u32_filter(endpoint, dns, keys(&answer), None));
        // RFC 8200: the protocol, without other headers before it; then both ports.
        let answer = [(4, 0x0000_ff00, protocol.cast_unsigned() << 8), ports(40)];
        filters.push(u32_filter(endpoint, ipv6, keys(&answer), None));
    }
    for filter in filters {
        netlink.request(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE)?;
    }
    Ok(())
}

/// An action: a packet goes out of `to`, and then what `then` says happens to it.
fn mirred(to: u32, how: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut parms = TcMirror::default();
    parms.generic.action = then;
    parms.eaction = how;
    parms.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            parms,
        ))]),
    ];
    action
}

/// Offset in the packet, mask and value, each of 32 bits.
fn keys(of: &[(i32, u32, u32)]) -> Vec<TcU32Key> {
    let key = |(offset, mask, value): &(i32, u32, u32)| {
        let mut key = TcU32Key::default();
        key.off = *offset;
        key.mask = mask.to_be();
        key.val = value.to_be();
        key
    };
    of.iter().map(key).collect()
}

/// A filter at the ingress of an interface. Without an action it lets packets pass.
fn u32_filter(index: u32, info: u32, keys: Vec<TcU32Key>, action: Option<TcAction>) -> TcMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    // A handful.
    selector.nkeys = keys.len() as u8;
    selector.keys = keys;
    let mut options = vec![TcOption::U32(TcFilterU32Option::Selector(selector))];
    if let Some(action) = action {
        options.push(TcOption::U32(TcFilterU32Option::Action(vec![action])));
    }
    let mut filter = TcMessage::with_index(signed(index));
    filter.header.parent = AT_INGRESS;
    filter.header.info = info;
    filter.attributes = vec![
        TcAttribute::Kind("u32".into()),
        TcAttribute::Options(options),
    ];
    filter
}

/// Of the filter for everything.
fn filter_info() -> u32 {
    info_of(PREFERENCE, libc::ETH_P_ALL)
}

/// `tcm_info` of a filter: preference and protocol, which is in network byte order.
fn info_of(preference: u16, protocol: libc::c_int) -> u32 {
    (u32::from(preference) << 16) | u32::from((protocol as u16).to_be())
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
