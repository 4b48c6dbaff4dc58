//! Network cards that a program of the host serves over vhost-user, by an annotation: neither
//! the runtime specification nor CNI has a place for a card that is no interface of the host.
//!
//! ```json
//! [{"name": "fast0", "socket": "/run/vhost-user/pod1", "mac": "02:00:00:00:00:01",
//!   "mtu": 9000, "addresses": ["10.1.0.2/24"], "routes": [{"to": "default", "via": "10.1.0.1"}]}]
//! ```
//!
//! Annotations reach the runtime from people who may not use every socket of the host, so
//! `[network] vhost_user` says in which directories sockets may be. There, names lead nowhere
//! else: no component may be a symbolic link.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use serde::Deserialize;

use super::guest_volumes::vhost_user::{self, Wanted};
use crate::config;
use crate::sandbox::network::MAX_INTERFACES;
use crate::sandbox::network::served::{Card, Prefix, Route, Served};
use crate::sys::random;

pub const ANNOTATION: &str = "dev.kuasar-runv.network.vhost-user";

/// Most addresses, and most routes, of a card.
const MAX_ENTRIES: usize = 256;
/// Longest name of an interface (`IFNAMSIZ` without the end).
const MAX_NAME: usize = 15;
/// Least that IPv4 takes (RFC 791), and most of a packet.
const MTUS: std::ops::RangeInclusive<u32> = 68..=65535;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the annotation {ANNOTATION}: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the annotation {ANNOTATION}: the card {name:?}: {reason}")]
    Card { name: String, reason: String },
    #[error("the annotation {ANNOTATION}: there can be at most {MAX_INTERFACES} cards")]
    TooMany,
    #[error("the card {name}: {}: {source}", socket.display())]
    Socket {
        name: String,
        socket: PathBuf,
        source: io::Error,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    name: String,
    socket: PathBuf,
    mac: Option<String>,
    mtu: Option<u32>,
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    routes: Vec<AskedRoute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedRoute {
    to: String,
    via: Option<IpAddr>,
    metric: Option<u32>,
}

/// The cards that a configuration's annotations ask for. Nothing is connected yet.
///
/// # Errors
/// See [`Error`].
pub fn of(spec: &Spec, settings: &config::Network) -> Result<Vec<Card>, Error> {
    let annotations = spec.annotations().as_ref();
    read(annotations.and_then(|all| all.get(ANNOTATION)), settings)
}

fn read(text: Option<&String>, settings: &config::Network) -> Result<Vec<Card>, Error> {
    let Some(text) = text else {
        return Ok(Vec::new());
    };
    let asked: Vec<Asked> = serde_json::from_str(text)?;
    if asked.len() > MAX_INTERFACES {
        return Err(Error::TooMany);
    }
    let mut names = HashSet::new();
    let mut card = |asked: Asked| {
        let name = asked.name.clone();
        let failed = |reason| Error::Card {
            name: name.clone(),
            reason,
        };
        if !names.insert(asked.name.clone()) {
            return Err(failed("there is another of this name".into()));
        }
        card_of(asked, &settings.vhost_user).map_err(failed)
    };
    asked.into_iter().map(&mut card).collect()
}

fn card_of(asked: Asked, directories: &[PathBuf]) -> Result<Card, String> {
    if !is_name(&asked.name) {
        return Err("an interface cannot have this name".into());
    }
    let (directory, socket) = place(&asked.socket, directories)?;
    let mtu = asked.mtu.unwrap_or(1500);
    if !MTUS.contains(&mtu) {
        return Err(format!("the mtu {mtu} is not between 68 and 65535"));
    }
    if asked.addresses.len() > MAX_ENTRIES || asked.routes.len() > MAX_ENTRIES {
        return Err(format!("more than {MAX_ENTRIES} addresses or routes"));
    }
    let addresses = asked.addresses.iter().map(|text| address(text));
    Ok(Card {
        name: asked.name,
        directory,
        socket,
        mac: match asked.mac {
            Some(text) => mac(&text)?,
            None => random_mac().map_err(|e| format!("a hardware address: {e}"))?,
        },
        mtu,
        addresses: addresses.collect::<Result<_, _>>()?,
        routes: asked.routes.iter().map(route).collect::<Result<_, _>>()?,
    })
}

/// As `dev_valid_name` of the kernel has it; what is called as our taps or the loopback
/// interface is none either.
fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    !matches!(name, "" | "." | ".." | "lo") && name.len() <= MAX_NAME && name.chars().all(fits)
}

/// The directory a socket is in, and its path below that.
fn place(socket: &Path, directories: &[PathBuf]) -> Result<(PathBuf, PathBuf), String> {
    let below = |directory: &PathBuf| {
        let rest = socket.strip_prefix(directory).ok()?;
        let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        let is_below = rest.components().next().is_some() && rest.components().all(is_plain);
        is_below.then(|| (directory.clone(), rest.to_owned()))
    };
    directories.iter().find_map(below).ok_or_else(|| {
        format!(
            "the socket {} is not below a directory of vhost_user in section [network]",
            socket.display()
        )
    })
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let no = || format!("{text:?} is not the hardware address of a card");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        // Digits only: the parser takes a sign as well.
        let is_byte = |part: &&str| part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
        let part = parts.next().filter(is_byte).ok_or_else(no)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| no())?;
    }
    // Not for groups, and not nobody's (IEEE 802).
    match parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6] {
        true => Ok(mac),
        false => Err(no()),
    }
}

/// Locally administered.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    random::fill(&mut mac)?;
    mac[0] = mac[0] & !1 | 2;
    Ok(mac)
}

fn prefix(text: &str) -> Result<Prefix, String> {
    let no = || format!("{text:?} is not an address with the length of a prefix");
    let (address, len) = text.split_once('/').ok_or_else(no)?;
    let address: IpAddr = address.parse().map_err(|_| no())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let len = len.parse().ok().filter(|len| *len <= most).ok_or_else(no)?;
    Ok(Prefix { address, len })
}

fn address(text: &str) -> Result<Prefix, String> {
    let prefix = prefix(text)?;
    let is_a_hosts = !prefix.address.is_multicast()
        && !prefix.address.is_unspecified()
        && !prefix.address.is_loopback();
    match is_a_hosts {
        true => Ok(prefix),
        false => Err(format!("{text:?} is not the address of a host")),
    }
}

fn route(asked: &AskedRoute) -> Result<Route, String> {
    let is_v6 = asked.via.is_some_and(|via| via.is_ipv6());
    let to = match (asked.to.as_str(), is_v6) {
        ("default", true) => prefix("::/0")?,
        ("default", false) => prefix("0.0.0.0/0")?,
        (text, _) => prefix(text)?,
    };
    if asked
        .via
        .is_some_and(|via| via.is_ipv6() != to.address.is_ipv6())
    {
        return Err(format!("the route to {:?} is of another family", asked.to));
    }
    Ok(Route {
        to,
        via: asked.via,
        metric: asked.metric,
    })
}

/// Connects to the programs; each has shown that it serves a card.
///
/// # Errors
/// [`Error::Socket`].
pub fn connect(cards: &[Card]) -> Result<Vec<Served>, Error> {
    let served = |card: &Card| {
        let socket = open(card)
            .and_then(|socket| vhost_user::connect_to(&socket, Wanted::Card))
            .map_err(|source| Error::Socket {
                name: card.name.clone(),
                socket: card.directory.join(&card.socket),
                source,
            })?;
        Ok(Served {
            card: card.clone(),
            socket,
        })
    };
    cards.iter().map(served).collect()
}

/// The socket, without anything having been done with it.
fn open(card: &Card) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let directory: OwnedFd = openat(
        CWD,
        &card.directory,
        flags | OFlags::DIRECTORY,
        Mode::empty(),
    )?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let socket = openat2(&directory, &card.socket, flags, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is not a socket"));
    }
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn parse(text: &str) -> Result<Vec<Card>, Error> {
        let settings = config::Network {
            vhost_user: vec!["/run/switch".into()],
            ..config::Network::default()
        };
        read(Some(&text.to_owned()), &settings)
    }

    #[test]
    fn a_card_is_read_with_its_addresses() {
        assert!(read(None, &config::Network::default()).unwrap().is_empty());
        let cards = parse(
            r#"[{"name": "fast0", "socket": "/run/switch/a/b", "mac": "02:00:00:00:0A:01",
                "mtu": 9000, "addresses": ["10.1.0.2/24", "fd00::2/64"],
                "routes": [{"to": "default", "via": "10.1.0.1"}, {"to": "default", "via": "fd00::1"},
                           {"to": "10.2.0.0/16", "metric": 7}]},
               {"name": "fast1", "socket": "/run/switch/c"}]"#,
        )
        .unwrap();
        let first = &cards[0];
        assert_eq!(first.directory, Path::new("/run/switch"));
        assert_eq!(first.socket, Path::new("a/b"));
        assert_eq!(first.mac, [2, 0, 0, 0, 10, 1]);
        assert_eq!((first.mtu, first.addresses.len()), (9000, 2));
        assert!(first.routes[1].to.address.is_ipv6());
        assert_eq!(first.routes[2].metric, Some(7));
        let second = &cards[1];
        assert_eq!((second.mtu, second.mac[0] & 3), (1500, 2));
    }

    #[test]
    fn what_cannot_be_a_card_is_refused() {
        let card = |more: &str| format!(r#"[{{"name": "x", "socket": "/run/switch/s"{more}}}]"#);
        for (text, words) in [
            ("{}", "expected a sequence"),
            (r#"[{"name": "x"}]"#, "socket"),
            (&card(r#", "queues": 2"#), "unknown field"),
            (&card(r#", "mac": "01:00:00:00:00:01""#), "hardware address"),
            (&card(r#", "mac": "02:00:00:00:00""#), "hardware address"),
            (&card(r#", "mac": "02:00:00:00:00:+1""#), "hardware address"),
            (&card(r#", "mtu": 10"#), "mtu"),
            (
                &card(r#", "addresses": ["10.1.0.2"]"#),
                "length of a prefix",
            ),
            (
                &card(r#", "addresses": ["10.1.0.2/33"]"#),
                "length of a prefix",
            ),
            (
                &card(r#", "addresses": ["224.0.0.1/24"]"#),
                "address of a host",
            ),
            (
                &card(r#", "routes": [{"to": "fd00::/64", "via": "10.1.0.1"}]"#),
                "another family",
            ),
            (
                r#"[{"name": "lo", "socket": "/run/switch/s"}]"#,
                "this name",
            ),
            (
                r#"[{"name": "a/b", "socket": "/run/switch/s"}]"#,
                "this name",
            ),
            (
                r#"[{"name": "x", "socket": "/run/switch/../docker.sock"}]"#,
                "not below",
            ),
            (r#"[{"name": "x", "socket": "/run/switch"}]"#, "not below"),
            (
                r#"[{"name": "x", "socket": "/run/switched/s"}]"#,
                "not below",
            ),
            (
                r#"[{"name": "x", "socket": "/run/switch/s"}, {"name": "x", "socket": "/run/switch/s"}]"#,
                "another of this name",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(words), "{text}: {message}");
        }
        let one = r#"{"name": "x", "socket": "/run/switch/s"}"#;
        let many = format!("[{}]", vec![one; MAX_INTERFACES + 1].join(","));
        assert!(matches!(parse(&many), Err(Error::TooMany)));
    }

    #[test]
    fn names_of_sockets_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
        std::fs::create_dir(&inside).unwrap();
        let _listener = UnixListener::bind(&outside).unwrap();
        let _other = UnixListener::bind(inside.join("socket")).unwrap();
        std::fs::write(inside.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        std::os::unix::fs::symlink(dir.path(), inside.join("dir")).unwrap();
        let card = |socket: &str| Card {
            name: "x".into(),
            directory: inside.clone(),
            socket: socket.into(),
            mac: [2; 6],
            mtu: 1500,
            addresses: Vec::new(),
            routes: Vec::new(),
        };
        assert!(open(&card("socket")).is_ok());
        for socket in ["link", "dir/outside", "file", "none", "../outside"] {
            assert!(open(&card(socket)).is_err(), "{socket}");
        }
    }
}
