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

/// The bits of a candidate's index.
const INDEX: u32 = CANDIDATES.next_power_of_two() as u32 - 1;

/// The codebook for weights in units of `absmax / 127`, at one candidate scale.
#[derive(Debug)]
pub(super) struct Grid {
    /// The code of `w` is the number of these strictly below it. The seven low ones are negative, the others positive, so a value
    /// never has the sign opposite to its weight.
    pub thresholds: [i8; 15],
    /// Thresholds 1, 5, 9 and 13, for the third step of a binary search.
    pub third: [i8; 4],
    /// Thresholds 0, 2, ..., 14, for its fourth step.
    pub fourth: [i8; 8],
}

impl Grid {
    const fn new(fraction: f32) -> Self {
        let mut grid = Self { thresholds: [0; 15], third: [0; 4], fourth: [0; 8] };
        let mut i = 0;
        while i < 15 {
            let threshold = nf4::MIDPOINTS[i] * fraction * 127.0;
            // Rounded down, so that the integers above are those above the threshold.
            let below = threshold as i8;
            let below = if (below as f32) > threshold { below - 1 } else { below };
            grid.thresholds[i] = below;
            if i % 4 == 1 {
                grid.third[i / 4] = below;
            } else if i % 2 == 0 {
                grid.fourth[i / 2] = below;
            }
            i += 1;
        }
        grid
    }
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
    let mut grids = [const { Grid::new(1.0) }; FRACTIONS.len()];
    let mut i = 0;
    while i < FRACTIONS.len() {
        grids[i] = Grid::new(FRACTIONS[i]);
        i += 1;
    }
    grids
};

/// The best scale found for a block that is not all zeros, rounded to `precision`.
#[inline(always)]
pub(super) fn best_scale<L: Lanes>(l: L, precision: ScalePrecision, block: &mut Block) -> f32 {
    let absmax = block.absmax;
    let [first, second] = candidates(l, block).map(|fraction| precision.round(absmax * fraction));
    let [first, second] = block.refits(l, [first, second]);
    let refit = precision.round(if second.1 > first.1 { second.0 } else { first.0 });
    let absmax = precision.round(absmax);
    let [error, absmax_error] = block.errors(l, [refit, absmax]);
    if error < absmax_error { refit } else { absmax }
}

/// The signed fractions of absmax that promise the smallest errors, refitted in integers, best first.
#[inline(always)]
fn candidates<L: Lanes>(l: L, block: &mut Block) -> [f32; REFINED] {
    block.roughen(l);
    let weights = &block.rough[..block.groups().len()];
    let (mut qw, mut qq) = ([0.0; CANDIDATES], [1.0; CANDIDATES]);
    for (i, grid) in GRIDS.iter().enumerate() {
        let dots = l.dots(weights, grid);
        (qw[2 * i], qq[2 * i]) = (dots[0] as f32, dots[1] as f32);
        (qw[2 * i + 1], qq[2 * i + 1]) = (dots[2] as f32, dots[3] as f32);
    }
    let mut keys = [0; CANDIDATES.next_power_of_two()];
    for i in 0..CANDIDATES {
        // Gains are positive, so they order as their bits do. The low bits, worth less than the 8-bit weights are exact, name the
        // candidate, which also settles ties.
        keys[i] = (qw[i] * qw[i] / qq[i]).to_bits() & !INDEX | i as u32;
    }
    let mut fractions = [0.0; REFINED];
    for fraction in &mut fractions {
        let best = keys.iter().fold(0, |best, &key| best.max(key)) & INDEX;
        let i = best as usize;
        keys[i] = 0;
        *fraction = if i % 2 == 0 { qw[i] } else { -qw[i] } / qq[i];
    }
    fractions
}
