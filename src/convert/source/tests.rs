//! One rejection per error variant, and similar input that must be accepted.

use std::fs;

use proptest::prelude::*;

use super::*;

const CONFIG_JSON: &str = r#"{"model_type": "qwen3"}"#;

/// The bytes of a safetensors file with this header and `data` zero bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A file of F16 vectors of two elements.
fn vectors(names: &[&str]) -> Vec<u8> {
    let entry = |(i, name): (usize, &&str)| {
        format!(r#""{name}":{{"dtype":"F16","shape":[2],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4)
    };
    let entries: Vec<_> = names.iter().enumerate().map(entry).collect();
    file(&format!("{{{}}}", entries.join(",")), 4 * names.len())
}

fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    parse_header(bytes, bytes.len() as u64)
}

fn parse_entry(entry: &str, data: usize) -> Result<Header, HeaderError> {
    parse(&file(&format!(r#"{{"t":{entry}}}"#), data))
}

#[test]
fn a_header_gives_its_tensors_in_the_order_of_their_offsets() {
    let header = r#"{"b":{"dtype":"F32","shape":[3],"data_offsets":[4,16],"note":[1]},
        "__metadata__":{"format":"pt","dtype":"x"},"a":{"data_offsets":[0,4],"shape":[2,1],"dtype":"BF16"}}  "#;
    let Header { data_start, tensors, unstorable } = parse(&file(header, 16)).unwrap();
    assert!(unstorable.is_empty());
    assert_eq!(data_start, 8 + header.len() as u64);
    let info = |name: &str, float_type, shape, from, length| TensorInfo {
        name: name.to_owned(),
        float_type,
        shape,
        file: 0,
        offset: data_start + from,
        length,
    };
    assert_eq!(tensors, [info("a", FloatType::Bf16, vec![2, 1], 0, 4), info("b", FloatType::F32, vec![3], 4, 12)]);
    // Only the bytes of the header are looked at.
    let bytes = file(header, 16);
    assert_eq!(parse_header(&bytes[..data_start as usize], bytes.len() as u64).unwrap().tensors, tensors);
    assert!(parse(&file(r#"{"__metadata__":null}"#, 0)).unwrap().tensors.is_empty());
}

#[test]
fn a_length_field_that_does_not_fit_is_refused() {
    assert!(matches!(parse(&[1; 7]), Err(HeaderError::TooShort { found: 7 })));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    assert!(matches!(parse(pointer), Err(HeaderError::LfsPointer)));
    let mut bytes = file("{}", 0);
    bytes[..8].copy_from_slice(&(MAX_HEADER_LEN + 1).to_le_bytes());
    assert!(matches!(parse_header(&bytes, u64::MAX), Err(HeaderError::TooLarge { found: 100_000_001, .. })));
    bytes[..8].copy_from_slice(&3_u64.to_le_bytes());
    assert!(matches!(parse(&bytes), Err(HeaderError::Truncated { expected: 3, found: 2 })));
    assert!(matches!(parse_header(&bytes, 11), Err(HeaderError::Truncated { expected: 3, found: 2 })));
}

#[test]
fn json_that_is_no_header_is_refused() {
    for header in ["", "[]", "{", "{} x", r#"{"a":1}"#, r#"{"__metadata__":{"a":1}}"#, "\u{0}", r#"{"a":{"shape":[-1]}}"#] {
        assert!(matches!(parse(&file(header, 0)), Err(HeaderError::Json { .. })), "{header:?}");
    }
    let deep = "[".repeat(10_000);
    assert!(matches!(parse_entry(&format!(r#"{{"x":{deep}"#), 0), Err(HeaderError::Json { .. })));
    let mut not_utf8 = file(r#"{"a":{}}"#, 0);
    not_utf8[10] = 0xff;
    assert!(matches!(parse(&not_utf8), Err(HeaderError::Json { .. })));
}

#[test]
fn repeated_keys_are_refused() {
    let twice = |error: HeaderError| match error {
        HeaderError::DuplicateKey { key } => key,
        other => panic!("{other:?}"),
    };
    assert_eq!(twice(parse(&vectors(&["a", "b", "a"])).unwrap_err()), "a");
    // The same name, written with an escape.
    assert_eq!(twice(parse(&vectors(&["a", "\\u0061"])).unwrap_err()), "a");
    assert_eq!(twice(parse(&file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)).unwrap_err()), "__metadata__");

    let field = |error: HeaderError| match error {
        HeaderError::DuplicateField { entry, key } => (entry, key),
        other => panic!("{other:?}"),
    };
    for (key, value) in [("dtype", r#""F16""#), ("shape", "[1]"), ("data_offsets", "[0,2]")] {
        let entry = format!(r#"{{"dtype":"F16","shape":[1],"data_offsets":[0,2],"{key}":{value}}}"#);
        assert_eq!(field(parse_entry(&entry, 2).unwrap_err()), ("t".to_owned(), key.to_owned()));
    }
    let metadata = file(r#"{"__metadata__":{"x":"1","x":"2"}}"#, 0);
    assert_eq!(field(parse(&metadata).unwrap_err()), ("__metadata__".to_owned(), "x".to_owned()));
}

#[test]
fn incomplete_entries_are_refused() {
    for (entry, missing) in [
        (r#"{"shape":[1],"data_offsets":[0,2]}"#, "dtype"),
        (r#"{"dtype":"F16","data_offsets":[0,2]}"#, "shape"),
        (r#"{"dtype":"F16","shape":[1]}"#, "data_offsets"),
    ] {
        match parse_entry(entry, 2).unwrap_err() {
            HeaderError::MissingField { tensor, field } => assert_eq!((tensor.as_str(), field), ("t", missing)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn too_many_tensors_and_too_long_names_are_refused() {
    let entries: Vec<_> = (0..=MAX_TENSORS).map(|i| format!("\"{i}\":{{}}")).collect();
    let bytes = file(&format!("{{{}}}", entries.join(",")), 0);
    assert!(matches!(parse(&bytes), Err(HeaderError::TooManyTensors { limit: MAX_TENSORS })));
    assert!(parse(&vectors(&[&"x".repeat(1024)])).is_ok());
    assert!(matches!(parse(&vectors(&[&"x".repeat(1025)])), Err(HeaderError::NameTooLong { found: 1025, .. })));
}

#[test]
fn types_other_than_the_three_floats_cannot_be_stored() {
    for (dtype, count) in [("F64", 1), ("I64", 1), ("BOOL", 8), ("U8", 8), ("F8_E4M3FNUZ", 8), ("F4", 16), ("C64", 1)] {
        let entry = format!(r#"{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,8]}}"#);
        let header = parse_entry(&entry, 8).unwrap();
        assert!(header.tensors.is_empty());
        let [tensor] = <[UnstorableTensor; 1]>::try_from(header.unstorable).unwrap();
        assert_eq!((tensor.name.as_str(), tensor.length), ("t", 8));
        assert_eq!(tensor.why, Unstorable::Type { found: dtype.to_owned() });
    }
    match parse_entry(r#"{"dtype":"nonsense","shape":[1],"data_offsets":[0,8]}"#, 8).unwrap_err() {
        HeaderError::UnknownType { tensor, found } => assert_eq!((tensor.as_str(), found.as_str()), ("t", "nonsense")),
        other => panic!("{other:?}"),
    }
    // Half a byte too few.
    let odd = parse_entry(r#"{"dtype":"F4","shape":[15],"data_offsets":[0,8]}"#, 8);
    assert!(matches!(odd, Err(HeaderError::Layout { .. })), "{odd:?}");
}

/// A checkpoint of vectors of eight bytes, with these names and types.
fn typed(tensors: &[(&str, &str)]) -> Result<Checkpoint, SourceError> {
    let entry = |(i, (name, dtype)): (usize, &(&str, &str))| {
        let elements = match *dtype {
            "F4" => 16,
            "F6_E2M3" => 0,
            "I32" | "U32" | "F32" => 2,
            "F64" => 1,
            "F16" | "BF16" => 4,
            _ => 8,
        };
        let (start, end) = (8 * i, 8 * i + if elements == 0 { 0 } else { 8 });
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[{start},{end}]}}"#)
    };
    let entries: Vec<String> = tensors.iter().enumerate().map(entry).collect();
    let length = 8 * tensors.iter().filter(|(_, dtype)| *dtype != "F6_E2M3").count();
    open(&[(CONFIG, b"{}"), (SINGLE, &file(&format!("{{{}}}", entries.join(",")), length))])
}

fn quantised(tensors: &[(&str, &str)]) -> Quantised {
    match typed(tensors) {
        Err(SourceError::Quantised { source, path }) if path.ends_with(SINGLE) => source,
        other => panic!("{tensors:?}: {other:?}"),
    }
}

#[test]
fn quantised_tensors_are_recognised() {
    for tensor in ["l.weight.absmax", "l.weight.quant_state.bitsandbytes__nf4", "l.SCB"] {
        let found = quantised(&[("l.weight", "U8"), (tensor, "F32")]);
        assert_eq!(found, Quantised::Bitsandbytes { tensor: tensor.to_owned() });
    }
    for tensor in ["l.weight_scale_inv", "l.weight_scale"] {
        let found = quantised(&[("l.weight", "F8_E4M3"), (tensor, "F32")]);
        assert_eq!(found, Quantised::Scaled { tensor: tensor.to_owned() });
    }
    for tensor in ["l.qweight", "l.qzeros", "l.weight_packed", "l.W_q"] {
        let found = quantised(&[("l.scales", "F16"), (tensor, "I32")]);
        assert_eq!(found, Quantised::Packed { tensor: tensor.to_owned() });
    }
    for name in ["model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight", "embed_tokens.weight"] {
        for dtype in ["U8", "I8", "F8_E4M3", "F8_E5M2", "F6_E2M3", "F4", "I32", "U32"] {
            let expected = Quantised::Narrow { tensor: name.to_owned(), dtype: dtype.to_owned() };
            assert_eq!(quantised(&[(name, dtype)]), expected);
        }
    }
}

#[test]
fn what_a_quantisation_left_behind_is_none() {
    // transformers loads all of these.
    for (tensor, dtype) in [
        ("l.weight_scale", "F32"),
        ("l.weight_scale_inv", "F32"),
        ("l.weight.absmax", "F32"),
        ("l.weight.quant_state.bitsandbytes__nf4", "U8"),
        ("l.SCB", "F32"),
        ("l.qweight", "I32"),
    ] {
        for float in ["F16", "BF16", "F32", "F64"] {
            assert!(typed(&[("l.weight", float), (tensor, dtype)]).is_ok(), "{tensor} with {float}");
        }
    }
    // In another shard, too.
    let index = r#"{"weight_map":{"l.weight":"1","l.weight_scale":"2"}}"#;
    assert!(sharded(index, &[("1", &["l.weight"]), ("2", &["l.weight_scale"])]).is_ok());
    // What is no part of a model may have any type.
    for (name, dtype) in [("extra.weight", "U8"), ("vision.pos.weight", "I32"), ("model.layers.0.mlp.scales", "F16")] {
        assert!(typed(&[(name, dtype)]).is_ok(), "{name}");
    }
}

#[test]
fn shapes_that_no_tensor_has_are_refused() {
    let shaped = |shape: &str, end: u64| {
        parse_entry(&format!(r#"{{"dtype":"F16","shape":{shape},"data_offsets":[0,{end}]}}"#), end as usize)
    };
    assert!(shaped("[1,1,1,1]", 2).is_ok());
    let unstorable = |shape: &str, end| shaped(shape, end).unwrap().unstorable.remove(0).why;
    assert_eq!(unstorable("[]", 2), Unstorable::Rank { found: 0 });
    assert_eq!(unstorable("[1,2,1,1,3]", 12), Unstorable::Rank { found: 5 });
    assert_eq!(unstorable("[3,0]", 0), Unstorable::Empty { shape: vec![3, 0] });
    assert!(matches!(shaped("[1,2,1,1,3]", 4), Err(HeaderError::TensorLength { expected: 12, found: 4, .. })));
    assert!(matches!(shaped("[3]", 4), Err(HeaderError::TensorLength { expected: 6, found: 4, .. })));
    assert!(matches!(shaped("[9223372036854775808,2]", 4), Err(HeaderError::Impossible { .. })));
    assert!(matches!(shaped("[18446744073709551615,18446744073709551615]", 4), Err(HeaderError::Impossible { .. })));
    let backwards = r#"{"dtype":"F16","shape":[1],"data_offsets":[4,2]}"#;
    assert!(matches!(parse_entry(backwards, 4), Err(HeaderError::Impossible { .. })));
    let beyond = r#"{"dtype":"F16","shape":[1],"data_offsets":[18446744073709551613,18446744073709551615]}"#;
    assert!(matches!(parse_entry(beyond, 4), Err(HeaderError::Impossible { .. })));
}

#[test]
fn holes_overlaps_and_wrong_file_lengths_are_refused() {
    let two = |a: u64, b: u64, data| {
        let entry = |n: u64| format!(r#"{{"dtype":"F16","shape":[2],"data_offsets":[{n},{}]}}"#, n + 4);
        parse(&file(&format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b)), data))
    };
    assert!(two(4, 0, 8).is_ok());
    for (a, b) in [(0, 6), (0, 2), (0, 0), (2, 6)] {
        assert!(matches!(two(a, b, 10), Err(HeaderError::Layout { .. })), "{a} {b}");
    }
    for data in [7, 9] {
        match two(0, 4, data).unwrap_err() {
            HeaderError::FileLength { expected, found } => assert_eq!(found as i64 - expected as i64, data as i64 - 8),
            other => panic!("{other:?}"),
        }
    }
}

proptest! {
    /// The parser is total, and what it accepts covers the file without holes.
    #[test]
    fn a_changed_header_never_panics(position in 0_usize..200, byte: u8, cut in 0_usize..40) {
        let mut bytes = vectors(&["model.norm.weight", "b", "lm_head.weight"]);
        let len = bytes.len();
        bytes[position % len] = byte;
        bytes.truncate(len - if byte & 1 == 0 { cut } else { 0 });
        if let Ok(Header { data_start, tensors, unstorable }) = parse(&bytes) {
            let tensors = tensors.iter().map(|t| (t.offset, t.length));
            let mut all: Vec<_> = tensors.chain(unstorable.iter().map(|t| (t.offset, t.length))).collect();
            all.sort_unstable();
            let mut end = data_start;
            for (offset, length) in all {
                prop_assert_eq!(offset, end);
                end += length;
            }
            prop_assert_eq!(end, bytes.len() as u64);
        }
    }
}

/// A folder of these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(files: &[(&str, &[u8])]) -> Result<Checkpoint, SourceError> {
    Checkpoint::open(folder(files).path(), None)
}

/// A sharded snapshot with this index.
fn sharded(index: &str, shards: &[(&str, &[&str])]) -> Result<Checkpoint, SourceError> {
    let dir = folder(&[(CONFIG, CONFIG_JSON.as_bytes()), (INDEX, index.as_bytes())]);
    for (name, tensors) in shards {
        fs::write(dir.path().join(name), vectors(tensors)).unwrap();
    }
    Checkpoint::open(dir.path(), None)
}

#[test]
fn a_single_file_opens_as_a_folder_and_by_its_name() {
    let other = r#"{"model_type": "llama"}"#.as_bytes();
    let files = [
        (SINGLE, &vectors(&["b", "a"])[..]),
        ("tokenizer_config.json", b"{}"),
        (CONFIG, CONFIG_JSON.as_bytes()),
        ("tokenizer.json", br#"{"model":{}}"#),
        ("chat_template.jinja", b"c"),
        ("README.md", b"no"),
        ("other.json", other),
    ];
    let dir = folder(&files);
    for path in [dir.path().to_owned(), dir.path().join(SINGLE)] {
        let checkpoint = Checkpoint::open(&path, None).unwrap();
        let names: Vec<_> = checkpoint.side_files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [CONFIG, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]);
        assert_eq!(checkpoint.side_files[0].1, CONFIG_JSON.as_bytes());
        assert_eq!(checkpoint.config["model_type"], "qwen3");
        assert_eq!(checkpoint.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!((checkpoint.files[0].name.as_str(), checkpoint.files[0].tensors.clone()), (SINGLE, 0..2));
        assert!(checkpoint.notices.is_empty());
        let overridden = Checkpoint::open(&path, Some(&dir.path().join("other.json"))).unwrap();
        assert_eq!(overridden.config["model_type"], "llama");
        assert_eq!(overridden.side_files[0], (CONFIG.to_owned(), other.to_owned()));
    }
}

#[test]
fn the_single_file_wins_over_an_index_and_says_so() {
    let single = vectors(&["a"]);
    let checkpoint = open(&[(CONFIG, b"{}"), (SINGLE, &single), (INDEX, b"not even JSON")]).unwrap();
    assert_eq!(checkpoint.notices, [Notice::IndexIgnored]);
}

#[test]
fn shards_and_index_agree() {
    let index = r#"{"metadata":{},"weight_map":{"a":"2.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#;
    let checkpoint = sharded(index, &[("1.safetensors", &["b"]), ("2.safetensors", &["c", "a"])]).unwrap();
    let placed: Vec<_> = checkpoint.tensors.iter().map(|t| (t.name.as_str(), t.file)).collect();
    assert_eq!(placed, [("b", 0), ("c", 1), ("a", 1)]);
    assert_eq!(checkpoint.files[1].tensors, 1..3);
    assert_eq!(checkpoint.files[1].length, vectors(&["c", "a"]).len() as u64);
}

#[test]
fn where_index_and_shards_differ_the_shards_decide() {
    let both: &[(&str, &[&str])] = &[("1", &["a"]), ("2", &["b"])];
    let missing = sharded(r#"{"weight_map":{"a":"1","b":"3"}}"#, both);
    assert!(matches!(missing, Err(SourceError::MissingShard { shard, .. }) if shard == "3"));
    let notice = |absent: &[&str], unlisted: &[&str], elsewhere: &[&str]| {
        let [absent, unlisted, elsewhere] =
            [absent, unlisted, elsewhere].map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        [Notice::IndexDiffers { absent, unlisted, elsewhere }]
    };
    let not_there = sharded(r#"{"weight_map":{"a":"1","b":"2","c":"2","d":"1"}}"#, both).unwrap();
    let absent = [("c", "2"), ("d", "1")].map(|(tensor, shard)| (tensor.to_owned(), shard.to_owned()));
    assert_eq!(not_there.absent, absent);
    assert_eq!(not_there.notices, notice(&["c", "d"], &[], &[]));
    let swapped = sharded(r#"{"weight_map":{"a":"2","b":"1"}}"#, both).unwrap();
    assert_eq!(swapped.notices, notice(&[], &[], &["a", "b"]));
    let unlisted = sharded(r#"{"weight_map":{"a":"1"}}"#, &[("1", &["a", "x"])]).unwrap();
    assert_eq!((unlisted.tensors.len(), unlisted.notices.as_slice()), (2, &notice(&[], &["x"], &[])[..]));
}

#[test]
fn copies_of_a_tensor_are_one_tensor_and_others_of_its_name_are_an_error() {
    let index = r#"{"weight_map":{"a":"1","b":"2"}}"#;
    let twice = sharded(index, &[("1", &["a"]), ("2", &["b", "a", "c"]), ("3", &["c"])]).unwrap();
    let names: Vec<_> = twice.tensors.iter().map(|t| (t.name.as_str(), t.file)).collect();
    assert_eq!(names, [("a", 0), ("b", 1), ("c", 1)]);
    assert_eq!([&twice.files[0].tensors, &twice.files[1].tensors], [&(0..1), &(1..3)]);
    assert!(twice.notices.contains(&Notice::Copies { tensors: vec!["a".to_owned()] }));

    let mut other = vectors(&["b", "a"]);
    *other.last_mut().unwrap() = 1;
    let result = open(&[(CONFIG, b"{}"), (INDEX, index.as_bytes()), ("1", &vectors(&["a"])), ("2", &other)]);
    assert!(matches!(result, Err(SourceError::DuplicateTensor { tensor, first, second })
        if tensor == "a" && first == "1" && second == "2"));
}

#[test]
fn a_tensor_without_a_name_cannot_be_stored() {
    let header = parse(&vectors(&["", "a"])).unwrap();
    assert_eq!((header.tensors.len(), &header.unstorable[0].why), (1, &Unstorable::Name));
}

#[test]
fn shard_names_that_are_paths_are_refused() {
    for name in ["", ".", "..", "a/b", "../x", "/etc/passwd", "a\\\\b", "C:x", "x\\u0000"] {
        let result = sharded(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#), &[]);
        assert!(matches!(result, Err(SourceError::ShardName { .. })), "{name:?}: {result:?}");
    }
}

#[test]
fn broken_json_and_repeated_keys_are_refused() {
    let single = vectors(&["a"]);
    let config = |json: &[u8]| open(&[(CONFIG, json), (SINGLE, &single)]);
    for json in [&b""[..], b"[]", b"{\"a\":}", b"\xff", b"{} {}"] {
        assert!(matches!(config(json), Err(SourceError::Json { path, .. }) if path.ends_with(CONFIG)));
    }
    let repeated = config(br#"{"vocab_size":1,"b":{},"vocab_size":2}"#);
    assert!(matches!(repeated, Err(SourceError::DuplicateKey { key, .. }) if key == "vocab_size"));
    let repeated = sharded(r#"{"weight_map":{"a":"1","a":"2"}}"#, &[("1", &["a"]), ("2", &["a"])]);
    assert!(matches!(repeated, Err(SourceError::DuplicateKey { path, key }) if key == "a" && path.ends_with(INDEX)));
    let empty = sharded(r#"{"metadata":{},"weight_map":{}}"#, &[("1", &["a"])]);
    assert!(matches!(empty, Err(SourceError::EmptyIndex { path }) if path.ends_with(INDEX)));
    // Python writes and reads numbers that JSON does not have.
    assert_eq!(config(br#"{"a":NaN,"b":[-Infinity]}"#).unwrap().config["a"], Value::Null);
    for index in ["{}", r#"{"weight_map":{},"weight_map":{}}"#, r#"{"weight_map":{"a":1}}"#] {
        assert!(matches!(sharded(index, &[]), Err(SourceError::Json { path, .. }) if path.ends_with(INDEX)), "{index}");
    }
}

#[test]
fn an_index_of_more_tensors_than_a_pack_holds_is_refused() {
    let entries: Vec<_> = (0..=MAX_TENSORS).map(|i| format!("\"{i}\":\"\"")).collect();
    match sharded(&format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")), &[]).unwrap_err() {
        SourceError::Json { source, .. } => assert!(source.to_string().starts_with("more than 262144 keys at line 1")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let single = vectors(&["a"]);
    let dir = folder(&[(SINGLE, &single), ("model.bin", b"")]);
    let open_in = |name: &str| Checkpoint::open(&dir.path().join(name), None);
    assert!(matches!(open_in("absent"), Err(SourceError::Io { path, .. }) if path.ends_with("absent")));
    assert!(matches!(open_in("model.bin"), Err(SourceError::NotACheckpoint { .. })));
    assert!(matches!(open_in("."), Err(SourceError::NoConfig { .. })));
    assert!(matches!(open_in(SINGLE), Err(SourceError::NoConfig { .. })));
    assert!(matches!(open(&[(CONFIG, b"{}")]), Err(SourceError::NoWeights { found, .. }) if found.is_empty()));
    let others = [(CONFIG, &b"{}"[..]), ("pytorch_model.bin", b"x"), ("weights.safetensors", b"x"), ("x.txt", b"x")];
    let expected = ["pytorch_model.bin", "weights.safetensors"];
    assert!(matches!(open(&others), Err(SourceError::NoWeights { found, .. }) if found == expected));
    fs::create_dir(dir.path().join(CONFIG)).unwrap();
    assert!(matches!(open_in("."), Err(SourceError::NotAFile { path }) if path.ends_with(CONFIG)));
    let bad = open(&[(CONFIG, b"{}"), (SINGLE, b"x")]);
    assert!(matches!(bad, Err(SourceError::Header { source: HeaderError::TooShort { found: 1 }, .. })));
}

#[test]
fn side_files_that_are_too_large_are_refused_unread() {
    let dir = folder(&[(SINGLE, &vectors(&["a"])), (CONFIG, b"{}"), ("tokenizer.json", b"")]);
    let grow = |name: &str, len| fs::File::options().write(true).open(dir.path().join(name)).unwrap().set_len(len).unwrap();
    grow("tokenizer.json", MAX_SIDE_FILE_LEN + 1);
    let result = Checkpoint::open(dir.path(), None);
    assert!(matches!(result, Err(SourceError::TooLarge { path, .. }) if path.ends_with("tokenizer.json")));
    grow(CONFIG, MAX_CONFIG_LEN + 1);
    let result = Checkpoint::open(dir.path(), None);
    assert!(matches!(result, Err(SourceError::TooLarge { limit: MAX_CONFIG_LEN, .. })));
}

#[test]
fn quantised_checkpoints_are_refused_by_tensors_and_suspected_by_config() {
    let single = vectors(&["a"]);
    let config = br#"{"quantization_config":{"quant_method":"awq"}}"#;
    let claimed = |config: &[u8]| open(&[(CONFIG, config), (SINGLE, &single)]).unwrap().claimed_quantisation;
    assert_eq!(claimed(config), Some(Quantised::Config { method: "awq".to_owned() }));
    let nested = br#"{"text_config":{"compression_config":{}}}"#;
    assert_eq!(claimed(nested), Some(Quantised::Config { method: "unknown".to_owned() }));
    assert_eq!(claimed(br#"{"quantization_config":null}"#), None);
    let result = open(&[(CONFIG, b"{}"), (SINGLE, &vectors(&["l.qweight"]))]);
    assert!(matches!(result, Err(SourceError::Quantised { path, .. }) if path.ends_with(SINGLE)));
}

#[test]
fn shards_without_an_index_are_read_where_all_are_there() {
    let shard = |n: u32, of: u32| format!("model-{n:05}-of-{of:05}.safetensors");
    let [first, second] = [vectors(&["a"]), vectors(&["b"])];
    let both = open(&[(CONFIG, b"{}"), (&shard(1, 2), &first), (&shard(2, 2), &second)]).unwrap();
    assert_eq!(both.tensors.iter().map(|t| (t.name.as_str(), t.file)).collect::<Vec<_>>(), [("a", 0), ("b", 1)]);
    assert_eq!(both.notices, [Notice::NoIndex { shards: 2 }]);
    assert!(both.index.is_none());
    let only = open(&[(CONFIG, b"{}"), (&shard(1, 1), &first)]).unwrap();
    assert_eq!(only.notices, [Notice::NoIndex { shards: 1 }]);
    for (n, of) in [(1, 2), (2, 2), (2, 1)] {
        let result = open(&[(CONFIG, b"{}"), (&shard(n, of), &first)]);
        assert!(matches!(result, Err(SourceError::NoWeights { .. })), "{n} of {of}");
    }
}

#[test]
fn the_cache_of_a_model_names_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let found = || match Checkpoint::open(dir.path(), None).unwrap_err() {
        SourceError::HubCache { snapshot, .. } => snapshot,
        other => panic!("{other:?}"),
    };
    fs::create_dir_all(dir.path().join("snapshots/abc")).unwrap();
    assert_eq!(found(), dir.path().join("snapshots/abc"));
    fs::create_dir_all(dir.path().join("snapshots/def")).unwrap();
    assert!(matches!(Checkpoint::open(dir.path(), None), Err(SourceError::NoWeights { .. })));
    fs::create_dir(dir.path().join("refs")).unwrap();
    fs::write(dir.path().join("refs/main"), "def\n").unwrap();
    assert_eq!(found(), dir.path().join("snapshots/def"));
    for elsewhere in ["../../x", "", "gone"] {
        fs::write(dir.path().join("refs/main"), elsewhere).unwrap();
        assert!(matches!(Checkpoint::open(dir.path(), None), Err(SourceError::NoWeights { .. })), "{elsewhere}");
    }
}

#[test]
fn side_files_that_are_pointers_are_refused() {
    let single = vectors(&["a"]);
    let with = |name: &str, bytes: &[u8]| open(&[(CONFIG, b"{}"), (SINGLE, &single), (name, bytes)]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for name in ["tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"] {
        let result = with(name, pointer);
        assert!(matches!(result, Err(SourceError::LfsPointer { path }) if path.ends_with(name)), "{name}");
    }
    let index = open(&[(CONFIG, b"{}"), (INDEX, pointer)]);
    assert!(matches!(index, Err(SourceError::LfsPointer { path }) if path.ends_with(INDEX)));
    // What else may be wrong with them keeps no pack from being made: it is said of the pack.
    assert!(with("tokenizer.json", b"<html>").is_ok());
}

#[test]
fn files_without_content_and_broken_generation_settings_are_named() {
    let single = vectors(&["a"]);
    let files = [(CONFIG, &b"{}"[..]), (SINGLE, &single), ("tokenizer_config.json", b""), ("merges.txt", b"")];
    let checkpoint = open(&files).unwrap();
    let names = ["tokenizer_config.json", "merges.txt"].map(str::to_owned);
    assert_eq!(checkpoint.notices, [Notice::EmptyFiles { files: names.to_vec() }]);
    assert_eq!(checkpoint.side_files.len(), 1);

    let generation = |bytes| open(&[(CONFIG, b"{}"), (SINGLE, &single), ("generation_config.json", bytes)]).unwrap().notices;
    assert!(matches!(&generation(b"<html>")[..], [Notice::GenerationConfigIgnored { .. }]));
    assert_eq!(generation(br#"{"temperature": NaN}"#), []);
}

#[test]
fn a_checkpoint_with_another_tokenizer_says_what_to_make_of_it() {
    let files = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), Vec::new())).collect::<Vec<_>>();
    assert_eq!(no_tokenizer(&files(&[CONFIG, "tokenizer.json", "tokenizer.model"])), None);
    assert_eq!(no_tokenizer(&files(&[CONFIG])), None);
    let model_alone = no_tokenizer(&files(&[CONFIG, "vocab.json", "tokenizer.model"]));
    assert_eq!(model_alone, Some(Notice::NoTokenizer { other: "tokenizer.model" }));
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_named() {
    let notice = |json: &str, rows| tokens_without_rows(&[("tokenizer.json".to_owned(), json.into())], rows);
    let map = r#"{"model": {"vocab": {"a": 0, "b": 3}}, "added_tokens": [{"id": 5, "content": "<pad>"}]}"#;
    assert_eq!(notice(map, 5), Some(Notice::TokensWithoutRows { last: 5, rows: 5 }));
    assert_eq!(notice(map, 6), None);
    let unigram = r#"{"model": {"vocab": [["a", -1.0], ["b", -2.5]]}}"#;
    assert_eq!(notice(unigram, 1), Some(Notice::TokensWithoutRows { last: 1, rows: 1 }));
    assert_eq!(notice(unigram, 2), None);
    for other in ["{}", "<html>", r#"{"model": {}}"#, r#"{"model": {"vocab": 3}}"#] {
        assert_eq!(notice(other, 0), None, "{other}");
    }
}

#[test]
fn further_chat_templates_are_read_from_their_folder() {
    let dir = folder(&[(CONFIG, b"{}"), (SINGLE, &vectors(&["a"])), ("tokenizer.model", b"\n")]);
    let templates = dir.path().join("additional_chat_templates");
    fs::create_dir_all(templates.join("folder")).unwrap();
    for (name, text) in [("tool_use.jinja", "t"), ("rag.jinja", "r"), ("a b.jinja", "x"), ("notes.txt", "x")] {
        fs::write(templates.join(name), text).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    let names: Vec<_> = checkpoint.side_files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let [_, model, rag, tool_use] = names[..] else { panic!("{names:?}") };
    assert_eq!(model, ("tokenizer.model", &b"\n"[..]));
    assert_eq!(rag, ("additional_chat_templates.rag.jinja", &b"r"[..]));
    assert_eq!(tool_use, ("additional_chat_templates.tool_use.jinja", &b"t"[..]));
    let left_out = ["a b.jinja", "folder", "notes.txt"].map(|name| format!("additional_chat_templates/{name}"));
    assert_eq!(checkpoint.notices, [Notice::FilesLeftOut { files: left_out.to_vec() }]);
}

#[test]
fn values_are_compared_and_reads_stay_inside_the_tensor() {
    let len = 3 * COMPARE_LEN / 2;
    let entry = |i: usize, dtype, n| {
        format!(r#""{i}":{{"dtype":"{dtype}","shape":[{n}],"data_offsets":[{},{}]}}"#, i * len, (i + 1) * len)
    };
    let entries = [entry(0, "F16", len / 2), entry(1, "F16", len / 2), entry(2, "F16", len / 2), entry(3, "F32", len / 4)];
    let mut bytes = file(&format!("{{{}}}", entries.join(",")), 4 * len);
    let last_of_third = bytes.len() - len - 1;
    bytes[last_of_third] = 1;
    let dir = folder(&[(CONFIG, b"{}"), (SINGLE, &bytes)]);
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    let tensors = &checkpoint.tensors;
    assert!(checkpoint.same_values(&tensors[0], &tensors[1]).unwrap());
    assert!(!checkpoint.same_values(&tensors[0], &tensors[2]).unwrap());
    assert!(!checkpoint.same_values(&tensors[0], &tensors[3]).unwrap());
    let mut last = [0; 2];
    checkpoint.read(&tensors[2], len as u64 - 2, &mut last).unwrap();
    assert_eq!(last, [0, 1]);
    assert!(matches!(checkpoint.read(&tensors[2], len as u64 - 1, &mut last), Err(SourceError::Io { .. })));
    assert!(checkpoint.read(&tensors[2], u64::MAX, &mut last).is_err());
    fs::File::options().write(true).open(dir.path().join(SINGLE)).unwrap().set_len(100).unwrap();
    assert!(matches!(checkpoint.same_values(&tensors[0], &tensors[1]), Err(SourceError::Io { .. })));
}

#[cfg(unix)]
mod links {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A hub cache: links in the snapshot, files among the blobs. Gives the snapshot's folder.
    fn hub(dir: &Path, blobs: &Path) -> PathBuf {
        let model = dir.join("models--X--Y");
        let snapshot = model.join("snapshots/abc");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(blobs).unwrap();
        for (name, blob, bytes) in [(CONFIG, "c", b"{}".to_vec()), (SINGLE, "w", vectors(&["a"]))] {
            fs::write(blobs.join(blob), bytes).unwrap();
            symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
        }
        snapshot
    }

    fn leaves(result: Result<Checkpoint, SourceError>, name: &str) {
        assert!(matches!(&result, Err(SourceError::LinkLeavesFolder { path, .. }) if path.ends_with(name)), "{result:?}");
    }

    #[test]
    fn those_of_a_hub_cache_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = hub(dir.path(), &dir.path().join("models--X--Y/blobs"));
        Checkpoint::open(&snapshot, None).unwrap();
        Checkpoint::open(&snapshot.join(SINGLE), None).unwrap();
        // The user may reach the snapshot by a link too.
        symlink(&snapshot, dir.path().join("mine")).unwrap();
        Checkpoint::open(&dir.path().join("mine"), None).unwrap();
        // The folder above the blobs is outside.
        fs::write(dir.path().join("models--X--Y/secret"), b"x").unwrap();
        symlink("../../secret", snapshot.join("tokenizer.json")).unwrap();
        leaves(Checkpoint::open(&snapshot, None), "tokenizer.json");
    }

    #[test]
    fn blobs_that_are_a_link_themselves_are_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("models--X--Y")).unwrap();
        symlink(dir.path().join("elsewhere"), dir.path().join("models--X--Y/blobs")).unwrap();
        let snapshot = hub(dir.path(), &dir.path().join("elsewhere"));
        leaves(Checkpoint::open(&snapshot, None), CONFIG);
    }

    #[test]
    fn others_may_not_leave_the_folder() {
        let outside = folder(&[(CONFIG, b"{}"), (SINGLE, &vectors(&["a"])), ("s", &vectors(&["a"]))]);
        let to = |name: &str, from: &Path| symlink(outside.path().join(name), from.join(name)).unwrap();
        let dir = folder(&[(SINGLE, &vectors(&["a"]))]);
        to(CONFIG, dir.path());
        leaves(Checkpoint::open(dir.path(), None), CONFIG);
        // Named by the user, it is followed.
        Checkpoint::open(dir.path(), Some(&dir.path().join(CONFIG))).unwrap();
        let dir = folder(&[(CONFIG, b"{}")]);
        to(SINGLE, dir.path());
        leaves(Checkpoint::open(dir.path(), None), SINGLE);
        let dir = folder(&[(CONFIG, b"{}"), (INDEX, br#"{"weight_map":{"a":"s"}}"#)]);
        to("s", dir.path());
        leaves(Checkpoint::open(dir.path(), None), "s");
        // Inside, a link is a file like another; one that leads nowhere is an error, not an absent
        // file.
        let dir = folder(&[(CONFIG, b"{}"), ("w", &vectors(&["a"]))]);
        symlink("w", dir.path().join(SINGLE)).unwrap();
        Checkpoint::open(dir.path(), None).unwrap();
        symlink("nowhere", dir.path().join("tokenizer.json")).unwrap();
        assert!(matches!(Checkpoint::open(dir.path(), None), Err(SourceError::Io { .. })));
    }
}

/// A checkpoint of two tensors of `shape`, with these types and bytes.
fn two_tensors(tensors: [(&str, &[u8]); 2], elements: usize) -> (Checkpoint, tempfile::TempDir) {
    let mut at = 0;
    let entry = |(i, (dtype, bytes)): (usize, (&str, &[u8]))| {
        let (start, end) = (at, at + bytes.len());
        at = end;
        format!(r#""{i}":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[{start},{end}]}}"#)
    };
    let entries: Vec<String> = tensors.into_iter().enumerate().map(entry).collect();
    let json = format!("{{{}}}", entries.join(","));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.bytes());
    tensors.iter().for_each(|(_, values)| bytes.extend(*values));
    let dir = folder(&[(CONFIG, b"{}"), (SINGLE, &bytes)]);
    (Checkpoint::open(dir.path(), None).unwrap(), dir)
}

#[test]
fn values_are_the_same_in_any_float_type_that_holds_them() {
    use half::{bf16, f16};
    // More than one piece of either type. Every value is one of all three types.
    let count = COMPARE_LEN / 3;
    let values: Vec<f32> = (0..count).map(|i| (i % 251) as f32 / 64.0 - 2.0).collect();
    let f32s = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let f16s: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let bf16s: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let same = |tensors: [(&str, &[u8]); 2]| {
        let (checkpoint, _dir) = two_tensors(tensors, count);
        checkpoint.same_values(&checkpoint.tensors[0], &checkpoint.tensors[1]).unwrap()
    };
    let wide = f32s(&values);
    assert!(same([("BF16", &bf16s), ("F32", &wide)]));
    assert!(same([("F32", &wide), ("F16", &f16s)]));
    assert!(same([("F16", &f16s), ("BF16", &bf16s)]));
    let f64s: Vec<u8> = values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let same_in_f64 = |narrow: (&str, &[u8]), f64s: &[u8]| {
        let (checkpoint, _dir) = two_tensors([narrow, ("F64", f64s)], count);
        checkpoint.same_values_in_f64(&checkpoint.tensors[0], &checkpoint.unstorable[0]).unwrap()
    };
    for narrow in [("F16", &f16s[..]), ("BF16", &bf16s), ("F32", &wide)] {
        assert!(same_in_f64(narrow, &f64s), "{}", narrow.0);
        let mut other = f64s.clone();
        other[8 * (count - 1)] ^= 1;
        assert!(!same_in_f64(narrow, &other), "{}", narrow.0);
    }
    let mut other = values.clone();
    *other.last_mut().unwrap() += 1e-6;
    let other = f32s(&other);
    assert!(!same([("BF16", &bf16s), ("F32", &other)]));
    assert!(!same([("F16", &bf16s), ("BF16", &bf16s)]));
}
