//! The choice of a plan: how many rows a pass has, and how many layers keep their activations.

use super::options::{Choice, KeepActivations, MicroBatch, OffloadActivations, Slower};
use super::{Demand, MAX_AUTO_ROWS, MemoryError, MemoryPlan, Sizes};
use crate::dequant::stream::Globals;
use crate::model::workspace::{WorkspaceBytes, chunk};

/// Residual streams that are never offloaded: a layer reads one and writes the next. In the
/// backward pass, it reads one, and the one before it arrives.
const STREAMS_ON_DEVICE: u32 = 2;

/// Tokens that a pass could compute in the time that it takes besides its tokens. Measured: 512
/// tokens at 0.78 of the speed of 2,048.
const OVERHEAD_TOKENS: f64 = 256.0;
/// Share of a step in which the backward pass computes all layers again.
const RECOMPUTED: f64 = 0.25;

impl MemoryPlan {
    /// Plans a run with the requested rows, or with the rows that are estimated to be fastest: at
    /// most `MAX_AUTO_ROWS`, and one row if the budget is unknown. All layers are resident if a
    /// number of rows permits that. Otherwise, they are streamed through a ring, and more rows are
    /// faster.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Host`] and [`MemoryError::Matrix`], with a change
    /// that makes the run fit; [`MemoryError::Stream`].
    pub(crate) fn new(demand: &Demand<'_>, micro_batch: MicroBatch) -> Result<Self, MemoryError> {
        let (min, max) = match micro_batch {
            MicroBatch::Rows(rows) => (rows, rows),
            // With an unknown budget, it uses little.
            MicroBatch::Auto if demand.budget.is_none() => (1, 1),
            MicroBatch::Auto => (1, demand.rows.clamp(1, MAX_AUTO_ROWS.into()) as u32),
        };
        let fewest = Self::of_rows(demand, min).map_err(|error| error.with(demand.remedy(min)))?;
        let more = (min + 1..=max).filter_map(|rows| Self::of_rows(demand, rows).ok());
        let mut plans: Vec<Self> = [fewest.clone()].into_iter().chain(more).collect();
        if plans.iter().any(|plan| plan.stream.resident) {
            plans.retain(|plan| plan.stream.resident);
        }
        if plans.iter().any(|plan| plan.sizes.offloaded == 0) {
            plans.retain(|plan| plan.sizes.offloaded == 0);
        }
        if plans.iter().any(|plan| plan.copied_vocabulary == 0) {
            plans.retain(|plan| plan.copied_vocabulary == 0);
        }
        let speed = |plan: &Self| plan.speed(demand.model.layers);
        let fastest = plans.iter().max_by(|a, b| speed(a).total_cmp(&speed(b))).unwrap_or(&fewest);
        let most = plans.last().filter(|most| most.micro_batch != fastest.micro_batch);
        let slower = most.map(|most| Slower {
            micro_batch: most.micro_batch,
            kept_layers: most.kept_layers(),
            percent: (100.0 * speed(most) / speed(fastest)) as u32,
        });
        Ok(Self { slower, ..fastest.clone() })
    }

    /// The plan of `rows` rows that copies the fewest bytes between host and device in a pass, with
    /// the requested layers that keep their activations, and what is requested in host memory.
    pub(super) fn of_rows(demand: &Demand<'_>, rows: u32) -> Result<Self, MemoryError> {
        let mut best: Result<Self, MemoryError> = Err(MemoryError::Budget { budget: 0, needed: 0, remedy: None });
        let choices = demand.offload_vocabulary.choices(chunk(demand.model, rows.saturating_mul(demand.length)));
        for globals in choices {
            match (Self::with(demand, rows, globals), &best) {
                (Ok(plan), Ok(before)) if plan.copied() >= before.copied() => {}
                // The last choice takes the least memory.
                (Err(_), Ok(_)) => {}
                (plan, _) => best = plan,
            }
            if best.as_ref().is_ok_and(|plan| plan.copied() == 0) {
                break;
            }
        }
        best
    }

    /// The plan of `rows` rows with these global tensors in GPU memory.
    fn with(demand: &Demand<'_>, rows: u32, globals: Globals) -> Result<Self, MemoryError> {
        let all = demand.max_offloaded();
        let keeping = |offloaded| Self::keeping(demand, rows, offloaded, globals);
        match demand.offload_activations {
            _ if all == 0 => keeping(0),
            OffloadActivations::Off => keeping(0),
            OffloadActivations::On => keeping(all)?.within_host(demand),
            OffloadActivations::Auto => match keeping(0) {
                Ok(plan) if plan.stream.resident => Ok(plan),
                plain => {
                    let in_host = demand.offloaded_in_host(rows, all);
                    let found = Self::offloading(in_host, plain.ok(), keeping);
                    // More host memory may be all that is missing.
                    found.or_else(|error| match in_host < all {
                        true => Self::offloading(all, None, keeping)?.within_host(demand),
                        false => Err(error),
                    })
                }
            },
        }
    }

    /// The plan, if the host has the memory for it.
    fn within_host(self, demand: &Demand<'_>) -> Result<Self, MemoryError> {
        let needed = self.workspace.host;
        match demand.host_memory {
            Some(available) if needed > available => Err(MemoryError::Host { available, needed, remedy: None }),
            _ => Ok(self),
        }
    }

    /// The plan that copies the fewest bytes between host and device in a pass: `plain`, which
    /// streams layers, one that offloads as few streams as resident layers permit, or one that does
    /// both. `keeping` is the plan that offloads a number of streams, at most `all`.
    fn offloading(
        all: u32,
        plain: Option<Self>,
        keeping: impl Fn(u32) -> Result<Self, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let most_offloaded = keeping(all);
        if all == 0 {
            return most_offloaded;
        }
        let resident = |offloaded| keeping(offloaded).ok().filter(|plan| plan.stream.resident);
        // More streams on the device take more memory.
        let on_device = |fewer| resident(all - fewer);
        let fewest = most(all - 1, |fewer| on_device(fewer).is_some()).and_then(on_device);
        let plans = [plain, fewest.or_else(|| resident(all)), most_offloaded.as_ref().ok().cloned()];
        plans.into_iter().flatten().min_by_key(Self::copied).map_or(most_offloaded, Ok)
    }

    /// The plan of `rows` rows and `offloaded` streams, with the requested layers that keep their
    /// activations.
    fn keeping(demand: &Demand<'_>, rows: u32, offloaded: u32, globals: Globals) -> Result<Self, MemoryError> {
        let of = |kept| Self::of(demand, rows, Choice { kept, offloaded, globals });
        if let Some(kept) = demand.requested() {
            return of(kept);
        }
        let none = of(0)?;
        // With an unknown budget, it uses little. A ring of layers uses more memory for its slots.
        if demand.budget.is_none() || !none.stream.resident || offloaded > 0 {
            return Ok(none);
        }
        let resident = |kept| of(kept).ok().filter(|plan| plan.stream.resident);
        Ok(most(demand.model.layers, |kept| resident(kept).is_some()).and_then(resident).unwrap_or(none))
    }

    /// Bytes that a forward and a backward pass copy between host and device.
    fn copied(&self) -> u64 {
        let streamed = u64::from(self.stream.layers.saturating_sub(self.stream.slots));
        let layers = if self.stream.resident { 0 } else { streamed.saturating_mul(self.stream.layer_bytes) };
        layers.saturating_add(self.workspace.host).saturating_mul(2).saturating_add(self.copied_vocabulary)
    }

    /// The estimated speed in tokens per time, compared to other plans for the same layers.
    pub(super) fn speed(&self, layers: u32) -> f64 {
        let tokens = f64::from(self.sizes.tokens);
        let kept = f64::from(self.kept_layers()) / f64::from(layers.max(1));
        tokens / (tokens + OVERHEAD_TOKENS) / (1.0 - RECOMPUTED * kept)
    }
}

impl Demand<'_> {
    /// The requested layers that keep their activations. `None`: as many as fit.
    pub(super) fn requested(&self) -> Option<u32> {
        if self.training { self.keep_activations.requested(self.model.layers) } else { Some(0) }
    }

    /// The maximum number of residual streams in host memory.
    fn max_offloaded(&self) -> u32 {
        let possible = self.training && self.host_buffers;
        if possible { (self.model.layers + 1).saturating_sub(STREAMS_ON_DEVICE) } else { 0 }
    }

    /// The maximum number of residual streams of `rows` rows that fit in host memory, of `all`.
    fn offloaded_in_host(&self, rows: u32, all: u32) -> u32 {
        let kept = self.requested().unwrap_or(0);
        let bytes = |offloaded| {
            let sizes = Sizes::of(self, rows, Choice { kept, offloaded, globals: Globals::All });
            WorkspaceBytes::of(self.model, sizes).host
        };
        let fits = |offloaded: u32| self.host_memory.is_none_or(|available| bytes(offloaded) <= available);
        most(all, fits).unwrap_or(0)
    }

    /// The maximum number of layers that fits with `rows` rows, if it is fewer than requested.
    pub(super) fn fewer_kept(&self, rows: u32) -> Option<u32> {
        let requested = self.requested().filter(|&kept| kept > 0)?;
        let fits = |kept| {
            let keep_activations = KeepActivations::Layers(kept);
            MemoryPlan::of_rows(&Self { keep_activations, ..*self }, rows).is_ok()
        };
        fits(0).then(|| most(requested - 1, fits).unwrap_or(0))
    }
}

/// The largest number of 1..=max that fits, if a number that is larger than one that does not fit
/// does not fit, either.
fn most(max: u32, fits: impl Fn(u32) -> bool) -> Option<u32> {
    let (mut fitting, mut too_many) = (0, max.saturating_add(1));
    while too_many - fitting > 1 {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) { fitting = middle } else { too_many = middle }
    }
    (fitting > 0).then_some(fitting)
}
