//! The guest agent of kuasar-runv: PID 1 of the virtual machine.
//!
//! Three kinds of process make up the agent, all of one executable image:
//!
//! | process | made by | does |
//! |---|---|---|
//! | agent | the kernel | mounts, reaps, serves ttrpc and the streams; async, one thread; never runs container code |
//! | zygote | `fork` before the runtime exists | stays pristine and single-threaded, forks the helpers |
//! | helper | `clone` by the zygote, one per container operation | runs libcontainer, answers, exits |
//!
//! Helpers are forked and not executed: loading and relocating the image again
//! would cost more than the operation itself under emulation. They are children
//! of the agent (`CLONE_PARENT`), so that a container's first process, which is
//! a child of its helper, becomes the agent's when the helper exits.
//!
//! [`boot`] turns the initial state of PID 1 into a system, [`serve`] is the
//! rest of the agent's life. A machine may be saved in between ([`template`]).

pub mod boot;
pub mod bpf;
pub mod cgroup;
pub mod clock;
pub mod containers;
pub mod debug_console;
pub mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod helper;
pub mod hotplug;
pub mod ipc;
pub mod logging;
pub mod loopback;
pub mod machine;
pub mod mmio;
pub mod network;
pub mod pci;
pub mod process;
pub mod reaper;
pub mod serve;
pub mod service;
pub mod storage;
pub mod streams;
pub mod sys;
pub mod template;
pub mod transport;
pub mod zygote;

/// Everything PID 1 does. Returns only when even powering off failed.
pub fn init() {
    let start_us = sys::boottime_us();
    logging::install_panic_hook();
    let restored = template::is_restored();
    let prepared = if restored {
        boot::config()
    } else {
        boot::prepare()
    };
    let config = match prepared {
        Ok(config) => config,
        Err(e) => return logging::fatal(&format!("boot: {e}")),
    };
    logging::init(config.log_level);
    if config.template && !restored {
        // Does not return: the machine that goes on executes the agent anew.
        let e = template::hand_over();
        return logging::fatal(&format!("template: {e}"));
    }
    if let Err(e) = boot::mount_share() {
        return logging::fatal(&format!("boot: {e}"));
    }
    let zygote = match zygote::Zygote::spawn() {
        Ok(zygote) => zygote,
        Err(e) => return logging::fatal(&format!("starting the zygote: {e}")),
    };
    let settings = serve::Settings {
        transport: transport::Transport::Vsock,
        debug_console: config.debug_console,
        start_us,
        state_dir: containers::STATE_DIR.into(),
    };
    if let Err(e) = serve::run(settings, zygote) {
        logging::fatal(&e.to_string());
    }
}
