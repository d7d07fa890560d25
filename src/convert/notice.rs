//! Notes and warnings about a checkpoint.

use std::fmt;

use crate::arch::names::Naming;

/// A decision about a checkpoint, for the caller to show or to ignore.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The folder holds both weight layouts; the single file is read, as transformers does.
    IndexIgnored,
    /// `lm_head.weight` has the values of a tied model's embedding, so the pack leaves it out.
    TiedHeadDropped,
    /// The options leave nothing to quantise.
    NothingQuantised,
    /// `lm_head.weight` differs from the embedding although config.json ties them; the pack keeps
    /// both.
    TiedHeadDiffers,
    /// The names differ from those that transformers writes; the pack has the names of
    /// transformers.
    Renamed {
        /// The differences, such as "without module.".
        how: String,
    },
    /// Keys of config.json that have no effect.
    IgnoredKeys {
        /// The keys.
        keys: Vec<String>,
    },
    /// The pack is good, but this program cannot train it or generate from it.
    NotRunnable {
        /// The reason.
        why: String,
    },
    /// There is no index, but the names of the shards show that none is missing.
    NoIndex {
        /// Number of shards.
        shards: usize,
    },
    /// Index and shards do not agree; the shards decide, as in transformers.
    IndexDiffers {
        /// Tensors that the index lists but no shard has.
        absent: Vec<String>,
        /// Tensors that a shard has but the index does not list.
        unlisted: Vec<String>,
        /// Tensors that another shard has than the index says.
        elsewhere: Vec<String>,
    },
    /// config.json has a quantisation, but the weights are not quantised.
    QuantisationIgnored {
        /// The method that config.json names.
        method: String,
    },
    /// There is no tokenizer.json, but a file from which it can be made.
    NoTokenizer {
        /// The file.
        other: &'static str,
    },
    /// The tokenizer has more tokens than the embedding has rows.
    TokensWithoutRows {
        /// The last id of tokenizer.json.
        last: u64,
        /// Rows of the embedding.
        rows: u32,
    },
    /// Files without content, which a pack does not store.
    EmptyFiles {
        /// Their names in the checkpoint.
        files: Vec<String>,
    },
    /// generation_config.json is not JSON.
    GenerationConfigIgnored {
        /// The error of the JSON parser.
        why: String,
    },
    /// Tensors that several shards hold with the same values.
    Copies {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Files whose names a pack cannot have.
    FilesLeftOut {
        /// Their names in the checkpoint.
        files: Vec<String>,
    },
    /// Tensors that are no part of the model, and are not stored.
    LeftOut {
        /// Each with the reason.
        tensors: Vec<LeftOut>,
    },
    /// Tensors that are no part of the model, but are stored as they are.
    KeptUnused {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Tensors named like parts of a layer that the model does not have by config.json. They are
    /// stored as they are and not used.
    Unexpected {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Tensors of layers that the model does not have by config.json and that are not recognised as
    /// layers for multi-token prediction. They are not stored.
    BeyondLayers {
        /// Layers by config.json.
        layers: u32,
        /// Their names.
        tensors: Vec<String>,
    },
}

/// A tensor that is not stored.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Its name in the checkpoint.
    pub name: String,
    /// The reason.
    pub why: String,
}

impl LeftOut {
    pub(super) fn new(name: String, why: &str) -> Self {
        Self { name, why: why.to_owned() }
    }
}

impl Notice {
    /// The note about names that are read in this way.
    pub(crate) fn renamed(naming: &Naming) -> Self {
        Self::Renamed { how: changes(naming) }
    }

    /// Whether the checkpoint may be wrong. Other notices are only information.
    pub fn is_warning(&self) -> bool {
        match self {
            Self::TiedHeadDiffers
            | Self::NothingQuantised
            | Self::IgnoredKeys { .. }
            | Self::NotRunnable { .. }
            | Self::FilesLeftOut { .. }
            | Self::TokensWithoutRows { .. }
            | Self::EmptyFiles { .. }
            | Self::GenerationConfigIgnored { .. }
            | Self::Unexpected { .. }
            | Self::BeyondLayers { .. } => true,
            Self::IndexIgnored
            | Self::TiedHeadDropped
            | Self::Renamed { .. }
            | Self::NoIndex { .. }
            | Self::NoTokenizer { .. }
            | Self::IndexDiffers { .. }
            | Self::Copies { .. }
            | Self::QuantisationIgnored { .. }
            | Self::LeftOut { .. }
            | Self::KeptUnused { .. } => false,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IndexIgnored => f.write_str(INDEX_IGNORED),
            Self::TiedHeadDropped => f.write_str(TIED_HEAD_DROPPED),
            Self::NothingQuantised => f.write_str("no tensor is quantised: the pack holds the weights as they are"),
            Self::TiedHeadDiffers => f.write_str(TIED_HEAD_DIFFERS),
            Self::Renamed { how } => write!(f, "the names of the tensors are stored {how}"),
            Self::IgnoredKeys { keys } => {
                write!(f, "config.json: {} has no effect, as in transformers", keys.join(", "))
            }
            Self::NotRunnable { why } => {
                write!(f, "the pack can be verified and exported, but not trained or generated from: {why}")
            }
            Self::NoIndex { shards } => {
                write!(f, "there is no model.safetensors.index.json: all {shards} shards are read, by their names")
            }
            Self::IndexDiffers { absent, unlisted, elsewhere } => index_differs(f, absent, unlisted, elsewhere),
            Self::QuantisationIgnored { method } => quantisation_ignored(f, method),
            Self::NoTokenizer { other } => no_tokenizer(f, other),
            Self::TokensWithoutRows { last, rows } => tokens_without_rows(f, *last, *rows),
            Self::EmptyFiles { files } => listed(f, "files without content are left out (download them again)", files),
            Self::GenerationConfigIgnored { why } => generation_config_ignored(f, why),
            Self::Copies { tensors } => listed(f, "in several shards with the same values, and stored once", tensors),
            Self::FilesLeftOut { files } => listed(f, "a pack cannot have files of these names, which are left out", files),
            Self::LeftOut { tensors } => left_out(f, tensors),
            Self::KeptUnused { tensors } => listed(f, "no part of the model, and kept as they are", tensors),
            Self::Unexpected { tensors } => listed(f, UNEXPECTED, tensors),
            Self::BeyondLayers { layers, tensors } => beyond_layers(f, *layers, tensors),
        }
    }
}

const INDEX_IGNORED: &str = "model.safetensors and model.safetensors.index.json are both present: model.safetensors is read, \
                             as transformers does, and the index with its shards is ignored";

const TIED_HEAD_DROPPED: &str = "lm_head.weight has the values of model.embed_tokens.weight and is tied to it \
                                 (tie_word_embeddings): they are stored once";

const TIED_HEAD_DIFFERS: &str = "config.json says tie_word_embeddings, but lm_head.weight differs from \
                                 model.embed_tokens.weight: both are kept, and lm_head.weight gives the logits, as in \
                                 transformers 5";

const UNEXPECTED: &str = "the model has no such tensors by config.json: they are kept as they are and not used, as in \
                          transformers";

fn quantisation_ignored(f: &mut fmt::Formatter<'_>, method: &str) -> fmt::Result {
    write!(
        f,
        "config.json has a quantization_config of the method {method:?}, but the weights are not quantised: it is not \
         followed, and an export leaves it out"
    )
}

fn no_tokenizer(f: &mut fmt::Formatter<'_>, other: &str) -> fmt::Result {
    write!(
        f,
        "tokenizer.json can be made of {other}: AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC) in Python; a \
         snapshot exported from the pack has none, either"
    )
}

fn tokens_without_rows(f: &mut fmt::Formatter<'_>, last: u64, rows: u32) -> fmt::Result {
    write!(
        f,
        "tokenizer.json has the token {last}, but the embedding has {rows} rows: texts with tokens from {rows} on are errors in \
         train, eval and generate (transformers: model.resize_token_embeddings(len(tokenizer)), then convert again)"
    )
}

fn generation_config_ignored(f: &mut fmt::Formatter<'_>, why: &str) -> fmt::Result {
    write!(
        f,
        "generation_config.json is not JSON ({why}): it is ignored, as in transformers, and config.json alone says which \
         tokens end a text"
    )
}

fn beyond_layers(f: &mut fmt::Formatter<'_>, layers: u32, tensors: &[String]) -> fmt::Result {
    write!(
        f,
        "the model has {layers} layers by config.json: tensors of further layers are left out, as transformers does: {}",
        Names(tensors)
    )
}

/// A sentence about tensors or files, and their names.
fn listed(f: &mut fmt::Formatter<'_>, text: &str, names: &[String]) -> fmt::Result {
    write!(f, "{text}: {}", Names(names))
}

/// The changes to the names.
fn changes(naming: &Naming) -> String {
    let replaced = naming.replaced.as_deref();
    let parts = [
        (!naming.wrappers.is_empty()).then(|| format!("without {}", naming.wrappers.join(", "))),
        replaced.filter(|prefix| prefix.is_empty()).map(|_| "with the \"model.\" that they lack".to_owned()),
        replaced.filter(|prefix| !prefix.is_empty()).map(|prefix| format!("with \"model.\" in place of {prefix:?}")),
        naming.head_inside.then(|| "with lm_head.weight outside of the decoder".to_owned()),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

/// Maximum number of names that a note shows.
const SHOWN: usize = 4;

/// The first names of a list, and the number of further ones.
struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(|name| name.escape_debug().to_string()).collect();
        f.write_str(&shown.join(", "))?;
        and_more(f, self.0.len())
    }
}

fn and_more(f: &mut fmt::Formatter<'_>, all: usize) -> fmt::Result {
    match all.saturating_sub(SHOWN) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

fn left_out(f: &mut fmt::Formatter<'_>, tensors: &[LeftOut]) -> fmt::Result {
    f.write_str("no part of the model, and left out: ")?;
    let one = |tensor: &LeftOut| format!("{} ({})", tensor.name.escape_debug(), tensor.why);
    f.write_str(&tensors.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", "))?;
    and_more(f, tensors.len())
}

fn index_differs(f: &mut fmt::Formatter<'_>, absent: &[String], unlisted: &[String], elsewhere: &[String]) -> fmt::Result {
    f.write_str("model.safetensors.index.json and the shards differ, and the shards decide, as in transformers")?;
    for (what, names) in
        [("listed, but in no shard", absent), ("not listed", unlisted), ("in another shard than listed", elsewhere)]
    {
        if !names.is_empty() {
            write!(f, "; {what}: {}", Names(names))?;
        }
    }
    Ok(())
}
