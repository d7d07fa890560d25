//! The kernels that the products of a model use, known before its first pass.

use std::rc::Rc;

use super::source::{Form, Tile};
use super::{Kind, Mixed, trial};
use crate::format::FloatType;
use crate::gpu::{Gpu, MatrixUnits};
use crate::ops::OpError;
use crate::ops::matmul::panels::Terms;
use crate::ops::matmul::weight::Stored;
use crate::ops::mixed_test::MixedTest;
use crate::ops::trial::Tried;

/// Kernels on matrix units: those of the products of a model.
#[derive(Debug, Clone, Default)]
pub struct ProductKernels {
    kinds: Vec<Kind>,
    /// Whether the weights have adapters.
    adapted: bool,
    /// Whether a matrix has a side that is no multiple of four.
    ragged: bool,
    /// A text replacement in every shader, for tests.
    #[cfg(test)]
    patch: Option<[&'static str; 2]>,
}

impl ProductKernels {
    /// The kernels of every model.
    pub fn all() -> Self {
        let mut all = Self::default();
        Stored::all().for_each(|stored| all.add_any_weight(stored));
        [7, 8].into_iter().for_each(|side| all.add_adapter(side, side, side));
        all.add_products(true);
        all
    }

    /// Adds the kernels that prepare the operands of products with a matrix [outputs, inputs].
    pub fn add_weight(&mut self, stored: Stored, outputs: u32, inputs: u32) {
        self.add(Kind::Measure);
        self.add_matrix(stored, [outputs, inputs], true);
    }

    /// Adds the kernels that prepare the matrices of an adapter of a matrix [outputs, inputs].
    pub fn add_adapter(&mut self, rank: u32, outputs: u32, inputs: u32) {
        self.adapted = true;
        for shape in [[rank, inputs], [outputs, rank]] {
            self.add_matrix(Stored::Raw(FloatType::F32), shape, false);
        }
    }

    /// `known`: whether its largest magnitude is.
    fn add_matrix(&mut self, stored: Stored, [rows, cols]: [u32; 2], known: bool) {
        self.add(Kind::Extent(stored));
        self.add(Kind::Decode { stored, whole: cols.is_multiple_of(8), known });
        for side in [rows, cols] {
            let whole = side.is_multiple_of(4);
            self.ragged |= !whole;
            self.add(Kind::Pack { whole });
        }
    }

    /// As [`ProductKernels::add_weight`], for matrices of any shape.
    pub fn add_any_weight(&mut self, stored: Stored) {
        [7, 8].into_iter().for_each(|side| self.add_weight(stored, side, side));
    }

    /// Adds the kernels of the products themselves, of forward passes or of both passes, for the
    /// matrices that were added.
    pub fn add_products(&mut self, training: bool) {
        let either = |set: bool| [false, true].into_iter().take(if set { 2 } else { 1 });
        for fours in either(self.ragged).map(|ragged| !ragged) {
            for right in either(training).map(|rows| if rows { Terms::Rows } else { Terms::Columns }) {
                for adapted in either(self.adapted) {
                    // A part of a weight may have few rows.
                    for tile in [Tile::LARGE, Tile::NARROW] {
                        self.add(Kind::Product(Form { tile, left: Terms::Columns, right, adapted, fours }));
                    }
                }
            }
            if training && self.adapted {
                let (left, right) = (Terms::Rows, Terms::Rows);
                self.add(Kind::Product(Form { tile: Tile::NARROW, left, right, adapted: false, fours }));
            }
        }
        let of_adapters = [Kind::LowRank, Kind::AlignExtent, Kind::Align].into_iter();
        of_adapters
            .take(if !self.adapted {
                0
            } else if training {
                3
            } else {
                1
            })
            .for_each(|kind| self.add(kind));
    }

    fn add(&mut self, kind: Kind) {
        if !self.kinds.contains(&kind) {
            self.kinds.push(kind);
        }
    }

    /// The test of each kernel. A kernel that passed before on this driver is only compiled.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted.
    pub fn tests<'a>(&self, gpu: &'a Gpu, units: MatrixUnits) -> Result<Vec<MixedTest<'a>>, OpError> {
        let tried = Tried::new(gpu);
        #[cfg(test)]
        let tried = self.patch.map_or(tried, |patch| Tried::patched(gpu, patch));
        let mixed = Rc::new(Mixed::new(gpu, units, tried, trial::of)?);
        let test = |&kind: &Kind| {
            let (mixed, spec) = (mixed.clone(), mixed.kernels.spec(|| kind.spec(units)));
            MixedTest::new(gpu, kind.name(), vec![spec], move || mixed.kernel(kind).map(drop))
        };
        Ok(self.kinds.iter().map(test).collect())
    }

    /// Broken kernels for tests, as [`Tried::patched`].
    #[cfg(test)]
    pub fn patched(self, patch: [&'static str; 2]) -> Self {
        Self { patch: Some(patch), ..self }
    }
}

impl Kind {
    /// The kernel in words.
    fn name(self) -> String {
        let rows = |whole, length| if whole { format!("rows of {length}") } else { "rows of any length".to_owned() };
        match self {
            Self::Pack { whole } => format!("pack, {}", rows(whole, "4 n")),
            Self::Extent(stored) => format!("largest magnitude of {}", stored.name()),
            Self::Measure => "largest magnitude of a weight, of those of its parts".to_owned(),
            Self::Decode { stored, whole, known } => {
                let of = if known { "known" } else { "measured" };
                format!("decode {} to panels, {}, magnitude {of}", stored.name(), rows(whole, "8 n"))
            }
            Self::Product(Form { tile, left, right, adapted, fours }) => {
                let operation = match (left, right) {
                    (Terms::Rows, _) => "dy^T u",
                    (_, Terms::Columns) => "x W^T",
                    (_, Terms::Rows) => "dy W",
                };
                let adapter = if adapted { " with an adapter" } else { "" };
                let columns = if fours { "4 n" } else { "any number of" };
                format!("{operation}{adapter} in tiles of {} x {}, {columns} columns", tile.m, tile.n)
            }
            Self::LowRank => "x A^T of an adapter".to_owned(),
            Self::AlignExtent => "largest magnitude with the exponents of rows".to_owned(),
            Self::Align => "pack with the exponents of rows".to_owned(),
        }
    }
}

impl Stored {
    fn name(self) -> String {
        match self {
            Self::Quantized(codec) => {
                format!("{} with {} scales", codec.name(), format!("{:?}", codec.scale_type()).to_lowercase())
            }
            Self::Raw(float_type) => float_type.to_string(),
        }
    }
}

#[cfg(test)]
impl Mixed {
    /// Names of the kernels that were used.
    pub fn used(&self) -> Vec<String> {
        self.kernels.used().into_iter().map(Kind::name).collect()
    }
}
