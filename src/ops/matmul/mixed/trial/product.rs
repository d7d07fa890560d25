//! The trial of a product: of thousands of rows, of several tiles in both directions with partial
//! last ones, and in each way in which products are cut along their sums.
//!
//! A misaligned or misplaced access gives wrong values without an error, sometimes in a few rows of
//! thousands. So every row is compared: its sum with random signs is that of the CPU, which takes
//! the products of matrices and vectors only. Some rows are compared element by element.
//!
//! Canaries surround all memory that a kernel uses. Panels hold NaN around the used part, except
//! where kernels rely on zeros, so that a misplaced load shows in a sum. Words before, between and
//! after the rows of the result must stay as they were.

use half::f16;

use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, MatrixUnits};
use crate::ops::OpError;
use crate::ops::matmul::mixed::source::{Form, Tile};
use crate::ops::matmul::mixed::{LowRank, Mixed, Side, WIDTH};
use crate::ops::matmul::panels::{Exponents, Panels, Size, Terms};
use crate::ops::matmul::product::{Target, View};
use crate::ops::trial::{add, difference, dot};

/// Maximum error of a sum, relative to the sum of the magnitudes of its terms.
const TOLERANCE: f64 = 1e-5;
/// A word that no kernel writes.
const CANARY: u32 = 0x7e00_7e00;
/// Floats before and after a result, and between its rows.
const MARGIN: u32 = 64;
const GAP: u32 = 8;
/// Elements of the table that all operands are taken from: a prime, so that rows of matrices start
/// in different places.
pub(in crate::ops::matmul::mixed) const PERIOD: usize = 16_381;
/// Places in the table from one row of a matrix to the next.
const STEP: usize = 509;
/// Binding for the sizes of hardware. WebGPU guarantees more, so a lower limit was set by a test.
const ROOM: u64 = 64 << 20;
const RANK: u32 = 40;
const RATIO: f32 = -1.5;
const SCALE: f32 = 0.75;

/// The sizes of a trial: of one product, and of others that are cut along their sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops::matmul::mixed) struct Sizes {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    /// Rows of the products that are cut, and their chunks.
    pub cut_m: u32,
    pub cuts: &'static [u32],
}

impl Sizes {
    pub fn of(gpu: &Gpu, units: MatrixUnits, form: Form) -> Self {
        Self::on(units, gpu.limits().max_storage_buffer_binding_size >= ROOM, form)
    }

    /// `room`: whether the device binds the operands of hardware.
    pub fn on(units: MatrixUnits, room: bool, form: Form) -> Self {
        let Tile { m, n, .. } = form.tile;
        let sizes = match units {
            MatrixUnits::Hardware if room && form.tile == Tile::LARGE => {
                Self { m: 8323, n: 3 * n + 77, k: 1357, cut_m: 1283, cuts: &[2, 3, 4] }
            }
            MatrixUnits::Hardware if room => Self { m: 8323, n: n + 13, k: 1357, cut_m: 1283, cuts: &[7, 43] },
            _ => Self { m: m + 13, n: n + 9, k: 133, cut_m: m + 13, cuts: &[3] },
        };
        Self { n: if form.fours { sizes.n.next_multiple_of(4) } else { sizes.n }, ..sizes }
    }

    /// What the trial compares, in words.
    pub fn covers(self) -> String {
        let Self { m, n, k, cut_m, cuts } = self;
        let cuts: Vec<String> = cuts.iter().map(u32::to_string).collect();
        format!(
            "{m} x {n} sums of {k} terms, and {cut_m} x {n} in {} parts: every row, canaries around operands and results",
            cuts.join(", ")
        )
    }
}

/// Runs some dispatches.
pub(super) fn run(gpu: &Gpu, record: impl FnOnce(&mut Commands)) -> Result<(), OpError> {
    let mut commands = gpu.commands("a test of a product on matrix units");
    record(&mut commands);
    commands.submit()?;
    Ok(())
}

/// The exponents of the rows of panels.
pub(super) fn row_exponent(row: u32) -> i32 {
    row as i32 % 7 - 3
}

/// Numbers that f16 has, twice in a row.
struct Table {
    halves: Vec<u16>,
    values: Vec<f64>,
}

impl Table {
    fn new(random: &mut Random) -> Self {
        let once: Vec<f16> = (0..PERIOD).map(|_| f16::from_f32(random.uniform())).collect();
        let twice = || once.iter().chain(&once);
        Self { halves: twice().map(|x| x.to_bits()).collect(), values: twice().map(|x| x.to_f64()).collect() }
    }
}

/// A matrix from the table. It has at most [`PERIOD`] columns.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    table: &'a Table,
    seed: usize,
    rows: u32,
    cols: u32,
}

impl<'a> Matrix<'a> {
    fn place(&self, row: u32) -> std::ops::Range<usize> {
        let start = (row as usize * STEP + self.seed) % PERIOD;
        start..start + self.cols as usize
    }

    fn row(&self, row: u32) -> &'a [f64] {
        &self.table.values[self.place(row)]
    }

    fn halves(&self, row: u32) -> &'a [u16] {
        &self.table.halves[self.place(row)]
    }

    /// The sum of each row, times a factor for each column.
    fn sums_of_rows(&self, factors: &[f64]) -> Vec<f64> {
        (0..self.rows).map(|i| dot(self.row(i), factors)).collect()
    }

    /// The sum of each column, times a factor for each row.
    fn sums_of_columns(&self, factors: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.cols as usize];
        (0..self.rows).zip(factors).for_each(|(i, &factor)| add(&mut sums, factor, self.row(i)));
        sums
    }
}

/// A side of a product: its matrix, and the sides of the matrix.
#[derive(Clone, Copy)]
struct Operand<'a> {
    matrix: Matrix<'a>,
    terms: Terms,
}

impl<'a> Operand<'a> {
    /// `side` rows or columns of the result, and `terms` terms.
    fn new(table: &'a Table, seed: usize, along: Terms, [side, terms]: [u32; 2]) -> Self {
        let [rows, cols] = if along == Terms::Columns { [side, terms] } else { [terms, side] };
        Self { matrix: Matrix { table, seed, rows, cols }, terms: along }
    }

    /// For each row or column of the result, the sum of its terms times these factors.
    fn over_terms(&self, factors: &[f64]) -> Vec<f64> {
        match self.terms {
            Terms::Columns => self.matrix.sums_of_rows(factors),
            Terms::Rows => self.matrix.sums_of_columns(factors),
        }
    }

    /// For each term, the sum over the rows or columns of the result, times these factors.
    fn over_side(&self, factors: &[f64]) -> Vec<f64> {
        match self.terms {
            Terms::Columns => self.matrix.sums_of_columns(factors),
            Terms::Rows => self.matrix.sums_of_rows(factors),
        }
    }

    /// The terms of a row or column of the result.
    fn terms_of(&self, at: u32) -> Vec<f64> {
        match self.terms {
            Terms::Columns => self.matrix.row(at).to_vec(),
            Terms::Rows => (0..self.matrix.rows).map(|t| self.matrix.row(t)[at as usize]).collect(),
        }
    }

    /// Its panels, from row and column `first` on. All else is NaN, except the padding of the
    /// terms.
    fn panels(&self, gpu: &Gpu, first: (u32, u32), exponents: Exponents) -> Result<Panels, OpError> {
        let Matrix { rows, cols, .. } = self.matrix;
        let size = Size { rows: first.0 + rows, cols: first.1 + cols };
        let mut halves = vec![f16::NAN.to_bits(); (size.bytes() / 2) as usize];
        let mut set = |row: u32, column: u32, from: &[u16]| {
            let at = size.at(row, column);
            if let Some(to) = halves.get_mut(at..at + from.len()) {
                to.copy_from_slice(from);
            }
        };
        for i in 0..rows {
            let pieces = (first.1..).step_by(WIDTH as usize).zip(self.matrix.halves(i).chunks(WIDTH as usize));
            pieces.for_each(|(column, piece)| set(first.0 + i, column, piece));
        }
        let (rows, columns) = match self.terms {
            Terms::Columns => (0..size.padded_rows(), size.cols..size.padded_cols()),
            Terms::Rows => (size.rows..size.padded_rows(), 0..size.padded_cols()),
        };
        rows.for_each(|i| columns.clone().for_each(|j| set(i, j, &[0])));
        let count = if exponents == Exponents::ByRow { size.padded_rows() } else { 1 };
        let words: Vec<i32> = (0..count).map(row_exponent).collect();
        let range = |label, bytes: &[u8]| Ok::<_, OpError>(BufferRange::whole(gpu.storage_with(label, bytes)?));
        let range_of = (range("panels", bytemuck::cast_slice(&halves))?, range("exponents", bytemuck::cast_slice(&words))?);
        Ok(Panels { size, range: range_of.0, exponents, exponents_range: range_of.1 })
    }
}

/// The operands of a product, and what becomes of them.
struct Case<'a> {
    mixed: &'a Mixed,
    form: Form,
    sizes: Sizes,
    operands: [Operand<'a>; 2],
    /// Those of an adapter, which come with factors of their own.
    adapter: [Operand<'a>; 2],
    /// The first element of the left one in its panels.
    first: (u32, u32),
    /// The factors of both sums.
    weights: [f64; 2],
    /// A sign for each column.
    signs: Vec<f64>,
    bias: Matrix<'a>,
    old: Matrix<'a>,
}

/// Describes the difference of a product from the CPU, if there is one.
pub(super) fn of(mixed: &Mixed, kernel: &Kernel, form: Form) -> Result<Option<String>, OpError> {
    let mut random = Random::default();
    let table = Table::new(&mut random);
    let sizes = Sizes::of(&mixed.gpu, mixed.units, form);
    let Sizes { m, n, k, .. } = sizes;
    let by_row = form.left == Terms::Columns;
    let case = Case {
        mixed,
        form,
        sizes,
        operands: [Operand::new(&table, 0, form.left, [m, k]), Operand::new(&table, 1009, form.right, [n, k])],
        adapter: [Operand::new(&table, 2003, Terms::Columns, [m, RANK]), Operand::new(&table, 3001, form.right, [n, RANK])],
        first: if by_row { (form.tile.m, WIDTH) } else { (WIDTH, form.tile.m) },
        weights: [if by_row { 0.25 } else { 0.0625 }, if form.adapted { f64::from(RATIO) * 8.0 } else { 0.0 }],
        signs: (0..n).map(|_| if random.uniform() < 0.0 { -1.0 } else { 1.0 }).collect(),
        bias: Matrix { table: &table, seed: 4001, rows: 1, cols: n },
        old: Matrix { table: &table, seed: 5003, rows: m, cols: n },
    };
    case.differs(kernel)
}

impl Case<'_> {
    fn differs(&self, kernel: &Kernel) -> Result<Option<String>, OpError> {
        let (gpu, Sizes { m, n, cut_m, cuts, .. }) = (&self.mixed.gpu, self.sizes);
        let [left, right] = self.operands;
        let by_row = if left.terms == Terms::Columns { Exponents::ByRow } else { Exponents::One };
        // The exponents of both operands, those of the adapter's, and one that is not used.
        let of_left = if left.terms == Terms::Rows { -2 } else { 0 };
        let exponents: [i32; 4] = [of_left - 2, 5, -2, 99];
        let exponents_range = BufferRange::whole(gpu.storage_with("exponents", bytemuck::cast_slice(&exponents))?);
        let left = left.panels(gpu, self.first, by_row)?;
        let right = Panels { exponents_range, ..right.panels(gpu, (0, 0), Exponents::One)? };
        let [low, other] = self.adapter;
        let low = low.panels(gpu, (self.form.tile.m, 0), Exponents::ByRow)?;
        let other = other.panels(gpu, (0, 0), Exponents::One)?;
        let adapter = self.form.adapted.then_some(LowRank { low: &low, other: &other, ratio: RATIO });
        let sides = [
            Side { panels: &left, terms: self.form.left, first: self.first },
            Side { panels: &right, terms: self.form.right, first: (0, 0) },
        ];
        let checks = self.checks();
        // One product with a bias, added to what is there.
        let bias: Vec<f32> = self.bias.row(0).iter().map(|&x| x as f32).collect();
        let bias = (BufferRange::whole(gpu.storage_with("bias", bytemuck::cast_slice(&bias))?), 0);
        let old = |i: u32| self.old.row(i).iter().map(|&x| x as f32).collect();
        let out = Outputs::new(gpu, [m, n, n + GAP], 1, old)?;
        let view = out.view();
        let target = Target { m, n, out: &view, scale: SCALE, add: true, bias: Some(&bias) };
        let found = out.after(gpu, |commands| {
            let terms = (self.sizes.k, self.sizes.k.next_multiple_of(WIDTH));
            self.mixed.dispatch_product(commands, kernel, self.form.tile, sides, terms, adapter, target);
        })?;
        let wrong = found.canary().or_else(|| self.compare(&found, &checks, m, true));
        if wrong.is_some() {
            return Ok(wrong);
        }
        // Sums in chunks, whose rows lie one after another.
        for chunk in cuts.iter().map(|&cuts| self.sizes.k.div_ceil(cuts).next_multiple_of(WIDTH)) {
            let out = Outputs::new(gpu, [cut_m, n, n], self.sizes.k.div_ceil(chunk), |_| Vec::new())?;
            let view = out.view();
            let target = Target { m: cut_m, n, out: &view, scale: 1.0, add: false, bias: None };
            let found = out.after(gpu, |commands| {
                let terms = (self.sizes.k, chunk);
                self.mixed.dispatch_product(commands, kernel, self.form.tile, sides, terms, adapter, target);
            })?;
            let wrong = found.canary().or_else(|| self.compare(&found, &checks, cut_m, false));
            if let Some(reason) = wrong {
                return Ok(Some(format!("in chunks of {chunk} terms, {reason}")));
            }
        }
        Ok(None)
    }

    /// The sum of each row with the signs of its columns, without its exponent.
    fn checks(&self) -> Vec<f64> {
        let of = |[left, right]: [Operand<'_>; 2]| left.over_terms(&right.over_side(&self.signs));
        let (of_product, of_adapter) = (of(self.operands), of(self.adapter));
        of_product.iter().zip(of_adapter).map(|(a, b)| self.weights[0] * a + self.weights[1] * b).collect()
    }

    /// The elements of a row, without its exponent.
    fn row(&self, at: u32) -> Vec<f64> {
        let of = |[left, right]: [Operand<'_>; 2]| right.over_terms(&left.terms_of(at));
        let (of_product, of_adapter) = (of(self.operands), of(self.adapter));
        of_product.iter().zip(of_adapter).map(|(a, b)| self.weights[0] * a + self.weights[1] * b).collect()
    }

    /// Describes the first row of the results that differs. `whole`: those of the product with a
    /// bias.
    fn compare(&self, found: &Found, checks: &[f64], m: u32, whole: bool) -> Option<String> {
        let Sizes { n, k, .. } = self.sizes;
        let by_row = self.form.left == Terms::Columns;
        let factor = |i: u32| if by_row { 2_f64.powi(row_exponent(self.form.tile.m + i)) } else { 1.0 };
        let scale = if whole { f64::from(SCALE) } else { 1.0 };
        // The mean magnitude of a term is a quarter of its weight.
        let [weight, of_adapter] = self.weights.map(|weight| weight.abs() / 4.0);
        let size = weight * f64::from(k) + of_adapter * f64::from(RANK);
        let tolerance = |i: u32| TOLERANCE * (1.0 + factor(i) * size);
        let rest = |i: u32, j: usize| if whole { scale * self.bias.row(0)[j] + self.old.row(i)[j] } else { 0.0 };
        // Element by element at the edges of tiles, and in the middle.
        for i in [0, 1, 127, 128, m / 2 + 3, m - 2, m - 1].into_iter().filter(|&i| i < m) {
            let expected = self.row(i).into_iter().enumerate();
            let expected = expected.map(|(j, sum)| (scale * factor(i) * sum + rest(i, j), tolerance(i)));
            if let Some(reason) = difference(&found.row(i), expected) {
                return Some(format!("in row {i}, {reason}"));
            }
        }
        // Errors of rounding are independent of each other.
        let of_row = f64::from(n).sqrt();
        let rest: Vec<f64> = if whole { self.old.sums_of_rows(&self.signs) } else { vec![0.0; m as usize] };
        let of_bias = if whole { scale * dot(self.bias.row(0), &self.signs) } else { 0.0 };
        (0..m).zip(checks).zip(rest).find_map(|((i, check), old)| {
            let (found, expected) = (found.check(i, &self.signs), scale * factor(i) * check + of_bias + old);
            let near = (found - expected).abs() <= of_row * tolerance(i);
            (!near).then(|| format!("the elements of row {i} have the signed sum {found} instead of {expected}"))
        })
    }
}

/// The memory of the results of a product, between canaries.
struct Outputs {
    range: BufferRange,
    m: u32,
    n: u32,
    row: u32,
    chunks: u32,
}

/// What a kernel left there.
struct Found {
    outputs: Outputs,
    words: Vec<f32>,
}

impl Outputs {
    /// `row` floats from one row to the next. `old` has the floats of a row before, or none.
    fn new(gpu: &Gpu, [m, n, row]: [u32; 3], chunks: u32, old: impl Fn(u32) -> Vec<f32>) -> Result<Self, OpError> {
        let mut words = vec![f32::from_bits(CANARY); (2 * MARGIN + chunks * m * row) as usize];
        for i in 0..m {
            let (old, at) = (old(i), (MARGIN + i * row) as usize);
            words[at..at + old.len()].copy_from_slice(&old);
        }
        let range = BufferRange::whole(gpu.storage_with("trial", bytemuck::cast_slice(&words))?);
        Ok(Self { range, m, n, row, chunks })
    }

    fn view(&self) -> View {
        View { range: self.range.clone(), first: MARGIN, row: self.row, column: 1 }
    }

    /// What is there after the commands.
    fn after(self, gpu: &Gpu, record: impl FnOnce(&mut Commands)) -> Result<Found, OpError> {
        run(gpu, record)?;
        let bytes = gpu.read(&self.range)?;
        let words = bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap_or_default()));
        Ok(Found { words: words.collect(), outputs: self })
    }
}

impl Found {
    /// The floats of row `i` in each chunk.
    fn parts(&self, i: u32) -> impl Iterator<Item = &[f32]> {
        let Outputs { m, n, row, chunks, .. } = self.outputs;
        let starts = (0..chunks).map(move |chunk| (MARGIN + (chunk * m + i) * row) as usize);
        starts.map(move |at| self.words.get(at..at + n as usize).unwrap_or_default())
    }

    /// The sums of the chunks.
    fn row(&self, i: u32) -> Vec<f32> {
        let mut sums = vec![0.0; self.outputs.n as usize];
        self.parts(i).for_each(|part| sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x));
        sums
    }

    /// The sum of all elements of a row with these signs.
    fn check(&self, i: u32, signs: &[f64]) -> f64 {
        self.parts(i).flat_map(|part| part.iter().zip(signs)).map(|(&x, sign)| f64::from(x) * sign).sum()
    }

    /// Describes a canary that was overwritten.
    fn canary(&self) -> Option<String> {
        let Outputs { m, n, row, chunks, .. } = self.outputs;
        let (first, end) = (MARGIN as usize, (MARGIN + chunks * m * row) as usize);
        let changed = |words: &[f32]| words.iter().any(|word| word.to_bits() != CANARY);
        let gaps = self.words.get(first..end).unwrap_or_default().chunks(row as usize);
        let mut gaps = gaps.map(|row| row.get(n as usize..).unwrap_or_default());
        if changed(self.words.get(..first).unwrap_or_default()) {
            Some("words before the result are overwritten".to_owned())
        } else if changed(self.words.get(end..end + first).unwrap_or_default()) {
            Some("words after the result are overwritten".to_owned())
        } else {
            gaps.position(changed).map(|i| format!("words after row {i} of the result are overwritten"))
        }
    }
}
