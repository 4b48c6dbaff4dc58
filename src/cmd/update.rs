//! `kuasar-runv update`

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::values::bytes;
use super::{Context, Failure};
use crate::container::resources::{BlockIo, Cpu, Memory, Pids, Resources};

/// Most that is read of a file with limits, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Change the limits of a container
///
/// Limits hold in the virtual machine. What is not mentioned stays as it is.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n    \
    kuasar-runv update --memory 256m --pids-limit 100 mycontainer\n    \
    echo '{\"cpu\": {\"shares\": 512}}' | kuasar-runv update --resources - mycontainer")]
pub struct Args {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// File with the limits as in linux.resources of config.json, or - for
    /// standard input; the other options are ignored then
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Length of a CPU period in microseconds, 0 for the default
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time in a period in microseconds, -1 for no limit
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// CPU time saved up for later periods, in microseconds
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// CPU shares, relative to other containers
    #[arg(long, value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Refused unless 0: the guest's cgroup v2 has no realtime limits
    #[arg(long, value_name = "US")]
    cpu_rt_period: Option<u64>,
    /// Refused unless 0: the guest's cgroup v2 has no realtime limits
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    /// CPUs of the virtual machine to use, as in 0-2,4
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the virtual machine to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// 1: run only when nothing else wants to
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// Ignored, as by runc
    #[arg(long, value_name = "BYTES", hide = true, allow_negative_numbers = true)]
    kernel_memory: Option<String>,
    /// Ignored, as by runc
    #[arg(long, value_name = "BYTES", hide = true, allow_negative_numbers = true)]
    kernel_memory_tcp: Option<String>,
    /// Memory in bytes or with a unit (256m), -1 for no limit
    #[arg(long, value_name = "BYTES", value_parser = bytes, allow_negative_numbers = true)]
    memory: Option<i64>,
    /// Memory that is not reclaimed while others have more to give
    #[arg(long, value_name = "BYTES", value_parser = bytes, allow_negative_numbers = true)]
    memory_reservation: Option<i64>,
    /// Memory and swap together, -1 for no limit of swap
    #[arg(long, value_name = "BYTES", value_parser = bytes, allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// Number of processes, -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Refused: a virtual machine has no Intel RDT
    #[arg(long, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Refused: a virtual machine has no Intel RDT
    #[arg(long, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    let change = match &args.resources {
        Some(path) => read(path)?,
        None => of_flags(args),
    };
    let given = |schema: &Option<String>| schema.as_ref().is_some_and(|s| !s.is_empty());
    // runc's words.
    if given(&args.l3_cache_schema) {
        return Err(failure("Intel RDT/CAT: l3 cache schema is not enabled"));
    }
    if given(&args.mem_bw_schema) {
        return Err(failure(
            "Intel RDT/MBA: memory bandwidth schema is not enabled",
        ));
    }
    crate::container::update::update(&context.root, &args.id, &change)?;
    Ok(0)
}

fn failure(message: &str) -> Failure {
    Failure {
        message: message.to_owned(),
        code: 1,
    }
}

/// Reads one JSON value. What follows it is not read: the writer of a pipe may
/// keep it open.
fn read(path: &Path) -> Result<Resources, Failure> {
    let input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let opened = File::open(path);
        Box::new(opened.map_err(|e| failure(&format!("open {}: {e}", path.display())))?)
    };
    let mut json = serde_json::Deserializer::from_reader(input.take(MAX_FILE));
    Resources::deserialize(&mut json).map_err(|e| failure(&format!("reading the limits: {e}")))
}

fn of_flags(args: &Args) -> Resources {
    for (flag, value) in [
        ("kernel-memory", &args.kernel_memory),
        ("kernel-memory-tcp", &args.kernel_memory_tcp),
    ] {
        if value.is_some() {
            log::warn!("Setting --{flag} is ignored and will be removed");
        }
    }
    Resources {
        memory: Memory {
            limit: args.memory,
            reservation: args.memory_reservation,
            swap: args.memory_swap,
            check_before_update: None,
        },
        cpu: Cpu {
            shares: args.cpu_share,
            quota: args.cpu_quota,
            burst: args.cpu_burst,
            period: args.cpu_period,
            realtime_runtime: args.cpu_rt_runtime,
            realtime_period: args.cpu_rt_period,
            cpus: args.cpuset_cpus.clone(),
            mems: args.cpuset_mems.clone(),
            idle: args.cpu_idle,
        },
        block_io: BlockIo {
            weight: args.blkio_weight,
        },
        pids: Pids {
            limit: args.pids_limit,
        },
        ..Resources::default()
    }
}
