//! Tests every product against sums in f64.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::ops::Range;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::*;
use crate::dequant::{Codec, GpuWeights, dequantize};
use crate::format::FloatType;
use crate::format::nf4::{self, Nf4Tensor, ScaleType, Scales};
use crate::gpu::{BufferRange, Options};
use crate::ops::testing::{self, assert_close, assert_gradient, assert_untouched, poisoned, random, random_mat};

pub(super) const BOUND: f64 = 1e-5;
const SIZES: [u32; 5] = [1, 3, 17, 65, 130];

/// All tests share one device: software drivers take seconds to compile a kernel.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(testing::gpu).as_ref()
}

/// All triples of these sizes.
fn shapes() -> impl Iterator<Item = (u32, u32, u32)> {
    let size = |i: usize| SIZES[i % SIZES.len()];
    (0..SIZES.len()).flat_map(move |i| [(size(i), size(i + 1), size(i + 3)), (size(i), size(i + 3), size(i + 2))])
}

/// The reference `[m, n]`. Each element is a sum of `k` terms. A loop over indices, because
/// iterators are slow without optimisation.
pub(super) fn reference(m: u32, n: u32, k: u32, term: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    let (m, n, k) = (m as usize, n as usize, k as usize);
    let element = |i: usize| {
        let (row, column, mut sum, mut t) = (i / n, i % n, 0.0, 0);
        while t < k {
            sum += term(row, column, t);
            t += 1;
        }
        sum
    };
    (0..m * n).map(element).collect()
}

pub(super) fn round(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|x| x as f32).collect()
}

/// A weight on the device and in f64.
pub(super) struct Frozen {
    nf4: Option<GpuWeights>,
    raw: Option<(FloatType, Vec<BufferRange>)>,
    values: Vec<f32>,
    outputs: u32,
    inputs: u32,
}

impl Frozen {
    pub(super) fn nf4(gpu: &Gpu, outputs: u32, inputs: u32, block_size: u32, scale_type: ScaleType) -> Self {
        Self::nf4_times(gpu, outputs, inputs, block_size, scale_type, 1.0)
    }

    /// With scales of this magnitude.
    pub(super) fn nf4_times(
        gpu: &Gpu,
        outputs: u32,
        inputs: u32,
        block_size: u32,
        scale_type: ScaleType,
        magnitude: f32,
    ) -> Self {
        let elements = u64::from(outputs * inputs);
        let blocks = nf4::block_count(elements, block_size);
        let codes: Vec<u8> = random(7, nf4::codes_len(elements, block_size).unwrap() as usize)
            .into_iter()
            .map(|x| (x.abs() * 255.9) as u8)
            .collect();
        let unscaled = |seed, count: u64| random(seed, count as usize).into_iter().map(|x| x.abs() + 0.1);
        let floats = |seed, count: u64| unscaled(seed, count).map(|x| x * magnitude);
        let bytes = |seed, count| floats(seed, count).flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
        let payload = match scale_type {
            ScaleType::F32 => bytes(8, blocks),
            ScaleType::Bf16 => floats(8, blocks).flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
            ScaleType::Dq8 => {
                let codes: Vec<u8> = unscaled(9, blocks).map(|x| (x * 200.0) as u8).collect();
                // The offset and the super-scales have the magnitude, the map does not.
                let offset = unscaled(10, 1).map(|x| x * magnitude);
                let rest = unscaled(11, 256).chain(unscaled(12, blocks.div_ceil(256)).map(|x| x * magnitude));
                [offset.chain(rest).flat_map(f32::to_le_bytes).collect(), codes].concat()
            }
        };
        let scales = Scales::from_payload(&payload, scale_type, blocks as usize).unwrap();
        let projection = Nf4Tensor { codes: &codes, scales, block_size, elements };
        let mut values = vec![0.0; elements as usize];
        dequantize(&projection, 0, &mut values).unwrap();
        let nf4 = Some(GpuWeights::upload(gpu, &projection).unwrap());
        Self { nf4, raw: None, values, outputs, inputs }
    }

    /// Random weights of a codec.
    pub(super) fn sample(gpu: &Gpu, codec: Codec, outputs: u32, inputs: u32) -> Self {
        let (weights, values) = codec.sample(gpu, u64::from(outputs * inputs)).unwrap();
        Self { nf4: Some(weights), raw: None, values, outputs, inputs }
    }

    /// In parts of `part` bytes.
    pub(super) fn raw(gpu: &Gpu, outputs: u32, inputs: u32, float_type: FloatType, part: usize) -> Self {
        let floats = random(11, (outputs * inputs) as usize);
        let (values, bytes): (Vec<f32>, Vec<u8>) = match float_type {
            FloatType::F32 => (floats.clone(), floats.iter().flat_map(|x| x.to_le_bytes()).collect()),
            FloatType::F16 => {
                let halves: Vec<f16> = floats.iter().map(|&x| f16::from_f32(x)).collect();
                (halves.iter().map(|x| x.to_f32()).collect(), halves.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
            FloatType::Bf16 => {
                let halves: Vec<bf16> = floats.iter().map(|&x| bf16::from_f32(x)).collect();
                (halves.iter().map(|x| x.to_f32()).collect(), halves.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
        };
        let range = |bytes: &[u8]| {
            let buffer = gpu.storage_with("raw", bytes).unwrap();
            BufferRange { buffer, offset: 0, size: bytes.len() as u64 }
        };
        let parts = bytes.chunks(part).map(range).collect();
        Self { nf4: None, raw: Some((float_type, parts)), values, outputs, inputs }
    }

    pub(super) fn weight(&self) -> Weight<'_> {
        let elements = match (&self.nf4, &self.raw) {
            (Some(weights), _) => Elements::Quantized(weights),
            (_, Some((float_type, parts))) => Elements::Raw { float_type: *float_type, parts },
            _ => panic!("no weight"),
        };
        Weight::new(elements, self.outputs, self.inputs)
    }

    pub(super) fn value(&self, output: usize, input: usize) -> f64 {
        f64::from(self.values[output * self.inputs as usize + input])
    }

    /// Checks both products with some rows of the weight against the reference, with and without
    /// `add`. The sizes decide whether there is a factor.
    fn check(&self, gpu: &Gpu, what: &str, m: u32, rows: Range<u32>) {
        let matmul = Matmul::new(gpu, None).unwrap();
        let factor = [1.0, -0.3][(m + self.outputs) as usize % 2];
        let weight = self.weight().times(factor).rows(rows.clone());
        let factor = f64::from(factor);
        let (n, first) = (weight.outputs(), rows.start as usize);
        let (x, xs) = random_mat(gpu, 1, m, self.inputs);
        let (dy, dys) = random_mat(gpu, 2, m, n);
        let (bias, biases) = random_mat(gpu, 3, 1, n);
        let (y_added, y_old) = random_mat(gpu, 4, m, n);
        let (dx_added, dx_old) = random_mat(gpu, 5, m, self.inputs);
        let (y, dx) = (poisoned(gpu, m, n), poisoned(gpu, m, self.inputs));
        let mut commands = gpu.commands("products with weights");
        matmul.forward(&mut commands, &x, &weight, None, false, &y).unwrap();
        matmul.forward(&mut commands, &x, &weight, Some(&bias), true, &y_added).unwrap();
        matmul.backward(&mut commands, &dy, &weight, false, &dx).unwrap();
        matmul.backward(&mut commands, &dy, &weight, true, &dx_added).unwrap();
        commands.submit().unwrap();
        [&y, &y_added, &dx, &dx_added].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        let (inputs, xs, dys, values) = (self.inputs as usize, &xs[..], &dys[..], &self.values[..]);
        let value = |output: usize, input: usize| f64::from(values[output * inputs + input]);
        let product = |i: usize, j, t| factor * f64::from(xs[i * inputs + t]) * value(first + j, t);
        let expected = reference(m, n, self.inputs, product);
        let added = |i: usize, sum: &f64| sum + f64::from(y_old[i]) + factor * f64::from(biases[i % n as usize]);
        let expected_added = expected.iter().enumerate().map(|(i, sum)| added(i, sum)).collect();
        assert_close(&format!("{what}: y"), &y.read(gpu).unwrap(), &round(expected), BOUND);
        assert_close(&format!("{what}: y + x W^T + bias"), &y_added.read(gpu).unwrap(), &round(expected_added), BOUND);
        let outputs = n as usize;
        let product = |i: usize, j, t| factor * f64::from(dys[i * outputs + t]) * value(first + t, j);
        let expected = reference(m, self.inputs, n, product);
        let expected_added = expected.iter().zip(&dx_old).map(|(sum, &old)| sum + f64::from(old)).collect();
        assert_close(&format!("{what}: dx"), &dx.read(gpu).unwrap(), &round(expected), BOUND);
        assert_close(&format!("{what}: dx + dy W"), &dx_added.read(gpu).unwrap(), &round(expected_added), BOUND);
    }
}

type Product = fn(&Matmul, &mut Commands, &Mat, &Mat, f32, bool, &Mat) -> Result<(), OpError>;
/// Index of an element, from its row (or column), its term, and m, n and k.
type Index = fn(usize, usize, (usize, usize, usize)) -> usize;
/// Name and product, then shape and index of each operand.
type Case = (&'static str, Product, (u32, u32), Index, (u32, u32), Index);

fn by_row(row: usize, term: usize, (_, _, k): (usize, usize, usize)) -> usize {
    row * k + term
}

/// Checks the three dense products of one shape, with and without `add`.
fn check_dense(gpu: &Gpu, (m, n, k): (u32, u32, u32)) {
    let matmul = Matmul::new(gpu, None).unwrap();
    let cases: [Case; 3] = [
        ("nt", |of, c, a, b, scale, add, out| of.nt(c, a, b, scale, add, out), (m, k), by_row, (n, k), by_row),
        (
            "nn",
            |of, c, a, b, scale, add, out| of.nn(c, a, b, scale, add, out),
            (m, k),
            by_row,
            (k, n),
            |column, term, (_, n, _)| term * n + column,
        ),
        (
            "tn",
            |of, c, a, b, scale, add, out| of.tn(c, a, b, scale, add, out),
            (k, m),
            |row, term, (m, _, _)| term * m + row,
            (k, n),
            |column, term, (_, n, _)| term * n + column,
        ),
    ];
    for (name, product, a_shape, a_at, b_shape, b_at) in cases {
        let (a, a_values) = random_mat(gpu, 1, a_shape.0, a_shape.1);
        let (b, b_values) = random_mat(gpu, 2, b_shape.0, b_shape.1);
        let (added, old) = random_mat(gpu, 3, m, n);
        let out = poisoned(gpu, m, n);
        let mut commands = gpu.commands("dense products");
        product(&matmul, &mut commands, &a, &b, 1.0, false, &out).unwrap();
        product(&matmul, &mut commands, &a, &b, -0.75, true, &added).unwrap();
        commands.submit().unwrap();
        [&out, &added].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        let sizes = (m as usize, n as usize, k as usize);
        let term = |i, j, t| f64::from(a_values[a_at(i, t, sizes)]) * f64::from(b_values[b_at(j, t, sizes)]);
        let expected = reference(m, n, k, term);
        let expected_added = expected.iter().zip(&old).map(|(sum, &old)| f64::from(old) - 0.75 * sum).collect();
        let what = format!("{name} {m} x {n} x {k}");
        assert_close(&what, &out.read(gpu).unwrap(), &round(expected), BOUND);
        assert_close(&format!("{what}, added"), &added.read(gpu).unwrap(), &round(expected_added), BOUND);
    }
}

#[test]
fn dense_products_of_odd_sizes() {
    let Some(gpu) = gpu() else { return };
    shapes().for_each(|shape| check_dense(gpu, shape));
}

/// A sum of zero terms is 0, and adding it changes nothing.
#[test]
fn products_without_terms_columns_or_rows() {
    let Some(gpu) = gpu() else { return };
    for shape in [(5, 7, 0), (1, 300, 0), (130, 66, 0), (0, 7, 5), (5, 0, 7), (0, 0, 0)] {
        check_dense(gpu, shape);
    }
    let matmul = Matmul::new(gpu, None).unwrap();
    for (m, outputs, inputs) in [(5, 7, 0), (40, 3, 0), (5, 0, 7)] {
        let weight = Weight::new(Elements::Raw { float_type: FloatType::Bf16, parts: &[] }, outputs, inputs);
        let ((x, _), (dy, _)) = (random_mat(gpu, 1, m, inputs), random_mat(gpu, 2, m, outputs));
        let (bias, biases) = random_mat(gpu, 3, 1, outputs);
        let ((y_added, y_old), (dx_added, dx_old)) = (random_mat(gpu, 4, m, outputs), random_mat(gpu, 5, m, inputs));
        let (y, dx) = (poisoned(gpu, m, outputs), poisoned(gpu, m, inputs));
        let mut commands = gpu.commands("products without terms");
        matmul.forward(&mut commands, &x, &weight, None, false, &y).unwrap();
        matmul.forward(&mut commands, &x, &weight, Some(&bias), true, &y_added).unwrap();
        matmul.backward(&mut commands, &dy, &weight, false, &dx).unwrap();
        matmul.backward(&mut commands, &dy, &weight, true, &dx_added).unwrap();
        commands.submit().unwrap();
        [&y, &y_added, &dx, &dx_added].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        assert_eq!(y.read(gpu).unwrap(), vec![0.0; (m * outputs) as usize]);
        let added = y_old.iter().zip(biases.iter().cycle()).map(|(y, bias)| y + bias).collect::<Vec<f32>>();
        assert_eq!(y_added.read(gpu).unwrap(), added);
        assert_eq!(dx.read(gpu).unwrap(), vec![0.0; (m * inputs) as usize]);
        assert_eq!(dx_added.read(gpu).unwrap(), dx_old);
    }
}

/// Tiles, few rows of words, and few rows of whole vectors.
#[test]
fn a_second_codec() {
    let Some(gpu) = gpu() else { return };
    for scale_type in [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8] {
        for (m, inputs) in [(70, 72), (2, 72), (2, 64)] {
            let frozen = Frozen::sample(gpu, Codec::Linear(scale_type), 66, inputs);
            frozen.check(gpu, &format!("linear codes, {scale_type:?}, {m} x {inputs}"), m, 3..66);
        }
    }
}

#[test]
fn long_sums_are_cut_and_give_the_same_bits_each_time() {
    let Some(gpu) = gpu() else { return };
    for shape in [(17, 9, 600), (8, 40, 530), (40, 8, 513)] {
        check_dense(gpu, shape);
    }
    let matmul = Matmul::new(gpu, None).unwrap();
    let ((a, _), (b, _)) = (random_mat(gpu, 1, 17, 900), random_mat(gpu, 2, 9, 900));
    let bits = || {
        let out = poisoned(gpu, 17, 9);
        let mut commands = gpu.commands("a cut product");
        matmul.nt(&mut commands, &a, &b, 1.0, false, &out).unwrap();
        commands.submit().unwrap();
        assert_untouched(gpu, &out);
        out.read(gpu).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(), bits());
}

#[test]
fn nf4_weights_of_every_kind_and_odd_sizes() {
    let Some(gpu) = gpu() else { return };
    let types = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
    let any = shapes().enumerate().map(|(i, shape)| (shape, types[i % 3]));
    let whole_words = [(33, 70, 64), (5, 131, 96), (129, 24, 136)].into_iter().flat_map(|shape| types.map(|t| (shape, t)));
    for (i, ((m, outputs, inputs), scale_type)) in any.chain(whole_words).enumerate() {
        let block_size = nf4::BLOCK_SIZES[i % nf4::BLOCK_SIZES.len()];
        let what = format!("{scale_type:?}, blocks of {block_size}, {m} tokens, {outputs} x {inputs}");
        Frozen::nf4(gpu, outputs, inputs, block_size, scale_type).check(gpu, &what, m, 0..outputs);
    }
}

#[test]
fn nf4_sums_that_are_cut() {
    let Some(gpu) = gpu() else { return };
    Frozen::nf4(gpu, 260, 520, 32, ScaleType::Dq8).check(gpu, "long sums", 3, 0..260);
}

#[test]
fn raw_weights_of_every_type_and_odd_sizes() {
    let Some(gpu) = gpu() else { return };
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    for (i, (m, outputs, inputs)) in shapes().enumerate() {
        let float_type = types[i % 3];
        let what = format!("{float_type:?}, {m} tokens, {outputs} x {inputs}");
        Frozen::raw(gpu, outputs, inputs, float_type, 1 << 20).check(gpu, &what, m, 0..outputs);
    }
}

/// Few rows have their own kernels: rows of whole words and others, few and many columns, every
/// block size and type.
#[test]
fn a_few_rows() {
    let Some(gpu) = gpu() else { return };
    let (types, scales) =
        ([FloatType::F32, FloatType::F16, FloatType::Bf16], [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8]);
    let sizes =
        [(1, 7, 5), (1, 600, 1032), (2, 17, 4104), (3, 530, 77), (4, 3, 8), (5, 64, 129), (7, 515, 64), (8, 9, 2051)];
    for (i, (m, outputs, inputs)) in sizes.into_iter().enumerate() {
        let (float_type, scale_type, block_size) = (types[i % 3], scales[i / 2 % 3], [32, 64, 128, 4096][i % 4]);
        let what = format!("{m} x {outputs} x {inputs}");
        let nf4 = Frozen::nf4(gpu, outputs, inputs, block_size, scale_type);
        nf4.check(gpu, &format!("{scale_type:?} in blocks of {block_size}, {what}"), m, 0..outputs);
        Frozen::raw(gpu, outputs, inputs, float_type, 1 << 22).check(gpu, &format!("{float_type:?}, {what}"), m, 0..outputs);
    }
}

#[test]
fn the_same_few_rows_give_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    let frozen = Frozen::nf4(gpu, 100, 2051, 64, ScaleType::Dq8);
    let (x, _) = random_mat(gpu, 1, 3, 2051);
    let product = || {
        let y = poisoned(gpu, 3, 100);
        let mut commands = gpu.commands("few rows");
        matmul.forward(&mut commands, &x, &frozen.weight(), None, false, &y).unwrap();
        commands.submit().unwrap();
        assert_untouched(gpu, &y);
        y.read(gpu).unwrap()
    };
    assert!(product() == product());
}

#[test]
fn some_rows_of_a_weight() {
    let Some(gpu) = gpu() else { return };
    for rows in [0..1, 1..2, 3..70, 64..130, 129..130] {
        for inputs in [37, 64] {
            let nf4 = Frozen::nf4(gpu, 130, inputs, 64, ScaleType::Dq8);
            nf4.check(gpu, &format!("nf4, rows {rows:?} of {inputs}"), 5, rows.clone());
            let raw = Frozen::raw(gpu, 130, inputs, FloatType::Bf16, 1 << 20);
            raw.check(gpu, &format!("raw, rows {rows:?} of {inputs}"), 5, rows.clone());
        }
    }
}

#[test]
fn small_buffers_and_bindings() {
    if gpu().is_none() {
        return;
    }
    let limits = Options { cache: None, max_buffer: Some(1 << 15), max_binding: Some(1 << 13), ..Options::from_env() };
    let gpu = &Gpu::open(&limits).unwrap();
    // Parts and pieces end inside rows. Left operands and results exceed the binding limit.
    Frozen::nf4(gpu, 130, 521, 64, ScaleType::Bf16).check(gpu, "nf4 in pieces", 2, 0..130);
    Frozen::nf4(gpu, 136, 520, 4096, ScaleType::Dq8).check(gpu, "nf4 in pieces of whole words", 4, 3..135);
    Frozen::raw(gpu, 5, 1900, FloatType::F32, 1 << 14).check(gpu, "raw in pieces", 2, 1..5);
    for shape in [(90, 20, 25), (8, 2, 900)] {
        check_dense(gpu, shape);
    }
}

/// The loss is the sum of y times fixed numbers. So these numbers are dy.
#[test]
fn more_groups_than_a_dimension_has() {
    if gpu().is_none() {
        return;
    }
    let gpu = &Gpu::open(&Options { cache: None, max_groups: Some(20), ..Options::from_env() }).unwrap();
    // Tiles, chunks and their sum; few rows.
    check_dense(gpu, (150, 170, 20));
    check_dense(gpu, (40, 70, 1100));
    Frozen::nf4(gpu, 330, 1100, 64, ScaleType::Bf16).check(gpu, "nf4", 70, 0..330);
    Frozen::nf4(gpu, 330, 520, 64, ScaleType::Bf16).check(gpu, "nf4, few rows", 3, 0..330);
}

#[test]
fn backward_is_the_gradient_of_forward() {
    let Some(gpu) = gpu() else { return };
    let (m, outputs, inputs) = (2, 5, 9);
    let frozen = Frozen::nf4(gpu, outputs, inputs, 32, ScaleType::Bf16);
    let (dy, dys) = random_mat(gpu, 2, m, outputs);
    let dx = poisoned(gpu, m, inputs);
    let mut commands = gpu.commands("gradient");
    Matmul::new(gpu, None).unwrap().backward(&mut commands, &dy, &frozen.weight(), false, &dx).unwrap();
    commands.submit().unwrap();
    assert_untouched(gpu, &dx);
    let gradient: Vec<f64> = dx.read(gpu).unwrap().into_iter().map(f64::from).collect();
    let at: Vec<f64> = random(1, (m * inputs) as usize).into_iter().map(f64::from).collect();
    let loss = |x: &[f64]| {
        let y = reference(m, outputs, inputs, |i, j, t| x[i * inputs as usize + t] * frozen.value(j, t));
        y.iter().zip(&dys).map(|(y, &dy)| y * f64::from(dy)).sum()
    };
    assert_gradient("dx", &at, &gradient, 1e-5, loss);
}

#[test]
fn operands_that_do_not_fit_together_are_refused() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    let mut commands = gpu.commands("misfits");
    let mat = |rows, cols| poisoned(gpu, rows, cols);
    let misfit = |result| assert!(matches!(result, Err(OpError::Shape { .. })), "{result:?}");
    misfit(matmul.nt(&mut commands, &mat(2, 3), &mat(4, 5), 1.0, false, &mat(2, 4)));
    misfit(matmul.nn(&mut commands, &mat(2, 3), &mat(4, 5), 1.0, false, &mat(2, 5)));
    misfit(matmul.tn(&mut commands, &mat(2, 3), &mat(4, 5), 1.0, false, &mat(3, 5)));
    misfit(matmul.nt(&mut commands, &mat(2, 3), &mat(4, 3), 1.0, false, &mat(4, 4)));
    let frozen = Frozen::raw(gpu, 4, 3, FloatType::Bf16, 1 << 20);
    let weight = frozen.weight();
    misfit(matmul.forward(&mut commands, &mat(2, 4), &weight, None, false, &mat(2, 4)));
    misfit(matmul.forward(&mut commands, &mat(2, 3), &weight, Some(&mat(1, 3)), false, &mat(2, 4)));
    misfit(matmul.backward(&mut commands, &mat(2, 4), &weight, false, &mat(3, 3)));
    misfit(matmul.backward(&mut commands, &mat(2, 3), &weight.rows(2..5), false, &mat(2, 3)));
    let (_, parts) = frozen.raw.as_ref().unwrap();
    let short = Weight::new(Elements::Raw { float_type: FloatType::Bf16, parts }, 5, 3);
    misfit(matmul.backward(&mut commands, &mat(2, 5), &short, false, &mat(2, 3)));
    let nf4 = Frozen::nf4(gpu, 4, 3, 64, ScaleType::F32);
    let wrong = Weight::new(Elements::Quantized(nf4.nf4.as_ref().unwrap()), 3, 3);
    misfit(matmul.backward(&mut commands, &mat(2, 3), &wrong, false, &mat(2, 3)));
}

/// Prints the TFLOP/s of one shape. Run by hand on a real GPU, with `--release -- --ignored
/// --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    for (m, outputs, inputs) in
        [512, 2048, 8192].into_iter().flat_map(|m| [(m, 9728, 2560), (m, 2560, 9728), (m, 1024, 2560)])
    {
        let frozen = Frozen::nf4(gpu, outputs, inputs, 64, ScaleType::Dq8);
        let ((x, _), (y, _)) = (random_mat(gpu, 1, m, inputs), random_mat(gpu, 2, m, outputs));
        let ((u, _), (lora, _)) = (random_mat(gpu, 3, m, 16), random_mat(gpu, 4, 16, inputs));
        let weight = frozen.weight();
        let measure = |name: &str, n: u32, k: u32, record: &dyn Fn(&mut Commands)| {
            let seconds = (0..4).map(|_| {
                let mut commands = gpu.commands("speed");
                record(&mut commands);
                commands.submit_timed().unwrap().elapsed(gpu).unwrap().as_secs_f64()
            });
            let best = seconds.fold(f64::INFINITY, f64::min);
            let flops = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
            println!("{name} {m} x {n} x {k}: {:.2} ms, {:.2} TFLOP/s", 1e3 * best, flops / best / 1e12);
        };
        measure("x W^T", outputs, inputs, &|c| matmul.forward(c, &x, &weight, None, false, &y).unwrap());
        measure("dy W", inputs, outputs, &|c| matmul.backward(c, &y, &weight, false, &x).unwrap());
        measure("x A^T", 16, inputs, &|c| matmul.nt(c, &x, &lora, 1.0, false, &u).unwrap());
        measure("u A", inputs, 16, &|c| matmul.nn(c, &u, &lora, 1.0, true, &x).unwrap());
        measure("u^T x", inputs, 16, &|c| matmul.tn(c, &u, &x, 1.0, true, &lora).unwrap());
    }
}

/// Prints the read rate of weights for few rows. Run by hand on a real GPU, with `--release --
/// --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed_of_few_rows() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    for (outputs, inputs) in [(9728, 2560), (2560, 9728), (4096, 2560), (1024, 2560), (16, 2560), (16, 9728), (2560, 16)] {
        let forms = [
            ("nf4", Frozen::nf4(gpu, outputs, inputs, 64, ScaleType::Dq8), 0.516),
            ("bf16", Frozen::raw(gpu, outputs, inputs, FloatType::Bf16, 1 << 30), 2.0),
            ("f32", Frozen::raw(gpu, outputs, inputs, FloatType::F32, 1 << 30), 4.0),
        ];
        for ((name, frozen, bytes), m) in forms.iter().flat_map(|form| [1, 4, 8].map(|m| (form, m))) {
            let ((x, _), (y, _)) = (random_mat(gpu, 1, m, inputs), random_mat(gpu, 2, m, outputs));
            let seconds = (0..5).map(|_| {
                let mut commands = gpu.commands("speed");
                (0..50).for_each(|_| matmul.forward(&mut commands, &x, &frozen.weight(), None, false, &y).unwrap());
                commands.submit_timed().unwrap().elapsed(gpu).unwrap().as_secs_f64() / 50.0
            });
            let best = seconds.fold(f64::INFINITY, f64::min);
            let rate = bytes * f64::from(outputs) * f64::from(inputs) / best;
            println!("{name} {m} x {outputs} x {inputs}: {:.1} us, {:.0} GB/s", 1e6 * best, rate / 1e9);
        }
    }
}
