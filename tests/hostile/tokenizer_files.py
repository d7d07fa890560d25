"""tokenizer.json: other components, numbers of any size, patterns, added tokens, vocabularies, merges, nesting."""
import json

from common import packlib

TEXT = "hello " + "l" * 31 + "a" * 44 + " é ﷺ "


def sequence(kind, parts):
    return {"type": "Sequence", {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[kind]: parts}


def split(pattern, **more):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **more}}


def token(number, content="zzz", **more):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags, **more}


def normalizer(value):
    return {"normalizer": value}


def decoder(value):
    return {"decoder": value}


def nested(depth):
    inner = {"type": "NFC"}
    for _ in range(depth):
        inner = sequence("normalizer", [inner])
    return inner


PATTERNS = {
    "nested": "(a+)+$",
    "ahead": "(?=(a+)+b)a|(x+x+)+y",
    "back": "(a*)*\\1*(.*)*c",
    "count2": "(?:\\p{L}{1,99}){1,100}",
    "count3": "[\\p{L}\\p{N}\\p{P}]{9999}",
    "groups": "(" * 2000 + "a" + ")" * 2000,
    "alternatives": "|".join(["\\p{L}"] * 600),
    "recursive": "(?<x>a\\g<x>?b)",
    "left-recursive": "(?<x>\\g<x>a)",
    "empty": "",
    "behind": "(?<=a|bc)(?<!x*)",
}


def changes(good):
    """What is changed, and the exit code if only one is right."""
    model, added = good["model"], good["added_tokens"]
    in_model = lambda **more: {"model": {**model, **more}}
    unigram = lambda **more: {"model": {"type": "Unigram", **more}}
    single = lambda pieces, token: {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": token}
    all_parts = {
        "type": "x",
        "prefix": "",
        "suffix": "",
        "cleanup": True,
        "pad_token": "",
        "word_delimiter_token": "",
        "delimiter": "\u202e",
        "precompiled_charsmap": "AAAA",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
        "sep": ["a", 4294967295],
        "cls": ["b", 4294967295],
        "trim_offsets": True,
        "add_prefix_space": True,
    }
    others = {
        "decoder": ["WordPiece", "CTC", "BPEDecoder"],
        "pre_tokenizer": ["UnicodeScripts", "BertPreTokenizer", "CharDelimiterSplit"],
        "normalizer": ["BertNormalizer", "Nmt", "Precompiled"],
        "post_processor": ["BertProcessing", "RobertaProcessing"],
    }
    for place, types in others.items():
        for kind in types:
            yield f"other-{kind}", {place: {**all_parts, "type": kind}}, 1
    word_piece = {"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}
    yield "other-model-WordPiece", {"model": {"type": "WordPiece", "vocab": {"a": 0}, **word_piece}}, 1
    yield "other-model-WordLevel", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}}, 1
    for name, start, stop in [("stop", 0, 2**64 - 1), ("start", 2**64 - 1, 0), ("float", 1e30, 0)]:
        yield f"strip-{name}", decoder({"type": "Strip", "content": "a", "start": start, "stop": stop}), 1
    yield "sequence-deep", normalizer(nested(60)), 1
    yield "sequence-wide", normalizer(sequence("normalizer", [{"type": "NFC"}] * 100_000)), 1
    yield "sequence-empty", {kind: sequence(kind, []) for kind in ["normalizer", "pre_tokenizer", "decoder"]}, None
    for name, pattern in PATTERNS.items():
        yield f"pattern-{name}", split(pattern), None
    yield "pattern-count", split("((a{1000}){1000}){1000}"), 1
    yield "pattern-bad", split("(\u202e\x1b["), 1
    yield "behavior", split("a", behavior="Nope"), 1
    replaced = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
    yield "replace-empty", normalizer(replaced({"Regex": ""}, "a" * 10)), None
    yield "replace-empty-long", normalizer(replaced({"Regex": ""}, "a" * 1000)), 1
    yield "replace-nested", normalizer(replaced({"Regex": "(l+l+)+x"}, "b")), None
    yield "replace-both", normalizer(replaced({"String": "", "Regex": "a"}, "a")), 1
    yield "decode-escape", decoder(replaced({"String": "\u0120"}, "\x1b]0;x\x07")), None
    yield "decode-growth", decoder(sequence("decoder", [replaced({"String": "a"}, "a" * 10)] * 10)), 1
    yield "nfkd", normalizer(sequence("normalizer", [{"type": "NFKD"}] * 30)), None
    yield "prepend", normalizer(sequence("normalizer", [{"type": "Prepend", "prepend": "a" * 4096}] * 30)), None
    spaces = lambda **more: {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", **more}}
    yield "spaces-scheme", spaces(prepend_scheme="x", add_prefix_space=True), 1
    yield "spaces-empty", spaces(replacement="", prepend_scheme="always"), 1
    yield "spaces-conflict", spaces(add_prefix_space=True), None
    for name, number in [("2^32", 2**32 - 1), ("2^64", 2**64 - 1)]:
        yield f"added-{name}", {"added_tokens": [*added, token(number)]}, 1
    yield "added-negative", {"added_tokens": [token(-1)]}, 1
    yield "added-2^26", {"added_tokens": [*added, token((1 << 26) - 1, "a")]}, None
    yield "added-empty", {"added_tokens": [*added, token(600, "")]}, None
    yield "added-twice", {"added_tokens": [token(0, "a"), token(0, "b"), token(1, "a")]}, None
    yield "added-100k", {"added_tokens": [token(i, f"tok{i}") for i in range(100_000)]}, None
    yield "added-prefixes", {"added_tokens": [token(i, "a" * i) for i in range(1, 4000)]}, None
    strips = {"normalized": True, "lstrip": True, "rstrip": True, "single_word": True}
    yield "added-normalized", {"added_tokens": [token(600, "é" * 4000, **strips)], "normalizer": {"type": "NFKD"}}, None
    yield "added-escape", {"added_tokens": [token(100, "\x1b[2J\u202e")]}, None
    for name, number in [("huge", 4_000_000_000), ("2^26", (1 << 26) - 1)]:
        yield f"whole-words-{name}", in_model(ignore_merges=True, vocab={**model["vocab"], "hello": number}), None
    yield "vocabulary-empty", in_model(vocab={}, merges=[]), None
    yield "vocabulary-same", in_model(vocab={word: 0 for word in model["vocab"]}), None
    yield "merges-unknown", in_model(merges=["zq qz"]), 1
    yield "merges-one", in_model(merges=["a"]), 1
    yield "merges-three", in_model(merges=[["a", "b", "c"]]), 1
    yield "merges-twice", in_model(merges=model["merges"] * 300), None
    yield "unknown-missing", in_model(unk_token="nope"), None
    yield "bytes", in_model(byte_fallback=True, vocab={"a": 0}, merges=[]) | {"pre_tokenizer": None}, None
    yield "dropout", in_model(dropout=0.5), 1
    yield "unigram-empty", unigram(vocab=[], unk_id=0), 1
    yield "unigram-unknown", unigram(vocab=[["a", -1.0]], unk_id=99), None
    yield "unigram-none", unigram(vocab=[["a", -1.0]]), None
    yield "unigram-scores", unigram(vocab=[["a", 1e308], ["aa", 1e308], ["l", -1e308]], unk_id=0), None
    yield "unigram-twice", unigram(vocab=[["a", 0.0]] * 1000, unk_id=0, byte_fallback=True), None
    yield "unigram-long", unigram(vocab=[["a" * i, 0.0] for i in range(1, 5000)], unk_id=0), None
    special = lambda number: {"SpecialToken": {"id": "x", "type_id": number}}
    text = lambda number: {"Sequence": {"id": "A", "type_id": number}}
    far = {"x": {"id": "x", "ids": [4294967295], "tokens": ["x"]}}
    yield "template-ids", {"post_processor": single([special(0), text(0)], far)}, None
    many = single([special(4294967295)] * 60 + [text(4294967295)], {"x": {"id": "x", "ids": [1] * 64, "tokens": ["x"] * 64}})
    yield "template-many", {"post_processor": {"type": "Sequence", "processors": [many] * 30}}, None
    yield "template-text", {"post_processor": {**single("$A", {}), "pair": "$A $B"}}, None
    yield "truncation", {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}}, None
    padding = {"direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    yield "padding", {"padding": {"strategy": {"Fixed": 1_000_000_000}, **padding}}, None
    yield "version", {"version": "9.9\x1b"}, 1


def cases(bench):
    good = bench.tokenizer
    texts = [(name, json.dumps({**good, **change}, ensure_ascii=False), expected) for name, change, expected in changes(good)]
    raw = json.dumps(good, ensure_ascii=False)
    deep = '"normalizer":' + '{"type":"Sequence","normalizers":[' * 5000 + "]}" * 5000 + ',"decoder"'
    texts += [
        ("json-deep", "[" * 100_000, 1),
        ("json-deep-key", raw[:-1] + ',"x":' + "[" * 100 + "]" * 100 + "}", None),
        ("json-deep-sequence", raw.replace('"decoder"', deep), 1),
        ("model-twice", raw[:-1] + ',"model":{"type":"BPE","vocab":{},"merges":[]}}', 1),
        ("pre-tokenizer-twice", raw[:-1] + ',"pre_tokenizer":{"type":"FixedLength","length":0}}', 1),
        ("blanks", " " * 20_000_000 + raw, None),
        ("empty", "", 1),
        ("null", "null", 1),
        ("list", "[]", 1),
        ("mark", "\ufeff" + raw, 1),
        ("nul", raw + "\0", 1),
        ("key-escape", raw[:-1] + ',"\\u001b]0;x\\u0007":1}', None),
    ]

    def case(text, expected):
        def run(work):
            pack = work / "p.nf4pack"
            pack.write_bytes(packlib.with_file(bench.base, "tokenizer.json", text))
            return bench.judge(bench.run(["generate", pack, "--prompt", TEXT * 4, "--max-tokens", 2]), expected)

        return run

    return [(name, case(text, expected)) for name, text, expected in texts]
