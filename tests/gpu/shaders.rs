//! Parses and validates every shader with every set of constants that the host uses. Needs no GPU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use nf4pack::gpu::wgpu::naga;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Constants and their values on the host.
type Constants = &'static [(&'static str, &'static [f64])];

const EITHER: &[f64] = &[0.0, 1.0];
const TYPES: &[f64] = &[0.0, 1.0, 2.0];

/// The files of every shader, and its constants.
const FORMS: &[(&[&str], Constants)] = &[
    (&["copy.wgsl"], &[]),
    (
        &["nf4_params.wgsl", "nf4_bindings.wgsl", "codec_nf4.wgsl", "nf4_fast.wgsl"],
        &[("WORKGROUP", &[64.0, 256.0]), ("SCALES", TYPES), ("BF16", EITHER)],
    ),
    (&["nf4_params.wgsl", "nf4_bindings.wgsl", "nf4_plain.wgsl"], &[("SCALES", TYPES), ("OUTPUT", TYPES)]),
    (
        &["matmul_params.wgsl", "matmul.wgsl", "matmul_floats.wgsl", "matmul_raw.wgsl"],
        &[
            ("TX", &[4.0, 8.0, 16.0]),
            ("TY", &[4.0, 16.0]),
            ("A_FOURS", &[528.0]),
            ("B_FOURS", &[528.0]),
            ("A_BY_TERM", EITHER),
            ("B_BY_TERM", EITHER),
            ("FLOATS", TYPES),
        ],
    ),
    (
        &["matmul_params.wgsl", "matmul.wgsl", "nf4_bindings.wgsl", "codec_nf4.wgsl", "matmul_quantized.wgsl"],
        &[
            ("TX", &[8.0, 16.0]),
            ("TY", &[4.0, 16.0]),
            ("A_FOURS", &[528.0]),
            ("B_FOURS", &[528.0]),
            ("A_BY_TERM", &[1.0]),
            ("B_BY_TERM", EITHER),
            ("WHOLE", EITHER),
            ("SCALES", TYPES),
        ],
    ),
    (
        &["matmul_params.wgsl", "matmul_rows.wgsl", "matmul_floats.wgsl", "matmul_rows_raw.wgsl"],
        &[
            ("M", &[1.0, 2.0, 4.0, 8.0]),
            ("LANES", &[32.0, 256.0]),
            ("COLUMNS", &[1.0]),
            ("PARTIAL", &[2048.0]),
            ("WHOLE", EITHER),
            ("FLOATS", TYPES),
        ],
    ),
    (
        &["matmul_params.wgsl", "matmul_rows.wgsl", "nf4_bindings.wgsl", "codec_nf4.wgsl", "matmul_rows_quantized.wgsl"],
        &[
            ("M", &[1.0, 2.0, 4.0, 8.0]),
            ("LANES", &[32.0, 256.0]),
            ("COLUMNS", &[1.0]),
            ("PARTIAL", &[2048.0]),
            ("WHOLE", EITHER),
            ("SCALES", TYPES),
        ],
    ),
    (&["matmul_sum.wgsl"], &[]),
    (&["panels.wgsl", "pack.wgsl"], &[("WHOLE", EITHER)]),
    (
        &["panels.wgsl", "panels_decode.wgsl", "matmul_floats.wgsl", "panels_raw.wgsl"],
        &[("WHOLE", EITHER), ("KNOWN", EITHER), ("FLOATS", TYPES)],
    ),
    (
        &["panels.wgsl", "panels_decode.wgsl", "nf4_bindings.wgsl", "codec_nf4.wgsl", "panels_quantized.wgsl"],
        &[("WHOLE", EITHER), ("KNOWN", EITHER), ("SCALES", TYPES)],
    ),
    (&["panels.wgsl", "panels_measure.wgsl"], &[]),
    (&["panels.wgsl", "low_rank.wgsl"], &[]),
    (&["panels.wgsl", "align.wgsl"], &[]),
    (&["panels.wgsl", "glu_function.wgsl", "glu_fours.wgsl", "glu_halves.wgsl"], &[("GELU", EITHER)]),
    (&["panels.wgsl", "panels_tile.wgsl", "halves_panels.wgsl"], &[]),
    (&["panels.wgsl", "panels_tile.wgsl", "norm_panels.wgsl"], &[("NARROW", EITHER)]),
    (&["panels.wgsl", "panels_tile.wgsl", "glu_function.wgsl", "glu_fours.wgsl", "glu_panels.wgsl"], &[("GELU", EITHER)]),
    (&["panels.wgsl", "halves_whole.wgsl", "halves.wgsl"], &[]),
    (&["panels.wgsl", "halves_ragged.wgsl", "halves.wgsl"], &[]),
    (
        &["attention.wgsl"],
        &[("HEAD", &[1.0, 16.0, 20.0, 32.0, 64.0]), ("TX", &[8.0]), ("TY", &[16.0]), ("VALUES", &[4.0, 16.0])],
    ),
    (
        &["attention_units.wgsl", "attention_halves.wgsl"],
        &[("HEAD", &[1.0, 20.0, 32.0, 64.0]), ("VECS", &[2.0, 10.0, 16.0, 32.0])],
    ),
    (
        &["cached_attention_rows.wgsl", "cached_attention.wgsl"],
        &[
            ("HEAD", &[1.0, 5.0, 32.0, 64.0]),
            ("GROUP", &[1.0, 3.0, 8.0]),
            ("QUERY", &[576.0]),
            ("DOTS", &[1024.0]),
            ("WEIGHTS", &[256.0]),
        ],
    ),
    (
        &["cached_attention.wgsl", "cached_attention_joined.wgsl"],
        &[
            ("HEAD", &[2.0, 32.0, 64.0]),
            ("GROUP", &[1.0, 3.0, 8.0]),
            ("QUERY", &[576.0]),
            ("DOTS", &[1024.0]),
            ("WEIGHTS", &[256.0]),
            ("NORM", EITHER),
        ],
    ),
    (&["rotary.wgsl"], &[]),
    (
        &["matmul_wide.wgsl", "codec_nf4_joined.wgsl", "matmul_wide_quantized.wgsl"],
        &[
            ("M", &[1.0, 2.0, 4.0, 8.0]),
            ("LANES", &[8.0, 64.0]),
            ("QUADS", &[8.0]),
            ("ROUNDS", &[1.0]),
            ("NORM", EITHER),
            ("GATED", EITHER),
            ("SLAB_ROW", &[520.0]),
            ("SHARED", &[576.0]),
            ("SQUARES", &[512.0]),
            ("COPIES", &[4.0]),
            ("AHEAD", EITHER),
            ("SCALES", TYPES),
            ("MAPS", &[768.0]),
        ],
    ),
    (
        &["matmul_wide.wgsl", "matmul_wide_raw.wgsl"],
        &[
            ("M", &[1.0, 2.0, 4.0, 8.0]),
            ("LANES", &[8.0, 64.0]),
            ("QUADS", &[8.0]),
            ("ROUNDS", &[4.0]),
            ("NORM", EITHER),
            ("GATED", EITHER),
            ("SLAB_ROW", &[514.0]),
            ("SHARED", &[528.0]),
            ("SQUARES", &[512.0]),
            ("COPIES", &[4.0]),
            ("AHEAD", EITHER),
            ("FLOATS", &[1.0, 2.0]),
        ],
    ),
    (&["sample.wgsl"], &[]),
    (&["split_heads.wgsl"], &[("NORM", EITHER)]),
    (&["scale.wgsl"], &[]),
    (&["dropout.wgsl"], &[]),
    (&["finite.wgsl"], &[]),
    (&["gather.wgsl", "gather_raw.wgsl"], &[("FLOATS", TYPES)]),
    (&["gather.wgsl", "nf4_bindings.wgsl", "codec_nf4.wgsl", "gather_quantized.wgsl"], &[("SCALES", TYPES)]),
    (&["loss.wgsl"], &[]),
    (&["optimizer.wgsl"], &[]),
    (&["rms_norm.wgsl"], &[("LANES", &[32.0, 256.0])]),
    (&["norm_rotary.wgsl"], &[]),
    (&["glu_function.wgsl", "glu.wgsl"], &[("GELU", EITHER)]),
];

/// The files of shaders that are templates. Tests in the host code validate the sources
/// from them.
const TEMPLATES: &[&str] = &["attention_units_forward.wgsl", "attention_units_keys.wgsl", "attention_units_queries.wgsl"];
/// Parts of templates, without a kernel.
const PARTS: &[&str] = &["attention_units_tile.wgsl"];

/// The tests that run kernels over poisoned memory.
const POISON_TESTS: &[&str] = &["src/ops/poison.rs", "src/ops/attention/mixed_tests.rs"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders")
}

/// Every combination of values of the constants.
fn combinations(constants: Constants) -> Vec<naga::back::PipelineConstants> {
    let mut all = vec![naga::back::PipelineConstants::default()];
    for (name, values) in constants {
        let extend = |chosen: &naga::back::PipelineConstants| {
            let with = |&value: &f64| {
                let mut chosen = chosen.clone();
                chosen.insert((*name).to_owned(), value);
                chosen
            };
            values.iter().map(with).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(extend).collect();
    }
    all
}

/// A validator with the capabilities of every Vulkan, Metal and DX12 device: plain WGSL and
/// `pack2x16float`.
fn validator() -> Validator {
    Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32)
}

/// The constants of a shader that the host sets. Excludes derived constants, and array sizes, which
/// have no name.
fn given(module: &naga::Module) -> BTreeSet<&str> {
    let literal = |init| matches!(module.global_expressions[init], naga::Expression::Literal(_));
    let given = module.overrides.iter().filter(|(_, constant)| constant.init.is_some_and(literal));
    given.filter_map(|(_, constant)| constant.name.as_deref()).collect()
}

/// The kernels of a form: the name of its last file, and each entry point.
fn kernels(files: &[&str]) -> Vec<String> {
    let source: String = files.iter().map(|file| fs::read_to_string(folder().join(file)).unwrap()).collect();
    let module = naga::front::wgsl::parse_str(&source).unwrap();
    let shader = files.last().unwrap().strip_suffix(".wgsl").unwrap();
    module.entry_points.iter().map(|entry| format!("{shader}:{}", entry.name)).collect()
}

/// The names of kernels that a source passes to `assert_written`, which compares them with the
/// kernels that run.
fn poisoned(source: &str) -> impl Iterator<Item = String> {
    let name = |text: &&str| text.contains(':') && text.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c));
    source.split('"').filter(name).map(str::to_owned)
}

#[test]
fn every_kernel_runs_over_poisoned_memory_in_a_test() {
    let of_template = |file: &&str| format!("{}:main", file.strip_suffix(".wgsl").unwrap());
    let mut every: BTreeSet<String> =
        FORMS.iter().flat_map(|(files, _)| kernels(files)).chain(TEMPLATES.iter().map(of_template)).collect();
    // Written by src/ops/matmul/mixed/source.rs.
    every.insert("matmul_panels:main".to_owned());
    let read = |file: &&str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let sources: String = POISON_TESTS.iter().map(read).collect();
    assert_eq!(poisoned(&sources).collect::<BTreeSet<_>>(), every, "the kernels of {POISON_TESTS:?}, and those of shaders");
    assert_eq!(every.len(), 77);
}

#[test]
fn every_shader_is_valid_in_every_form() {
    let folder = folder();
    let found: BTreeSet<String> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let listed =
        FORMS.iter().flat_map(|(files, _)| *files).chain(TEMPLATES).chain(PARTS).map(|&file| file.to_owned()).collect();
    assert_eq!(found, listed, "list the forms of every shader");
    let mut compiled = 0;
    for (files, constants) in FORMS {
        let file = files.join(" + ");
        let source: String = files.iter().map(|file| fs::read_to_string(folder.join(file)).unwrap()).collect();
        let module =
            naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{file}: {}", e.emit_to_string(&source)));
        let info = validator().validate(&module).unwrap_or_else(|e| panic!("{file}: {}", e.emit_to_string(&source)));
        assert_eq!(given(&module), constants.iter().map(|(name, _)| *name).collect::<BTreeSet<_>>(), "{file}");
        for chosen in combinations(constants) {
            for entry in &module.entry_points {
                let entry = Some((entry.stage, entry.name.as_str()));
                let (module, _) = process_overrides(&module, &info, entry, &chosen).unwrap();
                validator().validate(&module).unwrap_or_else(|e| panic!("{file} with {chosen:?}: {e:?}"));
                compiled += 1;
            }
        }
    }
    let dequant = 2 + 2 * 12 + 9;
    let products = 72 + 48 + 2 * 48 + 1 + 64 * (3 + 2);
    let panels = 2 + 2 * 2 * 2 * 6 + 1 + 1 + 2 + 2 * 4 + 2 * 3 + 1 + 2 * 2 + 2 * 5;
    let attention = 5 * 10 + 3 * 16 + 3 * 4 * 2 + 3 * 3 * 2 * 2 + 2;
    let rest = 1 + 2 + 2 + 1 + 2 + 2 * 3 + 5 + 3 + 2 * 2 + 2 * 2 + 2;
    assert_eq!(compiled, dequant + products + panels + attention + rest);
}
