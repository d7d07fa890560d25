//! A frozen projection with its adapter: y = factor * (x W^T (+ bias)) + scale * (drop(x) A^T) B^T.

use crate::gpu::Commands;
use crate::lora::gpu::Lora;
use crate::model::pass::Kernels;
use crate::model::workspace::{Activations, Workspace};
use crate::ops::matmul::{Adapter, Left, Packed, Weight, Wide};
use crate::ops::{DropoutKey, Mat, OpError};

/// A projection of one layer.
#[derive(Debug)]
pub(super) struct Linear<'a> {
    /// Frozen, [outputs, inputs]. Its products are multiplied by the factor.
    pub weight: Weight<'a>,
    /// Frozen, [1, outputs].
    pub bias: Option<&'a Mat>,
    pub lora: Option<Lora>,
    /// drop(x) A^T [tokens, rank]: the forward pass writes it, and the gradients need it. After
    /// [`Linear::in_window`], that of the window.
    pub low: Mat,
    /// Its index in `family::PROJECTIONS`.
    pub index: usize,
}

impl Linear<'_> {
    /// The projection for window `number` of the tokens, with these activations. Other inputs are
    /// dropped in it.
    pub fn in_window(&self, number: u32, activations: &Activations<Mat>) -> Self {
        let lora = self.lora.clone().map(|lora| lora.in_window(number));
        let low = activations.lows.get(self.index).unwrap_or(&self.low).clone();
        Self { weight: self.weight.clone(), bias: self.bias, lora, low, index: self.index }
    }

    /// Records y = factor * (x W^T (+ bias)) + scale * (drop(x) A^T) B^T, added to `y` if `add` is
    /// set. `x` is [tokens, inputs], `y` [tokens, outputs].
    pub fn forward<'a>(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: impl Into<Left<'a>>,
        add: bool,
        y: &Mat,
    ) -> Result<(), OpError> {
        let x = &kernels.matmul.pack(commands, x)?;
        let Some(lora) = self.lora.as_ref().filter(|lora| lora.dropout.is_none()) else {
            kernels.matmul.forward(commands, x, &self.weight, self.bias, add, y)?;
            return self.forward_adapter(kernels, commands, work, x, y);
        };
        let low = &kernels.matmul.low_nt(commands, x, &lora.a, &lora.low_rank(&self.low, x.mat().rows))?;
        let adapter = Adapter { low, other: &lora.b, scale: lora.scale };
        kernels.matmul.forward_adapted(commands, x, &self.weight, self.bias, adapter, add, y)
    }

    /// As [`Linear::forward`], plus `addend`, another matrix of the shape of `y`.
    pub fn forward_plus<'a>(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: impl Into<Left<'a>>,
        addend: &Mat,
        y: &Mat,
    ) -> Result<(), OpError> {
        let (x, weights) = (x.into(), [&self.weight]);
        let wide = Wide { bias: self.bias, addend: Some(addend), ..Wide::of(&weights) };
        if !kernels.matmul.wide(commands, x.mat(), &wide, y)? {
            kernels.copy.record(commands, &addend.range, &y.range)?;
            return self.forward(kernels, commands, work, x, true, y);
        }
        let x = &kernels.matmul.pack(commands, x)?;
        self.forward_adapter(kernels, commands, work, x, y)
    }

    /// Adds the output of the adapter to `y`, if there is one.
    fn forward_adapter(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: &Packed,
        y: &Mat,
    ) -> Result<(), OpError> {
        let Some(lora) = &self.lora else { return Ok(()) };
        let low = self.compute_low(kernels, commands, work, x, lora)?;
        kernels.matmul.nt(commands, &low, &lora.b, lora.scale, true, y)
    }

    /// Computes drop(x) A^T with the same products as [`Linear::forward`].
    fn compute_low(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: &Packed,
        lora: &Lora,
    ) -> Result<Mat, OpError> {
        let low = lora.low_rank(&self.low, x.mat().rows);
        match lora.dropped(kernels, commands, &work.dropped, x.mat())? {
            Some(dropped) => kernels.matmul.nt(commands, &dropped, &lora.a, 1.0, false, &low)?,
            None => drop(kernels.matmul.low_nt(commands, x, &lora.a, &low)?),
        }
        Ok(low)
    }

    /// Computes drop(x) A^T again, for the gradients of a layer. Only its `x` was computed again.
    pub fn recompute_low(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: &Packed,
    ) -> Result<(), OpError> {
        let Some(lora) = &self.lora else { return Ok(()) };
        self.compute_low(kernels, commands, work, x, lora).map(drop)
    }

    /// Whether its products with operands of `rows` rows, forward and backward, need these only
    /// packed, and not in float32.
    pub fn only_packed(&self, kernels: &Kernels, rows: u32) -> Result<bool, OpError> {
        let rank = self.lora.as_ref().map_or(0, |lora| lora.a.rows);
        let drops = self.lora.as_ref().is_some_and(|lora| lora.dropout.is_some());
        Ok(!drops && kernels.matmul.only_packed(rows, &self.weight, rank)?)
    }

    /// Records the gradients for `dy` [tokens, outputs]: dx = factor * dy W + drop'(du A) with du =
    /// scale * dy B, added to `dx` if `add` is set; dA += du^T drop(x), dB += scale * dy^T (drop(x)
    /// A^T). `x` is the input of [`Linear::forward`], which wrote drop(x) A^T. It may be `dx`
    /// itself, because it is read before `dx` is written. It was prepared by
    /// [`Matmul::pack_to`](crate::ops::matmul::Matmul::pack_to).
    #[expect(clippy::too_many_arguments, reason = "operands, and how")]
    pub fn backward<'a>(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        x: &Packed,
        dy: impl Into<Left<'a>>,
        dx: &Mat,
        add: bool,
    ) -> Result<(), OpError> {
        let dy = dy.into();
        let Some(lora) = &self.lora else { return kernels.matmul.backward(commands, dy, &self.weight, add, dx) };
        let matmul = &kernels.matmul;
        let low_rank = lora.low_rank(&work.low_rank, dx.rows);
        let packed = &matmul.pack(commands, dy)?;
        let low = &matmul.low_nn(commands, packed, &lora.b, lora.scale, &low_rank)?;
        if let Some([da, db]) = &lora.gradient {
            matmul.tn(commands, packed, &lora.low_rank(&self.low, dx.rows), lora.scale, true, db)?;
            let dropped = lora.dropped(kernels, commands, &work.dropped, x.mat())?;
            let x = dropped.as_ref().map_or(Left::Packed(x), Left::Mat);
            matmul.tn(commands, &low_rank, x, 1.0, true, da)?;
        }
        match lora.dropout {
            None => {
                let adapter = Adapter { low, other: &lora.a, scale: lora.scale };
                matmul.backward_adapted(commands, packed, &self.weight, adapter, add, dx)
            }
            Some((p, key)) => {
                matmul.backward(commands, packed, &self.weight, add, dx)?;
                let dropped = work.dropped.narrow(dx.rows, dx.cols);
                matmul.nn(commands, &low_rank, &lora.a, 1.0, false, &dropped)?;
                kernels.dropout.record(commands, p, key, &dropped, dx, true)
            }
        }
    }
}

impl Lora {
    /// The same adapter with a factor on its output.
    pub fn times(self, factor: f32) -> Self {
        Self { scale: self.scale * factor, ..self }
    }

    /// The same adapter with the masks of window `number`. Those of the first are as without
    /// windows.
    fn in_window(self, number: u32) -> Self {
        let of_window = |(p, key): (f32, DropoutKey)| (p, DropoutKey { window: number, ..key });
        Self { dropout: self.dropout.map(of_window), ..self }
    }

    /// The scratch matrix [rows, rank].
    fn low_rank(&self, scratch: &Mat, rows: u32) -> Mat {
        scratch.narrow(rows, self.a.rows)
    }

    /// The inputs after dropout, if there is dropout.
    fn dropped(&self, kernels: &Kernels, commands: &mut Commands, scratch: &Mat, x: &Mat) -> Result<Option<Mat>, OpError> {
        let Some((p, key)) = self.dropout else { return Ok(None) };
        let dropped = scratch.narrow(x.rows, x.cols);
        kernels.dropout.record(commands, p, key, x, &dropped, false)?;
        Ok(Some(dropped))
    }
}
