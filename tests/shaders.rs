//! Every shader, parsed and validated in every form that it is compiled in: no GPU is needed.
#![cfg(feature = "gpu")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use nf4pack::gpu::wgpu::naga;
use std::fs;
use std::path::Path;

/// Constants, with the values that the host gives them.
type Constants = &'static [(&'static str, &'static [f64])];

/// Every file, and its constants.
const FORMS: &[(&str, Constants)] = &[
    ("add.wgsl", &[]),
    ("copy.wgsl", &[]),
    ("dropout.wgsl", &[]),
    ("finite.wgsl", &[]),
    ("gather.wgsl", &[("TYPE", &[0.0, 1.0, 2.0])]),
    ("loss.wgsl", &[]),
    ("nf4_fast.wgsl", &[("WORKGROUP", &[64.0, 256.0]), ("SCALES", &[0.0, 1.0, 2.0]), ("BF16", &[0.0, 1.0])]),
    ("nf4_plain.wgsl", &[("SCALES", &[0.0, 1.0, 2.0]), ("OUTPUT", &[0.0, 1.0, 2.0])]),
    ("optimizer.wgsl", &[]),
    ("rms_norm.wgsl", &[("LANES", &[32.0, 256.0])]),
    ("swiglu.wgsl", &[]),
];

/// Every choice of one value for each constant.
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

/// One for what every Vulkan, Metal and DX12 device has: `pack2x16float` beside plain WGSL.
fn validator() -> Validator {
    Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32)
}

#[test]
fn every_shader_is_valid_in_every_form() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut found: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, FORMS.iter().map(|(file, _)| *file).collect::<Vec<_>>(), "list the forms of every shader");
    let mut compiled = 0;
    for (file, constants) in FORMS {
        let source = fs::read_to_string(folder.join(file)).unwrap();
        let module =
            naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{file}: {}", e.emit_to_string(&source)));
        let info = validator().validate(&module).unwrap_or_else(|e| panic!("{file}: {}", e.emit_to_string(&source)));
        assert_eq!(module.overrides.len(), constants.len(), "{file}");
        for chosen in combinations(constants) {
            for entry in &module.entry_points {
                let entry = Some((entry.stage, entry.name.as_str()));
                let (module, _) = process_overrides(&module, &info, entry, &chosen).unwrap();
                validator().validate(&module).unwrap_or_else(|e| panic!("{file} with {chosen:?}: {e:?}"));
                compiled += 1;
            }
        }
    }
    let dequant = 1 + 2 * 12 + 9;
    let train = 1 + 1 + 2 + 3 + 3 + 3 + 2 * 2 + 2;
    assert_eq!(compiled, dequant + train);
}
