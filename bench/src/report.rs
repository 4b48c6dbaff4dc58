//! The result: tables for the terminal, the same as Markdown for docs/benchmarks.md.

use crate::sample::Samples;

/// One measured thing.
pub struct Row {
    pub name: String,
    pub samples: Samples,
    pub unit: &'static str,
}

impl Row {
    pub fn new(name: impl Into<String>, unit: &'static str, samples: Samples) -> Row {
        Row {
            name: name.into(),
            samples,
            unit,
        }
    }
}

/// What a figure is held against.
pub struct Verdict {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub target: Target,
}

#[derive(Clone, Copy)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// Printed to compare, promised to nobody.
    None,
}

impl Verdict {
    fn cells(&self) -> [String; 4] {
        let (target, met) = match self.target {
            Target::AtMost(limit) => (format!("at most {limit}"), Some(self.value <= limit)),
            Target::AtLeast(limit) => (format!("at least {limit}"), Some(self.value >= limit)),
            Target::None => (String::new(), None),
        };
        let met = match met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        let value = format!("{:.2} {}", self.value, self.unit)
            .trim_end()
            .to_owned();
        [self.name.clone(), value, target, met.to_owned()]
    }
}

/// One part of the benchmark.
pub struct Section {
    pub title: String,
    pub rows: Vec<Row>,
    pub verdicts: Vec<Verdict>,
}

pub struct Report {
    machine: Vec<(&'static str, String)>,
    sections: Vec<Section>,
}

impl Report {
    pub fn new(machine: Vec<(&'static str, String)>) -> Report {
        Report {
            machine,
            sections: Vec::new(),
        }
    }

    pub fn header(&self) -> String {
        let lines: Vec<_> = self
            .machine
            .iter()
            .map(|(k, v)| format!("{k:<12} {v}"))
            .collect();
        lines.join("\n")
    }

    /// Prints the section and keeps it for the Markdown.
    pub fn add(&mut self, section: Section) {
        println!("{}", section.text());
        self.sections.push(section);
    }

    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for (name, value) in &self.machine {
            out += &format!("- {name}: {value}\n");
        }
        for section in &self.sections {
            out += &format!("\n### {}\n", section.title);
            let (rows, verdicts) = section.tables();
            for table in [rows, verdicts].iter().filter(|t| t.len() > 1) {
                out += "\n";
                for (n, row) in table.iter().enumerate() {
                    out += &format!("| {} |\n", row.join(" | "));
                    if n == 0 {
                        out += &format!("|{}\n", " --- |".repeat(row.len()));
                    }
                }
            }
        }
        out
    }
}

type Table = Vec<Vec<String>>;

impl Section {
    fn tables(&self) -> (Table, Table) {
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let mut rows = vec![words(&["what", "median", "min", "max", "unit", "n"])];
        for row in &self.rows {
            let Row {
                name,
                samples,
                unit,
            } = row;
            rows.push(vec![
                name.clone(),
                number(samples.median()),
                number(samples.smallest()),
                number(samples.largest()),
                (*unit).to_owned(),
                samples.len().to_string(),
            ]);
        }
        let mut verdicts = vec![words(&["figure", "value", "target", ""])];
        verdicts.extend(self.verdicts.iter().map(|v| v.cells().to_vec()));
        (rows, verdicts)
    }

    fn text(&self) -> String {
        let (rows, verdicts) = self.tables();
        let tables: String = [rows, verdicts]
            .iter()
            .filter(|table| table.len() > 1)
            .map(|table| format!("{}\n", aligned(table)))
            .collect();
        format!("== {}\n{tables}", self.title)
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn aligned(table: &Table) -> String {
    let columns = table.first().map_or(0, Vec::len);
    let width = |c: usize| {
        table
            .iter()
            .map(|row| row[c].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    table
        .iter()
        .map(|row| {
            let cells: Vec<_> = row
                .iter()
                .zip(&widths)
                .map(|(t, w)| format!("{t:<w$}"))
                .collect();
            format!("  {}\n", cells.join("  ").trim_end())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_target_is_said_in_both_forms() {
        let verdict = |name: &str, target| Verdict {
            name: name.into(),
            value: 1.7,
            unit: "",
            target,
        };
        let mut report = Report::new(vec![("date", "today".into())]);
        report.add(Section {
            title: "part".into(),
            rows: vec![Row::new(
                "thing",
                "ms",
                [1.0, 2.0, 30.0].into_iter().collect(),
            )],
            verdicts: vec![
                verdict("high", Target::AtMost(1.6)),
                verdict("low", Target::AtLeast(1.0)),
            ],
        });
        let text = report.markdown();
        assert!(
            text.contains("| thing | 2.00 | 1.00 | 30.0 | ms | 3 |"),
            "{text}"
        );
        assert!(
            text.contains("| high | 1.70 | at most 1.6 | MISSED |"),
            "{text}"
        );
        assert!(text.contains("| low | 1.70 | at least 1 | met |"), "{text}");
    }
}
