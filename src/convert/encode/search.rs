//! The search of the `mse` encoder: which scale, of either sign, leaves the smallest squared error
//! in a block.
//!
//! The error of a block is `<w,w> - <q,w>^2 / <q,q>` once its scale is refitted by least squares to
//! the codebook's values `q` of its codes. So each candidate `absmax * g` is ranked by
//! `<q,w>^2 / <q,q>`, in 8-bit integers: exact, hence the same on every machine, and 32 weights an
//! instruction. The best [`REFINED`] are refitted, encoded and refitted again in the same integers.
//! Float32 encodes the better one, and compares it with absmax itself, so that no block is worse
//! than with absmax.
//!
//! On the projections of two trained models, in blocks of 64, that leaves 0.5 % more error than 41
//! candidates a sign, all of it in float32, and 18.5 % less than absmax. `benches/RESULTS.md` has
//! what other numbers of candidates cost and gain.

use super::block::{Block, MAX_BLOCK, MAX_GROUPS, Sums, Tile};
use super::lanes::{GROUP, Grid, Lanes};
use super::nested::Margin;
use super::types::ScalePrecision;
use crate::format::nf4;

/// Candidates as fractions of absmax, each tried with both signs.
const FRACTIONS: [f32; 5] = [0.82, 0.88, 0.94, 1.0, 1.06];

/// Candidates that are refined.
const REFINED: usize = 2;

/// Candidates of both signs.
const CANDIDATES: usize = 2 * FRACTIONS.len();

/// The bits of a candidate's index.
const INDEX: u32 = CANDIDATES.next_power_of_two() as u32 - 1;

/// The midpoints in the order of a [`Grid`], in 127ths. The filler stays beyond 127 at any fraction
/// of absmax that can come up.
const TREE: [f32; 16] = {
    const ORDER: [usize; 16] = [7, 3, 11, usize::MAX, 1, 5, 9, 13, 0, 2, 4, 6, 8, 10, 12, 14];
    let mut tree = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        tree[i] = 127.0 * if ORDER[i] < 15 { nf4::MIDPOINTS[ORDER[i]] } else { 1000.0 };
        i += 1;
    }
    tree
};

const GRIDS: [Grid; FRACTIONS.len()] = {
    let mut grids = [Grid([0; 16]); FRACTIONS.len()];
    let mut i = 0;
    while i < FRACTIONS.len() {
        let mut k = 0;
        while k < 16 {
            let threshold = TREE[k] * FRACTIONS[i];
            // Rounded down, so that the integers above are those above the threshold.
            let below = threshold as i8;
            grids[i].0[k] = if below as f32 > threshold { below - 1 } else { below };
            k += 1;
        }
        i += 1;
    }
    grids
};

/// The space that a search works in.
pub(super) struct Search {
    /// The weights of a tile in units of `absmax / 127` of their block.
    weights: [[i8; GROUP]; MAX_GROUPS],
    /// For each block of the tile, the best scale as a fraction of absmax.
    fractions: [f32; MAX_GROUPS],
    /// Codes of one block.
    codes: [u8; MAX_BLOCK / 2],
}

/// A block, encoded.
pub(super) struct Best<'a> {
    pub scale: f32,
    /// The codes of whole groups, and then some.
    pub codes: &'a [u8],
    pub sums: Sums,
    /// The squared error that absmax leaves.
    absmax_sq_error: f64,
}

impl Best<'_> {
    /// What the block has to spare against absmax.
    #[inline(always)]
    pub fn margin(&self) -> Margin {
        let gain = (self.absmax_sq_error - self.sums.sq_error) / self.sums.sq;
        Margin { sum_sq: self.sums.sq as f32, gain: gain as f32 }
    }
}

impl Search {
    #[inline(always)]
    pub const fn new() -> Self {
        Self { weights: [[0; GROUP]; MAX_GROUPS], fractions: [0.0; MAX_GROUPS], codes: [0; MAX_BLOCK / 2] }
    }

    /// Finds the most promising scales of the first `blocks` blocks of `tile`, blocks of zeros left
    /// out.
    #[inline(always)]
    pub fn prepare<L: Lanes>(&mut self, l: L, tile: &Tile, blocks: usize) {
        for i in 0..blocks {
            let block = tile.block(i);
            if block.absmax > 0.0 {
                let weights = &mut self.weights[..block.groups.len()];
                round_to_i8(l, &block, weights);
                self.fractions[i] = refit(l, weights, candidates(l, weights));
            }
        }
    }

    /// Encodes `block`, number `i` of the tile and not all zeros, at the best of its scales and
    /// absmax, rounded to `precision`.
    #[inline(always)]
    pub fn best<L: Lanes>(&mut self, l: L, precision: ScalePrecision, block: &Block<'_>, i: usize) -> Best<'_> {
        let (scale, absmax) = (precision.round(block.absmax * self.fractions[i]), precision.round(block.absmax));
        let sums = block.encode_at(l, scale, &mut self.codes);
        // One block in thirty: only then are absmax's codes worth their time.
        let absmax_sq_error = block.sq_error_at(l, absmax);
        if absmax_sq_error <= sums.sq_error {
            let sums = block.encode_at(l, absmax, &mut self.codes);
            return Best { scale: absmax, codes: &self.codes, sums, absmax_sq_error };
        }
        Best { scale, codes: &self.codes, sums, absmax_sq_error }
    }
}

/// The weights of `block` in units of `absmax / 127`.
#[inline(always)]
fn round_to_i8<L: Lanes>(l: L, block: &Block<'_>, to: &mut [[i8; GROUP]]) {
    let (factor, unit) = (l.splat(127.0 / (block.absmax * block.unit)), l.splat(block.unit));
    for (group, to) in block.groups.iter().zip(to) {
        let mut scaled = [unit; 4];
        for (vector, scaled) in group.as_chunks::<8>().0.iter().zip(&mut scaled) {
            *scaled = l.mul(l.mul(l.load(vector), unit), factor);
        }
        l.to_i8(scaled, to);
    }
}

/// The signed fractions of absmax that promise the smallest errors, refitted to their codes, best
/// first.
#[inline(always)]
fn candidates<L: Lanes>(l: L, weights: &[[i8; GROUP]]) -> [f32; REFINED] {
    let mut dots = [[0; 4]; FRACTIONS.len()];
    for (dots, grid) in dots.iter_mut().zip(&GRIDS) {
        *dots = l.dots(weights, [(grid, 1), (grid, -1)]);
    }
    let dots: &[[i32; 2]] = dots.as_flattened().as_chunks().0;
    let (mut best, mut second) = (0, 0);
    for (i, &[qw, qq]) in dots.iter().enumerate() {
        // What a candidate explains is positive, so it orders as its bits do. The low bits, worth
        // less than 8-bit weights can tell, name the candidate, which also settles ties.
        let (qw, qq) = (qw as f32, qq as f32);
        let key = (qw * qw / qq).to_bits() & !INDEX | i as u32;
        second = second.max(key.min(best));
        best = best.max(key);
    }
    // Not `[best, second].map`, which the compiler may leave out of line.
    let refitted = |key: u32| {
        let i = (key & INDEX) as usize;
        let fraction = dots[i][0] as f32 / dots[i][1] as f32;
        if i.is_multiple_of(2) { fraction } else { -fraction }
    };
    [refitted(best), refitted(second)]
}

/// The better one of two fractions of absmax, refitted to the codes that it gives.
#[inline(always)]
fn refit<L: Lanes>(l: L, weights: &[[i8; GROUP]], fractions: [f32; REFINED]) -> f32 {
    // Subtracting a half and rounding to the nearest rounds down, except for ties.
    let (half, mut thresholds) = (l.splat(0.5), [l.splat(0.0); 4]);
    for (i, fraction) in fractions.iter().enumerate() {
        let fraction = l.splat(fraction.abs());
        for (k, midpoints) in TREE.as_chunks::<8>().0.iter().enumerate() {
            thresholds[2 * i + k] = l.sub(l.mul(l.load(midpoints), fraction), half);
        }
    }
    let mut rounded = [0; GROUP];
    l.to_i8(thresholds, &mut rounded);
    let (first, second) = rounded.split_at(16);
    let mut grids = [Grid([0; 16]); 2];
    grids[0].0.copy_from_slice(first);
    grids[1].0.copy_from_slice(second);
    let sign = |fraction: f32| if fraction < 0.0 { -1 } else { 1 };
    let signs = [sign(fractions[0]), sign(fractions[1])];
    let dots = l.dots(weights, [(&grids[0], signs[0]), (&grids[1], signs[1])]);
    // The largest weight has a code that is not zero's at any candidate scale, so no sum of squares
    // is 0.
    let (a, b) = ((dots[0] as f32, dots[1] as f32), (dots[2] as f32, dots[3] as f32));
    let explained = |(qw, qq): (f32, f32)| qw * qw / qq;
    let refitted = |sign: i8, (qw, qq): (f32, f32)| f32::from(sign) * qw / qq;
    if explained(b) > explained(a) { refitted(signs[1], b) } else { refitted(signs[0], a) }
}
