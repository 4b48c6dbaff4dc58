//! What this machine offers, for `check` and `env`: found out without starting
//! anything, each question with a deadline, all of them at the same time.

mod facts;
mod guest;
mod host;
mod hypervisor;
mod template;

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::config::{self, Config};
use crate::root::Root;

pub use facts::environment;

/// Longest wait for all answers. A question that hangs, such as one about a file on
/// a network file system, is a failure of its own.
const DEADLINE: Duration = Duration::from_secs(10);

/// The answer to one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: &'static str,
    pub level: Level,
    pub text: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    Ok,
    /// Containers run, but slower or with less than they could.
    Warn,
    /// No container can run.
    Fail,
}

impl Finding {
    pub fn ok(name: &'static str, text: impl Into<String>) -> Finding {
        Finding {
            name,
            level: Level::Ok,
            text: text.into(),
            remedy: None,
        }
    }

    pub fn warn(name: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            level: Level::Warn,
            remedy: Some(remedy.into()),
            ..Finding::ok(name, text)
        }
    }

    pub fn fail(name: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            level: Level::Fail,
            ..Finding::warn(name, text, remedy)
        }
    }
}

/// What the questions are about.
struct Subject {
    root: Root,
    /// The one in effect; the defaults when the files are wrong.
    config: Config,
}

type Question = (&'static str, fn(&Subject) -> Finding);

/// In the order of the output.
const QUESTIONS: [Question; 16] = [
    ("user", host::user),
    ("kernel", host::kernel),
    ("hypervisor", hypervisor::choice),
    ("KVM", hypervisor::kvm),
    ("QEMU", hypervisor::qemu),
    ("firmware", hypervisor::firmware),
    ("guest kernel", guest::kernel),
    ("guest image", guest::image),
    ("template", template::template),
    ("state root", host::state_root),
    ("cgroups", host::cgroups),
    ("vsock", host::vsock),
    ("vhost", host::vhost),
    ("tap", host::tap),
    ("memory", host::memory),
    ("disk", host::disk),
];

/// Everything there is to find out, in a fixed order.
#[must_use]
pub fn all(root: &Root) -> Vec<Finding> {
    let (config, first) = configuration();
    let subject = Subject {
        root: root.clone(),
        config,
    };
    let mut findings = vec![first];
    findings.extend(ask(&QUESTIONS, subject, DEADLINE));
    findings
}

/// The configuration in effect and what there is to say about it.
fn configuration() -> (Config, Finding) {
    const NAME: &str = "configuration";
    let wrong = |e: config::Error| {
        let remedy = "correct the file; docs/configuration.md explains every key";
        (
            Config::default(),
            Finding::fail(NAME, e.to_string(), remedy),
        )
    };
    let config = match Config::load() {
        Ok(config) => config,
        Err(e) => return wrong(e),
    };
    match Config::files() {
        Ok(files) if files.is_empty() => {
            let text = format!("{} does not exist: defaults", config::DEFAULT_PATH);
            (config, Finding::ok(NAME, text))
        }
        Ok(files) => {
            let files: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            (config, Finding::ok(NAME, files.join(", ")))
        }
        Err(e) => wrong(e),
    }
}

/// The answers to all questions. A thread whose question hangs is left behind.
fn ask(questions: &[Question], subject: Subject, deadline: Duration) -> Vec<Finding> {
    let end = Instant::now() + deadline;
    let subject = Arc::new(subject);
    let mut waiting = Vec::new();
    for (name, question) in questions.iter().copied() {
        let (sender, receiver) = channel();
        let subject = Arc::clone(&subject);
        let asked = thread::Builder::new().spawn(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(question(&subject));
        });
        waiting.push((name, asked.map(|_| receiver)));
    }
    let answer = |(name, receiver): (_, std::io::Result<std::sync::mpsc::Receiver<Finding>>)| {
        let no_answer = |text: String| Finding::fail(name, text, "see the messages of the kernel");
        match receiver {
            Err(e) => no_answer(format!("cannot find out: {e}")),
            Ok(receiver) => {
                let left = end.saturating_duration_since(Instant::now());
                match receiver.recv_timeout(left) {
                    Ok(finding) => finding,
                    Err(RecvTimeoutError::Timeout) => {
                        no_answer(format!("no answer within {} s", deadline.as_secs()))
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        no_answer("the check itself failed".into())
                    }
                }
            }
        }
    };
    waiting.into_iter().map(answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject {
            root: Root::new(Some("/nowhere".into())),
            config: Config::default(),
        }
    }

    #[test]
    fn every_question_is_answered_under_its_name_and_in_time() {
        let asked = Instant::now();
        let findings = ask(&QUESTIONS, subject(), DEADLINE);
        assert!(asked.elapsed() < DEADLINE);
        for (finding, (name, _)) in findings.iter().zip(QUESTIONS) {
            assert_eq!(finding.name, name);
            assert!(!finding.text.is_empty());
            let has_remedy = finding.remedy.is_some();
            assert_eq!(has_remedy, finding.level != Level::Ok, "{finding:?}");
        }
    }

    #[test]
    fn a_question_that_hangs_or_breaks_is_a_failure() {
        let questions: [Question; 3] = [
            ("hangs", |_| {
                loop {
                    thread::park();
                }
            }),
            ("breaks", |_| panic!("on purpose")),
            ("works", |_| Finding::ok("works", "yes")),
        ];
        let findings = ask(&questions, subject(), Duration::from_millis(200));
        assert_eq!(findings[0].level, Level::Fail);
        assert!(findings[0].text.contains("no answer"), "{:?}", findings[0]);
        assert_eq!(findings[1].level, Level::Fail);
        assert_eq!(findings[2], Finding::ok("works", "yes"));
    }
}
