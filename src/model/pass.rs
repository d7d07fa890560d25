//! The shared parts of all layers in a pass: the kernels of the device, the batch, and the angles
//! of the rotary embedding.

use crate::arch::config::{LayerAttention, ModelConfig, Rope, RopeScaling};
use crate::data::pack::Batch;
use crate::dequant::copy_baseline::CopyKernel;
use crate::gpu::{BufferRange, Gpu};
use crate::lora::gpu::{GpuAdapter, Mask};
use crate::model::error::ModelError;
use crate::model::kv_cache::Past;
use crate::model::workspace::Workspace;
use crate::ops::matmul::{Matmul, PackedGlu, PackedHalves, PackedNorm};
use crate::ops::{
    Attention, ChunkedLoss, Dropout, Gather, Glu, Halves, Mat, NormRotary, OpError, RmsNorm, Rotary, Scale, StoredGlu,
    inverse_frequencies,
};

/// The operations of a device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub copy: CopyKernel,
    pub gather: Gather,
    pub scale: Scale,
    pub norm: RmsNorm,
    pub rotary: Rotary,
    pub norm_rotary: NormRotary,
    pub attention: Attention,
    pub glu: Glu,
    pub dropout: Dropout,
    pub matmul: Matmul,
    pub loss: ChunkedLoss,
    /// On devices with matrix units.
    pub halves: Option<HalfKernels>,
}

/// The operations of activations in f16, and those that write operands of products on matrix units.
#[derive(Debug)]
pub(super) struct HalfKernels {
    pub mats: Halves,
    pub glu: StoredGlu,
    pub packed_mats: PackedHalves,
    pub packed_norm: PackedNorm,
    pub packed_glu: PackedGlu,
}

impl Kernels {
    pub fn new(gpu: &Gpu, model: &ModelConfig) -> Result<Self, ModelError> {
        let glu = Glu::new(gpu, model.family.activation)?;
        let halves = || {
            let mats = Halves::new(gpu)?;
            let glu = StoredGlu::new(gpu, model.family.activation, &mats, &glu)?;
            let (packed_mats, packed_norm) = (PackedHalves::new(gpu)?, PackedNorm::new(gpu)?);
            let packed_glu = PackedGlu::new(gpu, model.family.activation)?;
            Ok::<_, ModelError>(HalfKernels { mats, glu, packed_mats, packed_norm, packed_glu })
        };
        let halves = gpu.matrix_units().is_ok().then(halves).transpose()?;
        Ok(Self {
            copy: CopyKernel::new(gpu)?,
            gather: Gather::new(gpu)?,
            scale: Scale::new(gpu)?,
            norm: RmsNorm::new(gpu)?,
            rotary: Rotary::new(gpu)?,
            norm_rotary: NormRotary::new(gpu)?,
            attention: Attention::new(gpu, model.head_dim, gpu.matrix_units().ok())?,
            glu,
            dropout: Dropout::new(gpu)?,
            matmul: Matmul::new(gpu, gpu.matrix_units().ok())?,
            loss: ChunkedLoss::new(gpu)?,
            halves,
        })
    }
}

/// The inputs of a pass: a batch, the memory of its tensors, and an adapter.
#[derive(Debug)]
pub(crate) struct PassInputs<'a> {
    pub work: Workspace<Mat>,
    pub batch: GpuBatch,
    pub adapter: Option<&'a GpuAdapter>,
    /// The dropout of a training step.
    pub mask: Option<Mask>,
    /// The cached tokens before the batch, which is then one sample.
    pub past: Option<Past<'a>>,
}

impl PassInputs<'_> {
    /// Whether gradients follow the forward pass.
    pub fn is_training(&self) -> bool {
        self.mask.is_some() && self.work.backward.is_some()
    }

    /// The same inputs with this mask.
    pub fn masked(self, mask: Option<Mask>) -> Self {
        Self { mask, ..self }
    }
}

/// The shared parts of all layers in a pass.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub kernels: &'a Kernels,
    pub model: &'a ModelConfig,
    /// [`Pass::angles`] selects the table of a layer and a batch.
    pub rotary: &'a Angles,
    pub inputs: &'a PassInputs<'a>,
}

/// Cosines and sines of every position, for texts of any length.
#[derive(Debug)]
pub(super) struct Angles {
    /// Of all layers, or of those without a window.
    full: Mat,
    /// Of layers with a window, if they differ.
    windowed: Option<Mat>,
}

impl Angles {
    /// The angles of the first `positions` positions. With dynamic scaling, these are the angles of
    /// short texts: see [`OwnAngles`].
    pub fn upload(gpu: &Gpu, model: &ModelConfig, positions: u32) -> Result<Self, OpError> {
        let table = |rope: &Rope| inverse_frequencies(rope.theta, rope.dim, &rope.scaling, 1).upload(gpu, positions);
        Ok(Self { full: table(&model.rope)?, windowed: model.windowed_rope.as_ref().map(table).transpose()? })
    }

    /// The number of positions.
    pub fn positions(&self) -> u32 {
        self.full.rows
    }

    /// Bytes of the angles of one position.
    pub fn bytes(model: &ModelConfig) -> u64 {
        let dims = [Some(&model.rope), model.windowed_rope.as_ref()].into_iter().flatten().map(|rope| u64::from(rope.dim));
        4 * dims.sum::<u64>()
    }
}

/// A batch in GPU memory: a u32 for each token.
#[derive(Debug)]
pub(crate) struct GpuBatch {
    pub ids: BufferRange,
    /// The ids on the host. Empty if only the device knows them.
    pub tokens: Vec<u32>,
    /// The next token, or [`IGNORE_INDEX`](crate::ops::IGNORE_INDEX).
    pub labels: BufferRange,
    /// The first token of its sample.
    pub starts: BufferRange,
    /// Angles by the length of each text, if a text of the batch is too long for the shared table.
    own_angles: Option<OwnAngles>,
}

/// The own cosines and sines of a batch: a row for each token.
#[derive(Debug)]
pub(super) struct OwnAngles {
    table: Mat,
    /// Zero for each token: rows count from the first token of the batch.
    starts: BufferRange,
}

impl OwnAngles {
    /// The angles of a batch. Each token is given by its position and the length of its text.
    /// `None` if the shared table has all of these angles.
    pub fn new(gpu: &Gpu, model: &ModelConfig, positions: &[(u32, u32)]) -> Result<Option<Self>, ModelError> {
        let RopeScaling::Dynamic { max_position_embeddings: unscaled, .. } = model.rope.scaling else { return Ok(None) };
        if positions.iter().all(|&(_, length)| f64::from(length) <= unscaled) {
            return Ok(None);
        }
        let rope = &model.rope;
        let mut angles = Vec::with_capacity(positions.len() * rope.dim as usize);
        for text in positions.chunk_by(|(_, a), (_, b)| a == b) {
            let length = text.first().map_or(0, |&(_, length)| length);
            let table = inverse_frequencies(rope.theta, rope.dim, &rope.scaling, length);
            text.iter().for_each(|&(position, _)| table.push_angles(position, &mut angles));
        }
        let tokens = positions.len() as u32;
        let table = Mat::from_slice(gpu, "rotary angles", tokens, rope.dim, &angles)?;
        let zeros = vec![0_u8; 4 * positions.len()];
        let starts = BufferRange { buffer: gpu.storage_with("starts", &zeros)?, offset: 0, size: zeros.len() as u64 };
        Ok(Some(Self { table, starts }))
    }
}

/// The position of each token in its sample, and the length of the sample.
pub(super) fn positions(batch: &Batch) -> Vec<(u32, u32)> {
    let samples = batch.starts.chunk_by(|a, b| a == b);
    samples.flat_map(|sample| (0..sample.len() as u32).map(move |position| (position, sample.len() as u32))).collect()
}

impl Pass<'_> {
    /// Cosines and sines of a layer, and for each token the token from which their rows count.
    pub fn angles(&self, layer: LayerAttention) -> (&Mat, &BufferRange) {
        match (&self.inputs.batch.own_angles, self.windowed_angles(layer)) {
            (_, Some(windowed)) => (windowed, &self.inputs.batch.starts),
            (Some(own), None) => (&own.table, &own.starts),
            (None, None) => (&self.rotary.full, &self.inputs.batch.starts),
        }
    }

    /// Cosines and sines of a layer for tokens after `past` cached tokens, and the row of the first
    /// token.
    pub fn angles_after(&self, layer: LayerAttention, past: u32) -> (&Mat, u32) {
        match (&self.inputs.batch.own_angles, self.windowed_angles(layer)) {
            (_, Some(windowed)) => (windowed, past),
            (Some(own), None) => (&own.table, 0),
            (None, None) => (&self.rotary.full, past),
        }
    }

    /// The angles of a layer with a window, if they differ from the others. They have no dynamic
    /// scaling.
    fn windowed_angles(&self, layer: LayerAttention) -> Option<&Mat> {
        self.rotary.windowed.as_ref().filter(|_| layer.window.is_some())
    }
}

impl GpuBatch {
    pub(super) fn new(gpu: &Gpu, batch: &Batch, own_angles: Option<OwnAngles>) -> Result<Self, ModelError> {
        let upload = |label, words: &[u32]| {
            let buffer = gpu.storage_with(label, bytemuck::cast_slice(words))?;
            Ok::<_, ModelError>(BufferRange { buffer, offset: 0, size: 4 * words.len() as u64 })
        };
        let (ids, labels, starts) = (&batch.tokens, &batch.labels, &batch.starts);
        let (ids, labels, starts) = (upload("tokens", ids)?, upload("labels", labels)?, upload("starts", starts)?);
        Ok(Self { ids, tokens: batch.tokens.clone(), labels, starts, own_angles })
    }

    /// One token after the tokens of a KV cache. Its id is in GPU memory. A pass over a cache reads
    /// neither labels nor starts.
    pub(super) fn of_token(id: &BufferRange, own_angles: Option<OwnAngles>) -> Self {
        Self { ids: id.clone(), tokens: Vec::new(), labels: id.clone(), starts: id.clone(), own_angles }
    }
}
