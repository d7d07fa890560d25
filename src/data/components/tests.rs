//! Hostile tokenizers: each is an error that names what is wrong with it.

use serde_json::{Value, json};

use super::*;
use crate::data::error::DataError;
use crate::data::files::TokenizerFiles;
use crate::data::tests::model;
use crate::data::tokenizer::Tokenizer;

fn good() -> Value {
    serde_json::from_slice(&std::fs::read("tests/fixtures/tiny-qwen3/tokenizer.json").unwrap()).unwrap()
}

/// The good tokenizer with another value at a path.
fn with(path: &str, value: Value) -> Vec<u8> {
    let mut tokenizer = good();
    match tokenizer.pointer_mut(path) {
        Some(place) => *place = value,
        None => {
            let (parent, key) = path.rsplit_once('/').unwrap();
            tokenizer.pointer_mut(parent).unwrap()[key] = value;
        }
    }
    serde_json::to_vec(&tokenizer).unwrap()
}

fn load(json: &[u8]) -> std::result::Result<Tokenizer, DataError> {
    Tokenizer::new(TokenizerFiles { tokenizer: json, ..TokenizerFiles::default() }, &model(), 0)
}

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

fn around(single: Value, tokens: Value) -> Value {
    json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens})
}

fn text(id: &str) -> Value {
    json!({"Sequence": {"id": id, "type_id": 0}})
}

fn unigram(vocab: Value, unk: Value) -> Value {
    json!({"type": "Unigram", "vocab": vocab, "unk_id": unk, "byte_fallback": false})
}

fn sequence(key: &str, component: &Value, count: usize) -> Value {
    json!({"type": "Sequence", key: vec![component.clone(); count]})
}

/// A component within as many sequences.
fn nested(key: &str, component: Value, levels: usize) -> Value {
    (0..levels).fold(component, |inner, _| sequence(key, &inner, 1))
}

/// What is replaced in the good tokenizer, and a part of the error.
fn hostile() -> Vec<(&'static str, Value, &'static str)> {
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let grows = replace(json!({"String": "a"}), &"a".repeat(100));
    let doubles = replace(json!({"String": "a"}), "aa");
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
    let metaspace = json!({"type": "Metaspace", "replacement": "\u{1f980}", "prepend_scheme": "always", "split": false});
    let special = |ids: Value, tokens: Value| json!({"x": {"id": "x", "ids": ids, "tokens": tokens}});
    let x = json!({"SpecialToken": {"id": "x", "type_id": 0}});
    let added = |id: u64, content: &str| json!([{"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]);
    let strip = |start: u64, stop: u64| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    vec![
        // [precompiled], [fixed], [template-b], [prefix] and [growth].
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""}), "\"Precompiled\" is not supported"),
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "\"FixedLength\" is not supported"),
        ("/post_processor", around(json!([text("B")]), json!({})), "\"single\" should be each text once"),
        ("/model/continuing_subword_prefix", json!("##".repeat(1000)), "null or empty"),
        ("/normalizer", sequence("normalizers", &grows, 5), "more than 16 times as long"),
        // Others of their kinds.
        ("/normalizer", grows, "more than 16 times as long"),
        ("/normalizer", sequence("normalizers", &doubles, 5), "more than 16 times as long"),
        ("/normalizer", replace(json!({"Regex": ""}), &"a".repeat(16)), "more than 16 times as long"),
        ("/normalizer", replace(json!({"String": ""}), "a"), "not empty"),
        ("/normalizer", replace(json!({"Regex": "(((a{1000}){1000}){1000})"}), "a"), "at most 10000 times"),
        ("/normalizer", replace(json!({"String": "a"}), &"a".repeat(5000)), "at most 4096 bytes"),
        ("/normalizer", json!({"type": "Prepend", "prepend": "a".repeat(5000)}), "at most 4096 bytes"),
        ("/normalizer", json!({"type": "Nmt"}), "\"Nmt\" is not supported"),
        ("/normalizer", json!({"type": "BertNormalizer"}), "is not supported"),
        ("/normalizer", json!({"type": "NFC", "precompiled_charsmap": ""}), "unknown key"),
        ("/normalizer", json!({"precompiled_charsmap": ""}), "the type of a component"),
        ("/normalizer", json!(["Precompiled", ""]), "the type of a component"),
        ("/normalizer", json!({"type": "Sequence", "normalizers": [{"type": "Precompiled"}]}), "is not supported"),
        ("/normalizer", json!({"type": "Sequence", "normalizers": "NFC"}), "a list"),
        ("/normalizer", nested("normalizers", json!({"type": "NFC"}), 30), "sequences within sequences"),
        ("/normalizer", sequence("normalizers", &json!({"type": "NFKC"}), 1000), "more than 32 components"),
        ("/pre_tokenizer", sequence("pretokenizers", &byte_level, 30), "more than 16 times as long"),
        ("/pre_tokenizer", sequence("pretokenizers", &metaspace, 3), "more than 16 times as long"),
        ("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "__"}), "one character"),
        ("/pre_tokenizer", json!({"type": "CharDelimiterSplit", "delimiter": "a"}), "is not supported"),
        ("/pre_tokenizer", json!({"type": "UnicodeScripts"}), "is not supported"),
        ("/pre_tokenizer", split(&"a".repeat(5000)), "at most 4096 bytes long"),
        ("/pre_tokenizer", split("(?:(?=a)a{999}){999}"), "at most 10000 times"),
        ("/pre_tokenizer", split("((a)"), "cannot be used"),
        ("/pre_tokenizer", split(r"(a*)*\1*(.*)*c"), "without back-references"),
        ("/pre_tokenizer", split(r"(?:(?=.)(?:.*))*x"), "without repeats and choices within repeats"),
        ("/post_processor", around(json!([text("A"), text("A")]), json!({})), "each text once"),
        ("/post_processor", around(json!([]), json!({})), "each text once"),
        ("/post_processor", around(json!([text("A"), x.clone()]), json!({})), "tokens that are defined"),
        ("/post_processor", around(json!([text("A"), x.clone()]), special(json!([1, 2]), json!(["x"]))), "an id for each"),
        ("/post_processor", around(json!(vec![x; 65]), special(json!([1]), json!(["x"]))), "at most 64 pieces"),
        ("/post_processor", sequence("processors", &around(json!([text("A")]), json!({})), 30), "more than 1 template"),
        ("/normalizer", replace(json!({"Regex": "a(?=b)"}), "c"), "without look-arounds"),
        ("/pre_tokenizer", split(r"a*(?=.*x)"), "without back-references"),
        ("/post_processor", json!({"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}), "is not supported"),
        ("/post_processor", json!({"type": "ByteLevel", "sep": ["a", 1], "cls": ["b", 2]}), "unknown key"),
        ("/decoder", strip(0, 1), "\"stop\" should be 0"),
        ("/decoder", strip(u64::MAX, 0), "\"start\" should be"),
        ("/decoder", json!({"type": "WordPiece", "prefix": "", "cleanup": true}), "is not supported"),
        ("/decoder", json!({"type": "CTC"}), "is not supported"),
        ("/decoder", sequence("decoders", &doubles, 9), "more than 16 times as long"),
        ("/model/type", json!("WordPiece"), "the model \"WordPiece\" is not supported"),
        ("/model/type", json!("WordLevel"), "the model \"WordLevel\" is not supported"),
        ("/model/type", Value::Null, "is not supported"),
        ("/model/end_of_word_suffix", json!("</w>"), "null or empty"),
        ("/model/dropout", json!(0.5), "null or 0"),
        ("/model/merges", json!([["a", "b".repeat(100)]]), "pairs whose joined texts are tokens"),
        ("/model/merges", json!([format!("a {}", "b".repeat(100))]), "pairs whose joined texts are tokens"),
        ("/model/merges", json!([["q", "\u{7fff}"]]), "cannot be used"),
        ("/model/vocab", json!({"a": u32::MAX}), "indices of at most"),
        ("/model/vocab", json!({"a": -1}), "invalid value"),
        ("/model/vocab", json!({"a": 1.5}), "invalid type"),
        ("/model/vocab", json!([["a", 0.0]]), "an object of tokens"),
        ("/model/max_input_chars_per_word", json!(1), "unknown key"),
        ("/model", unigram(json!([]), json!(0)), "not empty"),
        ("/model", unigram(json!([["", 0.0]]), json!(0)), "not empty"),
        ("/model", unigram(json!([["<unk>", 0.0]]), json!(9)), "UnkIdNotInVocabulary"),
        ("/model", unigram(json!([["b", 0.0]]), Value::Null), "unk_id"),
        ("/model", unigram(json!({"a": 1}), json!(0)), "a list of tokens"),
        ("/added_tokens", added(u64::from(u32::MAX), "<z>"), "\"id\" should be"),
        ("/added_tokens", added(3, &"<".repeat(5000)), "at most 4096 bytes"),
    ]
}

#[test]
fn hostile_tokenizers_are_refused() {
    for (path, value, expected) in hostile() {
        match load(&with(path, value.clone())) {
            Ok(_) => panic!("{path} {value}: accepted"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("the pack's tokenizer") && text.contains(expected), "{path} {value}: {text}");
                assert!(!text.contains("stopped"), "the library panicked: {path} {value}: {text}");
            }
        }
    }
}

#[test]
fn a_key_that_is_there_twice_is_refused() {
    let json = String::from_utf8(with("/normalizer", json!({"type": "NFC"}))).unwrap();
    for (once, twice) in [
        (r#"{"type":"NFC"}"#, r#"{"type":"NFC","type":"Precompiled"}"#),
        (r#""dropout":null"#, r#""dropout":null,"dropout":0.5"#),
        (r#""padding":null"#, r#""normalizer":{"type":"Precompiled"},"padding":null"#),
    ] {
        assert!(json.contains(once), "{once}");
        let error = load(json.replace(once, twice).as_bytes()).unwrap_err().to_string();
        assert!(error.contains("twice") || error.contains("duplicate field"), "{error}");
    }
    assert!(matches!(check(&vec![b' '; MAX_BYTES + 1]), Err(TokenizerError::Bytes { .. })));
    let token = r#"{"id": 0, "content": "a"}"#;
    let many = format!("[{}]", vec![token; MAX_ADDED_TOKENS + 1].join(","));
    let file = format!(r#"{{"added_tokens": {many}, "model": {{"type": "BPE", "vocab": {{}}, "merges": []}}}}"#);
    let error = check(file.as_bytes()).unwrap_err().to_string();
    assert_eq!(error, "the added_tokens has more than 131072 tokens");
}

#[test]
fn tokenizers_of_supported_models_are_accepted() {
    let llama_2 = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let llama_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let x = json!({"x": {"id": "x", "ids": [1], "tokens": ["x"]}});
    let template = around(json!([{"SpecialToken": {"id": "x", "type_id": 0}}, text("A")]), x);
    let sentencepiece = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    for (path, value) in [
        ("/normalizer", llama_2),
        ("/normalizer", json!({"type": "Sequence", "normalizers": []})),
        ("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split(llama_3), byte_level.clone()]})),
        ("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [digits, byte_level.clone()]})),
        ("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false})),
        ("/post_processor", json!({"type": "Sequence", "processors": [byte_level, template]})),
        ("/decoder", sentencepiece),
        ("/model", unigram(json!([["<unk>", 0.0], ["a", -1.5], ["aa", -2.0]]), json!(0))),
    ] {
        let tokenizer = load(&with(path, value.clone())).unwrap_or_else(|error| panic!("{path} {value}: {error}"));
        tokenizer.encode("aa a", true).unwrap();
    }
}

#[test]
fn counts_of_patterns_are_multiplied() {
    for (pattern, expected) in
        [(r"\p{N}{1,3}", 3), (r"\x{3040}+", 1), ("(a{10}){20,}", 200), ("a{99999999999999999999}", u64::MAX), ("{", 1)]
    {
        assert_eq!(repeats(pattern), expected, "{pattern}");
    }
}

/// By hand: every tokenizer.json in a folder is accepted.
#[test]
#[ignore = "needs NF4PACK_TOKENIZERS, a folder of tokenizer.json files in folders"]
fn real_tokenizers_are_accepted() {
    for folder in std::fs::read_dir(std::env::var("NF4PACK_TOKENIZERS").unwrap()).unwrap() {
        let path = folder.unwrap().path().join("package/models/tokenizer.json");
        let Ok(json) = std::fs::read(&path) else { continue };
        let started = std::time::Instant::now();
        check(&json).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        println!("{path:?}: {} bytes in {:?}", json.len(), started.elapsed());
    }
}
