//! How Python writes numbers and strings.

use super::error::Result;
use super::steps::Writer;

/// Python's `str.isspace` of one character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The shortest digits of a float, and its decimal exponent: `d.ddd * 10^exponent`.
pub(super) fn shortest_digits(value: f64) -> (String, i32) {
    let text = format!("{value:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    (mantissa.replace('.', ""), exponent.parse().unwrap_or_default())
}

/// Python's `repr` of a float.
pub(super) fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".to_owned()
        } else if value > 0.0 {
            "inf".to_owned()
        } else {
            "-inf".to_owned()
        };
    }
    let sign = if value.is_sign_negative() { "-" } else { "" };
    let (digits, exponent) = shortest_digits(value.abs());
    if !(-4..16).contains(&exponent) {
        let (first, rest) = digits.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{first}{point}{rest}e{exponent_sign}{:02}", exponent.abs());
    }
    let text = format!("{}", value.abs());
    let fraction = if text.contains('.') { "" } else { ".0" };
    format!("{sign}{text}{fraction}")
}

/// Whether Python prints a character of a string as it is.
pub(super) fn is_printable(c: char) -> bool {
    if matches!(c, ' '..='~') {
        return true;
    }
    // Behind another character an accent is not escaped; what is not printable always is.
    let mut bytes = [b'a'; 5];
    let (_, own) = bytes.split_at_mut(1);
    let len = 1 + c.encode_utf8(own).len();
    let text = bytes.get(..len).and_then(|bytes| std::str::from_utf8(bytes).ok());
    text.is_some_and(|text| text.escape_debug().nth(1) != Some('\\'))
}

/// Writes Python's `repr` of a string.
pub(super) fn write_string_repr(text: &str, out: &mut Writer) -> Result<()> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote)?;
    out.push_escaped(text, |c| match c {
        '\\' => Some("\\\\".into()),
        '\n' => Some("\\n".into()),
        '\r' => Some("\\r".into()),
        '\t' => Some("\\t".into()),
        c if c == quote => Some(format!("\\{c}").into()),
        c if is_printable(c) => None,
        c => Some(match u32::from(c) {
            code @ ..=0xff => format!("\\x{code:02x}").into(),
            code @ ..=0xffff => format!("\\u{code:04x}").into(),
            code => format!("\\U{code:08x}").into(),
        }),
    })?;
    out.push(quote)
}

/// MarkupSafe's `escape`.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// The first character in the case of titles.
pub(super) fn title_case(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".to_owned(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".to_owned(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".to_owned(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".to_owned(),
        c => {
            let mut upper = c.to_uppercase();
            upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_those_of_python() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (-1.25e100, "-1.25e+100"),
            (f64::INFINITY, "inf"),
        ];
        for (value, expected) in cases {
            assert_eq!(float_repr(value), expected);
        }
    }

    #[test]
    fn strings_are_those_of_python() {
        let string_repr = |text: &str| {
            let mut out = Writer::default();
            write_string_repr(text, &mut out).unwrap();
            out.finish()
        };
        assert_eq!(string_repr("it's"), "\"it's\"");
        assert_eq!(string_repr("it's \"x\""), "'it\\'s \"x\"'");
        assert_eq!(string_repr("e\u{301}\u{200b}\u{a0}\u{2028}é🦀\0"), "'e\u{301}\\u200b\\xa0\\u2028é🦀\\x00'");
    }
}
