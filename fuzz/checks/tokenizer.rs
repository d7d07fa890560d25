//! Any tokenizer.json: text is the file itself; from other bytes one is built of a model and parts
//! before and behind it, with values changed. It is refused with a reason, or gives tokens of texts
//! and texts of tokens: without a panic that leaves the library, in bounded time and memory.

use arbitrary::{Result, Unstructured};
use nf4pack::arch::ModelConfig;
use nf4pack::fuzzing::{TokenizerFiles, tokenizer};
use serde_json::{Value, json};

use super::json;

const TEXTS: [&str; 6] = [
    "",
    "a",
    "Hello world, <s> 12\u{e9}\u{1f980}\n\n x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u{feff}\u{0}<|im_end|>",
    " \t\u{2581}ab ",
];

const KEYS: [&str; 40] = [
    "type",
    "vocab",
    "merges",
    "unk_token",
    "unk_id",
    "byte_fallback",
    "fuse_unk",
    "ignore_merges",
    "dropout",
    "max_input_chars_per_word",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "added_tokens",
    "id",
    "content",
    "single_word",
    "lstrip",
    "rstrip",
    "normalized",
    "special",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "pattern",
    "String",
    "Regex",
    "behavior",
    "invert",
    "replacement",
    "prepend_scheme",
    "split",
    "add_prefix_space",
    "trim_offsets",
    "single",
    "pair",
    "special_tokens",
    "truncation",
    "padding",
];

/// Runs the check.
pub fn run(bytes: &[u8]) {
    if bytes.first().is_none_or(u8::is_ascii) {
        check(bytes, None);
    } else {
        let _ = built(&mut Unstructured::new(&bytes[1..]));
    }
}

/// A model with 600 tokens.
fn model() -> ModelConfig {
    let config = br#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 600, "max_position_embeddings": 16}"#;
    ModelConfig::parse(config, None).expect("a good configuration")
}

fn check(json: &[u8], config: Option<&[u8]>) {
    let files = TokenizerFiles { tokenizer: json, config, special_tokens_map: config, ..TokenizerFiles::default() };
    let tokenizer = match tokenizer(files, &model()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for text in TEXTS {
        for special in [false, true] {
            match tokenizer.encode(text, special) {
                Ok(tokens) => {
                    assert!(tokens.iter().all(|&token| token < 600));
                    let _ = tokenizer.decode(&tokens);
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
    let _ = tokenizer.decode(&[0, 1, 599, u32::MAX]);
}

fn built(u: &mut Unstructured<'_>) -> Result<()> {
    let mut document = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": part(u, normalizer)?, "pre_tokenizer": part(u, pre_tokenizer)?,
        "post_processor": part(u, post_processor)?, "decoder": part(u, decoder)?, "model": vocabulary(u)?,
    });
    if u.ratio(3, 4)? {
        json::edit(u, &mut document, &KEYS)?;
    }
    let mut config = json!({"bos_token": "<s>", "eos_token": {"content": "b"}, "added_tokens_decoder": {"7": {"content": "<x>", "special": true}}});
    json::edit(
        u,
        &mut config,
        &[
            "bos_token",
            "eos_token",
            "extra_special_tokens",
            "additional_special_tokens",
            "added_tokens_decoder",
            "split_special_tokens",
        ],
    )?;
    let config = json::bytes(u, &config)?;
    check(&json::bytes(u, &document)?, Some(&config).filter(|bytes| bytes.len() % 3 != 0).map(Vec::as_slice));
    Ok(())
}

/// Nothing, one part, or a sequence.
fn part(u: &mut Unstructured<'_>, one: fn(&mut Unstructured<'_>) -> Result<Value>) -> Result<Value> {
    Ok(match u.int_in_range(0..=3)? {
        0 => Value::Null,
        1 | 2 => one(u)?,
        _ => {
            let parts = (0..u.int_in_range(0..=3)?).map(|_| one(u)).collect::<Result<Vec<_>>>()?;
            json!({"type": "Sequence", "normalizers": parts, "pretokenizers": parts, "processors": parts, "decoders": parts})
        }
    })
}

fn pattern(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(u.choose(&[
        json!({"String": " "}),
        json!({"String": ""}),
        json!({"Regex": "\\s+"}),
        json!({"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"}),
        json!({"Regex": "(a|a)*b"}),
        json!({"Regex": "(?=a)(a*)*\\1"}),
        json!({"Regex": "a{1000}{1000}"}),
        json!({"Regex": "("}),
    ])?
    .clone())
}

fn normalizer(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=7)? {
        0 => json!({"type": "NFC"}),
        1 => json!({"type": *u.choose(&["NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"])?}),
        2 => json!({"type": "Prepend", "prepend": json::string(u)?}),
        3 | 4 => json!({"type": "Replace", "pattern": pattern(u)?, "content": json::string(u)?}),
        5 => json!({"type": "Strip", "strip_left": u.arbitrary::<bool>()?, "strip_right": u.arbitrary::<bool>()?}),
        6 => {
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true})
        }
        _ => json!({"type": "Precompiled", "precompiled_charsmap": *u.choose(&["", "AAAA", "BAAAAAAAAAA=", "/////w=="])?}),
    })
}

fn pre_tokenizer(u: &mut Unstructured<'_>) -> Result<Value> {
    let behavior = *u.choose(&["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"])?;
    Ok(match u.int_in_range(0..=5)? {
        0 => {
            json!({"type": "ByteLevel", "add_prefix_space": u.arbitrary::<bool>()?, "trim_offsets": u.arbitrary::<bool>()?, "use_regex": u.arbitrary::<bool>()?})
        }
        1 => {
            json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": *u.choose(&["always", "first", "never"])?, "split": u.arbitrary::<bool>()?})
        }
        2 | 3 => json!({"type": "Split", "pattern": pattern(u)?, "behavior": behavior, "invert": u.arbitrary::<bool>()?}),
        4 => json!({"type": "Digits", "individual_digits": u.arbitrary::<bool>()?}),
        _ => {
            json!({"type": *u.choose(&["Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "FixedLength"])?, "length": u.int_in_range(0..=3)?})
        }
    })
}

fn post_processor(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=3)? {
        0 => {
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": u.arbitrary::<bool>()?, "use_regex": true})
        }
        1 => json!({"type": "BertProcessing", "sep": ["b", 2], "cls": ["a", 1]}),
        _ => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": *u.choose(&["<s>", "x"])?, "type_id": 0}}, {"Sequence": {"id": *u.choose(&["A", "B"])?, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [u.int_in_range(0..=700)?], "tokens": ["<s>"]}},
        }),
    })
}

fn decoder(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=6)? {
        0 => json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        1 => json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}),
        2 => json!({"type": "Replace", "pattern": pattern(u)?, "content": json::string(u)?}),
        3 => {
            json!({"type": "Strip", "content": *u.choose(&[" ", "a", ""])?, "start": u.int_in_range(0..=9)?, "stop": u.int_in_range(0..=9)?})
        }
        4 => json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        _ => json!({"type": *u.choose(&["ByteFallback", "Fuse", "BPEDecoder", "CTC"])?, "suffix": ""}),
    })
}

/// A model with few tokens.
fn vocabulary(u: &mut Unstructured<'_>) -> Result<Value> {
    let unk = u.choose(&[json!(null), json!("<s>"), json!("nope")])?.clone();
    let words = json!({"<s>": 0, "a": 1, "b": 2, "ab": 3, "\u{2581}": 4, "aa": 5, "##a": 6, "<0x00>": 7, "H": 8, "e": 9, "\u{120}": 10});
    Ok(match u.int_in_range(0..=5)? {
        0..=2 => json!({
            "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": u.arbitrary::<bool>()?, "byte_fallback": u.arbitrary::<bool>()?, "ignore_merges": u.arbitrary::<bool>()?,
            "vocab": words, "merges": u.choose(&[json!(["a b"]), json!([["a", "b"], ["a", "a"]]), json!(["a c"]), json!(["a"])])?.clone(),
        }),
        3 => {
            json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": words})
        }
        4 => json!({"type": "WordLevel", "vocab": words, "unk_token": "<s>"}),
        _ => {
            json!({"type": "Unigram", "unk_id": u.int_in_range(0..=5)?, "vocab": [["<s>", 0.0], ["a", -1.5], ["ab", -2.0], ["", -1.0]], "byte_fallback": u.arbitrary::<bool>()?})
        }
    })
}
