//! Tests each kernel before its first use: one small product against sums in float64. It has
//! several tiles with a partial last one, weights from the middle of a tensor, a bias, and an
//! initial output to add to.

use super::kernels::{Form, Kernels, RightKind, TERMS, Trials, Variant};
use super::product::{Product, View};
use super::weight::{Elements, Right, Stored, Weight};
use super::wide::{self, Join, Wide, WideKernels};
use crate::dequant::GpuWeights;
use crate::dequant::sample::Random;
use crate::format::FloatType;
use crate::gpu::{BufferRange, Gpu, Kernel};
use crate::ops::trial::{difference, stored};
use crate::ops::{Mat, OpError};

/// Parameters of the kernel tests.
pub(super) const TRIALS: Trials = Trials { product: of_product, sum: of_sum };

/// Minimum elements of the weight before the tested rows: more than one super-scale covers.
const BEFORE: u32 = 8192;
/// Maximum error of a sum, relative to the sum of the magnitudes of its terms.
const TOLERANCE: f64 = 1e-5;
const SCALE: f32 = 0.75;
/// Epsilon of a norm.
const EPSILON: f32 = 0.01;

/// A matrix on the device and its elements.
struct Known {
    mat: Mat,
    values: Vec<f32>,
}

impl Known {
    fn new(gpu: &Gpu, random: &mut Random, rows: u32, cols: u32) -> Result<Self, OpError> {
        let values: Vec<f32> = (0..rows * cols).map(|_| random.uniform()).collect();
        Ok(Self { mat: Mat::from_slice(gpu, "trial", rows, cols, &values)?, values })
    }

    fn at(&self, row: u32, column: u32) -> f64 {
        self.values.get((row * self.mat.cols + column) as usize).copied().unwrap_or(f32::NAN).into()
    }
}

/// The sizes of a test.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    m: u32,
    n: u32,
    k: u32,
    /// Whether the terms are in the rows of the weight, not in its columns.
    by_term: bool,
}

impl Sizes {
    fn of(variant: Variant) -> Self {
        let whole_words = matches!(variant.b, RightKind::Quantized { whole_words: true, .. });
        match variant.form {
            Form::Rows(rows) => {
                let k = 8 * rows.lanes + if rows.whole { 16 } else { 21 };
                Self { m: rows.rows, n: 2 * rows.columns() + 1, k, by_term: true }
            }
            Form::Tiles { tile, b_by_term, .. } => {
                // Whole words need rows of 8 elements.
                let (row, other) = if whole_words { (8, 5) } else { (5, 5) };
                let (n, k) = if b_by_term { (other, row) } else { (row, other) };
                Self { m: 8 * tile.y + 3, n: 8 * tile.x + n, k: 2 * TERMS + k, by_term: b_by_term }
            }
        }
    }

    /// Rows and columns of the weight.
    fn weight(self) -> (u32, u32) {
        if self.by_term { (self.n, self.k) } else { (self.k, self.n) }
    }
}

/// A weight as it is stored, and its values.
struct Sampled {
    quantized: Option<GpuWeights>,
    float_type: FloatType,
    parts: Vec<BufferRange>,
    values: Vec<f32>,
}

impl Sampled {
    fn new(gpu: &Gpu, random: &mut Random, kind: RightKind, elements: u32) -> Result<Self, OpError> {
        match kind {
            RightKind::Quantized { codec, .. } => {
                let (quantized, values) = codec.sample(gpu, elements.into())?;
                Ok(Self { quantized: Some(quantized), float_type: FloatType::F32, parts: Vec::new(), values })
            }
            RightKind::Raw(float_type) => {
                let floats: Vec<f32> = (0..elements).map(|_| random.uniform()).collect();
                let (bytes, widened) = stored(float_type, &floats);
                let buffer = gpu.storage_with("trial", &bytes)?;
                let parts = vec![BufferRange { buffer, offset: 0, size: bytes.len() as u64 }];
                Ok(Self { quantized: None, float_type, parts, values: widened.into_owned() })
            }
        }
    }

    fn elements(&self) -> Elements<'_> {
        match &self.quantized {
            Some(weights) => Elements::Quantized(weights),
            None => Elements::Raw { float_type: self.float_type, parts: &self.parts },
        }
    }
}

/// The right operand of a test: a matrix [rows, inputs] from the middle of a tensor, and its
/// values.
pub(super) fn right(
    gpu: &Gpu,
    random: &mut Random,
    kind: RightKind,
    (rows, inputs): (u32, u32),
) -> Result<(Right, Vec<f32>), OpError> {
    let before = BEFORE / inputs + 1;
    let stored = Sampled::new(gpu, random, kind, (before + rows) * inputs)?;
    let weight = Weight::new(stored.elements(), before + rows, inputs).rows(before..before + rows);
    let binding = gpu.limits().max_storage_buffer_binding_size;
    let (_, right) = weight.pieces("a trial", binding)?.into_iter().next().ok_or(OpError::Shape {
        operation: "a trial",
        what: "the number of pieces",
        expected: 1,
        found: 0,
    })?;
    Ok((right, stored.values.get((before * inputs) as usize..).unwrap_or_default().to_vec()))
}

/// Describes the difference of a product from the CPU, if there is one.
fn of_product(kernels: &Kernels, variant: Variant, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let (gpu, sizes, mut random) = (kernels.gpu(), Sizes::of(variant), Random::default());
    let Sizes { m, n, k, by_term } = sizes;
    let (b, b_values) = right(gpu, &mut random, variant.b, sizes.weight())?;
    let a_by_term = !matches!(variant.form, Form::Tiles { a_by_term: false, .. });
    let (a_rows, a_cols) = if a_by_term { (m, k) } else { (k, m) };
    let a = Known::new(gpu, &mut random, a_rows, a_cols)?;
    let (bias, out) = (Known::new(gpu, &mut random, 1, n)?, Known::new(gpu, &mut random, m, n)?);
    let strides = |by_term, cols| if by_term { (cols, 1) } else { (1, cols) };
    let (row, column) = strides(a_by_term, a_cols);
    let product = Product {
        b_largest: None,
        m,
        n,
        k,
        a: View { range: a.mat.range.clone(), first: 0, row, column },
        b,
        b_strides: strides(by_term, sizes.weight().1),
        out: View { range: out.mat.range.clone(), first: 0, row: n, column: 1 },
        scale: SCALE,
        add: true,
        bias: Some((bias.mat.range.clone(), 0)),
    };
    let groups = match variant.form {
        Form::Rows(rows) => rows.groups(n),
        Form::Tiles { tile, .. } => tile.groups(m, n),
    };
    let mut commands = gpu.commands("a test of a product");
    kernels.multiply(&mut commands, kernel, &product, groups, k.next_multiple_of(TERMS));
    commands.submit()?;
    let term = |i: u32, j: u32, t: u32| {
        let left = if a_by_term { a.at(i, t) } else { a.at(t, i) };
        let at = if by_term { j * k + t } else { t * n + j };
        left * b_values.get(at as usize).copied().map_or(f64::NAN, f64::from)
    };
    let expected = (0..m * n).map(|at| {
        let (i, j) = (at / n, at % n);
        let (sum, size) = (0..k).map(|t| term(i, j, t)).fold((0.0, 1.0), |(sum, size), x| (sum + x, size + x.abs()));
        (f64::from(SCALE) * (sum + bias.at(0, j)) + out.at(i, j), TOLERANCE * size)
    });
    Ok(difference(&out.mat.read(gpu)?, expected))
}

/// Describes the difference of the sum of three chunks from the CPU, if there is one.
fn of_sum(kernels: &Kernels, kernel: &Kernel) -> Result<Option<String>, OpError> {
    const CHUNKS: u32 = 3;
    let (gpu, mut random, m, n) = (kernels.gpu(), Random::default(), 13, 43);
    let parts = Known::new(gpu, &mut random, CHUNKS * m, n)?;
    let (bias, out) = (Known::new(gpu, &mut random, 1, n)?, Known::new(gpu, &mut random, m, n)?);
    let product = Product {
        b_largest: None,
        m,
        n,
        k: 0,
        a: View { range: out.mat.range.clone(), first: 0, row: 0, column: 1 },
        b: Right::Raw { range: out.mat.range.clone(), first: 0, float_type: FloatType::F32 },
        b_strides: (0, 1),
        out: View { range: out.mat.range.clone(), first: 0, row: n, column: 1 },
        scale: SCALE,
        add: true,
        bias: Some((bias.mat.range.clone(), 0)),
    };
    let mut commands = gpu.commands("a test of a sum");
    // Work that was submitted before has finished with the scratch memory, and later work
    // overwrites it.
    commands.copy(&parts.mat.range, &kernels.scratch().slice(0, parts.mat.range.size));
    kernels.sum(&mut commands, kernel, product.target(), CHUNKS);
    commands.submit()?;
    let expected = (0..m * n).map(|at| {
        let (i, j) = (at / n, at % n);
        let sum: f64 = (0..CHUNKS).map(|chunk| parts.at(chunk * m + i, j)).sum();
        (f64::from(SCALE) * (sum + bias.at(0, j)) + out.at(i, j), TOLERANCE)
    });
    Ok(difference(&out.mat.read(gpu)?, expected))
}

/// Describes the difference of a product of few rows from the CPU, if there is one. Its weights are
/// in the middle of tensors: two in one buffer if the kernel joins them, else one.
pub(super) fn of_wide(kernels: &WideKernels, variant: wide::Variant, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (kernels.gpu(), Random::default());
    let chunk = variant.stored.chunk();
    // More rounds of the loop than one, and a partial last one.
    let (m, k) = (variant.rows, chunk * (2 * variant.lanes * variant.rounds + 3));
    // A partial last workgroup, of an even number of columns.
    let n = 2 * variant.columns() + 2;
    let kind = match variant.stored {
        Stored::Quantized(codec) => RightKind::Quantized { codec, whole_words: true },
        Stored::Raw(float_type) => RightKind::Raw(float_type),
    };
    let before = BEFORE / k + 1;
    let stored = Sampled::new(gpu, &mut random, kind, (before + n) * k)?;
    let whole = Weight::new(stored.elements(), before + n, k);
    // Two weights that are the halves of one.
    let middle = if variant.gated { n / 2 } else { n };
    let rows = |from: u32, to: u32| whole.rows(before + from..before + to).times(SCALE);
    let (start, end) = (rows(0, middle), rows(middle, n));
    let weights = [&start, &end];
    let columns = if variant.gated { n / 2 } else { n };
    let (x, gamma) = (Known::new(gpu, &mut random, m, k)?, Known::new(gpu, &mut random, 1, k)?);
    let (bias, addend) = (Known::new(gpu, &mut random, 1, n)?, Known::new(gpu, &mut random, m, columns)?);
    let out = Mat::from_slice(gpu, "trial", m, columns, &vec![f32::NAN; (m * columns) as usize])?;
    let product = Wide {
        weights: weights.get(..if variant.gated { 2 } else { 1 }).unwrap_or_default(),
        join: if variant.gated { Join::Gated } else { Join::Concat },
        norm: variant.norm.then_some((&gamma.mat, EPSILON)),
        bias: (!variant.gated).then_some(&bias.mat),
        addend: Some(&addend.mat),
    };
    let mut commands = gpu.commands("a test of a product");
    let bound = kernels.bind(&x.mat, &product)?;
    let unbound = OpError::Shape { operation: "a trial", what: "the number of products", expected: 1, found: 0 };
    kernels.dispatch(&mut commands, kernel, variant, &x.mat, &product, &bound.ok_or(unbound)?, &out);
    commands.submit()?;
    let factor = |i: u32| match variant.norm {
        true => 1.0 / ((0..k).map(|t| x.at(i, t).powi(2)).sum::<f64>() / f64::from(k) + f64::from(EPSILON)).sqrt(),
        false => 1.0,
    };
    let factors: Vec<f64> = (0..m).map(factor).collect();
    // The product with a row of the weight, and the sum of the magnitudes of its terms.
    let sum = |i: u32, j: u32| {
        let term = |t: u32| {
            let weight = stored.values.get(((before + j) * k + t) as usize).copied().map_or(f64::NAN, f64::from);
            x.at(i, t) * weight * if variant.norm { gamma.at(0, t) } else { 1.0 }
        };
        let (sum, size) = (0..k).map(term).fold((0.0, 1.0), |(sum, size), x| (sum + x, size + x.abs()));
        let factor = factors.get(i as usize).copied().unwrap_or(f64::NAN);
        let bias = if variant.gated { 0.0 } else { bias.at(0, j) };
        (f64::from(SCALE) * (factor * sum + bias), 1.0 + factor * size)
    };
    let expected = (0..m * columns).map(|at| {
        let (i, j) = (at / columns, at % columns);
        let (value, size) = match variant.gated {
            true => {
                let ((gate, gate_size), (up, up_size)) = (sum(i, j), sum(i, middle + j));
                (gate / (1.0 + (-gate).exp()) * up, gate_size * (1.0 + up.abs()) + up_size * (1.0 + gate.abs()))
            }
            false => sum(i, j),
        };
        (value + addend.at(i, j), TOLERANCE * (1.0 + size))
    });
    Ok(difference(&out.read(gpu)?, expected))
}

#[cfg(test)]
mod tests {
    use super::super::Matmul;
    use super::*;
    use crate::dequant::Codec;
    use crate::format::nf4::ScaleType;
    use crate::gpu::Commands;
    use crate::ops::testing::gpu;
    use crate::ops::trial::Tried;

    type Record<'a> = &'a dyn Fn(&Matmul, &mut Commands) -> Result<(), OpError>;

    /// The error on first use of a kernel with one wrong line.
    fn refusal(gpu: &Gpu, patch: [&'static str; 2], record: Record<'_>) -> String {
        let kernels = Kernels::new(gpu, Tried::patched(gpu, patch), Tried::patched(gpu, patch), TRIALS).unwrap();
        let wide = WideKernels::new(gpu, Tried::patched(gpu, patch), of_wide);
        let error = record(&Matmul { kernels, wide, mixed: None }, &mut gpu.commands("a wrong kernel")).unwrap_err();
        assert!(matches!(error, OpError::Unfit { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn a_wrong_kernel_of_any_form_is_named_before_its_first_use() {
        let Some(gpu) = gpu() else { return };
        let mat = |rows, cols| Mat::new(&gpu, "zeros", rows, cols).unwrap();
        let device = gpu.adapter().to_string();
        let check = |text: String, parts: &[&str]| {
            assert!(parts.iter().chain([&device.as_str()]).all(|part| text.contains(part)), "{text}");
        };
        let tile = ["sums[9] += a1.x * b1", "sums[9] += a1.x * b0"];
        let dense: [(&str, Record<'_>); 3] = [
            ("B_BY_TERM 1", &|matmul, c| matmul.nt(c, &mat(70, 9), &mat(70, 9), 1.0, false, &mat(70, 70))),
            ("B_BY_TERM 0", &|matmul, c| matmul.nn(c, &mat(70, 9), &mat(9, 70), 1.0, false, &mat(70, 70))),
            ("A_BY_TERM 0", &|matmul, c| matmul.tn(c, &mat(9, 70), &mat(9, 70), 1.0, false, &mat(70, 70))),
        ];
        for (form, record) in dense {
            check(refusal(&gpu, tile, record), &["matmul_raw:main", form]);
        }
        check(
            refusal(&gpu, ["sum += parts", "sum -= parts"], &|matmul, c| {
                matmul.nt(c, &mat(20, 0), &mat(20, 0), 1.0, false, &mat(20, 20))
            }),
            &["matmul_sum:main"],
        );
        let wrong_scale = ["let i = params.scales_first + block;", "let i = params.scales_first + (block ^ 1u);"];
        for (scale_type, scales) in
            [(ScaleType::F32, "SCALES 0"), (ScaleType::Bf16, "SCALES 1"), (ScaleType::Dq8, "SCALES 2")]
        {
            let codec = Codec::Nf4(scale_type);
            // Rows of whole words, but not of whole vectors.
            let (weights, _) = codec.sample(&gpu, 64 * 72).unwrap();
            let weight = Weight::new(Elements::Quantized(&weights), 64, 72);
            let forms: [(&str, Record<'_>); 3] = [
                ("matmul_quantized:main", &|matmul, c| matmul.forward(c, &mat(70, 72), &weight, None, false, &mat(70, 64))),
                ("matmul_quantized:main", &|matmul, c| matmul.backward(c, &mat(70, 64), &weight, false, &mat(70, 72))),
                ("matmul_rows_quantized:main", &|matmul, c| {
                    matmul.forward(c, &mat(2, 72), &weight, None, false, &mat(2, 64))
                }),
            ];
            for (name, record) in forms {
                check(refusal(&gpu, wrong_scale, record), &[name, scales]);
            }
            let whole = Weight::new(Elements::Quantized(&weights), 72, 64);
            let wide: Record<'_> = &|matmul, c| matmul.forward(c, &mat(2, 64), &whole, None, false, &mat(2, 72));
            let wrong_word = ["let first = params.places[number].y;", "let first = params.places[number].y + 1u;"];
            check(refusal(&gpu, wrong_word, wide), &["matmul_wide_quantized:main", scales]);
        }
    }
}
