//! The codecs of quantised weights in GPU memory.

use crate::format::ElementType;
use crate::format::nf4::{CODEBOOK, ScaleType};

/// How kernels decode quantised weights of 4 bits.
///
/// A codec that differs from NF4 in its 16 values only is an arm of this enum: a codebook with
/// values of magnitude 1 at most. One that stores its scales in another way has two files in
/// shaders/, with the functions that codec_nf4.wgsl and codec_nf4_joined.wgsl list. All kernels of
/// products and gathers then decode it, and their trials use its `sample`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// NF4 with scales of this type.
    Nf4(ScaleType),
    /// Sixteen values at equal distances: a second codec, for tests.
    #[cfg(test)]
    Linear(ScaleType),
}

impl Codec {
    /// All that a pack may have.
    #[cfg(feature = "train")]
    pub(crate) const ALL: [Self; 3] = [Self::Nf4(ScaleType::F32), Self::Nf4(ScaleType::Bf16), Self::Nf4(ScaleType::Dq8)];

    /// The codec of a codes section.
    pub(crate) fn of(element_type: ElementType, scale_type: Option<ScaleType>) -> Option<Self> {
        match element_type {
            ElementType::Nf4 => scale_type.map(Self::Nf4),
            _ => None,
        }
    }

    /// The type of its scales.
    pub fn scale_type(self) -> ScaleType {
        match self {
            Self::Nf4(scale_type) => scale_type,
            #[cfg(test)]
            Self::Linear(scale_type) => scale_type,
        }
    }

    /// The value of each code before scaling: `params.codebook`.
    pub(crate) fn codebook(self) -> [f32; 16] {
        match self {
            Self::Nf4(_) => CODEBOOK,
            #[cfg(test)]
            Self::Linear(_) => std::array::from_fn(|code| code as f32 / 8.0 - 1.0),
        }
    }
}

#[cfg(feature = "train")]
macro_rules! shaders {
    ($($file:literal),*) => { concat!($(include_str!(concat!("../../shaders/", $file, ".wgsl"))),*) };
}

#[cfg(feature = "train")]
impl Codec {
    /// The name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nf4(_) => "NF4",
            #[cfg(test)]
            Self::Linear(_) => "linear codes",
        }
    }

    /// The bindings and functions in WGSL. Every decoding kernel of one tensor includes them.
    pub(crate) fn source(self) -> &'static str {
        match self {
            Self::Nf4(_) => shaders!("nf4_bindings", "codec_nf4"),
            #[cfg(test)]
            Self::Linear(_) => shaders!("nf4_bindings", "codec_nf4"),
        }
    }

    /// The functions in WGSL over the joined tensors of a product of few rows.
    pub(crate) fn joined_source(self) -> &'static str {
        match self {
            Self::Nf4(_) => shaders!("codec_nf4_joined"),
            #[cfg(test)]
            Self::Linear(_) => shaders!("codec_nf4_joined"),
        }
    }

    /// The constants of the functions.
    pub(crate) fn constants(self) -> [(&'static str, f64); 1] {
        [("SCALES", scales_constant(self.scale_type()))]
    }

    /// The constants of the functions over joined tensors.
    pub(crate) fn joined_constants(self) -> [(&'static str, f64); 2] {
        let maps = if self.scale_type() == ScaleType::Dq8 { 768.0 } else { 1.0 };
        [("SCALES", scales_constant(self.scale_type())), ("MAPS", maps)]
    }
}

/// The constant `SCALES` of the shaders.
pub(super) fn scales_constant(scale_type: ScaleType) -> f64 {
    match scale_type {
        ScaleType::F32 => 0.0,
        ScaleType::Bf16 => 1.0,
        ScaleType::Dq8 => 2.0,
    }
}
