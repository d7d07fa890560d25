//! The filters of Jinja2, with transformers' `tojson`.

use super::args::{Args, flag_or, integer_or, text_of};
use super::budget;
use super::error::{ErrorKind, Result, invalid, unsupported};
use super::eval::Interpreter;
use super::json::JsonStyle;
use super::methods::{changed_case, justified, lines, replace, trimmed};
use super::names::method;
use super::ops;
use super::printf::printf;
use super::steps::{self, Length};
use super::text::{escape, is_space};
use super::value::{Value, View};

/// Characters that a line may be indented by.
const MAX_INDENT: usize = 1000;

pub(super) const FILTERS: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

impl Interpreter {
    /// `value | name(args)`.
    pub(super) fn filter(&mut self, name: &str, value: Value, args: Args) -> Result<Value> {
        budget::spend_text(&value)?;
        budget::spend_args(&args)?;
        let result = self.apply(name, value, args)?;
        budget::spend_text(&result)?;
        Ok(result)
    }

    fn apply(&mut self, name: &str, value: Value, args: Args) -> Result<Value> {
        match name {
            "upper" | "lower" | "capitalize" | "title" | "trim" | "center" | "replace" | "indent" | "truncate"
            | "wordcount" | "urlencode" | "format" | "string" | "safe" | "e" | "escape" | "forceescape" => {
                of_text(name, &value, args)
            }
            "int" | "float" | "round" | "abs" => of_number(name, &value, args),
            "d" | "default" => {
                let [default, boolean] = args.bind(name, 0, ["default_value", "boolean"])?;
                let missing = value.is_undefined() || (flag_or(boolean.as_ref(), false) && !value.is_true());
                Ok(if missing { default.unwrap_or_else(|| "".into()) } else { value })
            }
            "length" | "count" => {
                let [] = args.bind(name, 0, [])?;
                self.length(&value).map(Value::from)
            }
            "tojson" => to_json(&value, args),
            "attr" => {
                let [name] = args.bind(name, 1, ["name"])?;
                self.own_attribute(&value, &text_of("attr", &name.unwrap_or_default())?)
            }
            "list" => {
                let [] = args.bind(name, 0, [])?;
                self.iterate(&value).map(Value::from)
            }
            "items" => {
                let [] = args.bind(name, 0, [])?;
                self.pairs(&value)
            }
            "first" | "last" | "reverse" => {
                let [] = args.bind(name, 0, [])?;
                self.end_of(name, &value)
            }
            "join" => self.join(&value, args),
            "pprint" => {
                let [] = args.bind(name, 0, [])?;
                pretty(&value)
            }
            "batch" | "slice" => self.parts(name, &value, args),
            "sum" | "sort" | "unique" | "min" | "max" | "dictsort" => self.ordered(name, &value, args),
            "map" => self.map(&value, args),
            "select" | "reject" | "selectattr" | "rejectattr" => self.select(name, &value, args),
            "filesizeformat" => file_size(&value, args),
            "xmlattr" => xml_attributes(&value, args),
            "groupby" => self.group(&value, args),
            "random" | "striptags" | "urlize" | "wordwrap" => unsupported(format!("the filter {name:?}")),
            name => Err(ErrorKind::Unknown { what: "filter", name: name.to_owned() }),
        }
    }

    pub(super) fn length(&mut self, value: &Value) -> Result<usize> {
        let length = match value {
            Value::Object(id) if self.loop_state(*id).is_some() => {
                self.object_attribute(*id, "length")?.as_int().and_then(|length| usize::try_from(length).ok())
            }
            value => value.len(),
        };
        match length {
            Some(length) => Ok(length),
            None => invalid(format!("a {} has no length", value.type_name())),
        }
    }

    /// An attribute that is none of a dict's keys.
    fn own_attribute(&mut self, value: &Value, name: &str) -> Result<Value> {
        match value {
            Value::Object(id) => self.object_attribute(*id, name),
            Value::Undefined(_) => Err(ops::undefined(value)),
            value if method(value, name).is_some() => ops::attribute(value, name),
            value => Ok(Value::undefined(format!("a {} has no attribute {name:?}", value.type_name()))),
        }
    }

    fn pairs(&mut self, value: &Value) -> Result<Value> {
        let items = match value {
            Value::Undefined(_) => Vec::new(),
            Value::Dict(dict) => {
                steps::spend_items(dict.entries().len())?;
                Value::View(View::Items, dict.clone()).items().unwrap_or_default()
            }
            _ => return invalid("can only get item pairs from a mapping"),
        };
        Ok(self.generator(items))
    }

    fn end_of(&mut self, name: &str, value: &Value) -> Result<Value> {
        if let (Some(text), "reverse") = (value.as_str(), name) {
            return Ok(text.chars().rev().collect::<String>().into());
        }
        if name == "last" && matches!(value, Value::Object(_)) {
            return invalid("a generator has no last item");
        }
        let mut items = self.iterate(value)?;
        match name {
            "first" if items.is_empty() => Ok(Value::undefined("no first item, sequence was empty")),
            "first" => Ok(items.swap_remove(0)),
            "last" => Ok(items.pop().unwrap_or_else(|| Value::undefined("no last item, sequence was empty"))),
            _ => {
                items.reverse();
                Ok(self.generator(items))
            }
        }
    }

    fn join(&mut self, value: &Value, args: Args) -> Result<Value> {
        let [separator, attribute] = args.bind("join", 0, ["d", "attribute"])?;
        let separator = separator.unwrap_or_else(|| "".into()).to_text()?;
        let (mut texts, mut length) = (Vec::new(), Length::default());
        for item in self.iterate(value)? {
            let item = match &attribute {
                Some(attribute) => self.path(&item, attribute)?,
                None => item,
            };
            let text = item.to_text()?;
            length.add(text.len() + separator.len())?;
            texts.push(text);
        }
        Ok(texts.join(&separator).into())
    }

    fn parts(&mut self, name: &str, value: &Value, args: Args) -> Result<Value> {
        let [count, fill] = args.bind(name, 1, ["count", "fill_with"])?;
        let count = usize::try_from(integer_or(name, count.as_ref(), 0)?).unwrap_or_default();
        if count == 0 {
            return invalid(format!("{name} needs a number above 0"));
        }
        let fill = fill.filter(|fill| !fill.is_none());
        if name == "slice" || fill.is_some() {
            steps::spend_items(count)?;
        }
        let items = self.iterate(value)?;
        let mut parts: Vec<Vec<Value>> = Vec::new();
        if name == "batch" {
            parts = items.chunks(count).map(<[Value]>::to_vec).collect();
            if let (Some(last), Some(fill)) = (parts.last_mut(), fill) {
                last.resize(count, fill);
            }
        } else {
            let (each, longer) = (items.len() / count, items.len() % count);
            let mut items = items.into_iter();
            for part in 0..count {
                let mut part_items: Vec<Value> = items.by_ref().take(each + usize::from(part < longer)).collect();
                part_items.extend(fill.clone().filter(|_| part >= longer));
                parts.push(part_items);
            }
        }
        let parts = parts.into_iter().map(Value::from).collect();
        Ok(self.generator(parts))
    }
}

/// A string as it is; the text of any other value.
fn soft_text(value: &Value) -> Result<Value> {
    match value {
        Value::Str(_) | Value::Markup(_) => Ok(value.clone()),
        value => value.to_text().map(Value::Str),
    }
}

/// The result, marked as safe where the value was.
fn like(value: &Value, result: Value) -> Value {
    match (value, result) {
        (Value::Markup(_), Value::Str(text)) => Value::Markup(text),
        (_, result) => result,
    }
}

fn of_text(name: &str, value: &Value, args: Args) -> Result<Value> {
    let text = value.to_text()?;
    // Most go through single characters.
    steps::spend(text.len() / 16)?;
    match name {
        "upper" | "lower" | "capitalize" => {
            let [] = args.bind(name, 0, [])?;
            changed_case(&text, name).map(|result| like(value, result))
        }
        "title" => {
            let [] = args.bind(name, 0, [])?;
            Ok(titled(&text).into())
        }
        "trim" => {
            let [chars] = args.bind(name, 0, ["chars"])?;
            trimmed(&text, chars.as_ref()).map(|result| like(value, result))
        }
        "center" => {
            let [width] = args.bind(name, 0, ["width"])?;
            justified(&text, name, integer_or(name, width.as_ref(), 80)?, None)
        }
        "replace" => {
            let [old, new, count] = args.bind(name, 2, ["old", "new", "count"])?;
            let [old, new] = [old, new].map(|value| value.unwrap_or_default().to_text());
            let count = count.filter(|count| !count.is_none());
            replace(&text, &old?, &new?, integer_or(name, count.as_ref(), -1)?)
        }
        "indent" => indent(value, args),
        "truncate" => truncate(value, args),
        "wordcount" => {
            let [] = args.bind(name, 0, [])?;
            let words = text.split(|c: char| c != '_' && !c.is_alphanumeric()).filter(|word| !word.is_empty());
            Ok(Value::from(words.count()))
        }
        "urlencode" => {
            let [] = args.bind(name, 0, [])?;
            urlencode(value)
        }
        "format" => match (args.positional.is_empty(), args.named.is_empty()) {
            (false, false) => invalid("format takes arguments with names or without, not both"),
            (_, true) => printf(&text, &Value::tuple(args.positional)).map(Value::from),
            (true, false) => {
                let dict = Value::from_pairs(args.named.iter().map(|(name, value)| (name.as_str(), value.clone())));
                printf(&text, &dict).map(Value::from)
            }
        },
        "string" => {
            let [] = args.bind(name, 0, [])?;
            soft_text(value)
        }
        "safe" => {
            let [] = args.bind(name, 0, [])?;
            Ok(Value::Markup(text))
        }
        _ => {
            let [] = args.bind(name, 0, [])?;
            let is_escaped = matches!(value, Value::Markup(_)) && name != "forceescape";
            Ok(if is_escaped { value.clone() } else { Value::Markup(escape(&text).into()) })
        }
    }
}

/// Jinja2's own `title`: words begin after blanks, hyphens and opening brackets.
fn titled(text: &str) -> String {
    let begins = |c: char| is_space(c) || "-({[<".contains(c);
    let mut out = String::new();
    let mut at_start = true;
    for c in text.chars() {
        if at_start {
            out.extend(c.to_uppercase())
        } else {
            out.extend(c.to_lowercase())
        }
        at_start = begins(c);
    }
    out
}

fn indent(value: &Value, args: Args) -> Result<Value> {
    let [width, first, blank] = args.bind("indent", 0, ["width", "first", "blank"])?;
    let indention = match &width {
        Some(Value::Str(text) | Value::Markup(text)) => text.to_string(),
        width => blanks(integer_or("indent", width.as_ref(), 4)?)?,
    };
    let Some(text) = value.as_str() else { return invalid(format!("indent wants a string, not a {}", value.type_name())) };
    let (first, blank) = (flag_or(first.as_ref(), false), flag_or(blank.as_ref(), false));
    let with_end = format!("{text}\n");
    let ends = with_end.chars().filter(|&c| is_space(c)).count();
    steps::spend_items(ends)?;
    Length::default().add(with_end.len().saturating_add(ends.saturating_mul(indention.len())))?;
    let lines: Vec<String> = lines(&with_end, false)
        .into_iter()
        .enumerate()
        .map(|(i, line)| {
            let indented = if i == 0 { first } else { blank || !line.is_empty() };
            if indented { format!("{indention}{line}") } else { line.to_owned() }
        })
        .collect();
    Ok(like(value, lines.join("\n").into()))
}

/// The blanks of an indention.
fn blanks(width: i128) -> Result<String> {
    match usize::try_from(width.max(0)) {
        Ok(width) if width <= MAX_INDENT => Ok(" ".repeat(width)),
        _ => Err(ErrorKind::Limit("indents by more than 1000 characters")),
    }
}

fn truncate(value: &Value, args: Args) -> Result<Value> {
    let [length, kill_words, end, leeway] = args.bind("truncate", 0, ["length", "killwords", "end", "leeway"])?;
    let length = integer_or("truncate", length.as_ref(), 255)?;
    let leeway = integer_or("truncate", leeway.as_ref().filter(|leeway| !leeway.is_none()), 5)?;
    let end = end.map_or_else(|| Ok("...".to_owned()), |end| text_of("truncate", &end))?;
    let end_length = end.chars().count() as i128;
    if length < end_length || leeway < 0 {
        return invalid("truncate needs a length that its end fits in");
    }
    // What is short enough may be any value with a length.
    match value.len() {
        Some(items) if items as i128 <= length + leeway => return Ok(value.clone()),
        Some(_) => {}
        None => return invalid(format!("a {} has no length", value.type_name())),
    }
    let text = text_of("truncate", value)?;
    let kept: String = text.chars().take(usize::try_from(length - end_length).unwrap_or_default()).collect();
    let kept = match flag_or(kill_words.as_ref(), false) {
        true => kept.as_str(),
        false => kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words),
    };
    Ok(format!("{kept}{end}").into())
}

fn urlencode(value: &Value) -> Result<Value> {
    let mut length = Length::default();
    let mut quoted = |value: &Value, for_query: bool| -> Result<String> {
        let mut out = String::new();
        length.add(3 * value.to_text()?.len())?;
        for byte in value.to_text()?.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte.into()),
                b'/' if !for_query => out.push('/'),
                b' ' if for_query => out.push('+'),
                byte => out.push_str(&format!("%{byte:02X}")),
            }
        }
        Ok(out)
    };
    let pairs: Vec<(Value, Value)> = match (value.as_str(), value.as_dict(), value.items()) {
        (None, Some(dict), _) => dict.entries().to_vec(),
        (None, None, Some(items)) => {
            let pair = |item: &Value| match item.items().as_deref() {
                Some([key, value]) => Ok((key.clone(), value.clone())),
                _ => invalid("urlencode wants pairs"),
            };
            items.iter().map(pair).collect::<Result<_>>()?
        }
        _ => return Ok(quoted(value, false)?.into()),
    };
    let pairs = pairs.iter().map(|(key, value)| Ok(format!("{}={}", quoted(key, true)?, quoted(value, true)?)));
    Ok(pairs.collect::<Result<Vec<_>>>()?.join("&").into())
}

fn pretty(value: &Value) -> Result<Value> {
    let sorted = match value {
        Value::Dict(dict) => {
            let mut entries = dict.entries().to_vec();
            ops::sort_by_key(&mut entries, false, |(key, _)| Ok(key.clone()))?;
            Value::from(entries.into_iter().collect::<super::value::Dict>())
        }
        value => value.clone(),
    };
    let text = sorted.repr()?;
    if text.len() > 80 { unsupported("the filter \"pprint\" of values that take more than a line") } else { Ok(text.into()) }
}

/// Jinja2's `filesizeformat`: bytes with a prefix.
fn file_size(value: &Value, args: Args) -> Result<Value> {
    let [binary] = args.bind("filesizeformat", 0, ["binary"])?;
    let is_binary = flag_or(binary.as_ref(), false);
    let Some(bytes) = to_float(ops::defined(value)?) else {
        return invalid(format!("a {} is no size of a file", value.type_name()));
    };
    let (base, infix) = if is_binary { (1024.0, "iB") } else { (1000.0_f64, "B") };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes as i128).into());
    }
    let prefixes = [if is_binary { "K" } else { "k" }, "M", "G", "T", "P", "E", "Z", "Y"];
    let unit = |at: usize| base.powi(at as i32 + 2);
    let at = (0..prefixes.len()).find(|&at| bytes < unit(at)).unwrap_or(prefixes.len() - 1);
    let prefix = prefixes.get(at).unwrap_or(&"");
    Ok(format!("{:.1} {prefix}{infix}", base * bytes / unit(at)).into())
}

/// Jinja2's `xmlattr`: the items of a dict as attributes of a tag.
fn xml_attributes(value: &Value, args: Args) -> Result<Value> {
    let [space] = args.bind("xmlattr", 0, ["autospace"])?;
    let Some(dict) = ops::defined(value)?.as_dict() else {
        return invalid(format!("xmlattr wants a dict, not a {}", value.type_name()));
    };
    let escaped = |value: &Value| -> Result<String> {
        let text = value.to_text()?;
        Ok(if matches!(value, Value::Markup(_)) { text.to_string() } else { escape(&text) })
    };
    let (mut attributes, mut length) = (Vec::new(), Length::default());
    for (key, value) in dict.entries().iter().filter(|(_, value)| !value.is_none() && !value.is_undefined()) {
        let name = text_of("xmlattr", key)?;
        if name.contains(|c: char| is_space(c) || "/>=".contains(c)) {
            return invalid(format!("invalid character in the attribute name {name:?}"));
        }
        let attribute = format!("{}=\"{}\"", escaped(key)?, escaped(value)?);
        length.add(attribute.len())?;
        attributes.push(attribute);
    }
    let before = if attributes.is_empty() || !flag_or(space.as_ref(), true) { "" } else { " " };
    Ok(format!("{before}{}", attributes.join(" ")).into())
}

fn of_number(name: &str, value: &Value, args: Args) -> Result<Value> {
    match name {
        "abs" => {
            let [] = args.bind(name, 0, [])?;
            match ops::defined(value)? {
                Value::Float(value) => Ok(Value::Float(value.abs())),
                other => match other.as_int() {
                    Some(value) => Ok(Value::Int(value.saturating_abs())),
                    None => invalid(format!("a {} has no absolute value", other.type_name())),
                },
            }
        }
        "round" => {
            let [precision, method] = args.bind(name, 0, ["precision", "method"])?;
            let precision = integer_or(name, precision.as_ref(), 0)?;
            round(value, precision, method.as_ref().map_or(Some("common"), Value::as_str))
        }
        "float" => {
            let [default] = args.bind(name, 0, ["default"])?;
            let number = to_float(ops::defined(value)?);
            Ok(number.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        _ => {
            let [default, base] = args.bind(name, 0, ["default", "base"])?;
            let base = integer_or(name, base.as_ref(), 10)?;
            let number = to_integer(ops::defined(value)?, base);
            Ok(number.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
        }
    }
}

/// Python's `float(x)`.
fn to_float(value: &Value) -> Option<f64> {
    let Some(text) = value.as_str() else { return value.as_number() };
    let text = without_underscores(text.trim_matches(is_space))?;
    let unsigned = text.trim_start_matches(['+', '-']).to_ascii_lowercase();
    let is_word = unsigned.starts_with(|c: char| c.is_ascii_alphabetic());
    if is_word && !["inf", "infinity", "nan"].contains(&unsigned.as_str()) {
        return None;
    }
    text.parse().ok()
}

/// Python's `int(x)`, and that of the float where it is none.
fn to_integer(value: &Value, base: i128) -> Option<i128> {
    let of_float = |value: f64| (value.is_finite() && value.abs() < 1e38).then_some(value.trunc() as i128);
    let Some(text) = value.as_str() else {
        return if let Value::Float(value) = value { of_float(*value) } else { value.as_int() };
    };
    integer_of_text(text, base).or_else(|| to_float(value).and_then(of_float))
}

fn integer_of_text(text: &str, base: i128) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(prefix, _)| lower.starts_with(prefix));
    let (digits, base) = match prefixed {
        Some((_, radix)) if base == 0 || base == radix.into() => {
            let digits = lower.get(2..).unwrap_or_default();
            (digits.strip_prefix('_').unwrap_or(digits).to_owned(), radix)
        }
        _ if base == 0 => (lower, 10),
        _ => (lower, u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?),
    };
    let digits = without_underscores(&digits)?;
    let is_digits = digits.chars().all(|c| c.is_digit(base)) && !digits.is_empty();
    let value = if is_digits { i128::from_str_radix(&digits, base).ok() } else { None }?;
    Some(if negative { -value } else { value })
}

/// Digits without the single underscores between them.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let misplaced = |at: usize| {
        let is_digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_alphanumeric);
        bytes.get(at) == Some(&b'_') && !(is_digit(at.checked_sub(1)) && is_digit(Some(at + 1)))
    };
    if (0..bytes.len()).any(misplaced) { None } else { Some(text.replace('_', "")) }
}

fn round(value: &Value, precision: i128, method: Option<&str>) -> Result<Value> {
    let precision = i32::try_from(precision.clamp(-300, 300)).unwrap_or_default();
    let Some(number) = ops::defined(value)?.as_number() else {
        return invalid(format!("a {} cannot be rounded", value.type_name()));
    };
    let scale = 10_f64.powi(precision);
    match (method, value.as_int()) {
        (Some("common"), Some(integer)) if precision >= 0 => Ok(Value::Int(integer)),
        (Some("common"), Some(_)) => {
            let tens = 10_i128.checked_pow(precision.unsigned_abs());
            let rounded = tens.and_then(|tens| ((number * scale).round_ties_even() as i128).checked_mul(tens));
            // What is below half of so large a number is 0.
            Ok(Value::Int(rounded.unwrap_or_default()))
        }
        (Some("common"), None) => {
            let digits = usize::try_from(precision).ok();
            // Decimal digits round the exact value, as Python does.
            let rounded = digits.and_then(|digits| format!("{number:.digits$}").parse().ok());
            Ok(Value::Float(rounded.unwrap_or_else(|| (number * scale).round_ties_even() / scale)))
        }
        (Some("ceil"), _) => Ok(Value::Float((number * scale).ceil() / scale)),
        (Some("floor"), _) => Ok(Value::Float((number * scale).floor() / scale)),
        _ => invalid("the method of round is common, ceil or floor"),
    }
}

/// transformers' `tojson`: `json.dumps` that leaves characters as they are.
fn to_json(value: &Value, args: Args) -> Result<Value> {
    let [ensure_ascii, indent, separators, sort_keys] =
        args.bind("tojson", 0, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text) | Value::Markup(text)) if text.len() > MAX_INDENT => {
            return Err(ErrorKind::Limit("indents by more than 1000 characters"));
        }
        Some(Value::Str(text) | Value::Markup(text)) => Some(text.to_string()),
        Some(width) => Some(blanks(integer_or("tojson", Some(&width), 0)?)?),
    };
    let separators = match separators {
        None | Some(Value::None) => None,
        Some(pair) => match pair.items().unwrap_or_default().as_slice() {
            [item, key] => Some((text_of("tojson", item)?, text_of("tojson", key)?)),
            _ => return invalid("the separators of tojson are two strings"),
        },
    };
    let style = JsonStyle {
        ensure_ascii: flag_or(ensure_ascii.as_ref(), false),
        indent,
        separators,
        sort_keys: flag_or(sort_keys.as_ref(), false),
    };
    style.dumps(value).map(Value::from)
}
