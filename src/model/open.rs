//! Opens a model to run it without training: for losses, logits and texts.

use crate::arch::config::ModelConfig;
use crate::dequant::stream::{PackSource, default_budget};
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::lora::gpu::GpuAdapter;
use crate::model::error::ModelError;
use crate::model::plan::{
    Demand, KeepActivations, MemoryError, MemoryPlan, MicroBatch, OffloadActivations, OffloadVocabulary,
};
use crate::model::session::Session;

/// The passes that a model is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// Tokens of a row.
    pub length: u32,
    /// Rows of the data.
    pub rows: u64,
    /// Rows of a forward pass.
    pub micro_batch: MicroBatch,
    /// Tokens of the longest text. Fewer than a row has, or more if a text passes through the model
    /// in pieces.
    pub positions: u32,
    /// Bytes of the budget that are in use for other purposes.
    pub reserved: u64,
    /// Maximum bytes of GPU memory. `None`: the available memory of the device.
    pub budget: Option<u64>,
    /// The tensors of the vocabulary that are not in GPU memory. Passes over tokens that only the
    /// device knows need them there, and so do the logits of a last token.
    pub offload_vocabulary: OffloadVocabulary,
}

impl Passes {
    /// One row of `length` tokens, without a budget of its own.
    pub fn one_row(length: u32) -> Self {
        Self {
            length,
            rows: 1,
            micro_batch: MicroBatch::Rows(1),
            positions: length,
            reserved: 0,
            budget: None,
            offload_vocabulary: OffloadVocabulary::Off,
        }
    }

    /// Plans the memory for `model`, the model of `pack`, with or without an adapter.
    ///
    /// # Errors
    /// [`MemoryError`] if the plan does not fit the device or the budget.
    pub fn plan(
        &self,
        gpu: &Gpu,
        pack: &PackSource,
        model: &ModelConfig,
        adapter: Option<&Adapter>,
    ) -> Result<MemoryPlan, MemoryError> {
        let demand = Demand {
            index: pack.index(),
            model,
            max_buffer: gpu.limits().max_buffer_size,
            max_binding: gpu.limits().max_storage_buffer_binding_size,
            budget: self.budget.or_else(|| default_budget(gpu)),
            adapter: adapter.map_or(0, |adapter| adapter.layout.len() as u64),
            rank: adapter.map_or(0, |adapter| adapter.config.rank),
            dropout: false,
            training: false,
            keep_activations: KeepActivations::None,
            offload_activations: OffloadActivations::Off,
            offload_vocabulary: self.offload_vocabulary,
            host_buffers: false,
            host_memory: None,
            length: self.length,
            positions: self.positions,
            rows: self.rows,
            reserved: self.reserved,
            units: gpu.matrix_units().ok(),
        };
        MemoryPlan::new(&demand, self.micro_batch)
    }
}

impl MemoryPlan {
    /// Plans the memory for texts of up to `length` tokens, one at a time, for `model`, the model
    /// of `pack`, with or without an adapter.
    ///
    /// # Errors
    /// [`MemoryError`] if the plan does not fit the device.
    pub fn one_row(
        gpu: &Gpu,
        pack: &PackSource,
        model: &ModelConfig,
        adapter: Option<&Adapter>,
        length: u32,
    ) -> Result<Self, MemoryError> {
        Passes::one_row(length).plan(gpu, pack, model, adapter)
    }
}

impl Session {
    /// Opens the model of `pack` by a plan that was made with the same adapter.
    ///
    /// # Errors
    /// [`ModelError`] if the model, its adapter or its memory cannot be loaded.
    pub fn open(gpu: &Gpu, pack: PackSource, adapter: Option<&Adapter>, plan: &MemoryPlan) -> Result<Self, ModelError> {
        let (model, memory) = plan.reserve(gpu, pack)?;
        let upload = |a: &Adapter| GpuAdapter::new(gpu, &a.config, &a.layout, &a.vector, false);
        Ok(Self { model, adapter: adapter.map(upload).transpose()?, memory })
    }
}
