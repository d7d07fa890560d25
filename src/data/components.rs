//! What a tokenizer.json may have: the parts that tokenizers of supported models use, with values
//! that the library `tokenizers` takes without a panic, a loop or a text that grows.
//!
//! The file is a stranger's. The library indexes, unwraps and repeats by the numbers and strings in
//! it, so they are checked before it reads them.

pub(super) mod error;
mod model;
pub(super) mod pattern;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use error::{Result, TokenizerError};
use model::Model;

/// Bytes of a tokenizer.json, at most. The largest ones have some 35 MB.
const MAX_BYTES: usize = 64 << 20;
/// Components of a section, those within sequences included.
const MAX_COMPONENTS: usize = 32;
/// Sequences within sequences.
const MAX_NESTING: usize = 4;
/// Bytes of a pattern. The longest ones have some 500.
const MAX_PATTERN: usize = 4096;
/// Copies of a part of a pattern that its counts ask for: `(a{100}){100}` has 10,000.
const MAX_REPEATS: u64 = 10_000;
/// How much longer a section may make a text. `▁` for a blank makes it three times as long.
const MAX_GROWTH: u64 = 16;
/// Bytes of a string that a component writes, and of an added token.
const MAX_STRING: usize = 4096;
/// Added tokens. Models of speech have some 30,000.
pub(super) const MAX_ADDED_TOKENS: usize = 1 << 17;
/// Bytes of all added tokens.
const MAX_ADDED: usize = 16 << 20;
/// Pieces of a template, and tokens of a piece.
const MAX_PIECES: usize = 64;
/// Templates of a post-processor: the library puts each around the last one's result, and panics.
const MAX_TEMPLATES: usize = 1;

/// Checks a tokenizer.json.
///
/// # Errors
/// See [`TokenizerError`].
pub(super) fn check(json: &[u8]) -> Result<()> {
    if json.len() > MAX_BYTES {
        return Err(TokenizerError::Bytes { found: json.len(), limit: MAX_BYTES });
    }
    let file: File = serde_json::from_slice(json).map_err(TokenizerError::Json)?;
    file.model.check()?;
    added_tokens(&file.added_tokens)?;
    // Both write the text that the model reads.
    let growth = section("normalizer", file.normalizer.as_ref(), normalizer, 1)?;
    section("pre-tokenizer", file.pre_tokenizer.as_ref(), pre_tokenizer, growth)?;
    section("post-processor", file.post_processor.as_ref(), post_processor, 1)?;
    section("decoder", file.decoder.as_ref(), decoder, 1)?;
    Ok(())
}

#[derive(serde::Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Option<Strict>,
    #[serde(default)]
    pre_tokenizer: Option<Strict>,
    #[serde(default)]
    post_processor: Option<Strict>,
    #[serde(default)]
    decoder: Option<Strict>,
    model: Model,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u64,
    content: String,
}

fn added_tokens(tokens: &[Added]) -> Result<()> {
    let bad = |key, expected: String| {
        Err(TokenizerError::Value { section: "list", component: "added_tokens".to_owned(), key, expected })
    };
    if tokens.len() > MAX_ADDED_TOKENS {
        return Err(TokenizerError::Limit { section: "added_tokens", what: "tokens", limit: MAX_ADDED_TOKENS as u64 });
    }
    if tokens.iter().map(|token| token.content.len()).sum::<usize>() > MAX_ADDED {
        return Err(TokenizerError::Limit { section: "added_tokens", what: "bytes", limit: MAX_ADDED as u64 });
    }
    if tokens.iter().any(|token| token.content.len() > MAX_STRING) {
        return bad("content", format!("at most {MAX_STRING} bytes"));
    }
    if tokens.iter().any(|token| token.id > model::MAX_ID) {
        return bad("id", format!("at most {}", model::MAX_ID));
    }
    Ok(())
}

/// JSON in which no object has a key twice: two readers could take two values.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> std::result::Result<Strict, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = access.next_element()? {
            items.push(item);
        }
        Ok(Strict(Value::Array(items)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Strict, A::Error> {
        let mut map = Map::new();
        while let Some((key, Strict(value))) = access.next_entry::<String, Strict>()? {
            if map.contains_key(&key) {
                return Err(serde::de::Error::custom(format!("the key {key:?} is there twice")));
            }
            map.insert(key, value);
        }
        Ok(Strict(Value::Object(map)))
    }
}

/// A component of a section.
struct Component<'a> {
    section: &'static str,
    kind: &'a str,
    map: &'a Map<String, Value>,
}

/// How much longer a component makes a text.
type Growth = u64;

/// Checks a section. Returns its growth times that of the sections before it.
fn section(
    name: &'static str,
    value: Option<&Strict>,
    check: fn(&Component<'_>) -> Result<Growth>,
    before: Growth,
) -> Result<Growth> {
    let mut walk = Walk { section: name, check, components: 0, templates: 0, growth: before };
    value.map_or(Ok(()), |Strict(value)| walk.component(value, 0))?;
    Ok(walk.growth)
}

struct Walk {
    section: &'static str,
    check: fn(&Component<'_>) -> Result<Growth>,
    components: usize,
    templates: usize,
    growth: Growth,
}

impl Walk {
    fn component(&mut self, value: &Value, nesting: usize) -> Result<()> {
        let section = self.section;
        self.components += 1;
        if self.components > MAX_COMPONENTS {
            return Err(TokenizerError::Limit { section, what: "components", limit: MAX_COMPONENTS as u64 });
        }
        let found = value.as_object().and_then(|map| Some((map, map.get("type")?.as_str()?)));
        let Some((map, kind)) = found else {
            let expected = "the type of a component".to_owned();
            return Err(TokenizerError::Value { section, component: "object".to_owned(), key: "type", expected });
        };
        let component = Component { section, kind, map };
        self.templates += usize::from(kind == "TemplateProcessing");
        if self.templates > MAX_TEMPLATES {
            return Err(TokenizerError::Limit {
                section,
                what: "template (TemplateProcessing)",
                limit: MAX_TEMPLATES as u64,
            });
        }
        if kind != "Sequence" {
            let growth = (self.check)(&component)?;
            self.growth = self.growth.saturating_mul(growth);
            let limit = MAX_GROWTH;
            return if self.growth > limit { Err(TokenizerError::Growth { section, limit }) } else { Ok(()) };
        }
        if nesting == MAX_NESTING {
            return Err(TokenizerError::Limit { section, what: "sequences within sequences", limit: MAX_NESTING as u64 });
        }
        let key = match section {
            "normalizer" => "normalizers",
            "pre-tokenizer" => "pretokenizers",
            "post-processor" => "processors",
            _ => "decoders",
        };
        component.keys(&[key])?;
        let Some(list) = map.get(key).and_then(Value::as_array) else { return component.bad(key, "a list") };
        list.iter().try_for_each(|inner| self.component(inner, nesting + 1))
    }
}

impl Component<'_> {
    fn bad<T>(&self, key: &'static str, expected: impl Into<String>) -> Result<T> {
        let component = self.kind.to_owned();
        Err(TokenizerError::Value { section: self.section, component, key, expected: expected.into() })
    }

    /// Fails for a key that is none of these: the library decides by their keys on the types of
    /// some components.
    fn keys(&self, known: &[&str]) -> Result<()> {
        match self.map.keys().find(|key| *key != "type" && !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                Err(TokenizerError::Key { section: self.section, component: self.kind.to_owned(), key: key.clone() })
            }
        }
    }

    fn unknown<T>(&self, known: &'static [&'static str]) -> Result<T> {
        Err(TokenizerError::Component { section: self.section, found: self.kind.to_owned(), known })
    }

    fn text(&self, key: &'static str) -> Result<&str> {
        match self.map.get(key).and_then(Value::as_str).filter(|text| text.len() <= MAX_STRING) {
            Some(text) => Ok(text),
            None => self.bad(key, format!("a string of at most {MAX_STRING} bytes")),
        }
    }

    /// Bytes of one character.
    fn character(&self, key: &'static str) -> Result<u64> {
        match self.text(key)?.chars().collect::<Vec<_>>().as_slice() {
            [c] => Ok(c.len_utf8() as u64),
            _ => self.bad(key, "one character"),
        }
    }

    fn number(&self, key: &'static str, largest: u64) -> Result<u64> {
        match self.map.get(key).and_then(Value::as_u64).filter(|number| *number <= largest) {
            Some(number) => Ok(number),
            None if largest == 0 => self.bad(key, "0"),
            None => self.bad(key, format!("a number from 0 to {largest}")),
        }
    }

    /// `{"String": ..}` or `{"Regex": ..}`; bytes of the shortest text that it matches.
    fn pattern(&self) -> Result<u64> {
        let key = "pattern";
        let pattern = self.map.get(key).and_then(Value::as_object).filter(|map| map.len() == 1);
        let text = |name: &str| pattern.and_then(|map| map.get(name)?.as_str());
        let shortest = match (text("String"), text("Regex")) {
            (Some(""), _) => return self.bad(key, "a string that is not empty"),
            (Some(text), _) => text.len() as u64,
            // It may match nothing, between any two characters.
            (None, Some(_)) => 0,
            (None, None) => return self.bad(key, "a string or a regular expression"),
        };
        let pattern = text("String").or(text("Regex")).unwrap_or_default();
        if pattern.len() > MAX_PATTERN {
            return self.bad(key, format!("at most {MAX_PATTERN} bytes long"));
        }
        if text("Regex").is_some_and(|regex| repeats(regex) > MAX_REPEATS) {
            return self.bad(key, format!("a regular expression whose counts repeat a part at most {MAX_REPEATS} times"));
        }
        if text("Regex").is_some_and(pattern::takes_long) {
            return self.bad(key, pattern::EXPECTED);
        }
        Ok(shortest)
    }

    /// What `Replace` does to a text.
    fn replaces(&self) -> Result<Growth> {
        self.keys(&["pattern", "content"])?;
        let (shortest, content) = (self.pattern()?, self.text("content")?.len() as u64);
        let regex = self.map.get("pattern").and_then(|pattern| pattern.get("Regex")?.as_str());
        if regex.is_some_and(pattern::looks_around) {
            return self.bad("pattern", "a regular expression without look-arounds");
        }
        Ok(if shortest == 0 { 1 + content } else { content.div_ceil(shortest).max(1) })
    }

    fn metaspace(&self) -> Result<Growth> {
        self.keys(&["replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"])?;
        self.character("replacement")
    }

    fn byte_level(&self) -> Result<Growth> {
        self.keys(&["add_prefix_space", "trim_offsets", "use_regex"])?;
        Ok(2)
    }
}

/// The product of a pattern's counts: a bound of the copies that they make.
fn repeats(regex: &str) -> u64 {
    let mut product = 1_u64;
    for (at, _) in regex.match_indices('{') {
        let before = regex.get(..at).unwrap_or_default();
        let is_class = ["\\p", "\\P", "\\x", "\\u", "\\U", "\\k", "\\g"].iter().any(|class| before.ends_with(class));
        let inside = regex.get(at + 1..).and_then(|rest| rest.split_once('}')).map(|(inside, _)| inside);
        let numbers = inside.filter(|_| !is_class).into_iter().flat_map(|inside| inside.split(','));
        let largest = numbers.filter_map(|number| {
            let number = number.trim();
            let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| number.parse::<u64>().unwrap_or(u64::MAX))
        });
        product = product.saturating_mul(largest.max().unwrap_or(1).max(1));
    }
    product
}

fn normalizer(component: &Component<'_>) -> Result<Growth> {
    const KNOWN: &[&str] =
        &["Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace", "ByteLevel"];
    match component.kind {
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" => component.keys(&[]).map(|()| 1),
        "Strip" => component.keys(&["strip_left", "strip_right"]).map(|()| 1),
        "ByteLevel" => component.keys(&[]).map(|()| 2),
        "Prepend" => {
            component.keys(&["prepend"])?;
            component.text("prepend").map(|_| 1)
        }
        "Replace" => component.replaces(),
        _ => component.unknown(KNOWN),
    }
}

fn pre_tokenizer(component: &Component<'_>) -> Result<Growth> {
    const KNOWN: &[&str] =
        &["Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"];
    match component.kind {
        "ByteLevel" => component.byte_level(),
        "Metaspace" => component.metaspace(),
        "Split" => {
            component.keys(&["pattern", "behavior", "invert"])?;
            component.pattern().map(|_| 1)
        }
        "Digits" => component.keys(&["individual_digits"]).map(|()| 1),
        "Punctuation" => component.keys(&["behavior"]).map(|()| 1),
        "Whitespace" | "WhitespaceSplit" => component.keys(&[]).map(|()| 1),
        _ => component.unknown(KNOWN),
    }
}

fn decoder(component: &Component<'_>) -> Result<Growth> {
    const KNOWN: &[&str] = &["Sequence", "ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"];
    match component.kind {
        // It decodes what the pre-tokenizer wrote.
        "ByteLevel" => component.byte_level().map(|_| 1),
        "Metaspace" => component.metaspace().map(|_| 1),
        "Replace" => component.replaces(),
        "ByteFallback" | "Fuse" => component.keys(&[]).map(|()| 1),
        "Strip" => {
            component.keys(&["content", "start", "stop"])?;
            component.character("content")?;
            component.number("start", MAX_STRING as u64)?;
            // The library counts from the end of tokens that may be shorter.
            component.number("stop", 0).map(|_| 1)
        }
        _ => component.unknown(KNOWN),
    }
}

fn post_processor(component: &Component<'_>) -> Result<Growth> {
    match component.kind {
        "ByteLevel" => component.byte_level().map(|_| 1),
        "TemplateProcessing" => template(component).map(|()| 1),
        _ => component.unknown(&["Sequence", "ByteLevel", "TemplateProcessing"]),
    }
}

/// A template of tokens around a text: the text once, and special tokens that are defined.
fn template(component: &Component<'_>) -> Result<()> {
    component.keys(&["single", "pair", "special_tokens"])?;
    let Some(tokens) = component.map.get("special_tokens").and_then(Value::as_object) else {
        return component.bad("special_tokens", "an object");
    };
    let list = |token: &Value, key: &str| token.get(key).and_then(Value::as_array).map(Vec::len);
    let defined = |token: &Value| list(token, "ids").filter(|&ids| Some(ids) == list(token, "tokens"));
    if !tokens.values().all(|token| defined(token).is_some_and(|ids| ids <= MAX_PIECES)) {
        return component.bad("special_tokens", format!("tokens with an id for each, at most {MAX_PIECES} at a time"));
    }
    for (key, sequences) in [("single", ["A"].as_slice()), ("pair", &["A", "B"])] {
        let pieces = component.map.get(key).and_then(Value::as_array).filter(|pieces| pieces.len() <= MAX_PIECES);
        let Some(pieces) = pieces else { return component.bad(key, format!("a list of at most {MAX_PIECES} pieces")) };
        let id = |piece: &Value, kind: &str| Some(piece.get(kind)?.get("id")?.as_str()?.to_owned());
        let mut texts: Vec<String> = pieces.iter().filter_map(|piece| id(piece, "Sequence")).collect();
        texts.sort_unstable();
        let is_known = |piece: &Value| match (id(piece, "Sequence"), id(piece, "SpecialToken")) {
            (Some(_), None) => true,
            (None, Some(token)) => tokens.contains_key(&token),
            _ => false,
        };
        // The pair is not used; some files have none.
        let is_unused = key == "pair" && pieces.is_empty();
        if !is_unused && (texts != sequences || !pieces.iter().all(is_known)) {
            return component.bad(key, "each text once, and special tokens that are defined");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
