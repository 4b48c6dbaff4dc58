//! What commands print of a guest's answers, for [`crate::fuzzing`].

use kuasar_runv_protocol::agent::{GetStatsResponse, ListProcessesResponse};
use kuasar_runv_protocol::network::StatsResponse;

use super::ps::{options, table_of};
use super::stats::Stats;

/// Most bytes that are printed for one process: the arguments, and all other columns.
const MAX_ROW: usize = 64 * 1024;
/// Most bytes of statistics: a thousand lines of everything that has a bound.
const MAX_STATS: usize = 4 * 1024 * 1024;

/// `ps` prints a line for each process, and nothing that a terminal obeys.
pub fn processes(answer: ListProcessesResponse) {
    let all = [
        "-eo",
        "pid,ppid,pgid,sid,user,uid,gid,tty,tpgid,stat,comm,args,time,etime,vsz",
    ];
    for options in [&["-ef"][..], &["aux"], &all] {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let layout = options::parse(&options).expect("known options");
        let table = table_of(answer.clone(), &layout);
        let rows = answer.processes.len() + 1;
        assert!(table.lines().count() <= rows);
        assert!(table.len() <= rows * MAX_ROW);
        assert!(
            table.chars().all(|c| c == '\n' || !c.is_control()),
            "{table:?}"
        );
    }
}

/// `events` prints what can be parsed again.
pub fn statistics(answer: GetStatsResponse, network: &StatsResponse) {
    let stats = Stats::from(answer).with_network(network);
    let text = serde_json::to_string(&stats).expect("numbers and names");
    assert!(text.len() <= MAX_STATS);
    let _: serde_json::Value = serde_json::from_str(&text).expect("JSON");
}
