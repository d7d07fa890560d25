//! Checkpoints and packs of random weights in the shape of a real model, for benchmarks and tests
//! where none can be downloaded.

mod pack;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use super::report::Progress;
use crate::arch::family::Part;
use crate::arch::names::Prefix;
use crate::arch::{ConfigError, ModelConfig};
use crate::io::{AlignedBuf, sync_dir, write_all_at};

#[cfg(feature = "cli")]
pub(crate) use pack::{model_index, random_bytes, random_scales, write_matrices};
pub use pack::{write_model_pack, write_pack};

/// Standard deviation of the weights: the `initializer_range` of Qwen3.
const STD: f32 = 0.02;
/// Bytes that are generated and written at a time.
const CHUNK_LEN: usize = 1 << 20;
/// Bytes of a bfloat16.
const ELEMENT_LEN: u64 = 2;

/// The sizes of a Qwen3 or Llama model, in elements; its tensors are bfloat16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the feed-forward network.
    pub intermediate: u64,
    /// Number of layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Tokens in the vocabulary.
    pub vocabulary: u64,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Whether queries and keys have norms: those of Qwen3 have them, those of Llama do not.
    pub q_k_norm: bool,
}

impl Shape {
    /// The names that [`Shape::from_name`] knows.
    pub const NAMES: [&'static str; 5] = ["tiny", "qwen3-0.6b", "qwen3-4b", "qwen3-32b", "llama-3.1-8b"];

    /// The shape of a known model; `tiny` is a toy with every kind of tensor.
    pub fn from_name(name: &str) -> Option<Self> {
        let (hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary) = match name {
            "tiny" => (192, 512, 4, 4, 2, 64, 2048),
            "qwen3-0.6b" => (1024, 3072, 28, 16, 8, 128, 151_936),
            "qwen3-4b" => (2560, 9728, 36, 32, 8, 128, 151_936),
            "qwen3-32b" => (5120, 25_600, 64, 64, 8, 128, 151_936),
            "llama-3.1-8b" => (4096, 14_336, 32, 32, 8, 128, 128_256),
            _ => return None,
        };
        let (tied, q_k_norm) = (!matches!(name, "qwen3-32b" | "llama-3.1-8b"), name != "llama-3.1-8b");
        Some(Self { hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied, q_k_norm })
    }

    /// The config.json of a model of this shape.
    pub fn config(&self) -> Value {
        let (architecture, rope_theta) =
            if self.q_k_norm { ("Qwen3ForCausalLM", 1_000_000) } else { ("LlamaForCausalLM", 500_000) };
        json!({
            "architectures": [architecture],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 40960,
            "model_type": self.model_type(),
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": null,
            "rope_theta": rope_theta,
            "sliding_window": null,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocabulary,
        })
    }

    fn model_type(&self) -> &'static str {
        if self.q_k_norm { "qwen3" } else { "llama" }
    }

    /// Name and shape of every tensor, in the order of the files.
    pub fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        tensors_of(&self.config()).unwrap_or_default()
    }
}

/// Name and shape of every tensor of the model that a config.json describes, in the order of its
/// layers.
///
/// # Errors
/// A [`ConfigError`] where it describes none.
pub fn tensors_of(config: &Value) -> Result<Vec<(String, Vec<u64>)>, ConfigError> {
    let model = ModelConfig::read(config.as_object().unwrap_or(&Map::new()), None)?;
    let tensor = |(part, layer): (&Part, _)| (Prefix::PLAIN.name(part.scope, layer, part.name), model.shape(part));
    Ok(model.parts().map(tensor).collect())
}

/// A tensor to be written.
struct Tensor {
    name: String,
    shape: Vec<u64>,
    /// Bytes.
    len: u64,
    /// Start of its random numbers, so that its values depend neither on the shards nor on the
    /// other tensors.
    seed: u64,
}

/// Writes a snapshot of `shape` into the folder `dir`, which is created, or must be empty: one
/// `model.safetensors`, or shards of at most `shard_bytes` of data (but at least one tensor) with
/// an index. The same seed gives the same weights, however they are sharded: about normal, with a
/// standard deviation of 0.02 around 0, and around 1 in norms. Gives the number of bytes in weights
/// files. Memory stays at a few MiB; all is synced to disk at the end, so that the write-back does
/// not disturb what is measured next.
///
/// # Errors
///
/// `AlreadyExists` where `dir` is not empty; `Interrupted` where `progress`, which counts bytes of
/// weights, says so; otherwise what the operating system says.
pub fn write(dir: &Path, shape: &Shape, seed: u64, shard_bytes: Option<u64>, progress: &impl Progress) -> io::Result<u64> {
    write_model(dir, &shape.config(), seed, shard_bytes, progress)
}

/// [`write()`] for the model that a config.json describes, of any family.
///
/// # Errors
/// Those of [`write()`]; `InvalidInput` where it describes no model.
pub fn write_model(
    dir: &Path,
    config: &Value,
    seed: u64,
    shard_bytes: Option<u64>,
    progress: &impl Progress,
) -> io::Result<u64> {
    let tensors = tensors_of(config).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    fs::create_dir_all(dir)?;
    if fs::read_dir(dir)?.next().is_some() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is not empty", dir.display())));
    }
    fs::write(dir.join("config.json"), pretty(config)?)?;
    let shards = shards(tensors, seed, shard_bytes);
    let (total, done) = (shards.iter().flatten().map(|tensor| tensor.len).sum(), Cell::new(0));
    let advance = |bytes: u64| {
        done.set(done.get() + bytes);
        progress.advance(done.get(), total);
        if progress.cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    };
    let values = [quantiles(0.0), quantiles(1.0)];
    let mut written = 0;
    let mut index = BTreeMap::new();
    for (i, tensors) in shards.iter().enumerate() {
        let name = match shard_bytes {
            Some(_) => format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()),
            None => "model.safetensors".to_owned(),
        };
        written += write_file(&dir.join(&name), tensors, &values, &advance)?;
        index.extend(tensors.iter().map(|tensor| (&tensor.name, name.clone())));
    }
    if shard_bytes.is_some() {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": index });
        fs::write(dir.join("model.safetensors.index.json"), pretty(&index)?)?;
    }
    sync_dir(dir)?;
    Ok(written)
}

fn pretty(value: &Value) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// The tensors, cut into shards.
fn shards(tensors: Vec<(String, Vec<u64>)>, seed: u64, shard_bytes: Option<u64>) -> Vec<Vec<Tensor>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for (i, (name, shape)) in tensors.into_iter().enumerate() {
        let len = ELEMENT_LEN * shape.iter().product::<u64>();
        if filled > 0 && shard_bytes.is_some_and(|most| filled + len > most) {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += len;
        if let Some(shard) = shards.last_mut() {
            shard.push(Tensor { name, shape, len, seed: mix(mix(seed) ^ i as u64) });
        }
    }
    shards
}

/// Writes one safetensors file, with the values for weights and for norms, and gives its length;
/// `advance` is called for each run of bytes.
fn write_file(
    path: &Path,
    tensors: &[Tensor],
    [weights, norms]: &[Vec<[u8; 2]>; 2],
    advance: &dyn Fn(u64) -> io::Result<()>,
) -> io::Result<u64> {
    let mut header = BTreeMap::from([("__metadata__", json!({ "format": "pt" }))]);
    let mut end = 0;
    for Tensor { name, shape, len, .. } in tensors {
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [end, end + len] }));
        end += len;
    }
    let mut json = serde_json::to_vec(&header)?;
    // The data starts on a multiple of 8 bytes, as the safetensors crate has it.
    json.resize(json.len().next_multiple_of(8), b' ');
    let file = File::create_new(path)?;
    write_all_at(&file, &(json.len() as u64).to_le_bytes(), 0)?;
    write_all_at(&file, &json, 8)?;
    let mut offset = 8 + json.len() as u64;
    let mut buf = AlignedBuf::new(CHUNK_LEN);
    for tensor in tensors {
        let end = offset + tensor.len;
        let values = if tensor.shape.len() == 1 { norms } else { weights };
        let mut state = tensor.seed;
        while offset < end {
            let chunk = buf.first_mut(usize::try_from(end - offset).unwrap_or(CHUNK_LEN).min(CHUNK_LEN));
            state = fill(chunk, state, values);
            write_all_at(&file, chunk, offset)?;
            offset += chunk.len() as u64;
            advance(chunk.len() as u64)?;
        }
    }
    file.sync_data()?;
    Ok(offset)
}

/// Step of the counter of [`mix`]: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea, Flood, 2014): fast, and good enough for weights
/// that nobody learns from.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The values that weights are drawn from, as little-endian bfloat16: the 2^16 quantiles of a
/// normal distribution. A look-up is several times as fast as computing a normal sample, and
/// reaches 4.3 standard deviations.
fn quantiles(mean: f32) -> Vec<[u8; 2]> {
    // Winitzki's approximation of the inverse error function, good to 2 parts in 1000.
    const A: f64 = 0.147;
    let value = |i: u32| {
        let x = (f64::from(i) + 0.5) / 32_768.0 - 1.0;
        let log = (1.0 - x * x).ln();
        let half = 2.0 / (std::f64::consts::PI * A) + log / 2.0;
        let inverse_erf = ((half * half - log / A).sqrt() - half).sqrt().copysign(x);
        bf16::from_f32(mean + STD * (std::f64::consts::SQRT_2 * inverse_erf) as f32).to_le_bytes()
    };
    (0..1 << 16).map(value).collect()
}

/// Fills `bytes` with values of `quantiles`, four per random number; returns the state for the next
/// call. Chunks of a multiple of 8 bytes therefore give the same values as one long chunk.
fn fill(bytes: &mut [u8], mut state: u64, quantiles: &[[u8; 2]]) -> u64 {
    for group in bytes.chunks_mut(8) {
        state = state.wrapping_add(STEP);
        let mut bits = mix(state);
        for value in group.chunks_exact_mut(2) {
            value.copy_from_slice(&quantiles[(bits & 0xffff) as usize]);
            bits >>= 16;
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::parts::place;
    use crate::convert::source::Checkpoint;

    #[test]
    fn a_synthetic_checkpoint_is_a_model_and_its_weights_do_not_depend_on_the_shards() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, sharded) = (dir.path().join("whole"), dir.path().join("sharded"));
        let shape = Shape::from_name("tiny").unwrap();
        let written = write(&whole, &shape, 7, None, &()).unwrap();
        assert_eq!(written, fs::metadata(whole.join("model.safetensors")).unwrap().len());
        write(&sharded, &shape, 7, Some(1 << 20), &()).unwrap();
        assert_eq!(write(&whole, &shape, 7, None, &()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);

        let (whole, sharded) = (Checkpoint::open(&whole, None).unwrap(), Checkpoint::open(&sharded, None).unwrap());
        assert!(sharded.files.len() > 2);
        assert_eq!(place(&whole).unwrap().model.tensors.len(), 4 * 11 + 2);
        assert_eq!(whole.tensors.len(), sharded.tensors.len());
        for tensor in &whole.tensors {
            let other = sharded.tensors.iter().find(|other| other.name == tensor.name).unwrap();
            let (mut a, mut b) = (vec![0; tensor.length as usize], vec![0; other.length as usize]);
            whole.read(tensor, 0, &mut a).unwrap();
            sharded.read(other, 0, &mut b).unwrap();
            assert_eq!(a, b, "{}", tensor.name);
        }
    }

    #[test]
    fn writing_reports_its_progress_and_can_be_stopped() {
        /// Says to stop at half of the bytes.
        #[derive(Default)]
        struct Half(std::sync::Mutex<Vec<(u64, u64)>>);
        impl Progress for Half {
            fn advance(&self, done: u64, total: u64) {
                self.0.lock().unwrap().push((done, total));
            }
            fn cancelled(&self) -> bool {
                self.0.lock().unwrap().last().is_some_and(|&(done, total)| 2 * done > total)
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let half = Half::default();
        let stopped = write(&dir.path().join("half"), &Shape::from_name("tiny").unwrap(), 7, None, &half).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
        let reported = half.0.into_inner().unwrap();
        let bytes: u64 =
            Shape::from_name("tiny").unwrap().tensors().iter().map(|(_, s)| 2 * s.iter().product::<u64>()).sum();
        assert!(reported.is_sorted() && reported.iter().all(|&(_, total)| total == bytes), "{reported:?}");
        assert!(reported.last().unwrap().0 < bytes, "the rest was not written");
    }

    #[test]
    fn weights_have_the_mean_and_the_standard_deviation_they_should() {
        let mut bytes = vec![0; 2_000_000];
        fill(&mut bytes, mix(3), &quantiles(0.0));
        let values: Vec<f64> = bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 1e-4, "mean {mean}");
        assert!((std - 0.02).abs() < 1e-4, "standard deviation {std}");
    }

    #[test]
    fn the_projections_of_qwen3_4b_have_the_documented_size() {
        let shape = Shape::from_name("qwen3-4b").unwrap();
        let tensors = shape.tensors();
        let layer = tensors.iter().filter(|(name, _)| name.starts_with("model.layers.0.") && name.contains("_proj"));
        assert_eq!(layer.map(|(_, shape)| shape.iter().product::<u64>()).sum::<u64>(), 100_925_440);
        assert!(Shape::NAMES.iter().all(|name| Shape::from_name(name).is_some()));
        // As published: 8.03 and 32.8 billion parameters.
        for (name, parameters) in [("llama-3.1-8b", 8_030_261_248), ("qwen3-32b", 32_762_123_264)] {
            let tensors = Shape::from_name(name).unwrap().tensors();
            assert_eq!(tensors.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum::<u64>(), parameters, "{name}");
        }
    }
}
