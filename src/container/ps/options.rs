//! The options of ps(1) that choose columns. Which processes are listed is not
//! theirs to say: always those of the container.

use super::Error;
use super::columns::{self, Column};

/// What to print.
#[derive(Debug)]
pub struct Layout {
    pub columns: Vec<Column>,
    pub headers: bool,
}

/// runc's default.
const DEFAULT: &str = "-ef";

/// Sets of columns of the standard and of the BSD options.
const PLAIN: &str = "pid,tty,time,comm=CMD";
const FULL: &str = "user=UID,pid,ppid,c,stime,tty,time,args=CMD";
const EXTRA_FULL: &str = "user=UID,pid,ppid,c,sz,rss,psr,stime,tty,time,args=CMD";
const LONG: &str = "f,s,uid,pid,ppid,c,opri=PRI,ni,addr_sz,wchan,tty,time,comm=CMD";
const JOBS: &str = "pid,pgid,sid,tty,time,comm=CMD";
const JOBS_FULL: &str = "user=UID,pid,ppid,pgid,sid,c,stime,tty,time,args=CMD";
const BSD_PLAIN: &str = "pid,tty,stat,bsdtime,args";
const BSD_USER: &str = "user,pid,%cpu,%mem,vsz,rss,tty,stat,bsdstart,bsdtime,args";
const BSD_LONG: &str = "f,uid,pid,ppid,priority,ni,vsz,rss,wchan,stat,tty,bsdtime,args";
const BSD_JOBS: &str = "ppid,pid,pgid,sid,tty,tpgid,stat,uid,bsdtime,args";

#[derive(Default)]
struct Chosen {
    full: bool,
    extra_full: bool,
    long: bool,
    jobs: bool,
    bsd: bool,
    bsd_set: Option<&'static str>,
    lists: Vec<String>,
    no_headers: bool,
}

/// Understands what ps(1) would.
///
/// # Errors
/// An option or a column that is not supported.
pub fn parse(given: &[String]) -> Result<Layout, Error> {
    let default = [DEFAULT.to_owned()];
    let given = if given.is_empty() { &default } else { given };
    let mut chosen = Chosen::default();
    let mut words = given.iter();
    while let Some(word) = words.next() {
        let unknown = || Error::Option(word.clone());
        if let Some(long) = word.strip_prefix("--") {
            match long.split_once('=').unwrap_or((long, "")) {
                ("no-headers" | "no-headings" | "no-header" | "no-heading", "") => {
                    chosen.no_headers = true;
                }
                ("format", "") => chosen.lists.push(next_list(word, &mut words)?),
                ("format", list) => chosen.lists.push(list.to_owned()),
                _ => return Err(unknown()),
            }
            continue;
        }
        let (letters, dashed) = match word.strip_prefix('-') {
            Some(letters) => (letters, true),
            None => (word.as_str(), false),
        };
        // `-aux` is what everybody writes for `aux`.
        let bsd = !dashed || (letters.contains(['u', 'x']) && !letters.contains(['o', 'e', 'f']));
        if letters.is_empty() {
            return Err(unknown());
        }
        for (index, letter) in letters.char_indices() {
            if letter == 'o' {
                let rest = &letters[index + 1..];
                chosen.lists.push(match rest {
                    "" => next_list(word, &mut words)?,
                    rest => rest.to_owned(),
                });
                break;
            }
            if !chosen.letter(letter, bsd) {
                return Err(unknown());
            }
        }
    }
    chosen.layout()
}

fn next_list<'a>(
    option: &str,
    words: &mut impl Iterator<Item = &'a String>,
) -> Result<String, Error> {
    let list = words.next().filter(|list| !list.is_empty());
    list.cloned()
        .ok_or_else(|| Error::NoList(option.to_owned()))
}

impl Chosen {
    /// Whether the letter is known.
    fn letter(&mut self, letter: char, bsd: bool) -> bool {
        self.bsd |= bsd;
        match (letter, bsd) {
            // They choose processes, or the width of the output.
            ('e' | 'A' | 'a' | 'd' | 'w', false) | ('a' | 'x' | 'w' | 'g', true) => {}
            ('f', false) => self.full = true,
            ('F', false) => self.extra_full = true,
            ('l', false) => self.long = true,
            ('j', false) => self.jobs = true,
            ('u', true) => self.bsd_set = Some(BSD_USER),
            ('l', true) => self.bsd_set = Some(BSD_LONG),
            ('j', true) => self.bsd_set = Some(BSD_JOBS),
            _ => return false,
        }
        true
    }

    fn layout(self) -> Result<Layout, Error> {
        let set = match () {
            () if !self.lists.is_empty() => None,
            () if self.bsd => Some(self.bsd_set.unwrap_or(BSD_PLAIN)),
            () if self.extra_full => Some(EXTRA_FULL),
            () if self.long => Some(LONG),
            () if self.jobs && self.full => Some(JOBS_FULL),
            () if self.jobs => Some(JOBS),
            () if self.full => Some(FULL),
            () => Some(PLAIN),
        };
        let mut columns = Vec::new();
        match set {
            Some(set) => {
                for key in set.split(',') {
                    columns.push(columns::find(key)?);
                }
            }
            None => {
                for list in &self.lists {
                    add_list(&mut columns, list)?;
                }
            }
        }
        Ok(Layout {
            columns,
            headers: !self.no_headers,
        })
    }
}

/// One list of `-o`: separated by commas or blanks; what follows a `=` is a header
/// up to the end.
fn add_list(columns: &mut Vec<Column>, list: &str) -> Result<(), Error> {
    let (keys, header) = match list.split_once('=') {
        Some((keys, header)) => (keys, Some(header)),
        None => (list, None),
    };
    let before = columns.len();
    for key in keys.split([',', ' ']).filter(|key| !key.is_empty()) {
        columns.push(columns::find(key)?);
    }
    if columns.len() == before {
        return Err(Error::NoList(list.to_owned()));
    }
    if let (Some(header), Some(last)) = (header, columns.last_mut()) {
        last.set_header(header);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(options: &[&str]) -> Result<String, String> {
        let options: Vec<_> = options.iter().map(|o| (*o).to_owned()).collect();
        let layout = parse(&options).map_err(|e| e.to_string())?;
        let headers: Vec<_> = layout.columns.into_iter().map(|c| c.header).collect();
        Ok(headers.join(" "))
    }

    #[test]
    fn common_options_choose_the_columns_of_procps() {
        let full = "UID PID PPID C STIME TTY TIME CMD";
        let user = "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND";
        for (options, expected) in [
            (&[][..], full),
            (&["-ef"], full),
            (&["-e", "-f"], full),
            (&["aux"], user),
            (&["-aux"], user),
            (&["auxww"], user),
            (&["-e"], "PID TTY TIME CMD"),
            (&["ax"], "PID TTY STAT TIME COMMAND"),
            (
                &["-el"],
                "F S UID PID PPID C PRI NI ADDR SZ WCHAN TTY TIME CMD",
            ),
            (&["-ejf"], "UID PID PPID PGID SID C STIME TTY TIME CMD"),
            (&["-o", "pid,user"], "PID USER"),
            (&["-opid", "-o", "args=WHAT IS IT"], "PID WHAT IS IT"),
            (&["-eo", "pid ppid"], "PID PPID"),
            (&["--format=pid"], "PID"),
        ] {
            assert_eq!(headers(options).unwrap(), expected, "{options:?}");
        }
    }

    #[test]
    fn what_is_unknown_is_named() {
        for (options, words) in [
            (&["-Q"][..], "ps option \"-Q\" is not supported"),
            (&["--forest"], "ps option \"--forest\" is not supported"),
            (&["-o"], "needs a list of columns"),
            (&["-o", "pid,nope"], "unknown ps column \"nope\""),
            (&["-p", "1"], "ps option \"-p\" is not supported"),
        ] {
            let message = headers(options).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }
}
