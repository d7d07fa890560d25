//! Norms and biases of the layers in float32, and the largest magnitudes of the projections. They
//! are computed in the first pass over a layer, then kept.

use crate::arch::config::ModelConfig;
use crate::arch::family::PROJECTIONS;
use crate::dequant::stream::StreamedLayer;
use crate::format::Role;
use crate::gpu::{BufferRange, Commands, Gpu, GpuError};
use crate::model::error::ModelError;
use crate::model::pass::Kernels;
use crate::model::weights::{elements, projection};
use crate::ops::matmul::Largest;
use crate::ops::{Mat, mat_bytes};

/// The bias of each projection, in the order of `family::PROJECTIONS`.
const BIASES: [Role; 7] = [Role::QBias, Role::KBias, Role::VBias, Role::OBias, Role::GateBias, Role::UpBias, Role::DownBias];
/// Alignment of a matrix in the buffer of a layer.
const ALIGN: u64 = 256;

/// Norms and biases of a layer in float32, one row each.
#[derive(Debug)]
pub(super) struct Constants {
    pub input_norm: Mat,
    pub post_attention_norm: Mat,
    pub query_norm: Option<Mat>,
    pub key_norm: Option<Mat>,
    pub attention_output_norm: Option<Mat>,
    pub feed_forward_output_norm: Option<Mat>,
    /// Of the projections in the order of `family::PROJECTIONS`.
    pub biases: [Option<Mat>; 7],
    /// The largest magnitude of each projection, in the same order, for matrix units.
    largest: BufferRange,
    /// Whether a submitted list has converted them.
    converted: bool,
}

/// The columns of each tensor. 0: the model does not have it.
fn columns(model: &ModelConfig) -> [(Role, u32); 13] {
    let &ModelConfig { hidden, intermediate, head_dim, .. } = model;
    let (queries, keys) = (model.queries(), model.keys());
    let (qkv, o, mlp) = (u32::from(model.qkv_bias), u32::from(model.o_bias), u32::from(model.mlp_bias));
    let per_head = head_dim * u32::from(model.q_k_norm);
    let biases = [qkv * queries, qkv * keys, qkv * keys, o * hidden, mlp * intermediate, mlp * intermediate, mlp * hidden];
    let [q, k, v, out, gate, up, down] = std::array::from_fn(|i| (BIASES[i], biases[i]));
    let norms = [Role::InputNorm, Role::PostAttentionNorm].map(|role| (role, hidden));
    let [input, middle] = norms;
    let of_output = |role| (role, hidden * u32::from(model.family.part(role).is_some()));
    let [attention, feed_forward] = [Role::AttentionOutputNorm, Role::FeedForwardOutputNorm].map(of_output);
    [input, middle, (Role::QNorm, per_head), (Role::KNorm, per_head), attention, feed_forward, q, k, v, out, gate, up, down]
}

/// Bytes of the buffer of a layer.
fn layer_bytes(model: &ModelConfig) -> u64 {
    columns(model).iter().map(|&(_, cols)| mat_bytes(1, cols).next_multiple_of(ALIGN)).sum::<u64>() + ALIGN
}

impl Constants {
    /// Reserves the memory of all layers.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn reserve(gpu: &Gpu, model: &ModelConfig) -> Result<Vec<Self>, GpuError> {
        (0..model.layers).map(|_| Self::of_layer(gpu, model)).collect()
    }

    /// The bytes that [`Constants::reserve`] reserves.
    pub fn bytes(model: &ModelConfig) -> u64 {
        layer_bytes(model).saturating_mul(model.layers.into())
    }

    fn of_layer(gpu: &Gpu, model: &ModelConfig) -> Result<Self, GpuError> {
        let all = BufferRange::whole(gpu.storage("norms and biases", layer_bytes(model))?);
        let mut offset = 0;
        let mut rows = columns(model).map(|(_, cols)| {
            let bytes = mat_bytes(1, cols);
            let range = all.slice(offset, bytes);
            offset += bytes.next_multiple_of(ALIGN);
            Mat { range, rows: 1, cols }
        });
        let largest = all.slice(offset, 4 * PROJECTIONS.len() as u64);
        let [input_norm, post_attention_norm, others @ ..] = &mut rows;
        let others = others.clone().map(|mat| (mat.cols > 0).then_some(mat));
        let [query_norm, key_norm, attention_output_norm, feed_forward_output_norm, biases @ ..] = others;
        let [input_norm, post_attention_norm] = [input_norm.clone(), post_attention_norm.clone()];
        Ok(Self {
            input_norm,
            post_attention_norm,
            query_norm,
            key_norm,
            attention_output_norm,
            feed_forward_output_norm,
            biases,
            largest,
            converted: false,
        })
    }

    /// Where the largest magnitude of a projection is, by its index in `family::PROJECTIONS`.
    pub fn largest(&self, index: usize) -> Largest {
        Largest { range: self.largest.clone(), at: index as u32 }
    }

    /// Records the conversion of the tensors of `layer`, and the measurement of its projections,
    /// unless it was done in an earlier pass.
    pub fn record(
        &self,
        kernels: &Kernels,
        model: &ModelConfig,
        commands: &mut Commands,
        layer: &StreamedLayer,
    ) -> Result<(), ModelError> {
        if self.converted {
            return Ok(());
        }
        let norms = [
            (Role::InputNorm, Some(&self.input_norm)),
            (Role::PostAttentionNorm, Some(&self.post_attention_norm)),
            (Role::QNorm, self.query_norm.as_ref()),
            (Role::KNorm, self.key_norm.as_ref()),
            (Role::AttentionOutputNorm, self.attention_output_norm.as_ref()),
            (Role::FeedForwardOutputNorm, self.feed_forward_output_norm.as_ref()),
        ];
        // Added to the weights of norms.
        let offset = model.family.norm.weight_offset as f32;
        let norms = norms.into_iter().map(|(role, target)| (role, target, offset));
        let biases = BIASES.into_iter().zip(&self.biases).map(|(role, target)| (role, target.as_ref(), 0.0));
        for (role, target, offset) in norms.chain(biases) {
            let Some(target) = target else { continue };
            kernels.gather.to_f32(commands, elements(layer, role, &[target.cols.into()])?, target)?;
            kernels.scale.offset(commands, offset, target)?;
        }
        commands.clear(&self.largest);
        for (index, role) in PROJECTIONS.into_iter().enumerate() {
            let rows = model.rows_of(role).ok_or(ModelError::MissingTensor { layer: layer.number, role })?;
            kernels.matmul.measure(commands, &projection(layer, &rows)?, &self.largest(index))?;
        }
        Ok(())
    }

    /// Whether they were converted in an earlier pass.
    pub fn is_converted(&self) -> bool {
        self.converted
    }

    /// Notes that the commands of [`Constants::record`] were submitted.
    pub fn submitted(&mut self) {
        self.converted = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_the_rows_of_its_model() {
        let config = std::fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap();
        let qwen3 = ModelConfig::parse(&config, None).unwrap();
        assert!(qwen3.q_k_norm && !qwen3.qkv_bias);
        let found: Vec<u32> = columns(&qwen3).map(|(_, cols)| cols).into_iter().filter(|&cols| cols > 0).collect();
        assert_eq!(found, [qwen3.hidden, qwen3.hidden, qwen3.head_dim, qwen3.head_dim]);
        let biased = ModelConfig { q_k_norm: false, qkv_bias: true, o_bias: true, mlp_bias: true, ..qwen3.clone() };
        let bias = |wanted| columns(&biased).into_iter().find(|(role, _)| *role == wanted).map(|(_, cols)| cols);
        assert_eq!(bias(Role::QBias), Some(qwen3.queries()));
        assert_eq!(bias(Role::VBias), Some(qwen3.keys()));
        assert_eq!((bias(Role::OBias), bias(Role::DownBias)), (Some(qwen3.hidden), Some(qwen3.hidden)));
        assert_eq!((bias(Role::GateBias), bias(Role::QNorm)), (Some(qwen3.intermediate), Some(0)));
        assert_eq!(Constants::bytes(&qwen3) % (256 * u64::from(qwen3.layers)), 0);
        assert_eq!(Constants::bytes(&ModelConfig { layers: 2, ..qwen3.clone() }), 2 * layer_bytes(&qwen3));
    }
}
