//! Tests each kernel for matrix units before its first use: panels against the CPU's rounding, and
//! products of ragged sizes against sums in float64 ([`product`]). All outputs hold other numbers
//! before, and canaries follow panels.

pub(super) mod product;

use half::f16;

use super::low_rank::shift;
use super::{EXTENTS, Kind, Mixed, Stored};
use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Gpu, Kernel, MatrixUnits};
use crate::ops::matmul::kernels::RightKind;
use crate::ops::matmul::panels::{Exponents, Panels, Size, exponent};
use crate::ops::matmul::product::View;
use crate::ops::matmul::trial::right;
use crate::ops::matmul::weight::{Largest, Right};
use crate::ops::trial::difference;
use crate::ops::{Mat, OpError};
use product::{row_exponent, run};

/// Error of rounding to f16, relative to the number, and the smallest.
const ROUNDING: f64 = 1.0 / 2047.0;
const SMALLEST: f64 = 1.0 / (1 << 25) as f64;
/// What panels and results hold before: two f16 NaN.
const POISON: u32 = 0x7e00_7e00;
/// Bytes of poison after panels and their exponents, which no kernel writes.
const CANARY: u64 = 256;

/// Describes the difference of a kernel from the CPU, if there is one.
pub fn of(mixed: &Mixed, kind: Kind, kernel: &Kernel) -> Result<Option<String>, OpError> {
    match kind {
        Kind::Pack { whole } => of_pack(mixed, kernel, whole),
        Kind::Extent(stored) => of_extent(mixed, kernel, stored),
        Kind::Measure => of_measure(mixed, kernel),
        Kind::Decode { stored, whole, known } => of_decode(mixed, kernel, stored, whole, known),
        Kind::Product(form) => product::of(mixed, kernel, form),
        Kind::LowRank => of_low_rank(mixed, kernel),
        Kind::AlignExtent => of_align_extent(mixed, kernel),
        Kind::Align => of_align(mixed, kernel),
    }
}

/// What the trial of a kernel compares, in words.
pub(super) fn covers(gpu: &Gpu, units: MatrixUnits, kind: Kind) -> String {
    match kind {
        Kind::Product(form) => product::Sizes::of(gpu, units, form).covers(),
        Kind::Extent(_) | Kind::Measure | Kind::AlignExtent => "the largest of random numbers".to_owned(),
        Kind::Pack { .. } | Kind::Decode { .. } | Kind::LowRank | Kind::Align => {
            "operands of products: every element, the padding, canaries after it".to_owned()
        }
    }
}

/// New panels of poison, with more of it after them.
fn poisoned(gpu: &Gpu, size: Size, exponents: Exponents) -> Result<Panels, OpError> {
    let buffer = |label, bytes: u64| -> Result<BufferRange, OpError> {
        let words = vec![POISON; ((bytes + CANARY) / 4) as usize];
        Ok(BufferRange::whole(gpu.storage_with(label, bytemuck::cast_slice(&words))?))
    };
    let bytes = if exponents == Exponents::ByRow { size.exponent_bytes() } else { 4 };
    Ok(Panels { size, range: buffer("panels", size.bytes())?, exponents, exponents_range: buffer("exponents", bytes)? })
}

/// Compares panels with elements, by padded row and column, and exponents.
fn compare(
    gpu: &Gpu,
    panels: &Panels,
    element: impl Fn(u32, u32) -> f64,
    exponent: impl Fn(u32) -> i32,
) -> Result<Option<String>, OpError> {
    let size = panels.size;
    let exponents = gpu.read(&panels.exponents_range)?;
    let exponents: Vec<i32> =
        exponents.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap_or_default())).collect();
    let rows = if panels.exponents == Exponents::ByRow { size.padded_rows() } else { 1 };
    let expected: Vec<i32> = (0..rows).map(exponent).collect();
    if exponents.len() < expected.len() {
        return Ok(Some(format!("{} exponents instead of {rows}", exponents.len())));
    }
    if exponents.iter().skip(rows as usize).take(CANARY as usize / 4).any(|&word| word != POISON as i32) {
        return Ok(Some("words after the exponents are overwritten".to_owned()));
    }
    if let Some((row, (found, expected))) = exponents.iter().zip(&expected).enumerate().find(|(_, (a, b))| a != b) {
        return Ok(Some(format!("the exponent of row {row} is {found} instead of {expected}")));
    }
    elements_differ(gpu, panels, element, &expected)
}

/// Compares the elements of panels, by padded row and column. Each row has its exponent, or all
/// have the first one.
fn elements_differ(
    gpu: &Gpu,
    panels: &Panels,
    element: impl Fn(u32, u32) -> f64,
    exponents: &[i32],
) -> Result<Option<String>, OpError> {
    let size = panels.size;
    let bytes = gpu.read(&panels.range)?;
    let halves: &[u16] = bytemuck::try_cast_slice(&bytes).unwrap_or_default();
    let canary = halves.get((size.bytes() / 2) as usize..).unwrap_or_default();
    if canary.iter().take(CANARY as usize / 2).any(|&half| u32::from(half) != POISON & 0xffff) {
        return Ok(Some("words after the panels are overwritten".to_owned()));
    }
    let scales: Vec<f64> = exponents.iter().map(|&exponent| 2_f64.powi(-exponent)).collect();
    let scale = |row: u32| scales.get(row as usize).or(scales.first()).copied().unwrap_or(f64::NAN);
    let places = || (0..size.padded_rows()).flat_map(|i| (0..size.padded_cols()).map(move |j| (i, j)));
    let found: Vec<f32> =
        places().map(|(i, j)| halves.get(size.at(i, j)).map_or(f32::NAN, |&bits| f16::from_bits(bits).to_f32())).collect();
    let expected = places().map(|(i, j)| {
        let inside = i < size.rows && j < size.cols;
        let scaled = if inside { element(i, j) * scale(i) } else { 0.0 };
        (scaled, if inside { (scaled.abs() * ROUNDING).max(SMALLEST) } else { 0.0 })
    });
    Ok(difference(&found, expected))
}

/// Rows of different magnitudes, from the middle of a matrix.
fn of_pack(mixed: &Mixed, kernel: &Kernel, whole: bool) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (&mixed.gpu, Random::default());
    let rows = if mixed.units == MatrixUnits::Hardware { 1157 } else { 131 };
    let (cols, first) = if whole { (1108, 8) } else { (1107, 5) };
    let row = cols + first;
    let magnitude = |i: u32| 10_f32.powi([0, 30, -30, 5, -8, 0][i as usize % 6]) * [1.0, 0.0][usize::from(i == 77)];
    let values: Vec<f32> = (0..rows).flat_map(|i| vec![magnitude(i); row as usize]).collect();
    let values: Vec<f32> = values.into_iter().map(|magnitude| magnitude * random.uniform()).collect();
    let mat = Mat::from_slice(gpu, "trial", rows, row, &values)?;
    let panels = poisoned(gpu, Size { rows, cols }, Exponents::ByRow)?;
    let view = View::of(&mat).shifted(first);
    run(gpu, |commands| mixed.dispatch_pack(commands, kernel, &view, &panels))?;
    let at = |i: u32, j: u32| values.get((i * row + first + j) as usize).copied().unwrap_or(f32::NAN);
    let exponent = |i: u32| match i < rows {
        true => exponent((0..cols).map(|j| at(i, j).abs()).fold(0.0, f32::max)),
        false => exponent(0.0),
    };
    compare(gpu, &panels, |i, j| at(i, j).into(), exponent)
}

/// A matrix [rows, cols] from the middle of a tensor, as stored, and its values.
fn operand(gpu: &Gpu, stored: Stored, Size { rows, cols }: Size) -> Result<(Right, Vec<f32>), OpError> {
    let kind = match stored {
        Stored::Quantized(codec) => RightKind::Quantized { codec, whole_words: true },
        Stored::Raw(float_type) => RightKind::Raw(float_type),
    };
    right(gpu, &mut Random::default(), kind, (rows, cols))
}

fn of_extent(mixed: &Mixed, kernel: &Kernel, stored: Stored) -> Result<Option<String>, OpError> {
    let (gpu, size) = (&mixed.gpu, Size { rows: 301, cols: 307 });
    let (right, values) = operand(gpu, stored, size)?;
    run(gpu, |commands| mixed.dispatch_extent(commands, kernel, &right, (size, size.cols)))?;
    let extents = gpu.read(&mixed.extents)?;
    let words = extents.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default()));
    let found = words.map(f32::from_bits).fold(0.0, f32::max);
    let largest = values.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    // The scale of a block is at least as large as its elements, and some element is about as
    // large as the scale.
    let slack = if let Stored::Quantized(_) = stored { 2.0 } else { 1.0 };
    let fits = extents.len() == 4 * EXTENTS as usize && (largest..=slack * largest).contains(&found);
    Ok((!fits).then(|| format!("the largest magnitude is {found} instead of {largest}")))
}

/// The extents of some parts, and the maximum of them and of what was known.
fn of_measure(mixed: &Mixed, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let gpu = &mixed.gpu;
    let mut extents = vec![0.25_f32; EXTENTS as usize];
    extents.iter_mut().skip(201).step_by(7).for_each(|extent| *extent = 1.75);
    let extents = BufferRange::whole(gpu.storage_with("extents", bytemuck::cast_slice(&extents))?);
    let before = [9.0_f32, 0.0, 2.0, 9.0];
    let range = BufferRange::whole(gpu.storage_with("known", bytemuck::cast_slice(&before))?);
    run(gpu, |commands| {
        commands.copy(&extents, &mixed.extents);
        for at in [1, 2] {
            mixed.dispatch_measure(commands, kernel, &Largest { range: range.clone(), at });
        }
    })?;
    let found = gpu.read(&range)?;
    let found: Vec<f32> =
        found.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap_or_default())).collect();
    Ok((found != [9.0, 1.75, 2.0, 9.0]).then(|| format!("the largest magnitudes are {found:?}")))
}

fn of_decode(mixed: &Mixed, kernel: &Kernel, stored: Stored, whole: bool, known: bool) -> Result<Option<String>, OpError> {
    let (rows, cols) = if mixed.units == MatrixUnits::Hardware { (520, 1544) } else { (200, 296) };
    let (gpu, size) = (&mixed.gpu, Size { rows, cols: if whole { cols } else { cols - 5 } });
    let (right, values) = operand(gpu, stored, size)?;
    let largest = 1.75_f32;
    let mut extents = vec![0_u32; EXTENTS as usize];
    extents.iter_mut().skip(201).step_by(7).for_each(|extent| *extent = largest.to_bits());
    let of_parts = BufferRange::whole(gpu.storage_with("extents", bytemuck::cast_slice(&extents))?);
    let range = BufferRange::whole(gpu.storage_with("known", bytemuck::cast_slice(&[9.0, largest]))?);
    let known = known.then_some(Largest { range, at: 1 });
    let panels = poisoned(gpu, size, Exponents::One)?;
    run(gpu, |commands| {
        // Work that was submitted before has finished with the extents, and later work overwrites
        // them.
        commands.copy(&of_parts, &mixed.extents);
        mixed.dispatch_decode(commands, kernel, (&right, size.cols), &panels, known.as_ref(), 0);
    })?;
    let at = |i: u32, j: u32| values.get((i * size.cols + j) as usize).copied().map_or(f64::NAN, f64::from);
    compare(gpu, &panels, at, |_| exponent(largest))
}

/// Panels of random numbers, and the numbers they stand for, by row.
fn known(gpu: &Gpu, random: &mut Random, size: Size, exponents: Exponents) -> Result<(Panels, Vec<f64>), OpError> {
    let mut halves = vec![0_u16; (size.bytes() / 2) as usize];
    let exponent = |row: u32| if exponents == Exponents::ByRow { row_exponent(row) } else { -2 };
    let mut values = Vec::new();
    for (i, j) in (0..size.rows).flat_map(|i| (0..size.cols).map(move |j| (i, j))) {
        let value = f16::from_f32(random.uniform());
        if let Some(half) = halves.get_mut(size.at(i, j)) {
            *half = value.to_bits();
        }
        values.push(value.to_f64() * 2_f64.powi(exponent(i)));
    }
    let count = if exponents == Exponents::ByRow { size.padded_rows() } else { 1 };
    let words: Vec<i32> = (0..count).map(exponent).collect();
    let range = |label, bytes: &[u8]| -> Result<BufferRange, OpError> {
        Ok(BufferRange { buffer: gpu.storage_with(label, bytes)?, offset: 0, size: bytes.len() as u64 })
    };
    let (elements, exponents_range) =
        (range("panels", bytemuck::cast_slice(&halves))?, range("exponents", bytemuck::cast_slice(&words))?);
    Ok((Panels { size, range: elements, exponents, exponents_range }, values))
}

/// Sums of chunks with rows of different magnitudes, in float32 and in panels.
fn of_low_rank(mixed: &Mixed, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (&mixed.gpu, Random::default());
    let (m, rank, chunks, terms, scale) = (131, 37, 3, 90, -0.5_f32);
    let size = Size { rows: m, cols: rank };
    let (left, _) = known(gpu, &mut random, Size { rows: m, cols: 4 }, Exponents::ByRow)?;
    let parts: Vec<f32> = (0..chunks * m * rank).map(|_| random.uniform()).collect();
    let scratch = BufferRange::whole(gpu.storage_with("parts", bytemuck::cast_slice(&parts))?);
    let out = Mat::from_slice(gpu, "trial", m, rank, &vec![f32::NAN; (m * rank) as usize])?;
    let panels = poisoned(gpu, size, Exponents::One)?;
    let words: [i32; 4] = [-9, 77, 78, 79];
    let known_exponents = BufferRange::whole(gpu.storage_with("exponents", bytemuck::cast_slice(&words))?);
    run(gpu, |commands| {
        commands.copy(&known_exponents, &mixed.right_exponents);
        mixed.dispatch_low_rank(commands, &scratch, kernel, &left, &panels, (terms, chunks), scale, &out);
    })?;
    let count = (m * rank) as usize;
    let sum = |i: usize| parts.iter().skip(i).step_by(count).map(|&x| f64::from(x)).sum::<f64>();
    let of_out = difference(&out.read(gpu)?, (0..count).map(|i| (f64::from(scale) * sum(i), 1e-6)));
    let common = -9 + shift(terms);
    let found = gpu.read(&mixed.right_exponents)?;
    let found: Vec<i32> =
        found.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap_or_default())).collect();
    let wrong =
        (found != [-9, common, 78, 79]).then(|| format!("the exponents are {found:?}, with a common one of {common}"));
    // Padded rows have no exponents of their own, and are zeros.
    let exponents: Vec<i32> = (0..m).map(|row| common + row_exponent(row)).collect();
    let of_panels = elements_differ(gpu, &panels, |i, j| sum((i * rank + j) as usize), &exponents)?;
    Ok(wrong.or(of_out).or(of_panels))
}

/// Rows of very different magnitudes, and the panels whose exponents they get.
fn unaligned(mixed: &Mixed, rows: u32, cols: u32) -> Result<(Mat, Vec<f32>, Panels), OpError> {
    let mut random = Random::default();
    let magnitude = |i: u32| [1.0, 1e-20, 0.0, 1e3][i as usize % 4];
    let values: Vec<f32> = (0..rows * cols).map(|i| magnitude(i / cols) * random.uniform()).collect();
    let wide = known(&mixed.gpu, &mut random, Size { rows, cols: 4 }, Exponents::ByRow)?.0;
    Ok((Mat::from_slice(&mixed.gpu, "trial", rows, cols, &values)?, values, wide))
}

/// The exponent of the largest element with that of its row, as align.wgsl counts it.
fn level(values: &[f32], cols: u32) -> i32 {
    let elements = (0_u32..).zip(values).filter(|(_, x)| **x != 0.0);
    elements.map(|(i, x)| (x.abs().to_bits() >> 23) as i32 + row_exponent(i / cols)).max().unwrap_or_default()
}

fn of_align_extent(mixed: &Mixed, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let (gpu, cols) = (&mixed.gpu, 301);
    let (x, values, wide) = unaligned(mixed, 303, cols)?;
    let panels = poisoned(gpu, Size { rows: x.rows, cols }, Exponents::One)?;
    run(gpu, |commands| mixed.dispatch_align(commands, kernel, &x, &wide, &panels, [EXTENTS, 1, 1]))?;
    let extents = gpu.read(&mixed.extents)?;
    let found = extents.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default())).max();
    let expected = (level(&values, cols) + 0x8000) as u32;
    Ok((found != Some(expected)).then(|| format!("the largest level is {found:?} instead of {expected}")))
}

fn of_align(mixed: &Mixed, kernel: &Kernel) -> Result<Option<String>, OpError> {
    let (gpu, cols) = (&mixed.gpu, 37);
    let (x, values, wide) = unaligned(mixed, 131, cols)?;
    let panels = poisoned(gpu, Size { rows: x.rows, cols }, Exponents::One)?;
    let level = level(&values, cols);
    let mut extents = vec![0_u32; EXTENTS as usize];
    extents.iter_mut().skip(201).step_by(7).for_each(|extent| *extent = (level + 0x8000) as u32);
    let known = BufferRange::whole(gpu.storage_with("extents", bytemuck::cast_slice(&extents))?);
    run(gpu, |commands| {
        commands.copy(&known, &mixed.extents);
        let elements = panels.size.bytes() / 2;
        mixed.dispatch_align(commands, kernel, &x, &wide, &panels, gpu.grid(elements.div_ceil(1024)));
    })?;
    let at = |i: u32, j: u32| {
        let value = values.get((i * cols + j) as usize).copied().map_or(f64::NAN, f64::from);
        value * 2_f64.powi(row_exponent(i))
    };
    compare(gpu, &panels, at, |_| level - 136)
}
