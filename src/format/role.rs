//! What a tensor is for (spec section 3.3).

use std::fmt;

macro_rules! roles {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal;)*) => {
        /// What a tensor is for, in the field's usual words. The number is what the file stores; sections of a layer lie
        /// in its order.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Role {
            $($(#[$doc])* $variant = $value,)*
        }

        impl Role {
            /// Every role, in the file's order.
            pub const ALL: &[Role] = &[$(Role::$variant,)*];

            /// The role's name as commands print it, such as `q_proj`.
            pub fn name(self) -> &'static str {
                match self { $(Role::$variant => $name,)* }
            }
        }

        impl TryFrom<u16> for Role {
            type Error = u16;

            /// The role stored as `value`; an unknown number comes back as the error.
            fn try_from(value: u16) -> Result<Self, u16> {
                match value { $($value => Ok(Role::$variant),)* unknown => Err(unknown) }
            }
        }
    };
}

roles! {
    /// Token embedding `[vocab, hidden]`.
    Embedding = 1, "embedding";
    /// Gamma of the last RMSNorm `[hidden]`.
    FinalNorm = 2, "final_norm";
    /// Output projection `[vocab, hidden]`; absent where it is tied to the embedding.
    LmHead = 3, "lm_head";
    /// Gamma of the RMSNorm ahead of attention `[hidden]`.
    InputNorm = 16, "input_norm";
    /// Gamma of the RMSNorm ahead of the MLP `[hidden]`.
    PostAttentionNorm = 17, "post_attention_norm";
    /// Gamma of the per-head query norm `[head_dim]`.
    QNorm = 18, "q_norm";
    /// Gamma of the per-head key norm `[head_dim]`.
    KNorm = 19, "k_norm";
    /// Query projection `[heads * head_dim, hidden]`.
    QProj = 32, "q_proj";
    /// Key projection `[kv_heads * head_dim, hidden]`.
    KProj = 33, "k_proj";
    /// Value projection `[kv_heads * head_dim, hidden]`.
    VProj = 34, "v_proj";
    /// Attention output projection `[hidden, heads * head_dim]`.
    OProj = 35, "o_proj";
    /// SwiGLU gate projection `[intermediate, hidden]`.
    GateProj = 36, "gate_proj";
    /// SwiGLU up projection `[intermediate, hidden]`.
    UpProj = 37, "up_proj";
    /// MLP down projection `[hidden, intermediate]`.
    DownProj = 38, "down_proj";
    /// Bias of the query projection.
    QBias = 48, "q_bias";
    /// Bias of the key projection.
    KBias = 49, "k_bias";
    /// Bias of the value projection.
    VBias = 50, "v_bias";
    /// Bias of the attention output projection.
    OBias = 51, "o_bias";
    /// Bias of the gate projection.
    GateBias = 52, "gate_bias";
    /// Bias of the up projection.
    UpBias = 53, "up_bias";
    /// Bias of the down projection.
    DownBias = 54, "down_bias";
    /// Router of a mixture of experts `[experts, hidden]`.
    Router = 64, "router";
    /// Anything else; told apart by name.
    Other = 0xffff, "other";
}

impl Role {
    /// Whether this is one of the matrices that a converter quantises by default.
    pub fn is_projection(self) -> bool {
        (Role::QProj..=Role::DownProj).contains(&self)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_the_gaps_are_refused() {
        for &role in Role::ALL {
            assert_eq!(Role::try_from(role as u16), Ok(role));
        }
        assert_eq!(Role::try_from(0), Err(0));
        assert_eq!((0..=u16::MAX).filter(|&n| Role::try_from(n).is_ok()).count(), Role::ALL.len());
        assert_eq!(Role::ALL.iter().filter(|r| r.is_projection()).count(), 7);
    }
}
