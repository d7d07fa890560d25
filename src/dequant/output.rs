//! Output types of the kernels.

use std::fmt;

use crate::format::nf4::CODES_PER_WORD;

/// Output type of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Output {
    /// 4 bytes per element.
    F32,
    /// binary16, two per u32. Element `2 * i` is in the low half.
    F16,
    /// bfloat16, packed in the same way.
    Bf16,
}

impl Output {
    /// All output types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element.
    pub fn element_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Bytes of output for one word of codes.
    pub(super) fn word_bytes(self) -> u64 {
        self.element_bytes() * CODES_PER_WORD as u64
    }

    /// Size of an output of `elements` in bytes. Kernels write whole words of codes, 8 elements
    /// each.
    pub fn bytes(self, elements: u64) -> u64 {
        elements.div_ceil(CODES_PER_WORD as u64).saturating_mul(self.word_bytes())
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}
