//! Why a model that can be packed cannot be run. `convert`, `verify` and `doctor` report it, not
//! only `train`.

use serde::de::IgnoredAny;
use thiserror::Error;

use super::config::{ConfigError, ModelConfig, layer_count};
use super::family::{Family, PROJECTIONS, Part, Scope};
use crate::format::files::{GENERATION_CONFIG, LFS_POINTER};
use crate::format::{Index, Role};

/// The largest head of the attention's kernels.
pub const MAX_HEAD_DIM: u32 = 256;
/// The rows of B of an adapter for a fused tensor are bound projection by projection. With a
/// multiple of this number, they start on 256 bytes for any rank.
pub const FUSED_ROWS: u32 = 64;

/// Why a model or its pack cannot be trained, evaluated or generated from.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The kernels do not support this head size.
    #[error("a head has {found} features: the kernels need a multiple of 4, and at most {MAX_HEAD_DIM}")]
    HeadDim {
        /// Features of a head.
        found: u32,
    },
    /// The kernels do not support these norms.
    #[error("the norms of {model_type} models {found}, which no kernel does")]
    Norm {
        /// The model type.
        model_type: &'static str,
        /// What its norms do.
        found: &'static str,
    },
    /// The family has a tensor that the layers do not use.
    #[error("{model_type} models have a {name} ({role}), which no kernel uses")]
    Part {
        /// The model type.
        model_type: &'static str,
        /// The name of the tensor.
        name: &'static str,
        /// Its role.
        role: Role,
    },
    /// The family has two tensors of one role.
    #[error("{model_type} models have two tensors of the role {role} in one place")]
    PartTwice {
        /// The model type.
        model_type: &'static str,
        /// The role.
        role: Role,
    },
    /// A projection within a fused tensor whose rows do not start where a kernel can bind them.
    #[error("{role} has {found} rows in a fused tensor: the kernels need a multiple of {FUSED_ROWS}")]
    FusedRows {
        /// The projection.
        role: Role,
        /// Its rows.
        found: u32,
    },
    /// A pack without a description of its model.
    #[error("the pack has no config.json")]
    NoConfig,
    /// A pack whose config.json does not describe a supported model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A pack without a file that its tokenizer needs.
    #[error("the pack has no {name}")]
    MissingFile {
        /// Its name.
        name: &'static str,
    },
    /// A file with other content than its name says.
    #[error("{name} {reason}")]
    BadFile {
        /// Its name.
        name: &'static str,
        /// The defect.
        reason: String,
    },
    /// A config.json that describes another number of layers than the pack has.
    #[error("config.json describes {config} layers (num_hidden_layers), the pack has {pack}")]
    LayerCount {
        /// Layers by config.json.
        config: u64,
        /// Layers of the pack.
        pack: u32,
    },
    /// A pack that lacks a tensor of its model.
    #[error("the pack has no {role}{}", .layer.map_or_else(String::new, |layer| format!(" in layer {layer}")))]
    Missing {
        /// The layer; `None` outside the layers.
        layer: Option<u32>,
        /// The role of the missing tensor.
        role: Role,
    },
    /// A pack with a tensor that does not fit its config.json.
    #[error("the {role}{} has the shape {found:?}, by config.json it should have {expected:?}", .layer.map_or_else(String::new, |layer| format!(" of layer {layer}")))]
    Shape {
        /// The layer; `None` outside the layers.
        layer: Option<u32>,
        /// Its role.
        role: Role,
        /// Shape by config.json.
        expected: Vec<u64>,
        /// Shape in the pack.
        found: Vec<u64>,
    },
}

impl ModelConfig {
    /// Whether the kernels can run such a model.
    ///
    /// # Errors
    /// The first [`Obstacle`].
    pub fn check_runnable(&self) -> Result<(), Obstacle> {
        if !self.head_dim.is_multiple_of(4) || self.head_dim > MAX_HEAD_DIM {
            return Err(Obstacle::HeadDim { found: self.head_dim });
        }
        let Family { model_type, parts, .. } = *self.family;
        if [Role::InputNorm, Role::PostAttentionNorm].iter().any(|&role| self.family.part(role).is_none()) {
            return Err(Obstacle::Norm { model_type, found: "do not precede attention and the feed-forward network" });
        }
        let is_twice = |part: &&Part| parts.iter().filter(|other| other.role == part.role).count() > 1;
        if let Some(Part { role, .. }) = parts.iter().find(is_twice) {
            return Err(Obstacle::PartTwice { model_type, role: *role });
        }
        let fused = PROJECTIONS.iter().filter_map(|&role| Some((role, self.rows_of(role)?)));
        let mut fused = fused.filter(|(_, rows)| rows.tensor.is_fused());
        if let Some((role, rows)) = fused.find(|(_, rows)| !rows.count.is_multiple_of(FUSED_ROWS)) {
            return Err(Obstacle::FusedRows { role, found: rows.count });
        }
        match parts.iter().find(|part| !is_used(part)) {
            Some(Part { name, role, .. }) => Err(Obstacle::Part { model_type, name, role: *role }),
            None => Ok(()),
        }
    }
}

/// Whether the decoder or its layers compute with a part.
fn is_used(part: &Part) -> bool {
    match part.role {
        Role::Embedding | Role::FinalNorm | Role::LmHead => part.scope != Scope::Layer,
        Role::InputNorm
        | Role::QProj
        | Role::KProj
        | Role::VProj
        | Role::OProj
        | Role::QBias
        | Role::KBias
        | Role::VBias
        | Role::OBias
        | Role::QNorm
        | Role::KNorm
        | Role::PostAttentionNorm
        | Role::GateProj
        | Role::UpProj
        | Role::DownProj
        | Role::GateBias
        | Role::UpBias
        | Role::DownBias
        | Role::QkvProj
        | Role::GateUpProj
        | Role::AttentionOutputNorm
        | Role::FeedForwardOutputNorm => part.scope == Scope::Layer,
        Role::Router | Role::Other => false,
    }
}

impl Obstacle {
    /// Whether config.json describes exactly the layers of a pack that has `pack` of them. It comes
    /// before all else: other keys are read once for each layer.
    ///
    /// # Errors
    /// [`Obstacle::LayerCount`].
    pub fn check_layer_count(config_json: &[u8], pack: u32) -> Result<(), Self> {
        match layer_count(config_json) {
            Some(config) if config != u64::from(pack) => Err(Self::LayerCount { config, pack }),
            // Its parser says so if it names none.
            _ => Ok(()),
        }
    }

    /// Missing and broken files of the tokenizer, as far as they can be recognised without loading
    /// it. `file` gives the bytes of a file.
    pub fn check_files<'a>(file: impl Fn(&str) -> Option<&'a [u8]>) -> Vec<Self> {
        const NEEDED: &str = "tokenizer.json";
        let bad = |name: &'static str| fault_of(file(name)?).map(|reason| Self::BadFile { name, reason });
        let missing = file(NEEDED).is_none().then_some(Self::MissingFile { name: NEEDED });
        let files = [NEEDED, "tokenizer_config.json", "special_tokens_map.json"];
        missing.into_iter().chain(files.into_iter().filter_map(bad)).collect()
    }

    /// Whether a pack can be trained, evaluated and generated from, as far as its index says.
    ///
    /// # Errors
    /// The first obstacle.
    pub fn check_pack<'a>(index: &Index, file: impl Fn(&str) -> Option<&'a [u8]>) -> Result<(), Self> {
        let config = file("config.json").ok_or(Self::NoConfig)?;
        Self::check_layer_count(config, index.header().layer_count)?;
        let config = ModelConfig::parse(config, file(GENERATION_CONFIG))?;
        config.check_runnable()?;
        let shapes = index.tensors().map(|(_, section)| ((section.layer, section.role), section.shape));
        let shapes: std::collections::HashMap<_, _> = shapes.collect();
        // A stored output projection counts, even if config.json ties it to the embedding.
        let head = config.family.parts.iter().find(|part| part.role == Role::LmHead && config.tied);
        let head = head.filter(|_| index.has(Role::LmHead)).map(|part| (part, None));
        for (part, layer) in config.parts().chain(head) {
            let (role, expected) = (part.role, config.shape(part));
            match shapes.get(&(layer, role)) {
                Some(found) if found.dims() == expected => {}
                Some(found) => return Err(Self::Shape { layer, role, expected, found: found.dims().to_vec() }),
                // Without it, the embedding takes its place.
                None if role == Role::LmHead => {}
                None => return Err(Self::Missing { layer, role }),
            }
        }
        Ok(())
    }
}

/// Why a file of a tokenizer cannot be read. Tokenizers read strict JSON, without NaN and
/// infinities.
fn fault_of(bytes: &[u8]) -> Option<String> {
    if bytes.starts_with(LFS_POINTER) {
        return Some("is a pointer of Git LFS, not the file itself: `git lfs pull` fetches it".to_owned());
    }
    serde_json::from_slice::<IgnoredAny>(bytes).err().map(|error| format!("is not JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::arch::family::{DECODER, Dim, When};
    use crate::format::{Entry, FloatType, Layout, Pack, Shape, Storage};

    const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 10, "rms_norm_eps": 1e-6}"#;

    /// The obstacle of a pack with this config.json and an embedding of this shape.
    fn of(config: Option<&str>, embedding: Option<[u64; 2]>) -> Obstacle {
        let entry = |name: &str, role, storage, shape: &[u64]| Entry {
            name: name.to_owned(),
            role,
            layer: None,
            expert: None,
            shape: Shape::new(shape).unwrap(),
            storage,
        };
        let file = config.map(|text| entry("config.json", Role::Other, Storage::File, &[text.len() as u64]));
        let tensor = embedding.map(|shape| entry("embed", Role::Embedding, Storage::Raw(FloatType::Bf16), &shape));
        let metadata = "{}";
        // One layer, as config.json says, without any of its parts.
        let stray = Entry { layer: Some(0), ..entry("stray", Role::Other, Storage::Raw(FloatType::Bf16), &[1]) };
        let layout = Layout::new(file.into_iter().chain(tensor).chain([stray]).collect(), 1, metadata.len() as u64).unwrap();
        let payload = |section: &crate::format::Section| match section.role {
            _ if section.layer.is_some() => vec![0; section.length as usize],
            Role::Embedding => vec![0; section.length as usize],
            _ => config.unwrap().as_bytes().to_vec(),
        };
        let payloads: Vec<Vec<u8>> = layout.sections().iter().map(payload).collect();
        let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
        let bytes = layout.assemble(&payloads, metadata).unwrap();
        let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
        let pack = Pack::new(&bytes, &index).unwrap();
        Obstacle::check_pack(&index, |name| pack.file(name).map(|file| file.bytes)).unwrap_err()
    }

    #[test]
    fn a_pack_is_compared_with_its_own_config() {
        assert!(matches!(of(None, Some([10, 8])), Obstacle::NoConfig));
        let config = json!({ "model_type": "gpt2" }).to_string();
        assert!(matches!(of(Some(&config), None), Obstacle::Config(ConfigError::ModelType { .. })));
        assert!(matches!(of(Some(CONFIG), None), Obstacle::Missing { layer: None, role: Role::Embedding }));
        let found = of(Some(CONFIG), Some([10, 4]));
        assert_eq!(found.to_string(), "the embedding has the shape [10, 4], by config.json it should have [10, 8]");
        let found = of(Some(CONFIG), Some([10, 8]));
        assert_eq!(found.to_string(), "the pack has no input_norm in layer 0");
        let heads = CONFIG.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 2, \"head_dim\": 6");
        assert!(matches!(of(Some(&heads), None), Obstacle::HeadDim { found: 6 }));
    }

    #[test]
    fn families_that_no_kernel_supports() {
        const fn extra(role: Role, scope: Scope) -> Part {
            Part { name: "extra.weight", role, shape: &[Dim::Hidden], scope, when: When::Always }
        }
        const INPUT: Part = extra(Role::InputNorm, Scope::Layer);
        const MIDDLE: Part = extra(Role::PostAttentionNorm, Scope::Layer);
        static AFTER: Family = Family { parts: &[INPUT, extra(Role::AttentionOutputNorm, Scope::Layer)], ..DECODER };
        static ROUTER: Family = Family { parts: &[INPUT, MIDDLE, extra(Role::Router, Scope::Layer)], ..DECODER };
        static OTHER: Family = Family { parts: &[INPUT, MIDDLE, extra(Role::Other, Scope::Decoder)], ..DECODER };
        static OUTSIDE: Family = Family { parts: &[INPUT, MIDDLE, extra(Role::QNorm, Scope::Decoder)], ..DECODER };
        const NORM: Part = extra(Role::QNorm, Scope::Layer);
        static TWICE: Family = Family { parts: &[INPUT, MIDDLE, NORM, NORM], ..DECODER };
        let model = ModelConfig::parse(CONFIG.as_bytes(), None).unwrap();
        let of = |family| ModelConfig { family, ..model.clone() }.check_runnable();
        for family in Family::ALL {
            // Sizes that fused tensors permit.
            ModelConfig { family, head_dim: 64, intermediate: 64, ..model.clone() }.check_runnable().unwrap();
        }
        assert!(matches!(of(&AFTER), Err(Obstacle::Norm { .. })));
        assert!(matches!(of(&TWICE), Err(Obstacle::PartTwice { role: Role::QNorm, .. })));
        for (family, expected) in [(&ROUTER, Role::Router), (&OTHER, Role::Other), (&OUTSIDE, Role::QNorm)] {
            match of(family) {
                Err(Obstacle::Part { name: "extra.weight", role, .. }) => assert_eq!(role, expected),
                other => panic!("{other:?}"),
            }
        }
    }

    fn of_files(files: &[(&str, &str)]) -> Vec<String> {
        let file = |name: &str| files.iter().find(|(n, _)| *n == name).map(|(_, text)| text.as_bytes());
        Obstacle::check_files(file).iter().map(Obstacle::to_string).collect()
    }

    #[test]
    fn missing_and_broken_files_are_named() {
        assert_eq!(of_files(&[("tokenizer.json", "{}")]), [""; 0]);
        assert_eq!(of_files(&[]), ["the pack has no tokenizer.json"]);
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n";
        let found = of_files(&[("tokenizer.json", pointer), ("tokenizer_config.json", "{")]);
        assert!(found[0].starts_with("tokenizer.json is a pointer of Git LFS"), "{found:?}");
        assert!(found[1].starts_with("tokenizer_config.json is not JSON: EOF"), "{found:?}");
    }
}
