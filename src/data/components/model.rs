//! The model of a tokenizer.json: its vocabulary and merges, measured and not kept.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::{Result, TokenizerError};

/// The largest index of a token. The library counts on from the largest one.
pub(super) const MAX_ID: u64 = (1 << 26) - 1;
/// Tokens, and merges.
const MAX_ENTRIES: u64 = 1 << 23;
/// Bytes of a token. The longest ones have some hundred.
const MAX_TOKEN: usize = 1 << 16;

/// A model.
#[derive(Default)]
pub(super) struct Model {
    kind: Option<String>,
    dropout: Option<f64>,
    prefix: Option<String>,
    suffix: Option<String>,
    vocabulary: Option<Measures>,
    merges: Option<Measures>,
}

/// What is measured of a list of tokens or merges.
#[derive(Default)]
struct Measures {
    entries: u64,
    longest: usize,
    shortest: usize,
    largest_id: u64,
    /// Whether it is a list.
    is_list: bool,
}

impl Measures {
    fn count(&mut self, bytes: usize, id: u64) {
        self.shortest = if self.entries == 0 { bytes } else { self.shortest.min(bytes) };
        self.entries += 1;
        self.longest = self.longest.max(bytes);
        self.largest_id = self.largest_id.max(id);
    }
}

impl Model {
    pub(super) fn check(&self) -> Result<()> {
        let section = "model";
        let kind = self.kind.clone().unwrap_or_default();
        if !["BPE", "Unigram"].contains(&kind.as_str()) {
            return Err(TokenizerError::Component { section, found: kind, known: &["BPE", "Unigram"] });
        }
        let is_list = kind == "Unigram";
        let bad = |key, expected: &str| {
            Err(TokenizerError::Value { section, component: kind.clone(), key, expected: expected.to_owned() })
        };
        let limit = |what| Err(TokenizerError::Limit { section, what, limit: MAX_ENTRIES });
        // Tokens would be random.
        if self.dropout.is_some_and(|dropout| dropout != 0.0) {
            return bad("dropout", "null or 0");
        }
        // The library cuts the prefix off every merge, whether it is there or not.
        if self.prefix.as_deref().is_some_and(|prefix| !prefix.is_empty()) {
            return bad("continuing_subword_prefix", "null or empty");
        }
        if self.suffix.as_deref().is_some_and(|suffix| !suffix.is_empty()) {
            return bad("end_of_word_suffix", "null or empty");
        }
        let Some(vocabulary) = self.vocabulary.as_ref().filter(|vocabulary| vocabulary.is_list == is_list) else {
            return bad("vocab", if is_list { "a list of tokens with scores" } else { "an object of tokens with indices" });
        };
        if vocabulary.entries > MAX_ENTRIES {
            return limit("tokens");
        }
        if vocabulary.longest > MAX_TOKEN {
            return bad("vocab", &format!("tokens of at most {MAX_TOKEN} bytes"));
        }
        if vocabulary.largest_id > MAX_ID {
            return bad("vocab", &format!("tokens with indices of at most {MAX_ID}"));
        }
        // The library would find an empty token at the same place for ever.
        if is_list && (vocabulary.entries == 0 || vocabulary.shortest == 0) {
            return bad("vocab", "tokens that are not empty");
        }
        match &self.merges {
            Some(merges) if merges.entries > MAX_ENTRIES => limit("merges"),
            Some(merges) if merges.longest > vocabulary.longest => bad("merges", "pairs whose joined texts are tokens"),
            _ => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Model {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(ModelVisitor)
    }
}

struct ModelVisitor;

impl<'de> Visitor<'de> for ModelVisitor {
    type Value = Model;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Model, A::Error> {
        let (mut model, mut seen) = (Model::default(), Vec::<String>::new());
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(A::Error::custom(format!("the model has the key {key:?} twice")));
            }
            match key.as_str() {
                "type" => model.kind = map.next_value()?,
                "dropout" => model.dropout = map.next_value()?,
                "continuing_subword_prefix" => model.prefix = map.next_value()?,
                "end_of_word_suffix" => model.suffix = map.next_value()?,
                "vocab" => model.vocabulary = map.next_value::<Option<Vocabulary>>()?.map(|Vocabulary(found)| found),
                "merges" => model.merges = map.next_value::<Option<Merges>>()?.map(|Merges(found)| found),
                "unk_token" | "fuse_unk" | "byte_fallback" | "ignore_merges" | "unk_id" => {
                    map.next_value::<IgnoredAny>()?;
                }
                _ => return Err(A::Error::custom(format!("the model has the unknown key {key:?}"))),
            }
            seen.push(key);
        }
        Ok(model)
    }
}

/// Tokens: with indices in a map, or with scores in a list.
struct Vocabulary(Measures);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(VocabularyVisitor)
    }
}

struct VocabularyVisitor;

impl<'de> Visitor<'de> for VocabularyVisitor {
    type Value = Vocabulary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tokens with indices or scores")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocabulary, A::Error> {
        let mut measures = Measures::default();
        while let Some((Bytes(bytes), id)) = map.next_entry::<Bytes, u64>()? {
            measures.count(bytes, id);
        }
        Ok(Vocabulary(measures))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Vocabulary, A::Error> {
        let mut measures = Measures { is_list: true, ..Measures::default() };
        while let Some((Bytes(bytes), _)) = list.next_element::<(Bytes, f64)>()? {
            measures.count(bytes, measures.entries);
        }
        Ok(Vocabulary(measures))
    }
}

/// Pairs of tokens, each a list of two or one string with a blank.
struct Merges(Measures);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_seq(MergesVisitor)
    }
}

struct MergesVisitor;

impl<'de> Visitor<'de> for MergesVisitor {
    type Value = Merges;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Merges, A::Error> {
        let mut measures = Measures::default();
        while let Some(Merge(bytes)) = list.next_element()? {
            measures.count(bytes, 0);
        }
        Ok(Merges(measures))
    }
}

/// The bytes of a merge's two tokens.
struct Merge(usize);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E>(self, merge: &str) -> std::result::Result<Merge, E> {
        Ok(Merge(merge.len().saturating_sub(1)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Merge, A::Error> {
        let mut total = 0;
        while let Some(Bytes(bytes)) = list.next_element()? {
            total += bytes;
        }
        Ok(Merge(total))
    }
}

/// The bytes of a string.
struct Bytes(usize);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_str(BytesVisitor)
    }
}

struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<Bytes, E> {
        Ok(Bytes(text.len()))
    }
}
