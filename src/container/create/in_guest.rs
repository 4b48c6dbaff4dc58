//! The guest's part of a create: what it is told, and the streams that connect its
//! process with the stand-in.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};

use kuasar_runv_protocol::agent::{CreateContainerRequest, NamespaceJoin};
use kuasar_runv_protocol::namespace::Kind;
use kuasar_runv_protocol::seccomp::Filter;

use super::{Options, Parts, clone_bind, clone_rootfs, has_terminal};
use crate::agent_client::streams::{self, Wanted};
use crate::agent_client::{self, Agent};
use crate::container::bundle::Bundle;
use crate::container::guest_spec::{GuestSpec, ROOTFS};
use crate::container::membership::Membership;
use crate::container::{Error, guest_volumes, pod};
use crate::sandbox::{Guest, Sandbox};
use crate::standin::spawn::StandIn;
use crate::standin::{ATTACHED, HAS_STDERR, HAS_STDIN, HAS_STDOUT, TERMINAL};

/// Puts rootfs and volumes into the pod's shared directory.
pub(super) fn share(
    sandbox: &Sandbox,
    options: &Options,
    bundle: &Bundle,
    guest: &GuestSpec,
) -> Result<(), Error> {
    sandbox.share(&options.id, ROOTFS, clone_rootfs(bundle)?.as_fd())?;
    for bind in guest.binds.iter().filter(|bind| bind.is_shared) {
        let (tree, writes) = (clone_bind(bind)?, bind.read_only.is_none());
        sandbox.share_volume(&options.id, &bind.volume, writes, tree.as_fd())?;
    }
    Ok(())
}

/// Lets the agent create the container; the streams are for its stand-in.
pub(super) fn create_in_guest(
    sandbox: &Sandbox,
    options: &Options,
    parts: &Parts<'_>,
    seccomp: Option<&Filter>,
) -> Result<(Agent, Vec<OwnedFd>), Error> {
    let Parts {
        bundle,
        guest,
        membership,
        preserved,
        ..
    } = *parts;
    let terminal = has_terminal(bundle);
    let wanted = wanted_streams(terminal).with_preserved(&preserved.relayed());
    let mut config = Cow::Borrowed(&guest.json);
    if !guest.volumes.is_empty() {
        guest_volumes::make(sandbox, &options.id, &guest.volumes, config.to_mut())?;
    }
    let request = CreateContainerRequest {
        container_id: options.id.clone(),
        spec_json: config.to_string().into_bytes(),
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        no_pivot: options.no_pivot,
        no_new_keyring: options.no_new_keyring,
        plain_newlines: terminal && options.foreground,
        preserved: preserved.wanted(&options.id, ""),
        joins: joins(membership),
        shared_memory: guest.shared_memory.clone(),
        seccomp: seccomp.map(Filter::encode).unwrap_or_default(),
        ..Default::default()
    };
    let _files = preserved.share(sandbox, &options.id, "")?;
    let mut created = ask_to_create(sandbox.guest(), &request, wanted);
    if matches!(&created, Err(Error::Agent(e)) if e.is_already_there()) {
        // Left behind by one that was deleted while the guest did not answer. The
        // streams go with it.
        pod::remove_from_guest(sandbox, &options.id)?;
        created = ask_to_create(sandbox.guest(), &request, wanted);
    }
    created.map_err(|e| match e {
        Error::Agent(agent_client::Error::Refused { message, .. }) => Error::Process(message),
        other => other,
    })
}

fn ask_to_create(
    guest: &Guest,
    request: &CreateContainerRequest,
    wanted: Wanted,
) -> Result<(Agent, Vec<OwnedFd>), Error> {
    // All connections at once; the agent waits for what belongs together.
    let agent = guest.start_agent()?;
    let opening = guest.start_streams(&request.container_id, "", wanted)?;
    let agent = guest.finish_agent(agent)?;
    agent.create_container(request).map_err(Error::Agent)?;
    Ok((agent, guest.finish_streams(opening)?))
}

/// Gives the streams to the stand-in.
pub(super) fn attach(
    standin: &StandIn,
    options: &Options,
    parts: &Parts<'_>,
    streams: &[OwnedFd],
) -> Result<(), Error> {
    let terminal = has_terminal(parts.bundle);
    let mut flags = stream_flags(wanted_streams(terminal), terminal);
    if options.foreground {
        flags |= ATTACHED;
    }
    Ok(standin.attach(flags, streams, parts.preserved.relays())?)
}

fn joins(membership: &Membership) -> Vec<NamespaceJoin> {
    let join = |(kind, id): (&Kind, &String)| NamespaceJoin {
        type_: kind.name().to_owned(),
        container_id: id.clone(),
        ..Default::default()
    };
    membership.joins.iter().map(join).collect()
}

/// The standard streams that lead somewhere; with a terminal those that it has.
pub fn wanted_streams(terminal: bool) -> Wanted {
    if terminal {
        return Wanted {
            stdin: true,
            stdout: true,
            stderr: false,
            preserved: 0,
        };
    }
    Wanted {
        stdin: streams::leads_somewhere(rustix::stdio::stdin()),
        stdout: streams::leads_somewhere(rustix::stdio::stdout()),
        stderr: streams::leads_somewhere(rustix::stdio::stderr()),
        preserved: 0,
    }
}

/// What the stand-in is told of them.
pub fn stream_flags(wanted: Wanted, terminal: bool) -> u8 {
    let mut flags = 0;
    for (is_set, flag) in [
        (wanted.stdin, HAS_STDIN),
        (wanted.stdout, HAS_STDOUT),
        (wanted.stderr, HAS_STDERR),
        (terminal, TERMINAL),
    ] {
        if is_set {
            flags |= flag;
        }
    }
    flags
}
