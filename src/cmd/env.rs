//! `kuasar-runv env`

use std::fmt::Write;

use serde_json::Value;

use super::{Context, Failure, OCI_VERSION, print};
use crate::check;

/// Print versions, paths, configuration and facts of the host
///
/// What a bug report should contain.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n    kuasar-runv env\n    kuasar-runv env --json")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(context: &Context, args: &Args) -> Result<u8, Failure> {
    let facts = check::environment(&context.root, OCI_VERSION);
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&facts)?))?;
    } else {
        let mut text = String::new();
        flatten(&mut text, "", &facts);
        print(&text)?;
    }
    Ok(0)
}

/// One line `path.of.the.value: value` for each value.
fn flatten(text: &mut String, path: &str, value: &Value) {
    let join = |key: &str| match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    };
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                flatten(text, &join(key), value);
            }
        }
        Value::Array(list) if list.iter().any(Value::is_object) => {
            for (index, value) in list.iter().enumerate() {
                flatten(text, &join(&index.to_string()), value);
            }
        }
        // Writing to a String cannot fail.
        Value::String(value) => drop(writeln!(text, "{path}: {value}")),
        other => drop(writeln!(text, "{path}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_value_under_its_path() {
        let mut text = String::new();
        let facts = serde_json::json!({"a": {"b": 1, "c": ["x"]}, "d": [{"e": "f"}], "g": null});
        flatten(&mut text, "", &facts);
        assert_eq!(text, "a.b: 1\na.c: [\"x\"]\nd.0.e: f\ng: null\n");
    }
}
