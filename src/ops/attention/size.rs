//! The sizes of the kernels on matrix units.

/// Tokens of a workgroup, as in the shaders.
pub(super) const BLOCK: u32 = 64;
/// Maximum 16-column matrices of a head whose sums fit the registers of one workgroup.
const MAX_FRAGMENTS: u32 = 8;

/// The size of the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadSize {
    pub head_dim: u32,
    max_fragments: u32,
}

impl HeadSize {
    pub fn new(head_dim: u32) -> Self {
        Self { head_dim, max_fragments: MAX_FRAGMENTS }
    }

    /// The kernels as for the largest heads, for tests. `head_dim` is a multiple of 64.
    #[cfg(test)]
    pub fn as_largest(head_dim: u32) -> Self {
        Self { head_dim, max_fragments: 0 }
    }

    /// Whether the sums have no place in one workgroup.
    pub fn large(self) -> bool {
        self.head_dim.div_ceil(16) > self.max_fragments
    }

    /// The 16-column matrices that cover a head.
    pub fn fragments(self) -> u32 {
        let fragments = self.head_dim.div_ceil(16);
        if self.large() { fragments.next_multiple_of(4) } else { fragments }
    }

    /// vec4<u32>s of a row of a copy.
    pub fn vecs(self) -> u32 {
        2 * self.fragments()
    }
}
