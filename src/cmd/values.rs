//! Values on the command line in the forms runc takes them.

use std::time::Duration;

/// What a longer interval is cut to: a hundred years.
const MAX_DURATION: Duration = Duration::from_secs(100 * 365 * 86400);

/// A duration as Go writes it: `5s`, `1m30s`, `1.5h`, `100ms`.
///
/// # Errors
/// A text for the user.
pub fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("invalid duration {text:?}");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut seconds = 0.0;
    while rest != "0" && !rest.is_empty() {
        let number = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(|| format!("missing unit in duration {text:?}"))?;
        let (value, tail) = rest.split_at(number);
        let unit = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let factor = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(format!("unknown unit {unit:?} in duration {text:?}")),
        };
        let value: f64 = value.parse().map_err(|_| invalid())?;
        seconds += value * factor;
        rest = tail;
    }
    if negative {
        // The commands refuse what is not positive.
        return Ok(Duration::ZERO);
    }
    Duration::try_from_secs_f64(seconds)
        .map(|d| d.min(MAX_DURATION))
        .map_err(|_| invalid())
}

/// What runc takes for `--rootless`.
///
/// # Errors
/// A text for the user.
pub fn rootless(text: &str) -> Result<String, String> {
    match text == "auto" || super::go_flags::boolean(text).is_some() {
        true => Ok(text.to_owned()),
        false => Err("neither a boolean value nor auto".to_owned()),
    }
}

/// Bytes, with a unit of a power of 1024 if any: `512m`, `1.5GiB`; -1 is no limit.
///
/// # Errors
/// A text for the user.
pub fn bytes(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let invalid = || format!("invalid size: {text:?}");
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let power = match unit.strip_suffix('i').unwrap_or(unit) {
        "" if unit.is_empty() => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(invalid()),
    };
    let factor = 1_i64 << (10 * power);
    if let Ok(number) = number.parse::<i64>() {
        return number.checked_mul(factor).ok_or_else(invalid);
    }
    let number: f64 = number.parse().map_err(|_| invalid())?;
    // Fractions of a unit are far below 2^53 here.
    #[allow(clippy::cast_precision_loss)]
    let bytes = number * factor as f64;
    #[allow(clippy::cast_precision_loss)]
    if bytes >= i64::MAX as f64 {
        return Err(invalid());
    }
    // In range as of the line above, and what is behind the point is no byte.
    #[allow(clippy::cast_possible_truncation)]
    Ok(bytes as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, ms) in [
            ("5s", 5000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("100ms", 100),
            ("0", 0),
            ("-1s", 0),
            (".5s", 500),
        ] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "5", "s", "5x", "1.2.3s", "-", "é"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(duration("99999999999h").unwrap(), MAX_DURATION);
    }

    #[test]
    fn sizes_are_dockers() {
        for (text, expected) in [
            ("-1", -1),
            ("0", 0),
            ("33554432", 32 << 20),
            ("32m", 32 << 20),
            ("32MiB", 32 << 20),
            ("1.5 kB", 1536),
            ("2G", 2 << 30),
            ("10b", 10),
        ] {
            assert_eq!(bytes(text).unwrap(), expected, "{text}");
        }
        for text in ["", "-2", "m", "1x", "1ib", "i", "9999999p", "1.2.3m", "1mm"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
