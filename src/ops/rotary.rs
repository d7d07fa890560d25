//! Rotary position embedding (Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position
//! Embedding") in the rotate-half layout of transformers. Scalings: linear (Chen et al. 2023,
//! "Extending Context Window of Large Language Models via Positional Interpolation"), dynamic NTK,
//! llama3, and YaRN (Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language
//! Models").
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::{Mat, same};
use crate::arch::config::RopeScaling;
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::error::OpError;

/// The frequencies of a model's rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryTable {
    /// Angle per position for each pair of elements: half as many as there are rotated elements.
    pub inv_freq: Vec<f32>,
    /// Attention factor: the factor of cosines and sines.
    pub attention_factor: f32,
}

impl RotaryTable {
    /// The table for [`Rotary`]: cosine and sine of every pair, times the attention factor. It has
    /// one row for each of the first `positions` positions.
    ///
    /// An angle is a float32 product, as in transformers. The host computes its cosine and sine,
    /// because WGSL guarantees no accuracy for angles beyond pi.
    pub fn angles(&self, positions: u32) -> Vec<f32> {
        let mut angles = Vec::new();
        (0..positions).for_each(|position| self.push_angles(position, &mut angles));
        angles
    }

    /// Appends the row of one position of [`RotaryTable::angles`].
    pub fn push_angles(&self, position: u32, to: &mut Vec<f32>) {
        for frequency in &self.inv_freq {
            let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
            to.extend([cosine as f32 * self.attention_factor, sine as f32 * self.attention_factor]);
        }
    }

    /// Uploads [`RotaryTable::angles`] as a matrix [positions, rotated elements of a head].
    ///
    /// # Errors
    /// [`OpError::Gpu`] if it does not fit.
    pub fn upload(&self, gpu: &Gpu, positions: u32) -> Result<Mat, OpError> {
        let cols = u32::try_from(2 * self.inv_freq.len()).unwrap_or(u32::MAX);
        Mat::from_slice(gpu, "rotary angles", positions, cols, &self.angles(positions))
    }
}

/// Computes the frequencies of a model as `modeling_rope_utils.py` of transformers 5, with the same
/// float32 steps.
///
/// `theta` is the config's `rope_theta`; `rotary_dim` is the number of rotated elements of a head,
/// an even number above 2. `sequence_length` is the number of tokens; only [`RopeScaling::Dynamic`]
/// uses it.
pub fn inverse_frequencies(theta: f64, rotary_dim: u32, scaling: &RopeScaling, sequence_length: u32) -> RotaryTable {
    let mut attention_factor = 1.0;
    let mut inv_freq: Vec<f32> = periods(theta, rotary_dim).map(|period| 1.0 / period).collect();
    match *scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => inv_freq.iter_mut().for_each(|f| *f /= factor as f32),
        RopeScaling::Dynamic { factor, max_position_embeddings: max } => {
            let dim = f64::from(rotary_dim);
            let stretch = factor * f64::from(sequence_length).max(max) / max - (factor - 1.0);
            let theta = theta * stretch.powf(dim / (dim - 2.0));
            inv_freq = periods(theta, rotary_dim).map(|period| 1.0 / period).collect();
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
            for f in &mut inv_freq {
                let wavelength = std::f32::consts::TAU / *f;
                let rotations = original_max_position_embeddings as f32 / wavelength;
                let kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                *f = (1.0 - kept) * *f / factor as f32 + kept * *f;
            }
        }
        RopeScaling::Yarn { factor, attention_factor: given, mscale, mscale_all_dim, .. } => {
            inv_freq = yarn_frequencies(theta, rotary_dim, scaling);
            attention_factor = given.unwrap_or_else(|| yarn_attention_factor(factor, mscale, mscale_all_dim));
        }
    }
    RotaryTable { inv_freq, attention_factor: attention_factor as f32 }
}

/// theta^(2i / dim): the period of each pair, divided by 2 pi.
fn periods(theta: f64, dim: u32) -> impl Iterator<Item = f32> {
    let period = move |i: u32| {
        let exponent = (2 * i) as f32 / dim as f32;
        f64::from(theta as f32).powf(exponent.into()) as f32
    };
    (0..dim / 2).map(period)
}

/// The blend of the frequencies and the frequencies divided by the factor (llama3, YaRN). Empty for
/// every other scaling.
fn yarn_frequencies(theta: f64, dim: u32, scaling: &RopeScaling) -> Vec<f32> {
    let RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } = *scaling else {
        return Vec::new();
    };
    let pair = |rotations: f64| {
        let turns = original_max_position_embeddings / (rotations * std::f64::consts::TAU);
        f64::from(dim) * turns.ln() / (2.0 * theta.ln())
    };
    // The range of pairs with blended frequencies.
    let (mut low, mut high) = (pair(beta_fast.unwrap_or(32.0)), pair(beta_slow.unwrap_or(1.0)));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(f64::from(dim) - 1.0));
    // Equal bounds would divide by zero.
    let high = if low == high { high + 0.001 } else { high };
    let blend = |(i, period): (u32, f32)| {
        let kept = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        1.0 / (factor as f32 * period) * (1.0 - kept) + 1.0 / period * kept
    };
    (0..).zip(periods(theta, dim)).map(blend).collect()
}

/// The default attention factor, if the config has none.
fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let given = |mscale: Option<f64>| mscale.filter(|&m| m != 0.0);
    match (given(mscale), given(mscale_all_dim)) {
        (Some(mscale), Some(all_dim)) => of(mscale) / of(all_dim),
        _ => of(1.0),
    }
}

/// The rotary embedding, forward and backward.
#[derive(Debug, Clone)]
pub struct Rotary {
    gpu: Gpu,
    rotate: Kernel,
    rotate_from: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    pairs: u32,
    heads: u32,
    half: u32,
    positions: u32,
    sign: f32,
    first: u32,
    head_dim: u32,
    pad: u32,
}

impl Rotary {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if a kernel does not compile.
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        // SAFETY: `forward`, `backward` and `forward_from` check the sizes of `x`, `starts` and
        // `table` against each other; the kernels ignore pairs past the last one; `rotate` clamps
        // the position to the rows of the table, and the positions of `rotate_from` are in the
        // table. There is no loop and no workgroup memory.
        let shader = unsafe { Shader::trusted("rotary", include_str!("../../shaders/rotary.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        Ok(Self { gpu: gpu.clone(), rotate: kernel("rotate")?, rotate_from: kernel("rotate_from")? })
    }

    /// Records the rotation of the heads of `x`, [tokens, heads * head_dim], in place. The angles
    /// depend on the position of a token in its sample.
    ///
    /// `table` is from [`RotaryTable::upload`]. It has a column for each rotated element of a head
    /// (its first ones) and at least one row for each token of the longest sample. `starts` has one
    /// u32 per token: the first token of its sample. `x` has the tokens from token `first` on. All
    /// three must be in different buffers.
    ///
    /// # Errors
    /// [`OpError::Shape`]; nothing is then recorded.
    pub fn forward(
        &self,
        commands: &mut Commands,
        x: &Mat,
        heads: u32,
        (first, starts): (u32, &BufferRange),
        table: &Mat,
    ) -> Result<(), OpError> {
        self.rotate(commands, x, heads, (first, starts), table, 1.0)
    }

    /// Records the gradient of [`Rotary::forward`], in place: the rotation by the negative angle,
    /// times the attention factor.
    ///
    /// # Errors
    /// As [`Rotary::forward`].
    pub fn backward(
        &self,
        commands: &mut Commands,
        dx: &Mat,
        heads: u32,
        (first, starts): (u32, &BufferRange),
        table: &Mat,
    ) -> Result<(), OpError> {
        self.rotate(commands, dx, heads, (first, starts), table, -1.0)
    }

    /// As [`Rotary::forward`], for tokens of one sample from position `first` on. `table` has one
    /// row per position.
    ///
    /// # Errors
    /// As [`Rotary::forward`].
    pub fn forward_from(
        &self,
        commands: &mut Commands,
        x: &Mat,
        heads: u32,
        first: u32,
        table: &Mat,
    ) -> Result<(), OpError> {
        let params = Params { first, ..params(x, heads, table, 1.0)? };
        let end = u64::from(first) + u64::from(x.rows);
        if end > table.rows.into() {
            let (what, found) = ("the number of positions", table.rows.into());
            return Err(OpError::Shape { operation: OPERATION, what, expected: end, found });
        }
        // This kernel does not use `starts`.
        self.dispatch(commands, &self.rotate_from, &params, x, &table.range, table);
        Ok(())
    }

    fn rotate(
        &self,
        commands: &mut Commands,
        x: &Mat,
        heads: u32,
        (first, starts): (u32, &BufferRange),
        table: &Mat,
        sign: f32,
    ) -> Result<(), OpError> {
        let params = Params { first, ..params(x, heads, table, sign)? };
        check_starts(starts, first, x.rows)?;
        self.dispatch(commands, &self.rotate, &params, x, starts, table);
        Ok(())
    }

    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        params: &Params,
        x: &Mat,
        starts: &BufferRange,
        table: &Mat,
    ) {
        if params.pairs > 0 {
            let groups = self.gpu.grid(u64::from(params.pairs.div_ceil(WORKGROUP)));
            let bindings = [x.range.clone(), starts.clone(), table.range.clone()];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(params), groups, 16 * u64::from(params.pairs));
        }
    }
}

/// Checks `x` and `table` against each other, and returns the parameters.
fn params(x: &Mat, heads: u32, table: &Mat, sign: f32) -> Result<Params, OpError> {
    let head_dim = x.cols.checked_div(heads).unwrap_or(0);
    x.check(OPERATION, x.rows, heads.saturating_mul(head_dim))?;
    let (half, positions) = pairs(table, head_dim)?;
    // Fits u32, because x fits a binding.
    let pairs = x.rows.saturating_mul(heads).saturating_mul(half);
    Ok(Params { pairs, heads, half, positions, sign, first: 0, head_dim, pad: 0 })
}

/// The rotated pairs of a head, and the positions of a table.
pub(super) fn pairs(table: &Mat, head_dim: u32) -> Result<(u32, u32), OpError> {
    let (half, positions) = (table.cols / 2, table.rows);
    table.check(OPERATION, positions.max(1), (2 * half).max(2))?;
    same(OPERATION, "the rotated elements of a head", (2 * half).min(head_dim).into(), (2 * half).into())?;
    Ok((half, positions))
}

/// Checks that the starts of samples have all tokens.
pub(super) fn check_starts(starts: &BufferRange, first: u32, tokens: u32) -> Result<(), OpError> {
    let expected = 4 * (u64::from(first) + u64::from(tokens));
    match starts.size < expected {
        true => {
            let what = "the size of the samples' starts";
            Err(OpError::Shape { operation: OPERATION, what, expected, found: starts.size })
        }
        false => Ok(()),
    }
}

const OPERATION: &str = "rotary";
/// Threads per workgroup, as in the shader.
const WORKGROUP: u32 = 256;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::super::testing::{assert_close, assert_gradient, assert_untouched, gpu, narrow, random, random_mat, wide};
    use super::*;

    fn yarn(factor: f64, original_max_position_embeddings: f64, truncate: bool) -> RopeScaling {
        yarn_with(factor, original_max_position_embeddings, truncate, None, None)
    }

    fn yarn_with(
        factor: f64,
        original_max_position_embeddings: f64,
        truncate: bool,
        attention_factor: Option<f64>,
        mscales: Option<(f64, f64)>,
    ) -> RopeScaling {
        let (mscale, mscale_all_dim) = (mscales.map(|m| m.0), mscales.map(|m| m.1));
        let (beta_fast, beta_slow) = (None, None);
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            truncate,
        }
    }

    /// Compares frequencies with those of transformers 5.24.0 and torch 2.15.0 on a CPU:
    /// `ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len)`, and
    /// `compute_default_rope_parameters` of Llama, of a `LlamaConfig` with these values. The power
    /// function of torch may differ by one unit in the last place.
    #[track_caller]
    fn assert_frequencies(found: &RotaryTable, attention_factor: f64, expected: &[f32]) {
        assert_eq!(found.attention_factor, attention_factor as f32);
        assert_eq!(found.inv_freq.len(), expected.len());
        for (i, (found, expected)) in found.inv_freq.iter().zip(expected).enumerate() {
            assert!(found.to_bits().abs_diff(expected.to_bits()) <= 1, "pair {i}: {found:e}, but torch has {expected:e}");
        }
    }

    #[test]
    fn default_and_linear_frequencies_are_those_of_transformers() {
        let found = inverse_frequencies(1e6, 16, &RopeScaling::Default, 1);
        let expected = [1.0, 0.17782794, 0.03162278, 0.0056234132, 0.001, 0.00017782794, 3.1622774e-5, 5.6234135e-6];
        assert_frequencies(&found, 1.0, &expected);
        let found = inverse_frequencies(1e4, 16, &RopeScaling::Linear { factor: 2.5 }, 1);
        let expected = [0.4, 0.1264911, 0.04, 0.012649111, 0.0039999997, 0.0012649111, 0.00040000002, 0.00012649111];
        assert_frequencies(&found, 1.0, &expected);
    }

    #[test]
    fn dynamic_frequencies_are_those_of_transformers() {
        let scaling = RopeScaling::Dynamic { factor: 4.0, max_position_embeddings: 2048.0 };
        let short = [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622779, 0.001, 0.0003162278];
        assert_frequencies(&inverse_frequencies(1e4, 16, &scaling, 100), 1.0, &short);
        let long = [1.0, 0.2406493, 0.057912078, 0.013936501, 0.0033538092, 0.00080709177, 0.00019422606, 4.6740366e-5];
        assert_frequencies(&inverse_frequencies(1e4, 16, &scaling, 5000), 1.0, &long);
    }

    #[test]
    fn llama3_frequencies_are_those_of_transformers() {
        let scaling = |factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let expected = [1.0, 0.19392276, 0.03760603, 0.007292665, 0.000524846, 3.4281024e-5, 6.6478697e-6, 1.2891732e-6];
        assert_frequencies(&inverse_frequencies(5e5, 16, &scaling(8.0), 1), 1.0, &expected);
        #[rustfmt::skip]
        let expected = [
            1.0, 0.6636013, 0.44036663, 0.29222783, 0.19392276, 0.12868738, 0.0853971, 0.05666962, 0.03760603, 0.024955409,
            0.01656044, 0.010989529, 0.007292665, 0.0048394212, 0.003211446, 0.001290548, 0.0004295567, 9.708286e-5,
            1.9461639e-5, 1.29147675e-5, 8.570256e-6, 5.6872323e-6, 3.7740544e-6, 2.5044671e-6, 1.6619674e-6, 1.1028836e-6,
            7.3187493e-7, 4.856731e-7, 3.222933e-7, 2.1387423e-7, 1.419272e-7, 9.4183065e-8,
        ];
        assert_frequencies(&inverse_frequencies(5e5, 64, &scaling(32.0), 1), 1.0, &expected);
    }

    #[test]
    fn yarn_frequencies_are_those_of_transformers() {
        let found = |theta, dim, yarn: RopeScaling| inverse_frequencies(theta, dim, &yarn, 1);
        #[rustfmt::skip]
        let expected = [
            1.0, 0.4216965, 0.17782794, 0.074989416, 0.03162278, 0.013335215, 0.0047799014, 0.0016599617, 0.00055, 0.00016867858,
            4.4456985e-5, 1.8747356e-5, 7.905694e-6, 3.3338035e-6, 1.4058534e-6, 5.9284343e-7,
        ];
        assert_frequencies(&found(1e6, 32, yarn(4.0, 32768.0, true)), 1.138629436111989, &expected);
        #[rustfmt::skip]
        let expected = [
            1.0, 0.6890443, 0.47478205, 0.32714587, 0.225418, 0.15532298, 0.107024424, 0.073744565, 0.050813273, 0.031705696,
            0.019335, 0.011592049, 0.0067949593, 0.003860359, 0.0020937927, 0.0010526022, 0.00045648392, 0.0001293187,
            3.830881e-5, 2.6396468e-5, 1.8188337e-5, 1.253257e-5, 8.635496e-6, 5.9502395e-6, 4.0999785e-6, 2.8250668e-6,
            1.9465963e-6, 1.341291e-6, 9.2420896e-7, 6.368209e-7, 4.3879785e-7, 3.0235114e-7,
        ];
        let exact = yarn(32.0, 4096.0, false);
        assert_frequencies(&found(15e4, 64, exact), 1.3465735902799727, &expected);
        #[rustfmt::skip]
        let expected = [
            1.0, 0.56234133, 0.31622776, 0.17782794, 0.1, 0.05623413, 0.027218176, 0.012829017, 0.0058214283, 0.0024903687,
            0.00095997716, 0.0002921459, 2.5e-5, 1.40585325e-5, 7.9056945e-6, 4.4456983e-6,
        ];
        let mscale = yarn_with(40.0, 4096.0, true, None, Some((1.0, 0.707)));
        assert_frequencies(&found(1e4, 32, mscale), 1.0857263992561355, &expected);
        let expected = [1.0, 0.31622776, 0.1, 0.023914725, 0.0051249997, 0.0008498622, 2.5e-5, 7.9056945e-6];
        assert_frequencies(&found(1e4, 16, yarn_with(40.0, 4096.0, true, Some(1.25), None)), 1.25, &expected);
    }

    /// Compares with torch 2.15.0 in float32: `(torch.tensor([p]) * inv_freq).cos()` and `.sin()`.
    #[test]
    fn angles_are_those_of_torch_at_the_end_of_a_long_context() {
        let table = inverse_frequencies(1e6, 8, &RopeScaling::Default, 1);
        let angles = table.angles(131_072);
        let row = |position: usize| &angles[8 * position..8 * (position + 1)];
        let interleave = |cosines: [f32; 4], sines: [f32; 4]| cosines.into_iter().zip(sines).flat_map(|(c, s)| [c, s]);
        for (position, cosines, sines) in [
            (0, [1.0; 4], [0.0; 4]),
            (1, [0.54030234, 0.99950004, 0.9999995, 1.0], [0.84147096, 0.031617507, 0.0009999999, 3.1622774e-5]),
            (1000, [0.56237906, 0.9786824, 0.54030234, 0.99950004], [0.82687956, 0.20537944, 0.84147096, 0.031617504]),
            (131_071, [-0.8179835, -0.4815346, 0.6403117, -0.5375764], [-0.5752417, -0.87642705, -0.76811516, -0.84321505]),
        ] {
            for (found, expected) in row(position).iter().zip(interleave(cosines, sines)) {
                assert!((found - expected).abs() <= 1e-7, "position {position}: {found}, but torch has {expected}");
            }
        }
    }

    /// The rotation in f64 of [tokens, heads * dim], with the cosines and sines of the table.
    fn reference(x: &[f64], heads: usize, starts: &[u32], table: &RotaryTable, sign: f64) -> Vec<f64> {
        let (half, dim) = (table.inv_freq.len(), x.len() / starts.len() / heads);
        let mut rotated = x.to_vec();
        for (at, head) in x.chunks(dim).enumerate() {
            let token = at / heads;
            let position = token as f32 - starts[token] as f32;
            for (i, &frequency) in table.inv_freq.iter().enumerate() {
                let (sine, cosine) = (sign * f64::from(position * frequency)).sin_cos();
                let (a, b, factor) = (head[i], head[i + half], f64::from(table.attention_factor));
                rotated[dim * at + i] = factor * (a * cosine - b * sine);
                rotated[dim * at + i + half] = factor * (b * cosine + a * sine);
            }
        }
        rotated
    }

    #[test]
    fn heads_are_rotated_and_gradients_rotated_back() {
        let Some(gpu) = gpu() else { return };
        let rotary = Rotary::new(&gpu).unwrap();
        for (head_dim, dim, heads, lengths) in [
            (64, 64, 4, &[1][..]),
            (64, 64, 1, &[3, 2]),
            (80, 80, 2, &[33]),
            (128, 128, 3, &[1, 90, 39]),
            (6, 6, 5, &[130]),
            // A part of each head.
            (128, 96, 2, &[1, 37]),
            (10, 4, 3, &[7]),
        ] {
            let tokens: u32 = lengths.iter().sum();
            let starts: Vec<u32> = lengths
                .iter()
                .scan(0, |end, &n| Some((n, std::mem::replace(end, *end + n))))
                .flat_map(|(n, first)| vec![first; n as usize])
                .collect();
            let range = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
            let table = inverse_frequencies(1e4, dim, &yarn(4.0, 32768.0, true), 1);
            let angles = table.upload(&gpu, *lengths.iter().max().unwrap()).unwrap();
            let (x, elements) = random_mat(&gpu, u64::from(tokens), tokens, heads * head_dim);
            let mut commands = gpu.commands("rotary");
            rotary.forward(&mut commands, &x, heads, (0, &range), &angles).unwrap();
            commands.submit().unwrap();
            assert_untouched(&gpu, &x);
            let expected = narrow(&reference(&wide(&elements), heads as usize, &starts, &table, 1.0));
            assert_close(&format!("forward {head_dim}"), &x.read(&gpu).unwrap(), &expected, 1e-6);

            let (dx, elements) = random_mat(&gpu, 7 + u64::from(tokens), tokens, heads * head_dim);
            let mut commands = gpu.commands("rotary");
            rotary.backward(&mut commands, &dx, heads, (0, &range), &angles).unwrap();
            commands.submit().unwrap();
            assert_untouched(&gpu, &dx);
            let expected = narrow(&reference(&wide(&elements), heads as usize, &starts, &table, -1.0));
            assert_close(&format!("backward {head_dim}"), &dx.read(&gpu).unwrap(), &expected, 1e-6);
        }
    }

    #[test]
    fn tokens_in_the_middle_of_a_sample() {
        let Some(gpu) = gpu() else { return };
        let rotary = Rotary::new(&gpu).unwrap();
        for (head_dim, dim, heads, first, tokens) in
            [(64, 64, 4, 0, 3), (80, 60, 1, 1, 1), (6, 6, 3, 1000, 130), (128, 128, 2, 4095, 1), (10, 4, 3, 5, 9)]
        {
            let table = inverse_frequencies(1e4, dim, &yarn(4.0, 32768.0, true), 1);
            let angles = table.upload(&gpu, first + tokens).unwrap();
            let (x, elements) = random_mat(&gpu, u64::from(first), tokens, heads * head_dim);
            let mut commands = gpu.commands("rotary");
            rotary.forward_from(&mut commands, &x, heads, first, &angles).unwrap();
            commands.submit().unwrap();
            assert_untouched(&gpu, &x);
            // The reference also has the tokens before them.
            let before = vec![0.0; (first * heads * head_dim) as usize];
            let starts = vec![0; (first + tokens) as usize];
            let expected = reference(&[before.clone(), wide(&elements)].concat(), heads as usize, &starts, &table, 1.0);
            assert_close(&format!("from {first}"), &x.read(&gpu).unwrap(), &narrow(&expected[before.len()..]), 1e-6);
        }
    }

    /// The loss is the sum of the rotated elements times fixed numbers. So these numbers are the
    /// gradient of the output.
    #[test]
    fn backward_is_the_gradient_of_forward() {
        let Some(gpu) = gpu() else { return };
        let table = inverse_frequencies(1e4, 8, &yarn(4.0, 32768.0, true), 1);
        let starts = [0, 0, 2, 2, 2];
        let range = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
        let (dx, dy) = random_mat(&gpu, 2, 5, 16);
        let mut commands = gpu.commands("gradient");
        let angles = table.upload(&gpu, 3).unwrap();
        Rotary::new(&gpu).unwrap().backward(&mut commands, &dx, 2, (0, &range), &angles).unwrap();
        commands.submit().unwrap();
        let gradient = wide(&dx.read(&gpu).unwrap());
        let loss = |x: &[f64]| {
            let y = reference(x, 2, &starts, &table, 1.0);
            y.iter().zip(&dy).map(|(y, &dy)| y * f64::from(dy)).sum()
        };
        assert_gradient("dx", &wide(&random(1, 80)), &gradient, 1e-5, loss);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let Some(gpu) = gpu() else { return };
        let rotary = Rotary::new(&gpu).unwrap();
        let mat = |rows, cols| Mat::new(&gpu, "test", rows, cols).unwrap();
        let range = |bytes| BufferRange { buffer: gpu.storage("starts", 32).unwrap(), offset: 0, size: bytes };
        let refused = |x: &Mat, heads, starts: u64, table: &Mat| {
            let result = rotary.forward(&mut gpu.commands("test"), x, heads, (0, &range(starts)), table);
            matches!(result, Err(OpError::Shape { .. }))
        };
        assert!(!refused(&mat(5, 128), 2, 20, &mat(5, 64)));
        assert!(!refused(&mat(5, 128), 2, 20, &mat(5, 48)));
        assert!(refused(&mat(5, 128), 2, 20, &mat(5, 66)));
        assert!(refused(&mat(5, 128), 0, 20, &mat(5, 64)));
        assert!(refused(&mat(5, 128), 3, 20, &mat(5, 64)));
        assert!(refused(&mat(5, 128), 2, 16, &mat(5, 64)));
        assert!(refused(&mat(5, 126), 2, 20, &mat(5, 63)));
        assert!(refused(&mat(5, 128), 2, 20, &Mat { rows: 0, ..mat(5, 64) }));
        let from = |first| rotary.forward_from(&mut gpu.commands("test"), &mat(5, 128), 2, first, &mat(9, 64));
        assert!(from(4).is_ok());
        for first in [5, u32::MAX] {
            assert!(matches!(from(first), Err(OpError::Shape { expected, .. }) if expected == u64::from(first) + 5));
        }
    }
}
