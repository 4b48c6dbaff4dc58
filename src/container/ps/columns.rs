//! The columns of ps(1): names, headers, widths and contents as procps 4 has them
//! on a machine with pids of five digits.

use std::collections::HashMap;

use chrono::{DateTime, Datelike, Duration, Local};
use kuasar_runv_protocol::agent::ProcessInfo;

use super::Error;
use super::options::Layout;

/// What a column shows.
type Cell = fn(&ProcessInfo, &Facts) -> String;

/// One column of one table.
#[derive(Clone, Debug)]
pub struct Column {
    pub header: String,
    width: usize,
    align: Align,
    cell: Cell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Align {
    Right,
    Left,
    /// Left; cut when it is longer and not the last column.
    Cut,
    /// Left; cut with a plus sign.
    Name,
}

/// What cells need besides the process.
pub struct Facts {
    now: DateTime<Local>,
    memory_kib: u64,
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Facts {
    #[must_use]
    pub fn new(
        memory_kib: u64,
        users: HashMap<u32, String>,
        groups: HashMap<u32, String>,
    ) -> Facts {
        Facts {
            now: Local::now(),
            memory_kib,
            users,
            groups,
        }
    }

    fn user(&self, id: u32) -> String {
        self.users
            .get(&id)
            .cloned()
            .unwrap_or_else(|| id.to_string())
    }

    fn group(&self, id: u32) -> String {
        self.groups
            .get(&id)
            .cloned()
            .unwrap_or_else(|| id.to_string())
    }

    fn start(&self, p: &ProcessInfo) -> DateTime<Local> {
        let age = i64::try_from(p.age_ms)
            .ok()
            .and_then(Duration::try_milliseconds);
        age.and_then(|age| self.now.checked_sub_signed(age))
            .unwrap_or(self.now)
    }

    /// Today the time, this year the day, before that the year.
    fn short_start(&self, p: &ProcessInfo) -> String {
        let start = self.start(p);
        let format = match () {
            () if start.date_naive() == self.now.date_naive() => "%H:%M",
            () if start.year() == self.now.year() => "%b%d",
            () => "%Y",
        };
        start.format(format).to_string()
    }
}

struct Known {
    /// The first is the one that is named.
    keys: &'static str,
    header: &'static str,
    width: usize,
    align: Align,
    cell: Cell,
}

const fn column(
    keys: &'static str,
    header: &'static str,
    width: usize,
    align: Align,
    cell: Cell,
) -> Known {
    Known {
        keys,
        header,
        width,
        align,
        cell,
    }
}

use Align::{Cut, Left, Name, Right};

const KNOWN: &[Known] = &[
    column("pid tgid", "PID", 5, Right, |p, _| p.pid.to_string()),
    column("ppid", "PPID", 5, Right, |p, _| p.ppid.to_string()),
    column("pgid", "PGID", 5, Right, |p, _| p.pgid.to_string()),
    column("pgrp", "PGRP", 5, Right, |p, _| p.pgid.to_string()),
    column("sid", "SID", 5, Right, |p, _| p.sid.to_string()),
    column("sess session", "SESS", 5, Right, |p, _| p.sid.to_string()),
    column("tpgid", "TPGID", 5, Right, |p, _| p.tpgid.to_string()),
    column("uid", "UID", 5, Right, |p, _| p.euid.to_string()),
    column("euid", "EUID", 5, Right, |p, _| p.euid.to_string()),
    column("ruid", "RUID", 5, Right, |p, _| p.ruid.to_string()),
    column("gid", "GID", 5, Right, |p, _| p.egid.to_string()),
    column("egid", "EGID", 5, Right, |p, _| p.egid.to_string()),
    column("rgid", "RGID", 5, Right, |p, _| p.rgid.to_string()),
    column("user uname", "USER", 8, Name, |p, f| f.user(p.euid)),
    column("euser", "EUSER", 8, Name, |p, f| f.user(p.euid)),
    column("ruser", "RUSER", 8, Name, |p, f| f.user(p.ruid)),
    column("group", "GROUP", 8, Name, |p, f| f.group(p.egid)),
    column("egroup", "EGROUP", 8, Name, |p, f| f.group(p.egid)),
    column("rgroup", "RGROUP", 8, Name, |p, f| f.group(p.rgid)),
    column("comm ucomm", "COMMAND", 15, Left, |p, _| command_name(p)),
    column("ucmd", "CMD", 15, Left, |p, _| command_name(p)),
    column("args command", "COMMAND", 27, Cut, |p, _| arguments(p)),
    column("cmd", "CMD", 27, Cut, |p, _| arguments(p)),
    column("c", "C", 2, Right, |p, _| {
        (permille_cpu(p) / 10).min(99).to_string()
    }),
    column("%cpu pcpu", "%CPU", 4, Right, |p, _| {
        tenths(permille_cpu(p))
    }),
    column("%mem pmem", "%MEM", 4, Right, |p, f| {
        tenths(p.rss_kib.saturating_mul(1000) / f.memory_kib.max(1))
    }),
    column("vsz vsize", "VSZ", 6, Right, |p, _| p.vsize_kib.to_string()),
    column("rss rssize", "RSS", 5, Right, |p, _| p.rss_kib.to_string()),
    column("rsz", "RSZ", 5, Right, |p, _| p.rss_kib.to_string()),
    column("sz", "SZ", 5, Right, |p, _| (p.vsize_kib / 4).to_string()),
    column("addr_sz", "ADDR SZ", 7, Right, |p, _| {
        format!("- {:5}", p.vsize_kib / 4)
    }),
    column("tty tname", "TTY", 8, Left, |p, _| terminal(p.tty)),
    column("tt", "TT", 8, Left, |p, _| terminal(p.tty)),
    column("stat", "STAT", 4, Left, |p, _| long_state(p)),
    column("s state", "S", 1, Left, |p, _| p.state.clone()),
    column("stime start_time", "STIME", 5, Left, |p, f| {
        f.short_start(p)
    }),
    column("bsdstart", "START", 5, Left, |p, f| f.short_start(p)),
    column("start", "STARTED", 8, Right, |p, f| {
        let recent = p.age_ms < 24 * 3600 * 1000;
        let format = if recent { "%H:%M:%S" } else { "  %b %d" };
        f.start(p).format(format).to_string()
    }),
    column("lstart", "STARTED", 24, Right, |p, f| {
        f.start(p).format("%a %b %e %H:%M:%S %Y").to_string()
    }),
    column("time cputime", "TIME", 8, Right, |p, _| {
        clock(p.cpu_ms / 1000, true)
    }),
    column("bsdtime", "TIME", 6, Right, |p, _| {
        let seconds = p.cpu_ms / 1000;
        format!("{}:{:02}", seconds / 60, seconds % 60)
    }),
    column("times cputimes", "TIME", 8, Right, |p, _| {
        (p.cpu_ms / 1000).to_string()
    }),
    column("etime", "ELAPSED", 11, Right, |p, _| {
        clock(p.age_ms / 1000, false)
    }),
    column("etimes", "ELAPSED", 7, Right, |p, _| {
        (p.age_ms / 1000).to_string()
    }),
    column("ni nice", "NI", 3, Right, |p, _| p.nice.to_string()),
    column("pri", "PRI", 3, Right, |p, _| {
        39_i32.saturating_sub(p.priority).to_string()
    }),
    column("priority", "PRI", 3, Right, |p, _| p.priority.to_string()),
    column("opri", "PRI", 3, Right, |p, _| {
        p.priority.saturating_add(60).to_string()
    }),
    column("nlwp", "NLWP", 4, Right, |p, _| p.threads.to_string()),
    column("thcount", "THCNT", 5, Right, |p, _| p.threads.to_string()),
    column("psr", "PSR", 3, Right, |p, _| p.processor.to_string()),
    column("f flag flags", "F", 1, Right, |p, _| {
        format!("{:o}", p.flags >> 6 & 7)
    }),
    column("cls class", "CLS", 3, Right, |p, _| policy(p).to_owned()),
    column("rtprio", "RTPRIO", 6, Right, |p, _| match p.rt_priority {
        0 => "-".to_owned(),
        priority => priority.to_string(),
    }),
    // The guest's kernel keeps no such names.
    column("wchan", "WCHAN", 6, Left, |_, _| "-".to_owned()),
];

/// Names of all columns.
pub fn known() -> String {
    let names = KNOWN.iter().filter_map(|k| k.keys.split(' ').next());
    let names: Vec<_> = names.filter(|name| *name != "addr_sz").collect();
    names.join(", ")
}

/// The column of a key with `:WIDTH` or `=HEADER` behind it.
///
/// # Errors
/// [`Error::Column`].
pub fn find(key: &str) -> Result<Column, Error> {
    let (rest, header) = match key.split_once('=') {
        Some((rest, header)) => (rest, Some(header)),
        None => (key, None),
    };
    let (name, width) = match rest.split_once(':') {
        Some((name, width)) => (name, Some(width)),
        None => (rest, None),
    };
    let unknown = || Error::Column(key.to_owned());
    let known = KNOWN
        .iter()
        .find(|known| known.keys.split(' ').any(|k| k == name))
        .ok_or_else(unknown)?;
    let mut column = Column {
        header: known.header.to_owned(),
        width: known.width,
        align: known.align,
        cell: known.cell,
    };
    if let Some(width) = width {
        let width: u8 = width.parse().map_err(|_| unknown())?;
        column.width = width.into();
    }
    if let Some(header) = header {
        column.set_header(header);
    }
    Ok(column)
}

impl Column {
    /// Another header; the column is at least as wide.
    pub fn set_header(&mut self, header: &str) {
        header.clone_into(&mut self.header);
        self.width = self.width.max(header.chars().count());
    }

    fn put(&self, line: &mut String, text: &str, is_last: bool) {
        let width = self.width;
        let len = text.chars().count();
        let shown: String = match self.align {
            Align::Cut if len > width && !is_last => text.chars().take(width).collect(),
            Align::Name if len > width => text
                .chars()
                .take(width.saturating_sub(1))
                .chain(['+'])
                .collect(),
            _ => text.to_owned(),
        };
        if !line.is_empty() {
            line.push(' ');
        }
        let padding = " ".repeat(width.saturating_sub(shown.chars().count()));
        match self.align {
            Align::Right => line.extend([padding.as_str(), &shown]),
            _ if is_last => line.push_str(&shown),
            _ => line.extend([shown.as_str(), &padding]),
        }
    }
}

/// The whole table.
pub fn render(layout: &Layout, processes: &[ProcessInfo], facts: &Facts) -> String {
    let mut table = String::new();
    let last = layout.columns.len().saturating_sub(1);
    let mut line = |text: &dyn Fn(&Column) -> String| {
        let mut line = String::new();
        for (index, column) in layout.columns.iter().enumerate() {
            column.put(&mut line, &text(column), index == last);
        }
        table.push_str(&line);
        table.push('\n');
    };
    if layout.headers {
        line(&|column| column.header.clone());
    }
    for process in processes {
        line(&|column| (column.cell)(process, facts));
    }
    table
}

fn command_name(p: &ProcessInfo) -> String {
    match p.state.as_str() {
        "Z" => format!("{} <defunct>", p.name),
        _ => p.name.clone(),
    }
}

fn arguments(p: &ProcessInfo) -> String {
    if !p.args.is_empty() {
        return String::from_utf8_lossy(&p.args).into_owned();
    }
    match p.state.as_str() {
        "Z" => format!("[{}] <defunct>", p.name),
        _ => format!("[{}]", p.name),
    }
}

fn permille_cpu(p: &ProcessInfo) -> u64 {
    p.cpu_ms.saturating_mul(1000) / p.age_ms.max(1)
}

fn tenths(permille: u64) -> String {
    match permille {
        ..1000 => format!("{}.{}", permille / 10, permille % 10),
        _ => (permille / 10).to_string(),
    }
}

/// `[[DD-]hh:]mm:ss`; with `full` the hours are always there.
fn clock(seconds: u64, full: bool) -> String {
    let (days, hours) = (seconds / 86400, seconds / 3600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    match (days, hours) {
        (0, 0) if !full => format!("{minutes:02}:{seconds:02}"),
        (0, _) => format!("{hours:02}:{minutes:02}:{seconds:02}"),
        _ => format!("{days}-{hours:02}:{minutes:02}:{seconds:02}"),
    }
}

/// A device number as in `/proc/PID/stat`.
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    // devices.txt of the kernel: eight majors of Unix98 slaves.
    match (major, minor) {
        (0, 0) => "?".to_owned(),
        (136..=143, minor) => format!("pts/{}", (major - 136) * 256 + minor),
        (4, 0..=63) => format!("tty{minor}"),
        (4, _) => format!("ttyS{}", minor - 64),
        (5, 1) => "console".to_owned(),
        (229, minor) => format!("hvc{minor}"),
        _ => format!("{major},{minor}"),
    }
}

fn long_state(p: &ProcessInfo) -> String {
    let mut state = p.state.clone();
    for (is_set, letter) in [
        (p.nice < 0, '<'),
        (p.nice > 0, 'N'),
        (p.locked, 'L'),
        (p.sid == p.pid, 's'),
        (p.threads > 1, 'l'),
        (p.tpgid == p.pgid, '+'),
    ] {
        if is_set {
            state.push(letter);
        }
    }
    state
}

fn policy(p: &ProcessInfo) -> &'static str {
    match p.policy {
        0 => "TS",
        1 => "FF",
        2 => "RR",
        3 => "B",
        4 => "ISO",
        5 => "IDL",
        6 => "DLN",
        _ => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::parse;
    use super::*;

    fn process() -> ProcessInfo {
        ProcessInfo {
            pid: 42,
            ppid: 1,
            pgid: 42,
            sid: 42,
            tpgid: -1,
            euid: 0,
            state: "S".into(),
            name: "sleep".into(),
            args: b"sleep 1000".to_vec(),
            cpu_ms: 90_000,
            age_ms: 180_000,
            vsize_kib: 2268,
            rss_kib: 1440,
            priority: 20,
            threads: 1,
            ..ProcessInfo::new()
        }
    }

    fn table(options: &[&str], process: ProcessInfo) -> Vec<String> {
        let options: Vec<_> = options.iter().map(|o| (*o).to_owned()).collect();
        let users = HashMap::from([(0, "root".to_owned()), (7, "a-long-user-name".to_owned())]);
        let facts = Facts::new(100_000, users, HashMap::new());
        let text = render(&parse(&options).unwrap(), &[process], &facts);
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_table_is_laid_out_as_procps_does() {
        // Headers as procps 4.0.2 prints them.
        let headers = [
            (
                &["-ef"][..],
                "UID        PID  PPID  C STIME TTY          TIME CMD",
            ),
            (
                &["aux"],
                "USER       PID %CPU %MEM    VSZ   RSS TTY      STAT START   TIME COMMAND",
            ),
            (
                &["-el"],
                "F S   UID   PID  PPID  C PRI  NI ADDR SZ WCHAN  TTY          TIME CMD",
            ),
            (
                &["l"],
                "F   UID   PID  PPID PRI  NI    VSZ   RSS WCHAN  STAT TTY        TIME COMMAND",
            ),
            (
                &["j"],
                " PPID   PID  PGID   SID TTY      TPGID STAT   UID   TIME COMMAND",
            ),
            (
                &["-F"],
                "UID        PID  PPID  C    SZ   RSS PSR STIME TTY          TIME CMD",
            ),
            (
                &["-o", "pid,args,comm"],
                "  PID COMMAND                     COMMAND",
            ),
        ];
        for (options, header) in headers {
            assert_eq!(table(options, process())[0], header, "{options:?}");
        }
        let [_, line] = &table(&["aux"], process())[..] else {
            panic!("one process, one line")
        };
        assert!(
            line.starts_with("root        42 50.0  1.4   2268  1440 ?        Ss   "),
            "{line}"
        );
        assert!(line.ends_with("   1:30 sleep 1000"), "{line}");
    }

    #[test]
    fn long_texts_are_cut_where_procps_cuts_them() {
        let long = ProcessInfo {
            euid: 7,
            args: "x".repeat(40).into_bytes(),
            ..process()
        };
        let line = &table(&["-o", "pid,user,args,comm"], long.clone())[1];
        assert_eq!(line, &format!("   42 a-long-+ {} sleep", "x".repeat(27)));
        let line = &table(&["-o", "pid=", "-o", "args="], long)[1];
        assert_eq!(line, &format!("   42 {}", "x".repeat(40)));
    }

    #[test]
    fn times_and_terminals_read_as_usual() {
        assert_eq!(clock(59, false), "00:59");
        assert_eq!(clock(59, true), "00:00:59");
        assert_eq!(clock(90_061, true), "1-01:01:01");
        assert_eq!(terminal(0), "?");
        assert_eq!(terminal(136 << 8 | 3), "pts/3");
        assert_eq!(terminal(4 << 8 | 64), "ttyS0");
    }
}
