//! Which table of nested scales (`dq8`) a tensor gets.
//!
//! The even map ([`nested::LINEAR_MAP`]) is best where the scales of a super-block are alike. One
//! large weight makes them differ: 255 neighbours then share few steps of the map, or none. The
//! first pass notices that, block by block and at no cost worth naming. Only then are other tables
//! tried: each is measured on all weights, and taken only where no super-block is worse than with
//! bitsandbytes' rule.

use super::encode::nested::{self, Grade, Margin, Nesting, OUTLIERS};
use super::encode::{BlockError, Encoder};
use crate::format::nf4::{SUPER_BLOCK, ScaleType, Scales};

/// What the first pass has found of one tensor so far.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// The scales that the encoder would like, one a block.
    pub scales: Vec<f32>,
    /// Margins of the blocks since the last whole super-block.
    margins: Vec<Margin>,
    /// Whether a super-block was found for which the even map is too coarse.
    uneven: bool,
}

impl Wanted {
    /// Adds the blocks of a piece.
    pub(super) fn extend(&mut self, scales: &[f32], margins: &[Margin]) {
        self.scales.extend(scales);
        self.margins.extend(margins);
        self.check(self.margins.len() / SUPER_BLOCK * SUPER_BLOCK);
    }

    /// Looks at the next `blocks` blocks, whole super-blocks or the end of the tensor.
    fn check(&mut self, blocks: usize) {
        let first = self.scales.len() - self.margins.len();
        let scales = self.scales.get(first..first + blocks).unwrap_or_default().chunks(SUPER_BLOCK);
        let mut pairs = scales.zip(self.margins.chunks(SUPER_BLOCK));
        self.uneven |= pairs.any(|(scales, margins)| !nested::linear_suffices(scales, margins));
        self.margins.drain(..blocks);
    }

    /// The table, where no measurement is needed. Called once, after the last piece.
    pub(super) fn table(&mut self, encoder: Encoder) -> Option<Vec<u8>> {
        if encoder == Encoder::Absmax {
            return Some(nested::nest(&self.scales, Nesting::Bitsandbytes));
        }
        self.check(self.margins.len());
        (!self.uneven).then(|| nested::nest(&self.scales, Nesting::Linear))
    }
}

/// The tables that are tried, bitsandbytes' last.
#[derive(Debug)]
pub(super) struct Candidates {
    tables: [Vec<u8>; TABLES],
    blocks: usize,
}

/// Number of [`Candidates`].
pub(super) const TABLES: usize = 3;

impl Candidates {
    /// For the scales that the encoder would like, and those of plain absmax.
    pub(super) fn new(wanted: &[f32], absmax: &[f32]) -> Self {
        let graded = nested::nest(wanted, Nesting::Graded(Grade::of(wanted)));
        let tables = [nested::nest(wanted, Nesting::Linear), graded, nested::nest(absmax, Nesting::Bitsandbytes)];
        Self { tables, blocks: wanted.len() }
    }

    /// As a reader sees them; `None` for a table that is none, which `nest` does not make.
    pub(super) fn scales(&self) -> [Option<Scales<'_>>; TABLES] {
        self.tables.each_ref().map(|table| Scales::from_payload(table, ScaleType::Dq8, self.blocks))
    }

    /// The table that `trial` decides for.
    pub(super) fn choose(self, trial: Trial) -> Vec<u8> {
        let [linear, graded, bitsandbytes] = self.tables;
        match trial.best() {
            0 => linear,
            1 => graded,
            _ => bitsandbytes,
        }
    }
}

/// Whether a super-block is no worse off by these gains of its blocks (losses are negative). It
/// must hold for all blocks together, and still without the [`OUTLIERS`] that gain most: then it
/// holds for all blocks but any [`OUTLIERS`].
fn is_no_worse(mut gains: Vec<f64>) -> bool {
    gains.sort_unstable_by(|a, b| b.total_cmp(a));
    let rest = gains.get(OUTLIERS..).unwrap_or_default();
    // Written so that a NaN does not pass.
    gains.iter().sum::<f64>() >= 0.0 && rest.iter().sum::<f64>() >= 0.0
}

/// What each of the [`Candidates`] costs.
#[derive(Debug)]
pub(super) struct Trial {
    /// Errors of the blocks since the last whole super-block.
    pending: [Vec<BlockError>; TABLES],
    /// Whether a candidate is nowhere worse than the last one so far.
    fits: [bool; TABLES],
    /// Sums of squared errors, each relative to its block.
    totals: [f64; TABLES],
}

impl Trial {
    pub(super) fn new() -> Self {
        Self { pending: Default::default(), fits: [true; TABLES], totals: [0.0; TABLES] }
    }

    /// Adds the next blocks: their errors with each table.
    pub(super) fn add(&mut self, errors: &[Vec<BlockError>; TABLES]) {
        for (pending, errors) in self.pending.iter_mut().zip(errors) {
            pending.extend(errors);
        }
        while self.pending.iter().all(|pending| pending.len() >= SUPER_BLOCK) {
            self.judge(SUPER_BLOCK);
        }
    }

    /// Compares the first `blocks` blocks, a super-block, and forgets them.
    fn judge(&mut self, blocks: usize) {
        let errors = self.pending.each_mut().map(|pending| pending.drain(..blocks.min(pending.len())).collect::<Vec<_>>());
        let [.., bitsandbytes] = &errors;
        let squared = |error: &BlockError| error.relative() * error.relative();
        for ((errors, fits), total) in errors.iter().zip(&mut self.fits).zip(&mut self.totals) {
            let pairs = || errors.iter().zip(bitsandbytes);
            *fits &= is_no_worse(pairs().map(|(error, limit)| limit.sum_sq_error - error.sum_sq_error).collect())
                && is_no_worse(pairs().map(|(error, limit)| squared(limit) - squared(error)).collect());
            *total += errors.iter().map(squared).sum::<f64>();
        }
    }

    /// The number of the best candidate: of those that are nowhere worse than the last one, the one
    /// with the smaller relative errors.
    fn best(mut self) -> usize {
        self.judge(SUPER_BLOCK);
        let fitting = self.totals.into_iter().zip(0..).zip(self.fits).filter(|(_, fits)| *fits);
        let best = fitting.map(|(candidate, _)| candidate).min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(TABLES - 1, |(_, number)| number)
    }
}

#[cfg(test)]
mod tests;
