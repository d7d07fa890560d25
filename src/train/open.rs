//! A model opened to be run, not trained: for losses, logits and texts.

use super::adapter::Adapter;
use super::config::ModelConfig;
use super::error::TrainError;
use super::gpu_adapter::GpuAdapter;
use super::plan::{Demand, MemoryError, MemoryPlan, rotary_bytes};
use super::session::Session;
use super::settings::MicroBatch;
use crate::dequant::stream::{PackSource, default_budget};
use crate::gpu::Gpu;

/// What a model is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// Tokens of a row.
    pub length: u32,
    /// Rows that there are.
    pub rows: u64,
    /// Rows of a forward pass.
    pub micro_batch: MicroBatch,
    /// Tokens of the longest text: more than a row has where a text goes through the model piece by piece.
    pub positions: u32,
    /// Bytes that something else takes of the budget.
    pub beside: u64,
    /// Bytes of GPU memory that all of it may take; `None`: what the device has left.
    pub budget: Option<u64>,
}

impl Passes {
    /// One row of so many tokens, in all the memory that there is.
    pub fn of_one(length: u32) -> Self {
        Self { length, rows: 1, micro_batch: MicroBatch::Rows(1), positions: length, beside: 0, budget: None }
    }

    /// Plans the memory for `model`, that of `pack`, with an adapter or without.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], in which all bytes count; [`MemoryError::Stream`].
    pub fn plan(
        &self,
        gpu: &Gpu,
        pack: &PackSource,
        model: &ModelConfig,
        adapter: Option<&Adapter>,
    ) -> Result<MemoryPlan, MemoryError> {
        let positions = self.positions.max(self.length);
        let angles = rotary_bytes(model, positions) - rotary_bytes(model, self.length);
        let (budget, beside) = (self.budget.or_else(|| default_budget(gpu)), self.beside + angles);
        let demand = Demand {
            index: pack.index(),
            model,
            max_buffer: gpu.limits().max_buffer_size,
            max_binding: gpu.limits().max_storage_buffer_binding_size,
            budget: budget.map(|budget| budget.saturating_sub(beside)),
            adapter: adapter.map_or(0, |adapter| adapter.layout.len() as u64),
            rank: adapter.map_or(0, |adapter| adapter.config.rank),
            dropout: false,
            training: false,
            length: self.length,
            rows: self.rows,
        };
        let plan = MemoryPlan::new(&demand, self.micro_batch).map_err(|error| match error {
            MemoryError::Budget { needed, remedy, .. } => {
                MemoryError::Budget { budget: budget.unwrap_or(u64::MAX), needed: needed.saturating_add(beside), remedy }
            }
            error => error,
        })?;
        Ok(MemoryPlan { length: positions, scratch: plan.scratch + beside, budget, ..plan })
    }
}

impl Session {
    /// Opens the model of `pack` as [`Passes::plan`] has planned it, with the same adapter.
    ///
    /// # Errors
    /// As [`MemoryPlan::reserve`] and [`GpuAdapter::new`].
    pub fn open(gpu: &Gpu, pack: PackSource, adapter: Option<&Adapter>, plan: &MemoryPlan) -> Result<Self, TrainError> {
        let (model, memory) = plan.reserve(gpu, pack)?;
        let upload = |a: &Adapter| GpuAdapter::new(gpu, &a.config, &a.layout, &a.vector, false);
        Ok(Self { model, adapter: adapter.map(upload).transpose()?, memory })
    }
}
