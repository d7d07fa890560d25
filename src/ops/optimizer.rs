//! AdamW (Loshchilov and Hutter 2019, decoupled weight decay) over all parameters of an adapter at
//! once. Equals `torch.nn.utils.clip_grad_norm_` and then `torch.optim.AdamW`.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{Piece, pieces};
use super::{Mat, OpError};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup. The update has one element per thread.
const WORKGROUP: u64 = 256;
/// Elements per workgroup in the sum of squares. The order of the sum depends only on the number of
/// elements.
const BLOCK: u64 = 16_384;

/// The tensors of AdamW: a loss [1, 1] and four matrices [1, count], in separate buffers.
#[derive(Debug, Clone)]
pub struct AdamWState {
    /// The parameters, updated in place.
    pub parameters: Mat,
    /// Their gradient, not changed.
    pub gradient: Mat,
    /// The loss, not changed. A step is applied only if it is finite.
    pub loss: Mat,
    /// First moment (`exp_avg`), 0 at the start.
    pub exp_avg: Mat,
    /// Second moment (`exp_avg_sq`), 0 at the start.
    pub exp_avg_sq: Mat,
}

/// The hyperparameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Number of the step, from 1.
    pub step: u64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Decay rates of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Maximum norm of the gradient. A larger gradient is scaled down. `None`: no clipping.
    pub clip: Option<f64>,
}

/// The report of a step.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct StepReport {
    /// Norm of the gradient before clipping.
    pub norm: f32,
    /// Clip factor of the gradient.
    pub clip: f32,
    /// 1 if parameters and moments were updated. 0 if norm or loss is not finite; then nothing
    /// changed.
    pub applied: f32,
    /// 0.
    pub pad: f32,
}

/// The kernels for a given number of parameters.
#[derive(Debug, Clone)]
pub struct AdamW {
    gpu: Gpu,
    squares: Kernel,
    norm: Kernel,
    update: Kernel,
    count: u32,
    /// Sums of squares, one per block.
    partials: BufferRange,
    report: BufferRange,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    first: u32,
    largest_norm: f32,
    decay: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_bias2: f32,
    epsilon: f32,
    pad: u32,
}

impl From<&AdamWStep> for Params {
    /// Computes bias corrections and differences from 1 in f64, as torch does.
    fn from(step: &AdamWStep) -> Self {
        let [beta1, beta2] = step.betas;
        let t = step.step as f64;
        Self {
            largest_norm: step.clip.map_or(f32::MAX, |norm| norm as f32),
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (step.learning_rate / (1.0 - beta1.powf(t))) as f32,
            root_bias2: (1.0 - beta2.powf(t)).sqrt() as f32,
            epsilon: step.epsilon as f32,
            ..Self::default()
        }
    }
}

impl AdamW {
    /// Compiles the kernels for `gpu` and `count` parameters.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu, count: u32) -> Result<Self, GpuError> {
        // SAFETY: `record` binds `count` floats, at most 2^29, and as many partial sums as there
        // are blocks in all pieces, which also is the `count` of `norm`; workgroups past the last
        // block return as one; loops end at `count` or halve; workgroup memory is written before
        // each barrier that precedes its reads.
        let shader = unsafe { Shader::trusted("optimizer", include_str!("../../shaders/optimizer.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        let partials = 4 * u64::from(count).div_ceil(BLOCK);
        let range = |label, size| Ok(BufferRange { buffer: gpu.storage(label, size)?, offset: 0, size });
        Ok(Self {
            gpu: gpu.clone(),
            squares: kernel("squares")?,
            norm: kernel("norm")?,
            update: kernel("update")?,
            count,
            partials: range("partial sums", partials)?,
            report: range("step report", size_of::<StepReport>() as u64)?,
        })
    }

    /// Records a step. g is the gradient times min(1, clip / (norm(gradient) + 1e-6)), t is the
    /// number of the step:
    ///
    /// - m = beta1 * m + (1 - beta1) * g, v = beta2 * v + (1 - beta2) * g^2,
    /// - p = p * (1 - lr * decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) +
    ///   epsilon).
    ///
    /// If norm or loss is not finite, nothing changes, and the report has `applied` 0.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if the step number is 0 or the clip norm is not
    /// positive.
    pub fn record(&self, commands: &mut Commands, state: &AdamWState, step: &AdamWStep) -> Result<(), OpError> {
        let value = |what, expected, found| OpError::Value { operation: "AdamW", what, expected, found };
        if step.step == 0 {
            return Err(value("the number of the step", "above 0", 0.0));
        }
        if let Some(clip) = step.clip.filter(|clip| !(clip.is_finite() && *clip > 0.0)) {
            return Err(value("the largest norm", "above 0", clip));
        }
        let AdamWState { parameters, gradient, loss, exp_avg, exp_avg_sq } = state;
        [parameters, gradient, exp_avg, exp_avg_sq].iter().try_for_each(|mat| mat.check("AdamW", 1, self.count))?;
        loss.check("AdamW", 1, 1)?;
        let pieces: Vec<Piece> = pieces(&self.gpu, self.count.into(), 4, BLOCK)?.collect();
        let params = Params::from(step);
        self.record_norm(commands, state, &pieces, params);
        for piece in pieces {
            let [gradient, parameters, exp_avg, exp_avg_sq] =
                [gradient, parameters, exp_avg, exp_avg_sq].map(|mat| piece.of(&mat.range, 4));
            let (partials, report, loss) = (self.partials.clone(), self.report.clone(), loss.range.clone());
            let bindings = [gradient, partials, report, loss, parameters, exp_avg, exp_avg_sq];
            let count = u64::from(piece.count);
            let params = Params { count: piece.count, ..params };
            let groups = self.gpu.grid(count.div_ceil(WORKGROUP));
            commands.dispatch(&self.update, &bindings, bytemuck::bytes_of(&params), groups, 28 * count);
        }
        Ok(())
    }

    fn record_norm(&self, commands: &mut Commands, state: &AdamWState, pieces: &[Piece], params: Params) {
        for piece in pieces {
            let gradient = piece.of(&state.gradient.range, 4);
            let bytes = gradient.size;
            let params = Params { count: piece.count, first: (piece.first / BLOCK) as u32, ..params };
            let groups = self.gpu.grid(u64::from(piece.count).div_ceil(BLOCK));
            let bindings = [gradient, self.partials.clone()];
            commands.dispatch(&self.squares, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        let params = Params { count: (self.partials.size / 4) as u32, ..params };
        let [gradient, loss] = [&state.gradient, &state.loss].map(|mat| mat.range.clone());
        let bindings = [gradient, self.partials.clone(), self.report.clone(), loss];
        commands.dispatch(&self.norm, &bindings, bytemuck::bytes_of(&params), [1, 1, 1], self.partials.size);
    }

    /// Waits for the last submitted step and returns its report.
    ///
    /// # Errors
    /// Any device error.
    pub fn read_report(&self) -> Result<StepReport, GpuError> {
        let mut report = StepReport::zeroed();
        self.gpu.read_into(&self.report, bytemuck::bytes_of_mut(&mut report))?;
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_untouched, gpu, gpu_with, mat, narrow, random, random_mat, wide};

    const STEP: AdamWStep =
        AdamWStep { step: 1, learning_rate: 3e-2, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.1, clip: Some(1.0) };

    /// Parameters and moments in f64.
    struct Reference {
        p: Vec<f64>,
        m: Vec<f64>,
        v: Vec<f64>,
    }

    fn norm(gradient: &[f64]) -> f64 {
        gradient.iter().map(|g| g * g).sum::<f64>().sqrt()
    }

    fn clip(step: &AdamWStep, gradient: &[f64]) -> f64 {
        step.clip.map_or(1.0, |clip| (clip / (norm(gradient) + 1e-6)).min(1.0))
    }

    impl Reference {
        fn step(&mut self, step: &AdamWStep, gradient: &[f64]) {
            let factor = clip(step, gradient);
            let [beta1, beta2] = step.betas;
            let t = step.step as i32;
            for (i, g) in gradient.iter().map(|g| g * factor).enumerate() {
                self.p[i] *= 1.0 - step.learning_rate * step.weight_decay;
                self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
                self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
                let denominator = self.v[i].sqrt() / (1.0 - beta2.powi(t)).sqrt() + step.epsilon;
                self.p[i] -= step.learning_rate / (1.0 - beta1.powi(t)) * self.m[i] / denominator;
            }
        }
    }

    fn state(gpu: &Gpu, count: u32) -> (AdamWState, Reference) {
        let (parameters, p) = random_mat(gpu, 1, 1, count);
        let zeros = || mat(gpu, 1, count, &vec![0.0; count as usize]);
        let gradient = zeros();
        let zero = vec![0.0; count as usize];
        (
            AdamWState { parameters, gradient, loss: mat(gpu, 1, 1, &[2.5]), exp_avg: zeros(), exp_avg_sq: zeros() },
            Reference { p: wide(&p), m: zero.clone(), v: zero },
        )
    }

    fn set_gradient(gpu: &Gpu, state: &mut AdamWState, gradient: &[f32]) {
        state.gradient = mat(gpu, 1, state.parameters.cols, gradient);
    }

    /// Gradients of the steps differ by a factor of a thousand, so that only some are clipped.
    fn check(gpu: &Gpu, count: u32, steps: u64, base: AdamWStep) {
        let adamw = AdamW::new(gpu, count).unwrap();
        let (mut state, mut reference) = state(gpu, count);
        for t in 1..=steps {
            let size = [3.0, 1e-3, 0.1][t as usize % 3] / (count as f32).sqrt();
            let gradient: Vec<f32> = random(10 + t, count as usize).iter().map(|g| g * size).collect();
            set_gradient(gpu, &mut state, &gradient);
            let step = AdamWStep { step: t, ..base };
            let mut commands = gpu.commands("adamw");
            adamw.record(&mut commands, &state, &step).unwrap();
            commands.submit().unwrap();
            let gradient = wide(&gradient);
            reference.step(&step, &gradient);
            let report = adamw.read_report().unwrap();
            assert_close("norm", &[report.norm], &[norm(&gradient) as f32], 1e-6);
            assert_close("clip", &[report.clip], &[clip(&step, &gradient) as f32], 1e-6);
            assert_eq!(report.applied, 1.0);
        }
        [&state.parameters, &state.exp_avg, &state.exp_avg_sq].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        assert_close("p", &state.parameters.read(gpu).unwrap(), &narrow(&reference.p), 1e-6);
        assert_close("m", &state.exp_avg.read(gpu).unwrap(), &narrow(&reference.m), 1e-6);
        assert_close("v", &state.exp_avg_sq.read(gpu).unwrap(), &narrow(&reference.v), 1e-6);
    }

    #[test]
    fn five_steps() {
        let Some(gpu) = gpu() else { return };
        for count in [1, 7, 65, 1000, 16_385] {
            check(&gpu, count, 5, STEP);
            check(&gpu, count, 5, AdamWStep { clip: None, weight_decay: 0.0, betas: [0.8, 0.95], epsilon: 1e-3, ..STEP });
        }
    }

    #[test]
    fn many_parameters_pieces_that_can_be_bound_and_grids_of_two_dimensions() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, 1_000_001, 1, STEP);
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(200_000)) else { return };
        check(&gpu, 100_001, 2, STEP);
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(23)) else { return };
        check(&gpu, 100_001, 2, STEP);
    }

    #[test]
    fn the_same_bits_every_time_and_in_any_pieces() {
        let bits = |binding: Option<u64>| {
            let gpu = gpu_with(|options| options.max_binding = binding)?;
            let adamw = AdamW::new(&gpu, 100_001).unwrap();
            let (mut state, _) = state(&gpu, 100_001);
            set_gradient(&gpu, &mut state, &random(9, 100_001));
            let mut commands = gpu.commands("adamw");
            adamw.record(&mut commands, &state, &STEP).unwrap();
            commands.submit().unwrap();
            Some((adamw.read_report().unwrap().norm.to_bits(), state.parameters.read(&gpu).unwrap()))
        };
        let all = bits(None);
        assert!(all == bits(None) && all == bits(Some(200_000)));
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing_and_is_reported() {
        let Some(gpu) = gpu() else { return };
        for poison in [f32::NAN, f32::INFINITY, 1e30] {
            let adamw = AdamW::new(&gpu, 1000).unwrap();
            let (mut state, reference) = state(&gpu, 1000);
            let mut gradient = random(9, 1000);
            gradient[777] = poison;
            set_gradient(&gpu, &mut state, &gradient);
            let mut commands = gpu.commands("adamw");
            adamw.record(&mut commands, &state, &STEP).unwrap();
            commands.submit().unwrap();
            let report = adamw.read_report().unwrap();
            assert!(!report.norm.is_finite() && report.applied == 0.0, "{poison}: {report:?}");
            assert_eq!(state.parameters.read(&gpu).unwrap(), narrow(&reference.p));
            assert_eq!(state.exp_avg.read(&gpu).unwrap(), vec![0.0; 1000]);
            assert_eq!(state.exp_avg_sq.read(&gpu).unwrap(), vec![0.0; 1000]);
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_changes_nothing_although_the_gradient_is() {
        let Some(gpu) = gpu() else { return };
        for loss in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let adamw = AdamW::new(&gpu, 1000).unwrap();
            let (mut state, reference) = state(&gpu, 1000);
            set_gradient(&gpu, &mut state, &random(9, 1000));
            state.loss = mat(&gpu, 1, 1, &[loss]);
            let mut commands = gpu.commands("adamw");
            adamw.record(&mut commands, &state, &STEP).unwrap();
            commands.submit().unwrap();
            let report = adamw.read_report().unwrap();
            assert!(report.norm.is_finite() && report.applied == 0.0, "{loss}: {report:?}");
            assert_eq!(state.parameters.read(&gpu).unwrap(), narrow(&reference.p));
            assert_eq!(state.exp_avg.read(&gpu).unwrap(), vec![0.0; 1000]);
            assert_eq!(state.exp_avg_sq.read(&gpu).unwrap(), vec![0.0; 1000]);
        }
    }

    #[test]
    fn impossible_steps_are_refused() {
        let Some(gpu) = gpu() else { return };
        let adamw = AdamW::new(&gpu, 7).unwrap();
        let (fits, _) = state(&gpu, 7);
        let refused = |state: &AdamWState, step| adamw.record(&mut gpu.commands("adamw"), state, &step).unwrap_err();
        for step in [
            AdamWStep { step: 0, ..STEP },
            AdamWStep { clip: Some(0.0), ..STEP },
            AdamWStep { clip: Some(f64::NAN), ..STEP },
        ] {
            assert!(matches!(refused(&fits, step), OpError::Value { operation: "AdamW", .. }));
        }
        assert!(matches!(refused(&state(&gpu, 8).0, STEP), OpError::Shape { expected: 7, found: 8, .. }));
    }
}
