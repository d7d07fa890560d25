//! An adapter in GPU memory: a vector of parameters and a vector of gradients.

use crate::arch::config::TensorRows;
use crate::arch::family::PROJECTIONS;
use crate::gpu::Gpu;
use crate::lora::config::{AdapterLayout, LoraConfig, target_index};
use crate::ops::OpError;
use crate::ops::{DropoutKey, Mat};

/// Which inputs of the adapters a pass drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    /// The run's seed.
    pub seed: u64,
    /// Micro-batches before this one in the run.
    pub micro_batch: u64,
}

/// An adapter in GPU memory.
#[derive(Debug)]
pub struct GpuAdapter {
    pub(crate) layout: AdapterLayout,
    scale: f32,
    dropout: f32,
    /// [1, layout.len()].
    pub(crate) parameters: Mat,
    /// Shaped as the parameters; `None` where nothing is trained.
    pub(crate) gradient: Option<Mat>,
}

/// The adapter of a projection.
#[derive(Debug, Clone)]
pub(crate) struct Lora {
    /// [rank, inputs].
    pub a: Mat,
    /// [outputs, rank].
    pub b: Mat,
    /// The factor on B (A x).
    pub scale: f32,
    /// The gradients of A and B, where they are asked for.
    pub gradient: Option<[Mat; 2]>,
    /// The probability of a dropped input, and which of them are.
    pub dropout: Option<(f32, DropoutKey)>,
}

impl GpuAdapter {
    /// Copies an adapter to the device, with room for its gradient if it is `trained`.
    ///
    /// # Errors
    /// [`OpError::Shape`] where `vector` is not of this layout, [`OpError::Gpu`].
    pub fn new(
        gpu: &Gpu,
        config: &LoraConfig,
        layout: &AdapterLayout,
        vector: &[f32],
        trained: bool,
    ) -> Result<Self, OpError> {
        let (expected, what) = (u32::MAX.into(), "the number of floats");
        let found = layout.len() as u64;
        let too_large = |_| OpError::Shape { operation: "adapter", what, expected, found };
        let count = u32::try_from(layout.len()).map_err(too_large)?;
        let parameters = Mat::from_slice(gpu, "adapter", 1, count, vector)?;
        let gradient = trained.then(|| Mat::new(gpu, "gradient", 1, count)).transpose()?;
        let (scale, dropout) = (config.scale() as f32, config.dropout as f32);
        Ok(Self { layout: layout.clone(), scale, dropout, parameters, gradient })
    }

    /// The adapter of a projection, if its tensor has one. The projections of a fused tensor share
    /// A, and each has its rows of B. Inputs are dropped where there is a `mask`.
    pub(crate) fn lora(&self, layer: u32, of: &TensorRows, mask: Option<Mask>) -> Option<Lora> {
        let place = self.layout.place(layer, of.tensor)?;
        let rank = self.layout.rank();
        let matrices = |vector: &Mat| {
            let a = vector.range.slice(4 * place.a.start as u64, 4 * place.a.len() as u64);
            let b = vector.range.slice(4 * place.b.start as u64, 4 * place.b.len() as u64);
            let b = Mat { range: b, rows: place.outputs, cols: rank };
            [Mat { range: a, rows: rank, cols: place.inputs }, b.window(of.first, of.count)]
        };
        let module = layer * PROJECTIONS.len() as u32 + target_index(of.tensor);
        let key = |Mask { seed, micro_batch }| DropoutKey { seed, step: micro_batch, module, window: 0 };
        let [a, b] = matrices(&self.parameters);
        let dropout = mask.filter(|_| self.dropout > 0.0).map(|mask| (self.dropout, key(mask)));
        Some(Lora { a, b, scale: self.scale, gradient: self.gradient.as_ref().map(matrices), dropout })
    }
}
