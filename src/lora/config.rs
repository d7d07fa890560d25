//! LoRA: y = W x + scale * B (A x), with A [rank, inputs] and B [outputs, rank] for each adapted
//! projection. All matrices of an adapter are in one vector, so that the optimiser sees one
//! tensor.

use std::ops::Range;

use thiserror::Error;

use crate::arch::config::ModelConfig;
use crate::arch::family::Family;
use crate::arch::family::{PROJECTION_TENSORS, PROJECTIONS, projections_of};
use crate::format::Role;
use crate::random::{Generator, Stream};

/// The tensors that can be adapted, in their order in a layer of an adapter. A model has some of
/// them: all of these as targets are all that it has.
pub const TARGETS: [Role; 9] = PROJECTION_TENSORS;

/// A matrix starts on a multiple of this many floats, 256 bytes: the alignment of a range of a GPU
/// buffer.
const ALIGN: usize = 64;

/// Floats that every adapter may have. A larger one must have fewer than the projections that it
/// adapts: otherwise a few settings of a stranger would take any amount of memory.
const SMALL: u128 = 1 << 24;

/// Invalid settings of an adapter.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A rank of zero.
    #[error("the rank of an adapter must be at least 1")]
    Rank,
    /// An alpha that is not a positive number.
    #[error("alpha should be a number above 0, found {found}")]
    Alpha {
        /// The alpha.
        found: f64,
    },
    /// A dropout below 0, or of 1 or more.
    #[error("dropout should be from 0 on and below 1, found {found}")]
    Dropout {
        /// The dropout.
        found: f64,
    },
    /// Nothing to train.
    #[error("an adapter needs at least one target")]
    NoTarget,
    /// A target that is not one of `q_proj`, `k_proj` and the other projections.
    #[error("{found} cannot be adapted; targets are {}", TARGETS.map(Role::name).join(", "))]
    Target {
        /// The role.
        found: Role,
    },
    /// A target that this model does not have.
    #[error("{model_type} models have no {found}; their targets are {}", .targets.iter().map(|role| role.name()).collect::<Vec<_>>().join(", "))]
    NotInModel {
        /// The model type.
        model_type: &'static str,
        /// The role.
        found: Role,
        /// The targets of such models.
        targets: Vec<Role>,
    },
    /// More floats than the projections have that are adapted, and more than any small adapter has.
    #[error("an adapter of rank {rank} is too large: it would have more numbers than the projections that it adapts")]
    TooLarge {
        /// The rank.
        rank: u32,
    },
}

/// The settings of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rows of A, columns of B.
    pub rank: u32,
    /// The numerator of the scale.
    pub alpha: f64,
    /// The probability that training drops an input of an adapter.
    pub dropout: f64,
    /// The adapted tensors, some of [`TARGETS`], in any order.
    pub targets: Vec<Role>,
    /// Whether the scale is alpha / sqrt(rank) and not alpha / rank.
    pub rslora: bool,
}

impl LoraConfig {
    /// The factor on B (A x).
    pub fn scale(&self) -> f64 {
        let rank = f64::from(self.rank);
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// A [`LoraError`] that names the setting.
    pub fn check(&self) -> Result<(), LoraError> {
        if self.rank == 0 {
            return Err(LoraError::Rank);
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(LoraError::Alpha { found: self.alpha });
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(LoraError::Dropout { found: self.dropout });
        }
        match self.targets.iter().find(|role| !TARGETS.contains(role)) {
            Some(&found) => Err(LoraError::Target { found }),
            None if self.targets.is_empty() => Err(LoraError::NoTarget),
            None => Ok(()),
        }
    }
}

/// Those of `targets` that a model has.
pub(crate) fn targets_in(model: &ModelConfig, targets: &[Role]) -> Vec<Role> {
    targets.iter().copied().filter(|&role| model.projection(role).is_some()).collect()
}

/// The number of a target within a layer: the index of its first projection in [`PROJECTIONS`].
pub(crate) fn target_index(role: Role) -> u32 {
    let first = projections_of(role).first();
    PROJECTIONS.iter().zip(0..).find(|(projection, _)| Some(*projection) == first).map_or(0, |(_, index)| index)
}

/// Inputs and outputs of a projection; `None` for a role that is not one of [`TARGETS`].
pub fn projection_shape(model: &ModelConfig, role: Role) -> Option<(u32, u32)> {
    model.projection(role).filter(|_| TARGETS.contains(&role))
}

/// Whether the adapter has more floats than the projections that it adapts, and is not small.
fn exceeds_model(config: &LoraConfig, model: &ModelConfig) -> bool {
    let [mut floats, mut weights] = [0_u128; 2];
    for (inputs, outputs) in
        TARGETS.iter().filter(|role| config.targets.contains(role)).filter_map(|&role| projection_shape(model, role))
    {
        let [inputs, outputs] = [inputs, outputs].map(u128::from);
        floats += u128::from(config.rank) * (inputs + outputs);
        weights += inputs * outputs;
    }
    floats > weights && floats * u128::from(model.layers) > SMALL
}

/// The place of the two matrices of one projection in the vector of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// A, [rank, inputs], row-major: floats of the vector, from a multiple of 64 on.
    pub a: Range<usize>,
    /// B, [outputs, rank], row-major: floats of the vector, from a multiple of 64 on.
    pub b: Range<usize>,
    /// Columns of A.
    pub inputs: u32,
    /// Rows of B.
    pub outputs: u32,
}

/// The places of all matrices in the vector of an adapter: by layer, then in the order of
/// [`TARGETS`], A before B. The padding between the matrices is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLayout {
    family: &'static Family,
    rank: u32,
    layers: u32,
    layer_len: usize,
    /// Places in layer 0.
    places: Vec<(Role, Place)>,
}

impl AdapterLayout {
    /// The layout of an adapter of `model`.
    ///
    /// # Errors
    /// An invalid setting of `config`.
    pub fn new(config: &LoraConfig, model: &ModelConfig) -> Result<Self, LoraError> {
        config.check()?;
        let (targets, is_all) = (targets_in(model, &TARGETS), TARGETS.iter().all(|role| config.targets.contains(role)));
        if let Some(&found) = config.targets.iter().find(|role| !is_all && !targets.contains(role)) {
            return Err(LoraError::NotInModel { model_type: model.family.model_type, found, targets });
        }
        let too_large = || LoraError::TooLarge { rank: config.rank };
        if exceeds_model(config, model) {
            return Err(too_large());
        }
        let mut places = Vec::new();
        let mut layer_len = 0_usize;
        let mut take = |rows: u32, cols: u32| {
            let start = layer_len;
            let end = (rows as usize).checked_mul(cols as usize).and_then(|len| start.checked_add(len))?;
            layer_len = end.checked_next_multiple_of(ALIGN)?;
            Some(start..end)
        };
        for role in TARGETS.into_iter().filter(|role| config.targets.contains(role)) {
            let Some((inputs, outputs)) = projection_shape(model, role) else { continue };
            let a = take(config.rank, inputs).ok_or_else(too_large)?;
            let b = take(outputs, config.rank).ok_or_else(too_large)?;
            places.push((role, Place { a, b, inputs, outputs }));
        }
        layer_len.checked_mul(4).and_then(|len| len.checked_mul(model.layers as usize)).ok_or_else(too_large)?;
        Ok(Self { family: model.family, rank: config.rank, layers: model.layers, layer_len, places })
    }

    /// Floats of the vector; a multiple of 64.
    pub fn len(&self) -> usize {
        self.layer_len * self.layers as usize
    }

    /// The model's family.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Rows of every A, columns of every B.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The adapted projections of each layer, in the order in which they stand there.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        self.places.iter().map(|&(role, _)| role)
    }

    /// The floats of all matrices.
    #[cfg(test)]
    pub fn parameters(&self) -> u64 {
        let of = |(_, place): &(Role, Place)| (place.a.len() + place.b.len()) as u64;
        self.places.iter().map(of).sum::<u64>() * u64::from(self.layers)
    }

    /// The place of a projection's matrices; `None` if it is not adapted.
    pub fn place(&self, layer: u32, role: Role) -> Option<Place> {
        let (_, first) = self.places.iter().find(|(r, _)| *r == role).filter(|_| layer < self.layers)?;
        let offset = layer as usize * self.layer_len;
        let shift = |range: &Range<usize>| range.start + offset..range.end + offset;
        Some(Place { a: shift(&first.a), b: shift(&first.b), ..*first })
    }

    /// All places: layer by layer, in the order of the vector.
    pub fn places(&self) -> impl Iterator<Item = (u32, Role, Place)> {
        let of_layer = move |layer| self.roles().filter_map(move |role| Some((layer, role, self.place(layer, role)?)));
        (0..self.layers).flat_map(of_layer)
    }

    /// The vector before training: A uniform in [-1/sqrt(inputs), 1/sqrt(inputs)), each module from
    /// a stream of its own, and B zero, so that the model is what it was.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut vector = vec![0.0; self.len()];
        for (layer, role, place) in self.places() {
            let mut generator = Generator::new(seed, Stream::Init { layer, module: target_index(role) });
            let bound = 1.0 / f64::from(place.inputs).sqrt();
            for x in vector.get_mut(place.a).unwrap_or_default() {
                *x = (f64::from(generator.uniform() * 2.0 - 1.0) * bound) as f32;
            }
        }
        vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelConfig {
        ModelConfig::parse(&std::fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap()
    }

    fn lora(targets: &[Role]) -> LoraConfig {
        LoraConfig { rank: 3, alpha: 16.0, dropout: 0.0, targets: targets.to_vec(), rslora: false }
    }

    #[test]
    fn scales() {
        let config = LoraConfig { rank: 16, ..lora(&TARGETS) };
        assert_eq!(config.scale(), 1.0);
        assert_eq!(LoraConfig { rslora: true, ..config }.scale(), 4.0);
    }

    #[test]
    fn matrices_are_aligned_in_order_and_do_not_overlap() {
        let layout = AdapterLayout::new(&lora(&TARGETS), &model()).unwrap();
        let mut end = 0;
        let mut parameters = 0;
        for (layer, role, place) in layout.places() {
            assert_eq!(projection_shape(&model(), role), Some((place.inputs, place.outputs)));
            for (range, len) in [(place.a, 3 * place.inputs), (place.b, 3 * place.outputs)] {
                assert!(range.start.is_multiple_of(64) && range.start >= end && range.start < end + 64, "{layer} {role}");
                assert_eq!(range.len(), len as usize);
                parameters += range.len() as u64;
                end = range.end;
            }
        }
        assert!(layout.len() >= end && layout.len().is_multiple_of(64));
        assert_eq!(layout.parameters(), parameters);
        assert_eq!(layout.places().count(), 28);
        assert_eq!(layout.place(1, Role::KProj).unwrap().outputs, 128);
        assert_eq!(layout.place(1, Role::OProj).unwrap().inputs, 256);
    }

    #[test]
    fn only_targets_have_a_place_whatever_their_order() {
        let layout = AdapterLayout::new(&lora(&[Role::UpProj, Role::QProj, Role::UpProj]), &model()).unwrap();
        assert_eq!(layout.roles().collect::<Vec<_>>(), [Role::QProj, Role::UpProj]);
        assert_eq!(layout.place(0, Role::KProj), None);
        assert_eq!(layout.place(4, Role::QProj), None);
        assert_eq!(layout.place(0, Role::QProj).unwrap().a, 0..3 * 192);
    }

    #[test]
    fn a_is_uniform_and_differs_between_modules_and_b_is_zero() {
        let layout = AdapterLayout::new(&lora(&TARGETS), &model()).unwrap();
        let vector = layout.initial(42);
        assert_eq!(vector, layout.initial(42));
        assert_ne!(vector, layout.initial(43));
        let mut starts = Vec::new();
        for (_, _, place) in layout.places() {
            let a = &vector[place.a];
            let bound = 1.0 / (place.inputs as f32).sqrt();
            assert!(a.iter().all(|x| x.abs() <= bound));
            let variance = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
            let expected = bound * bound / 3.0;
            assert!((variance / expected - 1.0).abs() < 0.15, "{variance} {expected}");
            assert!(vector[place.b].iter().all(|&x| x == 0.0));
            starts.push(a[0].to_bits());
        }
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 28);
        let occupied: usize = layout.places().map(|(_, _, p)| vector[p.a].iter().filter(|&&x| x != 0.0).count()).sum();
        assert_eq!(vector.iter().filter(|&&x| x != 0.0).count(), occupied, "padding is zero");
    }

    #[test]
    fn a_module_s_start_does_not_depend_on_the_other_targets() {
        let of = |targets: &[Role]| {
            let layout = AdapterLayout::new(&lora(targets), &model()).unwrap();
            layout.initial(5)[layout.place(2, Role::VProj).unwrap().a].to_vec()
        };
        assert_eq!(of(&TARGETS), of(&[Role::VProj]));
    }

    /// All targets are those of the model; a target that it lacks is an error.
    #[test]
    fn targets_of_fused_projections() {
        let config = std::fs::read("tests/fixtures/architectures/phi3/config.json").unwrap();
        let phi3 = ModelConfig::parse(&config, None).unwrap();
        let layout = AdapterLayout::new(&lora(&TARGETS), &phi3).unwrap();
        assert_eq!(layout.roles().collect::<Vec<_>>(), [Role::QkvProj, Role::OProj, Role::GateUpProj, Role::DownProj]);
        let place = layout.place(1, Role::QkvProj).unwrap();
        assert_eq!((place.inputs, place.outputs), (64, 256));
        assert_eq!(targets_in(&model(), &TARGETS), PROJECTIONS, "as before there were fused tensors");
        let error = |targets: &[Role], model| AdapterLayout::new(&lora(targets), model).unwrap_err().to_string();
        let found = error(&[Role::OProj, Role::QProj], &phi3);
        assert_eq!(found, "phi3 models have no q_proj; their targets are qkv_proj, o_proj, gate_up_proj, down_proj");
        assert!(error(&[Role::QkvProj], &model()).starts_with("qwen3 models have no qkv_proj; their targets are q_proj,"));
    }

    /// The streams of random numbers of a model's modules do not change with the list of targets.
    #[test]
    fn numbers_of_modules() {
        let found = PROJECTIONS.map(target_index);
        assert_eq!(found, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!([Role::QkvProj, Role::GateUpProj].map(target_index), [0, 4]);
    }

    #[test]
    fn settings_that_cannot_be() {
        let error = |config| AdapterLayout::new(&config, &model()).unwrap_err();
        let good = lora(&TARGETS);
        assert_eq!(error(LoraConfig { rank: 0, ..good.clone() }), LoraError::Rank);
        assert_eq!(error(LoraConfig { alpha: 0.0, ..good.clone() }), LoraError::Alpha { found: 0.0 });
        assert_eq!(error(LoraConfig { dropout: 1.0, ..good.clone() }), LoraError::Dropout { found: 1.0 });
        assert_eq!(error(lora(&[])), LoraError::NoTarget);
        assert_eq!(error(lora(&[Role::LmHead])), LoraError::Target { found: Role::LmHead });
        let huge = ModelConfig { layers: u32::MAX, hidden: u32::MAX, ..model() };
        let config = LoraConfig { rank: u32::MAX, ..good };
        assert_eq!(AdapterLayout::new(&config, &huge), Err(LoraError::TooLarge { rank: u32::MAX }));
    }
}
