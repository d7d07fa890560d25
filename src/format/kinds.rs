//! The enumerations of a section record and their numbers in a file (spec section 4).

use super::layout::{FEATURE_FUSED_PROJECTIONS, FEATURE_OUTPUT_NORMS};

/// Declares an enum whose values have a fixed number and name. One list serves both directions.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal, $label:literal;)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum $name { $($(#[$doc])* $variant = $number,)+ }

        impl $name {
            /// Every value, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The number of this value in a file.
            pub const fn number(self) -> u16 {
                self as u16
            }

            /// The value of a number, if any.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// The value's name in messages and in JSON.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

numbered! {
    /// The kind of a section.
    SectionKind {
        /// Packed 4-bit codes of one tensor.
        Codes = 1, "codes";
        /// The scale table of the codes directly before it.
        Scales = 2, "scales";
        /// A tensor in its own element type, byte for byte.
        Raw = 3, "raw";
        /// A file of the checkpoint (config.json, tokenizer.json, ...), byte for byte.
        File = 4, "file";
    }
}

numbered! {
    /// The part of the model that a tensor is. The numbers also give the order inside a layer.
    Role {
        /// RMSNorm gamma before attention.
        InputNorm = 1, "input_norm";
        /// Query projection.
        QProj = 2, "q_proj";
        /// Key projection.
        KProj = 3, "k_proj";
        /// Value projection.
        VProj = 4, "v_proj";
        /// Output projection of attention.
        OProj = 5, "o_proj";
        /// Bias of the query projection.
        QBias = 6, "q_bias";
        /// Bias of the key projection.
        KBias = 7, "k_bias";
        /// Bias of the value projection.
        VBias = 8, "v_bias";
        /// Bias of the output projection.
        OBias = 9, "o_bias";
        /// Per-head RMSNorm gamma of the queries.
        QNorm = 10, "q_norm";
        /// Per-head RMSNorm gamma of the keys.
        KNorm = 11, "k_norm";
        /// RMSNorm gamma between attention and feed-forward.
        PostAttentionNorm = 12, "post_attention_norm";
        /// Expert router of a mixture-of-experts layer.
        Router = 13, "router";
        /// Gate projection of the feed-forward network.
        GateProj = 14, "gate_proj";
        /// Up projection of the feed-forward network.
        UpProj = 15, "up_proj";
        /// Down projection of the feed-forward network.
        DownProj = 16, "down_proj";
        /// Bias of the gate projection.
        GateBias = 17, "gate_bias";
        /// Bias of the up projection.
        UpBias = 18, "up_bias";
        /// Bias of the down projection.
        DownBias = 19, "down_bias";
        /// Query, key and value projections: their rows in this order. See [`Role::is_fused`].
        QkvProj = 20, "qkv_proj";
        /// Gate and up projections: their rows in this order.
        GateUpProj = 21, "gate_up_proj";
        /// RMSNorm gamma of the output of attention, before the sum with the residual.
        AttentionOutputNorm = 22, "attention_output_norm";
        /// RMSNorm gamma of the output of the feed-forward network, before the sum with the
        /// residual.
        FeedForwardOutputNorm = 23, "feed_forward_output_norm";
        /// Token embedding, [vocabulary, hidden].
        Embedding = 32, "embedding";
        /// RMSNorm gamma after the last layer.
        FinalNorm = 33, "final_norm";
        /// Output projection, [vocabulary, hidden]; absent if it is tied to the embedding.
        LmHead = 34, "lm_head";
        /// A file, or a tensor that the architecture does not name.
        Other = 255, "other";
    }
}

impl Role {
    /// Whether a tensor of this role joins the rows of several projections.
    pub const fn is_fused(self) -> bool {
        matches!(self, Self::QkvProj | Self::GateUpProj)
    }

    /// The required-feature bit of a file with a tensor of this role; 0 for the roles that every
    /// reader knows.
    pub const fn required_feature(self) -> u64 {
        match self {
            Self::QkvProj | Self::GateUpProj => FEATURE_FUSED_PROJECTIONS,
            Self::AttentionOutputNorm | Self::FeedForwardOutputNorm => FEATURE_OUTPUT_NORMS,
            _ => 0,
        }
    }
}

numbered! {
    /// Element type of a section's payload.
    ElementType {
        /// IEEE 754 binary32.
        F32 = 1, "f32";
        /// IEEE 754 binary16.
        F16 = 2, "f16";
        /// bfloat16: the upper half of a binary32.
        Bf16 = 3, "bf16";
        /// NF4 codes packed in little-endian u32 words.
        Nf4 = 4, "nf4";
        /// A scale table; its scale type says how it is stored.
        ScaleTable = 5, "scale_table";
        /// Bytes.
        U8 = 6, "u8";
    }
}

/// The float types that a checkpoint's tensors may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FloatType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The element type of a raw section with these values.
    pub const fn element_type(self) -> ElementType {
        match self {
            Self::F32 => ElementType::F32,
            Self::F16 => ElementType::F16,
            Self::Bf16 => ElementType::Bf16,
        }
    }
}

impl ElementType {
    /// The float type of a raw tensor's elements; `None` for codes, scale tables and bytes.
    pub const fn float_type(self) -> Option<FloatType> {
        match self {
            Self::F32 => Some(FloatType::F32),
            Self::F16 => Some(FloatType::F16),
            Self::Bf16 => Some(FloatType::Bf16),
            Self::Nf4 | Self::ScaleTable | Self::U8 => None,
        }
    }
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.element_type().name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_unknown_ones_are_refused() {
        for &role in Role::ALL {
            assert_eq!(Role::from_number(role.number()), Some(role));
        }
        for &kind in SectionKind::ALL {
            assert_eq!(SectionKind::from_number(kind.number()), Some(kind));
        }
        assert_eq!(Role::from_number(0), None);
        assert_eq!(SectionKind::from_number(5), None);
        assert_eq!(ElementType::from_number(7), None);
    }
}
