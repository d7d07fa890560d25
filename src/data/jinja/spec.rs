//! How a format writes numbers and pads texts.

use super::error::{Result, invalid};
use super::text::shortest_digits;
use super::value::Value;

/// Characters that a field may be wide, or digits that a number may have. Rust's own formats panic
/// beyond 65,535 digits.
const MAX_WIDTH: usize = 10_000;

/// How a value is written.
#[derive(Debug, Default, Clone)]
pub(super) struct Spec {
    pub(super) fill: Option<char>,
    pub(super) align: Option<char>,
    pub(super) sign: Option<char>,
    pub(super) alternate: bool,
    pub(super) width: usize,
    pub(super) grouping: Option<char>,
    pub(super) precision: Option<usize>,
    pub(super) kind: Option<char>,
}

/// The rest of a format.
pub(super) struct Field<'a>(pub(super) &'a str);

impl<'a> Field<'a> {
    pub(super) fn next(&mut self) -> Option<char> {
        let c = self.0.chars().next()?;
        self.0 = self.0.get(c.len_utf8()..).unwrap_or_default();
        Some(c)
    }

    pub(super) fn next_of(&mut self, set: &str) -> Option<char> {
        if self.0.starts_with(|c: char| set.contains(c)) { self.next() } else { None }
    }

    pub(super) fn number(&mut self) -> Result<Option<usize>> {
        let length = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(length);
        self.0 = rest;
        if digits.is_empty() { Ok(None) } else { checked_width(digits.parse().ok()).map(Some) }
    }

    /// `(key)`.
    pub(super) fn key(&mut self) -> Result<Option<&'a str>> {
        let Some(rest) = self.0.strip_prefix('(') else { return Ok(None) };
        match rest.split_once(')') {
            Some((key, rest)) => {
                self.0 = rest;
                Ok(Some(key))
            }
            None => invalid("the key of a format has no end"),
        }
    }
}

pub(super) fn checked_width(width: Option<usize>) -> Result<usize> {
    match width.filter(|width| *width <= MAX_WIDTH) {
        Some(width) => Ok(width),
        None => invalid("the width of a format is too large"),
    }
}

pub(super) fn with_sign(digits: String, negative: bool, spec: &Spec) -> String {
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let digits = match spec.grouping {
        Some(separator) => grouped(&digits, separator),
        None => digits,
    };
    format!("{sign}{digits}")
}

/// Digits in groups of three, as far as the point.
fn grouped(digits: &str, separator: char) -> String {
    let whole = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(whole);
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            out.push(separator);
        }
        out.push(c);
    }
    out + rest
}

pub(super) fn integer_text(value: &Value, kind: char, spec: &Spec) -> String {
    let value = value.as_int().unwrap_or_default();
    let magnitude = value.unsigned_abs();
    let digits = match kind {
        'x' => format!("{magnitude:x}"),
        'X' => format!("{magnitude:X}"),
        'o' => format!("{magnitude:o}"),
        'b' => format!("{magnitude:b}"),
        _ => magnitude.to_string(),
    };
    let zeros = spec.precision.unwrap_or_default().saturating_sub(digits.len());
    let prefix = if spec.alternate && kind != 'd' { format!("0{kind}") } else { String::new() };
    with_sign(format!("{prefix}{}{digits}", "0".repeat(zeros)), value < 0, spec)
}

pub(super) fn float_text(value: f64, kind: char, spec: &Spec) -> String {
    let precision = spec.precision.unwrap_or(6);
    let magnitude = value.abs();
    let text = if !value.is_finite() {
        if value.is_nan() { "nan".to_owned() } else { "inf".to_owned() }
    } else {
        match kind.to_ascii_lowercase() {
            'f' => format!("{magnitude:.precision$}"),
            'e' => exponential(&format!("{magnitude:.precision$e}")),
            _ => general(magnitude, precision.max(1), spec.alternate),
        }
    };
    let text = if kind.is_ascii_uppercase() { text.to_uppercase() } else { text };
    with_sign(text, value.is_sign_negative() && !value.is_nan(), spec)
}

/// Rust's `1.5e-7` as Python's `1.5e-07`.
fn exponential(text: &str) -> String {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// `%g`.
fn general(value: f64, precision: usize, keep_zeros: bool) -> String {
    let rounded = format!("{value:.*e}", precision - 1);
    let exponent = if value == 0.0 { 0 } else { shortest_digits(rounded.parse().unwrap_or(value)).1 };
    let without_zeros = |text: &str| match text.contains('.') && !keep_zeros {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        let (mantissa, rest) = rounded.split_once('e').unwrap_or((&rounded, "0"));
        return exponential(&format!("{}e{rest}", without_zeros(mantissa)));
    }
    let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or_default();
    without_zeros(&format!("{value:.decimals$}"))
}

pub(super) fn pad(text: &str, spec: &Spec, default_align: char) -> String {
    let missing = spec.width.saturating_sub(text.chars().count());
    let fill = spec.fill.unwrap_or(' ');
    let blanks = |count: usize| fill.to_string().repeat(count);
    match spec.align.unwrap_or(default_align) {
        '<' => format!("{text}{}", blanks(missing)),
        '^' => format!("{}{text}{}", blanks(missing / 2), blanks(missing - missing / 2)),
        '=' => {
            let signs = text.len() - text.trim_start_matches(['+', '-', ' ']).len();
            let (sign, digits) = text.split_at(signs);
            format!("{sign}{}{digits}", blanks(missing))
        }
        _ => format!("{}{text}", blanks(missing)),
    }
}
