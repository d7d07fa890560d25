//! Compares the kernels with the CPU before their first use on a driver: several tiles with ragged
//! edges, rows of magnitudes from 1e-8 to 1e6, and a row of zeros.

use half::f16;

use super::super::PackedMemory;
use super::super::panels::{Size, exponent};
use super::glu::PackedGlu;
use super::halves::PackedHalves;
use super::norm::PackedNorm;
use crate::arch::family::Activation;
use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Commands, Gpu, KernelSpec};
use crate::ops::mixed_test::MixedTest;
use crate::ops::trial::{PASSED, ROOM, difference};
use crate::ops::{Halves, Mat, OpError};

/// Error of rounding to f16 and of the operation in float32, relative to the number, and relative
/// to the largest magnitude of the row.
const ROUNDING: f64 = 1.0 / 2000.0;
const OF_LARGEST: f64 = 1.0 / (1 << 22) as f64;
/// The largest magnitude in panels, at most.
const LARGEST: f64 = 1024.0;
/// What panels hold before: two f16 NaN.
const POISON: u32 = 0x7e00_7e00;
const EPSILON: f32 = 1e-5;
const ROWS: u32 = 131;
const COLS: u32 = 328;

/// What the tests compare, in words.
const COVERS: &str = "operands of products with ragged edges: every element and the padding";
const NORM: &str = "norm to panels";
const HALVES: &str = "f16 to panels";

impl PackedNorm {
    /// Compiles the kernels for `gpu`, and compares them with the CPU before their first use on a
    /// driver.
    ///
    /// # Errors
    /// [`OpError::Unfit`] if values differ; [`OpError::Gpu`] if a kernel does not compile.
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        Self::tried(gpu, |spec| spec)
    }

    /// The test of the kernels, each after a `change`.
    pub fn mixed_test<'a>(gpu: &'a Gpu, change: impl Fn(KernelSpec) -> KernelSpec + Copy + 'a) -> MixedTest<'a> {
        let specs = Self::specs().map(change);
        MixedTest::new(gpu, [NORM, COVERS].map(str::to_owned), specs.into(), move || Self::tried(gpu, change).map(drop))
    }

    fn tried(gpu: &Gpu, change: impl Fn(KernelSpec) -> KernelSpec) -> Result<Self, OpError> {
        let specs = Self::specs().map(change);
        let kernels = Self::untried(gpu, &specs)?;
        passed(gpu, NORM, &specs, || of_norm(&kernels))?;
        Ok(kernels)
    }
}

impl PackedHalves {
    /// Compiles the kernel for `gpu`, and compares it with the CPU before its first use on a
    /// driver.
    ///
    /// # Errors
    /// [`OpError::Unfit`] if values differ; [`OpError::Gpu`] if it does not compile.
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        Self::tried(gpu, |spec| spec)
    }

    /// The test of the kernel, after a `change`.
    pub fn mixed_test<'a>(gpu: &'a Gpu, change: impl Fn(KernelSpec) -> KernelSpec + Copy + 'a) -> MixedTest<'a> {
        let test = move || Self::tried(gpu, change).map(drop);
        MixedTest::new(gpu, [HALVES, COVERS].map(str::to_owned), vec![change(Self::spec())], test)
    }

    fn tried(gpu: &Gpu, change: impl Fn(KernelSpec) -> KernelSpec) -> Result<Self, OpError> {
        let spec = change(Self::spec());
        let kernel = Self::untried(gpu, &spec)?;
        passed(gpu, HALVES, &[spec], || of_halves(&kernel))?;
        Ok(kernel)
    }
}

impl PackedGlu {
    /// Compiles the kernels for `gpu`, and compares them with the CPU before their first use on a
    /// driver.
    ///
    /// # Errors
    /// [`OpError::Unfit`] if values differ; [`OpError::Gpu`] if a kernel does not compile.
    pub fn new(gpu: &Gpu, activation: Activation) -> Result<Self, OpError> {
        Self::tried(gpu, activation, |spec| spec)
    }

    /// The test of the kernels, each after a `change`.
    pub fn mixed_test<'a>(
        gpu: &'a Gpu,
        activation: Activation,
        change: impl Fn(KernelSpec) -> KernelSpec + Copy + 'a,
    ) -> MixedTest<'a> {
        let specs = Self::specs(activation).map(change);
        let test = move || Self::tried(gpu, activation, change).map(drop);
        MixedTest::new(gpu, [name(activation), COVERS].map(str::to_owned), specs.into(), test)
    }

    fn tried(gpu: &Gpu, activation: Activation, change: impl Fn(KernelSpec) -> KernelSpec) -> Result<Self, OpError> {
        let specs = Self::specs(activation).map(change);
        let kernels = Self::untried(gpu, activation, &specs)?;
        passed(gpu, name(activation), &specs, || of_glu(&kernels))?;
        Ok(kernels)
    }
}

/// The kernels in words.
fn name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "gated SiLU to panels",
        Activation::GeluTanh => "gated GELU to panels",
    }
}

/// Runs `find`, which describes a difference of the kernels from the CPU, unless they passed before
/// on this driver.
///
/// # Errors
/// [`OpError::Unfit`] if there is a difference; those of `find`.
fn passed(
    gpu: &Gpu,
    name: &str,
    specs: &[KernelSpec],
    find: impl FnOnce() -> Result<Option<String>, OpError>,
) -> Result<(), OpError> {
    if gpu.limits().max_storage_buffer_binding_size < ROOM {
        return Ok(());
    }
    let unfit = |reason| OpError::Unfit { kernel: name.to_owned(), device: gpu.adapter().to_string(), reason };
    let find = || find()?.map_or(Ok(()), |reason| Err(unfit(reason)));
    gpu.recall_or_find(specs, |record| (record == PASSED).then_some(()), |()| PASSED.to_vec(), find)
}

/// New memory of poison for an operand.
fn poisoned(gpu: &Gpu, rows: u32, cols: u32) -> Result<PackedMemory, OpError> {
    let buffer = |label, bytes: u64| -> Result<BufferRange, OpError> {
        let words = vec![POISON; (bytes / 4) as usize];
        Ok(BufferRange { buffer: gpu.storage_with(label, bytemuck::cast_slice(&words))?, offset: 0, size: bytes })
    };
    let size = Size { rows, cols };
    let (elements, exponents) = (buffer("panels", size.bytes())?, buffer("exponents", size.exponent_bytes())?);
    Ok(PackedMemory { elements, exponents, padded_cols: size.padded_cols(), padded_rows: size.padded_rows() })
}

/// Compares panels with a matrix, and with zeros in their padding.
fn differs(gpu: &Gpu, memory: &PackedMemory, expected: &[f64], cols: u32) -> Result<Option<String>, OpError> {
    let bytes = gpu.read(&memory.elements)?;
    let (halves, exponents): (&[u16], _) = (bytemuck::try_cast_slice(&bytes).unwrap_or_default(), exponents(gpu, memory)?);
    let rows: Vec<&[f64]> = expected.chunks(cols as usize).collect();
    let largest = |row: u32| rows.get(row as usize).map_or(0.0, |row| row.iter().fold(0.0, |max: f64, x| max.max(x.abs())));
    for (row, &found) in (0..memory.padded_rows).zip(&exponents) {
        // The largest magnitude, and what rounding may make of it.
        let possible = [1.0 - 1e-3, 1.0, 1.0 + 1e-3].map(|factor| exponent((largest(row) * factor) as f32));
        if !possible.contains(&found) {
            return Ok(Some(format!("the exponent of row {row} is {found} instead of {}", possible[1])));
        }
    }
    let size = Size { rows: memory.padded_rows, cols: memory.padded_cols };
    let places = || (0..memory.padded_rows).flat_map(|i| (0..memory.padded_cols).map(move |j| (i, j)));
    let element = |bits: &u16| f16::from_bits(*bits).to_f32();
    let found: Vec<f32> = places().map(|(i, j)| halves.get(size.at(i, j)).map_or(f32::NAN, element)).collect();
    let expected = places().map(|(i, j)| {
        let of_row = rows.get(i as usize).zip(exponents.get(i as usize));
        let scaled = of_row.and_then(|(row, &e)| Some(row.get(j as usize)? * 2_f64.powi(-e)));
        scaled.map_or((0.0, 0.0), |scaled| (scaled, (scaled.abs() * ROUNDING).max(OF_LARGEST * LARGEST)))
    });
    Ok(difference(&found, expected))
}

/// The exponents of the rows.
fn exponents(gpu: &Gpu, memory: &PackedMemory) -> Result<Vec<i32>, OpError> {
    let bytes = gpu.read(&memory.exponents)?;
    Ok(bytes.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap_or_default())).collect())
}

/// Random numbers, row by row of another magnitude.
fn values(random: &mut Random, magnitudes: [f32; 5]) -> Vec<f32> {
    (0..ROWS * COLS).map(|i| magnitudes[(i / COLS) as usize % 5] * random.uniform()).collect()
}

fn run(gpu: &Gpu, record: impl FnOnce(&mut Commands)) -> Result<(), OpError> {
    let mut commands = gpu.commands("a test of packed operands");
    record(&mut commands);
    commands.submit()?;
    Ok(())
}

fn of_norm(norm: &PackedNorm) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (&norm.gpu, Random::default());
    for cols in [COLS, COLS / 2] {
        let rows = ROWS * COLS / cols;
        let x = values(&mut random, [1.0, 1e6, 1e-8, 0.0, 1e3]);
        let gamma: Vec<f32> = (0..cols).map(|j| [1.0, 8.0, 0.1][j as usize % 3] * random.uniform()).collect();
        let (x_mat, gamma_mat) =
            (Mat::from_slice(gpu, "trial", rows, cols, &x)?, Mat::from_slice(gpu, "trial", 1, cols, &gamma)?);
        let (factors, panels) = (Mat::new(gpu, "trial", rows, cols)?, poisoned(gpu, rows, cols)?);
        run(gpu, |commands| norm.dispatch(commands, [&x_mat, &gamma_mat, &factors], EPSILON, &panels))?;
        let of_row = |row: &[f32]| {
            let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / f64::from(cols);
            let r = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            row.iter().zip(&gamma).map(|(&x, &gamma)| f64::from(x) * r * f64::from(gamma)).collect::<Vec<_>>()
        };
        let expected: Vec<f64> = x.chunks(cols as usize).flat_map(of_row).collect();
        if let Some(reason) = differs(gpu, &panels, &expected, cols)? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

/// Stored rows of any exponents, with as many columns as fill no tile.
fn of_halves(packed: &PackedHalves) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (&packed.gpu, Random::default());
    let (rows, cols, words) = (ROWS, COLS + 5, Halves::words(COLS + 5));
    let (mut stored, mut expected) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let e = row as i32 % 60 - 30;
        stored.extend([e as u32, 0, 0, 0]);
        let row: Vec<f16> = (0..cols).map(|_| f16::from_f32(1000.0 * random.uniform())).collect();
        expected.extend(row.iter().map(|x| x.to_f64() * 2_f64.powi(e)));
        let bits = |i: u32| u32::from(row.get(i as usize).map_or(0, |x| x.to_bits()));
        stored.extend((0..words - 4).map(|word| bits(2 * word) | (bits(2 * word + 1) << 16)));
    }
    let stored: Vec<f32> = stored.into_iter().map(f32::from_bits).collect();
    let (stored, panels) = (Mat::from_slice(gpu, "trial", rows, words, &stored)?, poisoned(gpu, rows, cols)?);
    run(gpu, |commands| packed.dispatch(commands, &stored, &panels))?;
    differs(gpu, &panels, &expected, cols)
}

/// f(x) and its derivative.
fn function(activation: Activation, x: f64) -> [f64; 2] {
    let [z, dz] = match activation {
        Activation::Silu => [x, 1.0],
        Activation::GeluTanh => {
            let x = x.clamp(-100.0, 100.0);
            let factor = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            [factor * (x + 0.044_715 * x.powi(3)), factor * (1.0 + 0.134_145 * x * x)]
        }
    };
    let [s, opposite] = [1.0 / (1.0 + (-z).exp()), 1.0 / (1.0 + z.exp())];
    [x * s, s * (1.0 + x * opposite * dz)]
}

/// What is stored of gate or up.
fn stored_values(gpu: &Gpu, stored: &Mat) -> Result<Vec<f64>, OpError> {
    let words: Vec<u32> = stored.read(gpu)?.into_iter().map(f32::to_bits).collect();
    let of_row = |row: &[u32]| {
        let scale = 2_f64.powi(row.first().copied().unwrap_or_default() as i32);
        let halves = row.iter().skip(4).flat_map(|word| [*word as u16, (word >> 16) as u16]);
        halves.map(|bits| f16::from_bits(bits).to_f64() * scale).collect::<Vec<_>>()
    };
    Ok(words.chunks(stored.cols as usize).flat_map(of_row).collect())
}

fn of_glu(glu: &PackedGlu) -> Result<Option<String>, OpError> {
    let (gpu, mut random) = (&glu.gpu, Random::default());
    let magnitudes = [[4.0, 30.0, 1e-8, 0.0, 20.0], [1.0, 1e6, 1.0, 1.0, 1e-8], [1.0, 1e-8, 1e6, 1.0, 1.0]];
    let [gate, up, dh] = magnitudes.map(|magnitudes| values(&mut random, magnitudes));
    let upload = |values: &[f32]| Mat::from_slice(gpu, "trial", ROWS, COLS, values);
    let [gate_mat, up_mat, dh_mat] = [upload(&gate)?, upload(&up)?, upload(&dh)?];
    let store = || Mat::new(gpu, "trial", ROWS, Halves::words(COLS));
    let stored = [store()?, store()?];
    let new = || poisoned(gpu, ROWS, COLS);
    let [h, again, d_gate, d_up] = [new()?, new()?, new()?, new()?];
    run(gpu, |commands| {
        glu.dispatch_forward(commands, [&gate_mat, &up_mat], stored.each_ref(), &h);
        glu.dispatch_again(commands, stored.each_ref(), COLS, &again);
        glu.dispatch_backward(commands, stored.each_ref(), &dh_mat, [&d_gate, &d_up]);
    })?;
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (gate, up, dh) = (wide(&gate), wide(&up), wide(&dh));
    let [kept_gate, kept_up] = [stored_values(gpu, &stored[0])?, stored_values(gpu, &stored[1])?];
    for (name, kept, values) in [("gate", &kept_gate, &gate), ("up", &kept_up, &up)] {
        let rows = kept.chunks(COLS as usize).zip(values.chunks(COLS as usize));
        let scaled = rows.flat_map(|(kept, row)| {
            let largest = row.iter().fold(f64::MIN_POSITIVE, |max, x| max.max(x.abs()));
            kept.iter().zip(row).map(move |(kept, x)| ((kept / largest) as f32, x / largest)).collect::<Vec<_>>()
        });
        let (found, expected): (Vec<f32>, Vec<f64>) = scaled.unzip();
        let expected = expected.into_iter().map(|x| (x, (x.abs() * ROUNDING).max(OF_LARGEST)));
        if let Some(reason) = difference(&found, expected) {
            return Ok(Some(format!("stored {name}: {reason}")));
        }
    }
    let product = |gate: &[f64], up: &[f64]| -> Vec<f64> {
        gate.iter().zip(up).map(|(&x, &y)| function(glu.activation, x)[0] * y).collect()
    };
    let kept = || kept_gate.iter().zip(&kept_up).zip(&dh);
    let of_gate: Vec<f64> = kept().map(|((&x, &y), &dh)| dh * y * function(glu.activation, x)[1]).collect();
    let of_up: Vec<f64> = kept().map(|((&x, _), &dh)| dh * function(glu.activation, x)[0]).collect();
    let results = [
        ("h", h, product(&gate, &up)),
        ("h again", again, product(&kept_gate, &kept_up)),
        ("dgate", d_gate, of_gate),
        ("dup", d_up, of_up),
    ];
    for (name, panels, expected) in results {
        if let Some(reason) = differs(gpu, &panels, &expected, COLS)? {
            return Ok(Some(format!("{name}: {reason}")));
        }
    }
    Ok(None)
}
