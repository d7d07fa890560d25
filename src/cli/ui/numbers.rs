//! Numbers and lists as text.

pub use super::super::report::{duration, median};

/// Three digits and a prefix: `999`, `1.23k`, `440M`, `3.63G`.
fn three_digits(n: f64, prefixes: &[&str]) -> String {
    let (mut n, mut step) = (n, 0);
    // 999.5 would be shown as 1000.
    while n >= 999.5 && step + 1 < prefixes.len() {
        n /= 1000.0;
        step += 1;
    }
    let digits = match n {
        _ if step == 0 && n.fract() == 0.0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{n:.digits$}{}", prefixes.get(step).unwrap_or(&""))
}

/// A number of things.
pub fn count(n: f64) -> String {
    three_digits(n, &["", "k", "M", "G", "T"])
}

/// A number of bytes, in powers of 1000 as storage is sold.
pub fn bytes(n: f64) -> String {
    three_digits(n, &[" B", " kB", " MB", " GB", " TB"])
}

/// All digits, in groups: `545,259,520`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 tensor`, `2 tensors`.
pub fn plural(n: u64, thing: &str) -> String {
    format!("{} {thing}{}", grouped(n), if n == 1 { "" } else { "s" })
}

/// Names that are shown of many.
const SHOWN: usize = 4;

/// The first few of a list, and how many more there are.
pub fn first_of(names: &[String]) -> String {
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// What the columns of errors mean.
pub const ERROR_COLUMNS: &str = "(relative error: squared error per squared weight; worst block: norm of the errors over norm \
                                 of the weights, of the block where that is largest)";

/// A part of a whole, in percent.
pub fn share(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// A relative or absolute error: three digits, without an exponent where that is readable.
pub fn error_value(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    // The exponent after rounding, which can be one more than that of the value.
    let short = format!("{value:.2e}");
    let exponent = short.split_once('e').and_then(|(_, e)| e.parse::<i32>().ok());
    match exponent {
        Some(e @ -4..=2) => format!("{value:.0$}", usize::try_from(2 - e).unwrap_or(0)),
        _ => short,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(count(0.0), "0");
        assert_eq!(count(999.0), "999");
        assert_eq!(count(1000.0), "1.00k");
        assert_eq!(count(440_401_920.0), "440M");
        assert_eq!(count(58_720_256.0), "58.7M");
        assert_eq!(count(999_600_000.0), "1.00G");
        assert_eq!(bytes(545_259_520.0), "545 MB");
        assert_eq!(bytes(12.0), "12 B");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(123), "123");
        assert_eq!(plural(1, "file"), "1 file");
        assert_eq!(plural(2000, "file"), "2,000 files");
        assert_eq!(error_value(0.0), "0");
        assert_eq!(error_value(0.007_891), "0.00789");
        assert_eq!(error_value(0.125), "0.125");
        assert_eq!(error_value(0.9996), "1.00");
        assert_eq!(error_value(1.5e-6), "1.50e-6");
    }
}
