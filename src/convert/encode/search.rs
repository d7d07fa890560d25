//! The search of the `mse` encoder: which scale, of either sign, leaves the smallest squared error in a block.
//!
//! The error of a block is `<w,w> - <q,w>^2 / <q,q>` once its scale is refitted by least squares to the codebook's values `q` of
//! its codes. So every candidate `absmax * g` is first ranked by `<q,w>^2 / <q,q>`, in 8-bit integers: exact, the same on every
//! machine, and 32 weights an instruction. The best [`REFINED`] are then refitted in float32 and their exact errors compared,
//! with that of `absmax` itself among them.

use super::ScalePrecision;
use super::kernel::{Block, GROUP, Lanes};
use crate::format::nf4;

/// Candidates as fractions of absmax, each tried with both signs.
const FRACTIONS: [f32; 7] = [0.80, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04];

/// Candidates that are refitted in float32.
const REFINED: usize = 2;

/// Candidates of both signs.
const CANDIDATES: usize = 2 * FRACTIONS.len();

/// Groups of the largest block.
const MAX_GROUPS: usize = 4096 / GROUP;

/// The codebook for weights in units of `absmax / 127`, at one candidate scale.
#[derive(Debug)]
pub(super) struct Grid {
    /// The code of `w` is the number of these strictly below it. The seven low ones are negative, the others positive, so a value
    /// never has the sign opposite to its weight.
    pub thresholds: [i8; 15],
}

/// Magnitude of the codebook's values in 127ths.
pub(super) const MAGNITUDES: [u8; 16] = {
    let mut magnitudes = [0; 16];
    let mut i = 0;
    while i < 16 {
        magnitudes[i] = (nf4::CODEBOOK[i].abs() * 127.0 + 0.5) as u8;
        i += 1;
    }
    magnitudes
};

const GRIDS: [Grid; FRACTIONS.len()] = {
    let mut grids = [const { Grid { thresholds: [0; 15] } }; FRACTIONS.len()];
    let mut g = 0;
    while g < FRACTIONS.len() {
        let mut i = 0;
        while i < 15 {
            let threshold = nf4::MIDPOINTS[i] * FRACTIONS[g] * 127.0;
            // Rounded down, so that the integers above are those above the threshold.
            let below = threshold as i8;
            grids[g].thresholds[i] = if (below as f32) > threshold { below - 1 } else { below };
            i += 1;
        }
        g += 1;
    }
    grids
};

/// The best scale found for a block that is not all zeros, rounded to `precision`.
#[inline(always)]
pub(super) fn best_scale<L: Lanes>(l: L, precision: ScalePrecision, block: &Block) -> f32 {
    let mut best = precision.round(block.absmax);
    let mut smallest = block.try_scale(l, best).error;
    for fraction in candidates(l, block) {
        let mut scale = precision.round(block.absmax * fraction);
        for _ in 0..2 {
            let sums = block.try_scale(l, scale);
            if sums.error < smallest {
                (best, smallest) = (scale, sums.error);
            }
            if sums.qq > 0.0 {
                scale = precision.round(sums.qw / sums.qq / block.unit);
            }
        }
    }
    best
}

/// The signed fractions of absmax that promise the smallest errors, refitted in integers, best first.
#[inline(always)]
fn candidates<L: Lanes>(l: L, block: &Block) -> [f32; REFINED] {
    let mut weights = [[0; GROUP]; MAX_GROUPS];
    let factor = l.splat(127.0 / (block.absmax * block.unit));
    let unit = l.splat(block.unit);
    for (group, to) in block.groups().iter().zip(&mut weights) {
        let (vectors, _) = group.as_chunks::<8>();
        let mut scaled = [unit; 4];
        for (vector, scaled) in vectors.iter().zip(&mut scaled) {
            *scaled = l.mul(l.mul(l.load(vector), unit), factor);
        }
        l.to_i8(scaled, to);
    }
    let weights = &weights[..block.groups().len()];

    let (mut qw, mut qq) = ([0.0; CANDIDATES], [1.0; CANDIDATES]);
    for (i, grid) in GRIDS.iter().enumerate() {
        let dots = l.dots(weights, grid);
        (qw[2 * i], qq[2 * i]) = (dots[0] as f32, dots[1] as f32);
        (qw[2 * i + 1], qq[2 * i + 1]) = (dots[2] as f32, dots[3] as f32);
    }
    let mut gains = [0.0; CANDIDATES];
    for i in 0..CANDIDATES {
        gains[i] = qw[i] * qw[i] / qq[i];
    }
    std::array::from_fn(|_| {
        let mut best = 0;
        for i in 1..CANDIDATES {
            if gains[i] > gains[best] {
                best = i;
            }
        }
        gains[best] = f32::NEG_INFINITY;
        let sign = if best % 2 == 0 { 1.0 } else { -1.0 };
        sign * qw[best] / qq[best]
    })
}
