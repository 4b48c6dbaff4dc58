//! Whether machines are made of a template.

use std::path::Path;

use super::{Finding, Subject, hypervisor};
use crate::config::HugePages;
use crate::sandbox::template;
use crate::vm::selection::Choice;
use crate::vm::template::{Listed, Status, Store, list};

const NAME: &str = "template";
const REMEDY: &str = "kuasar-runv template create";

pub(super) fn template(subject: &Subject) -> Finding {
    let settings = &subject.config.template;
    if !settings.enabled {
        return Finding::ok(
            NAME,
            "not used (template.enabled is false): machines are booted",
        );
    }
    if hypervisor::chosen(subject) != Choice::Builtin {
        let text =
            "not used: machines are booted, because only the built-in hypervisor has templates";
        return Finding::warn(NAME, text, "set template.enabled to false in config.toml");
    }
    if subject.config.vm.hugepages != HugePages::Off {
        let text = "not used: machines are booted, because those of templates have no huge pages";
        return Finding::warn(
            NAME,
            text,
            "set template.enabled or vm.hugepages to false in config.toml",
        );
    }
    let found = template::machine(&subject.config, Path::new("/"))
        .map_err(|e| e.to_string())
        .and_then(|machine| list(&Store::new(&settings.dir), &machine).map_err(|e| e.to_string()));
    match found {
        Ok(templates) => of(&templates, &settings.dir),
        Err(e) => Finding::warn(NAME, format!("machines are booted: {e}"), REMEDY),
    }
}

fn of(templates: &[Listed], dir: &Path) -> Finding {
    let of_no_use = |t: &&Listed| matches!(t.status, Status::Stale | Status::Broken);
    let stale = templates.iter().filter(of_no_use).count();
    match templates.iter().find(|t| t.status == Status::Current) {
        Some(template) => {
            let text = format!("{} in {}", template.key, dir.display());
            Finding::ok(NAME, text)
        }
        None => {
            let text = format!(
                "none in {} fits, of {} there {stale} can never be used again: machines are booted",
                dir.display(),
                templates.len()
            );
            Finding::warn(NAME, text, REMEDY)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    #[test]
    fn only_a_template_of_this_configuration_is_good_news() {
        let listed = |status| Listed {
            key: "01234567".into(),
            status,
            reason: None,
            created: None,
            size: None,
            disk: 0,
        };
        let dir = Path::new("/templates");
        let none = of(&[listed(Status::Other), listed(Status::Stale)], dir);
        assert_eq!(none.level, Level::Warn);
        assert!(
            none.text.contains("of 2 there 1 can never"),
            "{}",
            none.text
        );
        let one = of(&[listed(Status::Other), listed(Status::Current)], dir);
        assert_eq!(one, Finding::ok(NAME, "01234567 in /templates"));
    }
}
