//! Tests of products on matrix units against sums in f64: on the units of the device if it has
//! them, and with the matrix operations as loops on every device.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::sync::OnceLock;

use super::source::{Form, Tile};
use super::*;
use crate::dequant::Codec;
use crate::format::FloatType;
use crate::format::nf4::ScaleType;
use crate::gpu::{Options, wgpu};
use crate::ops::matmul::tests::Frozen;
use crate::ops::matmul::{Elements, Matmul, Weight};
use crate::ops::testing::{self, assert_untouched, mat, poisoned, random, random_mat, units};
use crate::ops::{Mat, OpError};

/// Maximum error of a row, relative to the norm of its terms. Both operands are rounded to 11 bits.
pub(super) const BOUND: f64 = 5e-4;

const SIDES: [Terms; 2] = [Terms::Columns, Terms::Rows];

pub(super) fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(testing::gpu).as_ref()
}

pub(super) fn matmul(gpu: &Gpu) -> Matmul {
    Matmul::new(gpu, Some(units(gpu))).unwrap()
}

fn forms() -> impl Iterator<Item = Form> {
    let sides = SIDES.into_iter().flat_map(|left| SIDES.map(|right| (left, right)));
    let forms = sides.map(|(left, right)| Form { tile: Tile::LARGE, left, right, adapted: false, fours: false });
    let forms = forms.flat_map(|form| [form, Form { tile: Tile::NARROW, ..form }]);
    let forms = forms.flat_map(|form| [form, Form { fours: true, ..form }]);
    forms.flat_map(|form| [form, Form { adapted: true, ..form }]).filter(|form| !form.adapted || form.left == Terms::Columns)
}

/// The driver gets every source as SPIR-V; workgroup memory leaves room for a second workgroup on a
/// core.
#[test]
fn every_source_is_valid_for_matrix_units() {
    use wgpu::naga::{back::spv, front::wgsl, proc::Layouter, valid};
    let mut count = 0;
    for form in forms() {
        let source = MatrixUnits::Hardware.source(&form.source());
        let module = wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{form:?}: {}", e.emit_to_string(&source)));
        let mut validator = valid::Validator::new(valid::ValidationFlags::all(), valid::Capabilities::all());
        let info = validator.validate(&module).unwrap_or_else(|e| panic!("{form:?}: {}", e.emit_to_string(&source)));
        let options = spv::Options { lang_version: (1, 4), ..spv::Options::default() };
        spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{form:?}: {e}"));
        let mut layouter = Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let memory =
            module.global_variables.iter().filter(|(_, variable)| variable.space == wgpu::naga::AddressSpace::WorkGroup);
        let sizes: Vec<u32> = memory.map(|(_, variable)| layouter[variable.ty].size).collect();
        assert!(sizes.iter().all(|size| size.is_multiple_of(16)), "{form:?}: {sizes:?}");
        assert!(sizes.iter().sum::<u32>() <= 24 << 10, "{form:?}: {sizes:?}");
        count += 1;
    }
    assert_eq!(count, 24);
}

#[test]
fn every_kernel_is_right_on_this_device() {
    let Some(gpu) = gpu() else { return };
    let units = [MatrixUnits::Loops].into_iter().chain(gpu.matrix_units().ok());
    for units in units {
        let mixed = Mixed::new(gpu, units, Tried::new(gpu), trial::of).unwrap();
        // Software drivers take long to compile them: only those in use.
        let of_gradients = |form: &Form| form.tile == Tile::NARROW && form.right == Terms::Rows;
        let used = |form: &Form| form.fours && (form.left == Terms::Columns || of_gradients(form));
        let wanted = |form: &Form| units == MatrixUnits::Hardware || used(form);
        forms().filter(wanted).for_each(|form| drop(mixed.kernel(Kind::Product(form)).unwrap()));
        for kind in [Kind::Measure, Kind::LowRank, Kind::AlignExtent, Kind::Align] {
            mixed.kernel(kind).unwrap();
        }
        for whole in [false, true] {
            mixed.kernel(Kind::Pack { whole }).unwrap();
            for stored in Stored::all() {
                mixed.kernel(Kind::Extent(stored)).unwrap();
                for known in [false, true] {
                    mixed.kernel(Kind::Decode { stored, whole, known }).unwrap();
                }
            }
        }
    }
}

const NARROW_FORM: Form =
    Form { tile: Tile::NARROW, left: Terms::Columns, right: Terms::Columns, adapted: false, fours: false };

/// Each wrong line is found before the first use of its kernel.
#[test]
fn a_wrong_kernel_is_named_before_its_first_use() {
    let Some(gpu) = gpu() else { return };
    let quantized = Stored::Quantized(Codec::Nf4(ScaleType::Dq8));
    let product = |right| Kind::Product(Form { right, ..NARROW_FORM });
    let adapted = |right| Kind::Product(Form { right, adapted: true, ..NARROW_FORM });
    let rows = Kind::Decode { stored: Stored::Raw(FloatType::F32), whole: false, known: false };
    let fours = Kind::Product(Form { fours: true, ..NARROW_FORM });
    let cases: [(Kind, [&'static str; 2]); 20] = [
        (Kind::Pack { whole: true }, ["power(-exponent)", "power(1 - exponent)"]),
        (Kind::Pack { whole: false }, ["column + 3u", "column + 2u"]),
        (Kind::Extent(Stored::Raw(FloatType::F32)), ["i < params.items", "i < params.items / 64u"]),
        (Kind::Decode { stored: quantized, whole: true, known: true }, ["word >> vec4(16u", "word >> vec4(12u"]),
        (rows, ["column >= params.cols", "column > params.cols + 8u"]),
        (product(Terms::Columns), ["left_at += ", "left_at += 4u + "]),
        (product(Terms::Rows), ["right_m1, sums_1_1", "right_m0, sums_1_1"]),
        (product(Terms::Columns), ["value += out[at]", "value -= out[at]"]),
        (product(Terms::Rows), ["row < params.m &&", "row < params.m - 1u &&"]),
        (fours, ["i += 8u", "i += 16u"]),
        (fours, ["value += out[at]", "value -= out[at]"]),
        (adapted(Terms::Columns), ["power(-shift) / params.ratio", "power(-shift)"]),
        (adapted(Terms::Rows), ["other_at += ", "other_at += 4u + "]),
        (adapted(Terms::Columns), ["params.low_first + ", "16u + params.low_first + "]),
        (Kind::LowRank, ["exponent += left_exponents[row]", "exponent -= left_exponents[row]"]),
        (Kind::LowRank, ["column >= params.rank", "column > params.rank"]),
        (Kind::AlignExtent, ["i32(bits >> 23u) + row_exponent", "i32(bits >> 23u)"]),
        (Kind::Measure, ["max(largest[params.at], found)", "max(found, found)"]),
        (Kind::Decode { stored: quantized, whole: true, known: true }, ["extents[params.extent_at];", "extents[0];"]),
        (Kind::Align, ["column >= params.cols", "column > params.cols"]),
    ];
    for (kind, patch) in cases {
        let mixed = Mixed::new(gpu, units(gpu), Tried::patched(gpu, patch), trial::of).unwrap();
        let error = mixed.kernel(kind).unwrap_err();
        assert!(matches!(error, OpError::Unfit { .. }), "{kind:?}: {error}");
    }
}

/// The error of a row with few sums or terms may lie far above the mean.
pub(super) fn bound(n: u32, k: u32) -> f64 {
    if n.min(k) < 32 { 3.0 * BOUND } else { BOUND }
}

/// A sum, and the sum of the squares of its terms.
#[derive(Clone, Copy)]
pub(super) struct Sum(pub f64, pub f64);

impl Sum {
    pub(super) fn of(terms: impl Iterator<Item = f64>) -> Self {
        terms.fold(Self(0.0, 0.0), |Self(sum, squares), term| Self(sum + term, squares + term * term))
    }

    pub(super) fn plus(self, term: f64) -> Self {
        Self(self.0 + term, self.1 + term * term)
    }
}

/// The largest error of a row, relative to the norm of all terms of its sums.
pub(super) fn error(found: &[f32], expected: &[Sum], cols: u32) -> f64 {
    let row = |(found, expected): (&[f32], &[Sum])| {
        let difference: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e.0).powi(2)).sum();
        let norm: f64 = expected.iter().map(|e| e.1).sum();
        if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
    };
    let rows = found.chunks(cols as usize).zip(expected.chunks(cols as usize)).map(row);
    // NaN is larger than every error.
    rows.fold(0.0, |largest, error| if error <= largest { largest } else { error })
}

/// A left operand: random numbers times a magnitude by row and column.
pub(super) fn operand(gpu: &Gpu, seed: u64, rows: u32, cols: u32, magnitude: fn(u32, u32) -> f32) -> (Mat, Vec<f32>) {
    let places = (0..rows).flat_map(|i| (0..cols).map(move |j| magnitude(i, j)));
    let values: Vec<f32> = random(seed, (rows * cols) as usize).into_iter().zip(places).map(|(x, m)| x * m).collect();
    (mat(gpu, rows, cols, &values), values)
}

/// Checks both products with some rows of a weight, with and without a bias and `add`.
fn check(gpu: &Gpu, what: &str, frozen: &Frozen, m: u32, rows: std::ops::Range<u32>, magnitude: fn(u32, u32) -> f32) {
    let (matmul, factor) = (matmul(gpu), [1.0, -0.3][m as usize % 2]);
    let whole = frozen.weight();
    let weight = whole.rows(rows.clone()).times(factor);
    let (n, inputs, first) = (weight.outputs(), weight.inputs(), rows.start as usize);
    let ((x, xs), (dy, dys)) = (operand(gpu, 1, m, inputs, magnitude), operand(gpu, 2, m, n, magnitude));
    let (bias, biases) = random_mat(gpu, 3, 1, n);
    let ((y_added, y_old), (dx_added, dx_old)) = (random_mat(gpu, 4, m, n), random_mat(gpu, 5, m, inputs));
    let (y, dx) = (poisoned(gpu, m, n), poisoned(gpu, m, inputs));
    let mut commands = gpu.commands("products on matrix units");
    let packed = matmul.pack(&mut commands, &x).unwrap();
    assert!(packed.panels.is_some());
    matmul.forward(&mut commands, &packed, &weight, None, false, &y).unwrap();
    matmul.forward(&mut commands, &packed, &weight, Some(&bias), true, &y_added).unwrap();
    matmul.backward(&mut commands, &dy, &weight, false, &dx).unwrap();
    matmul.backward(&mut commands, &dy, &weight, true, &dx_added).unwrap();
    commands.submit().unwrap();
    [&y, &y_added, &dx, &dx_added].into_iter().for_each(|mat| assert_untouched(gpu, mat));
    let factor = f64::from(factor);
    let w = |output: usize, input: usize| factor * frozen.value(first + output, input);
    let sums = |values: &[f32], k: u32, n: u32, w: &dyn Fn(usize, usize) -> f64| -> Vec<Sum> {
        let columns: Vec<Vec<f64>> = (0..n as usize).map(|j| (0..k as usize).map(|t| w(j, t)).collect()).collect();
        let of = |row: &[f32], column: &Vec<f64>| Sum::of(row.iter().zip(column).map(|(&x, w)| f64::from(x) * w));
        values.chunks(k as usize).flat_map(|row| columns.iter().map(|column| of(row, column)).collect::<Vec<_>>()).collect()
    };
    let bound = bound(n, inputs);
    let close = |name: &str, found: &Mat, expected: &[Sum]| {
        let error = error(&found.read(gpu).unwrap(), expected, found.cols);
        assert!(error <= bound, "{what}: {name}: the error of a row is {error:e}");
    };
    let expected = sums(&xs, inputs, n, &|output, input| w(output, input));
    close("y", &y, &expected);
    let added = |(i, sum): (usize, &Sum)| sum.plus(y_old[i].into()).plus(factor * f64::from(biases[i % n as usize]));
    close("y + x W^T + bias", &y_added, &expected.iter().enumerate().map(added).collect::<Vec<_>>());
    let expected = sums(&dys, n, inputs, &|input, output| w(output, input));
    close("dx", &dx, &expected);
    let added = expected.iter().zip(&dx_old).map(|(sum, &old)| sum.plus(old.into())).collect::<Vec<_>>();
    close("dx + dy W", &dx_added, &added);
}

pub(super) fn even(_: u32, _: u32) -> f32 {
    1.0
}

/// Columns that are 1e2 to 1e6 times as large as the others.
pub(super) fn outliers(_: u32, column: u32) -> f32 {
    if column % 17 == 3 { 10_f32.powi(2 + (column / 17 % 5) as i32) } else { 1.0 }
}

/// Rows from 1 down to 1e-8, and up to 1e30.
pub(super) fn uneven_rows(row: u32, _: u32) -> f32 {
    [1.0, 1e-3, 1e-8, 1e4, 1e30, 1e-30][row as usize % 6]
}

#[test]
fn odd_sizes_of_nf4_weights() {
    let Some(gpu) = gpu() else { return };
    let types = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
    let sizes = [(65, 1, 7), (127, 129, 257), (257, 7, 128), (128, 257, 31), (129, 127, 1), (66, 128, 64), (70, 24, 136)];
    for (i, (m, outputs, inputs)) in sizes.into_iter().enumerate() {
        let (scales, block_size) = (types[i % 3], [32, 64, 128][i % 3]);
        let frozen = Frozen::nf4(gpu, outputs, inputs, block_size, scales);
        check(gpu, &format!("{scales:?}, {m} x {outputs} x {inputs}"), &frozen, m, 0..outputs, even);
    }
}

#[test]
fn a_second_codec() {
    let Some(gpu) = gpu() else { return };
    for scales in [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8] {
        let frozen = Frozen::sample(gpu, Codec::Linear(scales), 40, 70);
        check(gpu, &format!("linear codes, {scales:?}"), &frozen, 70, 0..40, even);
    }
}

#[test]
fn odd_sizes_of_raw_weights() {
    let Some(gpu) = gpu() else { return };
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    for (i, (m, outputs, inputs)) in [(65, 7, 1), (129, 33, 257), (128, 130, 72), (66, 64, 128)].into_iter().enumerate() {
        let frozen = Frozen::raw(gpu, outputs, inputs, types[i % 3], 1 << 20);
        check(gpu, &format!("{:?}, {m} x {outputs} x {inputs}", types[i % 3]), &frozen, m, 0..outputs, even);
    }
}

#[test]
fn some_rows_of_a_weight() {
    let Some(gpu) = gpu() else { return };
    for rows in [0..1, 3..70, 64..130] {
        for inputs in [37, 64] {
            let nf4 = Frozen::nf4(gpu, 130, inputs, 64, ScaleType::Dq8);
            check(gpu, &format!("rows {rows:?} of {inputs}"), &nf4, 67, rows.clone(), even);
        }
    }
}

#[test]
fn outliers_and_uneven_rows_keep_the_precision_of_f16() {
    let Some(gpu) = gpu() else { return };
    for (name, magnitude) in [("outliers", outliers as fn(u32, u32) -> f32), ("rows", uneven_rows)] {
        check(gpu, name, &Frozen::nf4(gpu, 70, 200, 64, ScaleType::Bf16), 71, 0..70, magnitude);
        check(gpu, name, &Frozen::raw(gpu, 70, 200, FloatType::Bf16, 1 << 20), 72, 0..70, magnitude);
    }
}

#[test]
fn large_and_small_weights() {
    let Some(gpu) = gpu() else { return };
    for magnitude in [1e5, 1e-7, 1e30, 1e-30] {
        for scales in [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8] {
            let frozen = Frozen::nf4_times(gpu, 40, 70, 32, scales, magnitude);
            check(gpu, &format!("{scales:?}, scales of {magnitude}"), &frozen, 70, 0..40, even);
        }
    }
}

/// A packed operand serves products with dense matrices, too, if it has many rows.
#[test]
fn dense_products_of_a_packed_operand() {
    let Some(gpu) = gpu() else { return };
    let (m, matmul) = (MIN_DENSE_ROWS + 5, matmul(gpu));
    for (n, k) in [(16, 70), (3, 600), (40, 33)] {
        let ((x, xs), (b, bs)) = (operand(gpu, 1, m, k, uneven_rows), random_mat(gpu, 2, n, k));
        let (c, cs) = random_mat(gpu, 3, k, n);
        let (nt, nn) = (poisoned(gpu, m, n), poisoned(gpu, m, n));
        let mut commands = gpu.commands("dense products");
        let packed = matmul.pack(&mut commands, &x).unwrap();
        matmul.nt(&mut commands, &packed, &b, 0.5, false, &nt).unwrap();
        matmul.nn(&mut commands, &packed, &c, 0.5, false, &nn).unwrap();
        commands.submit().unwrap();
        let products = [(&nt, &bs, [k, 1]), (&nn, &cs, [1, n])];
        for (found, right, [column, term]) in products {
            assert_untouched(gpu, found);
            let at = |j: u32, t: usize| f64::from(right[(j * column) as usize + t * term as usize]);
            let of = |row: &[f32], j| Sum::of(row.iter().enumerate().map(|(t, &x)| 0.5 * f64::from(x) * at(j, t)));
            let expected: Vec<Sum> = xs.chunks(k as usize).flat_map(|row| (0..n).map(move |j| of(row, j))).collect();
            let error = error(&found.read(gpu).unwrap(), &expected, n);
            assert!(error <= bound(n, k), "{n} x {k}: the error of a row is {error:e}");
        }
    }
}

/// Rows that are not finite do not disturb the others; a weight that is not finite shows.
#[test]
fn what_is_not_finite_shows() {
    let Some(gpu) = gpu() else { return };
    let (m, outputs, inputs) = (67, 9, 40);
    let frozen = Frozen::nf4(gpu, outputs, inputs, 32, ScaleType::F32);
    let mut values = random(1, (m * inputs) as usize);
    for (row, value) in [(3, f32::NAN), (8, f32::INFINITY), (65, f32::NEG_INFINITY)] {
        values[row * inputs as usize + 5] = value;
    }
    let (x, y) = (mat(gpu, m, inputs, &values), poisoned(gpu, m, outputs));
    let mut commands = gpu.commands("not finite");
    matmul(gpu).forward(&mut commands, &x, &frozen.weight(), None, false, &y).unwrap();
    commands.submit().unwrap();
    for (row, values) in y.read(gpu).unwrap().chunks(outputs as usize).enumerate() {
        let expected = ![3, 8, 65].contains(&row);
        // A weight may be zero, so some products with infinity are NaN, and some are infinite.
        assert!(values.iter().all(|value| value.is_finite() == expected), "row {row}: {values:?}");
    }
    let mut weights = random(2, (outputs * inputs) as usize);
    weights[77] = f32::NAN;
    let parts = [BufferRange::whole(gpu.storage_with("weights", bytemuck::cast_slice(&weights)).unwrap())];
    let weight = Weight::new(Elements::Raw { float_type: FloatType::F32, parts: &parts }, outputs, inputs);
    let (x, _) = random_mat(gpu, 1, m, inputs);
    let mut commands = gpu.commands("not finite");
    matmul(gpu).forward(&mut commands, &x, &weight, None, false, &y).unwrap();
    commands.submit().unwrap();
    let of_output: Vec<f32> = y.read(gpu).unwrap().into_iter().skip(1).step_by(outputs as usize).collect();
    assert!(of_output.iter().all(|value| value.is_nan()), "{of_output:?}");
}

#[test]
fn cut_sums_give_the_same_bits_each_time() {
    let Some(gpu) = gpu() else { return };
    let (m, outputs, inputs) = (66, 100, 2100);
    let frozen = Frozen::nf4(gpu, outputs, inputs, 64, ScaleType::Bf16);
    check(gpu, "cut sums", &frozen, m, 0..outputs, even);
    let (x, _) = random_mat(gpu, 1, m, inputs);
    let view = View::of(&x);
    let target = Target { m, n: outputs, out: &view, scale: 1.0, add: false, bias: None };
    assert_eq!(cuts(Tile::LARGE, target, inputs, 1 << 26), 4);
    let matmul = matmul(gpu);
    let bits = || {
        let y = poisoned(gpu, m, outputs);
        let mut commands = gpu.commands("cut sums");
        matmul.forward(&mut commands, &x, &frozen.weight(), None, false, &y).unwrap();
        commands.submit().unwrap();
        y.read(gpu).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(), bits());
}

/// The cuts that were fastest on a GPU with 132 cores, by rows, columns and terms.
#[test]
fn products_with_few_tiles_are_cut() {
    let Some(gpu) = gpu() else { return };
    let out = View::of(&Mat::new(gpu, "out", 1, 1).unwrap());
    let of = |m, n, k| {
        let target = Target { m, n, out: &out, scale: 1.0, add: false, bias: None };
        cuts(Tile::LARGE, target, k, 64 << 20)
    };
    let of_512 = [of(512, 2560, 9728), of(512, 2560, 4096), of(512, 1024, 2560), of(512, 9728, 2560)];
    assert_eq!(of_512, [3, 3, 4, 1]);
    assert_eq!([of(2048, 2560, 9728), of(2048, 2560, 4096), of(2048, 9728, 2560)], [2, 2, 1]);
    assert_eq!([of(8192, 2560, 9728), of(8192, 9728, 2560)], [1, 1]);
}

/// Weights are bound in rectangles: whole rows, which may start within a panel, and pieces of rows.
/// Results are bound in pieces of rows.
#[test]
fn small_buffers_and_bindings() {
    if gpu().is_none() {
        return;
    }
    let limits = Options { cache: None, max_buffer: Some(1 << 18), max_binding: Some(1 << 17), ..Options::from_env() };
    let gpu = &Gpu::open(&limits).unwrap();
    check(gpu, "raw in rectangles", &Frozen::raw(gpu, 150, 100, FloatType::F32, 1 << 14), 70, 3..150, even);
    check(gpu, "raw in pieces of rows", &Frozen::raw(gpu, 7, 200, FloatType::F32, 3 << 8), 70, 0..7, even);
    check(gpu, "results in pieces", &Frozen::nf4(gpu, 128, 60, 64, ScaleType::Bf16), 300, 0..128, even);
}

#[test]
fn more_groups_than_a_dimension_has() {
    if gpu().is_none() {
        return;
    }
    // Packing 512 rows takes two full rows of workgroups. That of 640 rows takes three, of 642.
    let gpu = &Gpu::open(&Options { cache: None, max_groups: Some(257), ..Options::from_env() }).unwrap();
    assert_eq!([512, 640].map(|groups| gpu.grid(groups)), [[256, 2, 1], [214, 3, 1]]);
    for rows in [400, 600] {
        check(gpu, "many groups", &Frozen::nf4(gpu, 130, 70, 64, ScaleType::Dq8), rows, 0..130, even);
    }
}

#[test]
fn a_packed_operand_serves_several_products_until_the_next() {
    let Some(gpu) = gpu() else { return };
    let matmul = matmul(gpu);
    let frozen = Frozen::nf4(gpu, 20, 30, 32, ScaleType::Bf16);
    let ((x, _), (y, z)) = (random_mat(gpu, 1, 65, 30), (poisoned(gpu, 65, 20), poisoned(gpu, 65, 20)));
    let mut commands = gpu.commands("packed once");
    let packed = matmul.pack(&mut commands, &x).unwrap();
    matmul.forward(&mut commands, &packed, &frozen.weight(), None, false, &y).unwrap();
    matmul.forward(&mut commands, &packed, &frozen.weight(), None, false, &z).unwrap();
    matmul.forward(&mut commands, &x, &frozen.weight(), None, false, &z).unwrap();
    let stale = matmul.forward(&mut commands, &packed, &frozen.weight(), None, false, &z);
    assert!(matches!(stale, Err(OpError::Shape { operation: "a packed operand", .. })), "{stale:?}");
    commands.submit().unwrap();
    assert!(y.read(gpu).unwrap() == z.read(gpu).unwrap());
    // Few rows stay in float32.
    let few = Mat { range: x.range.slice(0, 64 * 120), rows: 64, cols: 30 };
    assert!(matmul.pack(&mut gpu.commands("few"), &few).unwrap().panels.is_none());
}

/// Prints the time of each kernel. Run by hand on a real GPU, with `-- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let Some(gpu) = gpu() else { return };
    let (mixed, matmul) = (Mixed::new(gpu, units(gpu), Tried::new(gpu), trial::of).unwrap(), matmul(gpu));
    let timed = |record: &dyn Fn(&mut Commands)| {
        let seconds = (0..6).map(|_| {
            let mut commands = gpu.commands("speed");
            (0..8).for_each(|_| record(&mut commands));
            commands.submit_timed().unwrap().elapsed(gpu).unwrap().as_secs_f64() / 8.0
        });
        seconds.fold(f64::INFINITY, f64::min)
    };
    let (weights, _) = Codec::Nf4(ScaleType::Bf16).sample(gpu, 9728 * 2560).unwrap();
    let noise = random(1, 1 << 20);
    for (outputs, inputs) in [(9728, 2560), (2560, 9728), (1024, 2560), (4096, 2560)] {
        let shape = (9728 * 2560 / inputs, inputs);
        let weight = Weight::new(Elements::Quantized(&weights), shape.0, shape.1).rows(0..outputs);
        let binding = gpu.limits().max_storage_buffer_binding_size;
        let (_, right) = weight.pieces("speed", binding).unwrap().into_iter().next().unwrap();
        let size = Size { rows: outputs, cols: inputs };
        let seconds = timed(&|c| drop(mixed.decode(c, &right, size, inputs, None).unwrap()));
        println!("decode {outputs} x {inputs}: {:.1} us", 1e6 * seconds);
        for m in [512, 2048, 8192] {
            let fill = |rows: u32, cols: u32| {
                let mat = Mat::new(gpu, "speed", rows, cols).unwrap();
                for at in (0..mat.range.size).step_by(4 << 20) {
                    let bytes = (mat.range.size - at).min(4 << 20);
                    let part = Mat { range: mat.range.slice(at, bytes), rows: 1, cols: (bytes / 4) as u32 };
                    gpu.queue().write_buffer(&part.range.buffer, at, &bytemuck::cast_slice(&noise)[..bytes as usize]);
                }
                mat
            };
            let (x, y) = (fill(m, inputs), fill(m, outputs));
            let view = View::of(&x);
            let (left, _) = mixed.panels_for(m, inputs, Place::Left).unwrap();
            let seconds = timed(&|c| mixed.pack(c, &view, &left).unwrap());
            println!("pack {m} x {inputs}: {:.1} us, {:.0} GB/s", 1e6 * seconds, 6e-9 * f64::from(m * inputs) / seconds);
            let mut commands = gpu.commands("operands");
            mixed.pack(&mut commands, &view, &left).unwrap();
            let decoded = mixed.decode(&mut commands, &right, size, inputs, None).unwrap();
            commands.submit().unwrap();
            let flops = 2.0 * f64::from(m) * f64::from(outputs) * f64::from(inputs);
            let out = View::of(&y);
            let target = Target { m, n: outputs, out: &out, scale: 1.0, add: false, bias: None };
            let side = |panels, terms| Side { panels, terms, first: (0, 0) };
            let sides = [side(&left, Terms::Columns), side(&decoded, Terms::Columns)];
            let form = Form { tile: Tile::LARGE, fours: true, ..NARROW_FORM };
            let kernel = mixed.kernel(Kind::Product(form)).unwrap();
            for cuts in 1..=4 {
                let chunk = inputs.div_ceil(cuts).next_multiple_of(WIDTH);
                let parts = View { range: matmul.kernels.scratch().clone(), first: 0, row: outputs, column: 1 };
                if cuts > 1 && u64::from(4 * cuts * m * outputs) > parts.range.size {
                    continue;
                }
                let seconds = timed(&|c| match cuts {
                    1 => mixed.dispatch_product(c, &kernel, form.tile, sides, (inputs, chunk), None, target),
                    _ => {
                        let part = Target { out: &parts, ..target };
                        mixed.dispatch_product(c, &kernel, form.tile, sides, (inputs, chunk), None, part);
                        matmul.kernels.sum(c, &matmul.kernels.sum_kernel().unwrap(), target, cuts);
                    }
                });
                let chosen = if cuts == super::cuts(form.tile, target, inputs, 64 << 20) { " (chosen)" } else { "" };
                let rate = flops / seconds / 1e12;
                println!(
                    "x W^T {m} x {outputs} x {inputs}, {cuts} cuts: {:.1} us, {rate:.0} TFLOP/s{chosen}",
                    1e6 * seconds
                );
            }
            let mut commands = gpu.commands("operands");
            let (left, _) = mixed.panels_for(m, outputs, Place::Left).unwrap();
            mixed.pack(&mut commands, &out, &left).unwrap();
            commands.submit().unwrap();
            let target = Target { m, n: inputs, out: &view, ..target };
            let sides = [side(&left, Terms::Columns), side(&decoded, Terms::Rows)];
            let seconds = timed(&|c| mixed.multiply(&matmul.kernels, c, sides, outputs, None, target).unwrap());
            let rate = flops / seconds / 1e12;
            println!("dy W {m} x {inputs} x {outputs}: {:.1} us, {rate:.0} TFLOP/s", 1e6 * seconds);
            let seconds = timed(&|c| matmul.forward(c, &x, &weight, None, false, &y).unwrap());
            println!("forward, all {m}: {:.1} us, {:.0} TFLOP/s", 1e6 * seconds, flops / seconds / 1e12);
            let (low, (lora, _)) = (fill(m, 16), random_mat(gpu, 3, 16, inputs));
            let seconds = timed(&|c| matmul.nt(c, &x, &lora, 1.0, false, &low).unwrap());
            println!("x A^T in f32 {m} x {inputs}: {:.1} us", 1e6 * seconds);
            let (lora, _) = random_mat(gpu, 3, outputs, 16);
            let seconds = timed(&|c| matmul.nt(c, &low, &lora, 1.0, true, &y).unwrap());
            println!("u B^T in f32 {m} x {outputs}: {:.1} us", 1e6 * seconds);
            let seconds = timed(&|c| matmul.tn(c, &y, &low, 1.0, true, &lora).unwrap());
            println!("dy^T u in f32 {m} x {outputs}: {:.1} us", 1e6 * seconds);
        }
    }
}
