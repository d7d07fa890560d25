//! The operations that each instruction set provides. What a backend may change is how fast they
//! are, never their results, so all backends agree bit for bit by construction.

use crate::format::nf4;

/// Weights that a pass takes at a time: four vectors of eight, sixteen bytes of codes. Divides
/// every block size.
pub(super) const GROUP: usize = 32;

/// Thresholds between the codes of weights in units of `absmax / 127`, at one candidate scale: the
/// code of `w` is the number of them strictly below it. They stand in the order of a binary search:
/// the middle one, the two below it in the tree and a filler that no weight exceeds, the four below
/// those, the last eight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid(pub [i8; 16]);

/// Magnitude of the codebook's values in 127ths. Those below the middle are negative, as are the
/// weights that they encode, so products of value and weight are products of magnitudes.
pub(super) const MAGNITUDES: [u8; 16] = {
    let mut magnitudes = [0; 16];
    let mut i = 0;
    while i < 16 {
        magnitudes[i] = (nf4::CODEBOOK[i].abs() * 127.0 + 0.5) as u8;
        i += 1;
    }
    magnitudes
};

/// The operations of a backend, on eight float32 lanes at a time. Each is exact IEEE 754 binary32
/// with one rounding (no fused multiply-add), subnormal numbers included.
pub(super) trait Lanes: Copy {
    /// Eight float32.
    type F: Copy;
    /// Eight codes.
    type C: Copy;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, from: &[f32; 8]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; 8]);
    /// Eight little-endian bfloat16, widened.
    fn load_bf16(self, from: &[u8; 16]) -> Self::F;
    /// Eight little-endian binary16, widened.
    fn load_f16(self, from: &[u8; 16]) -> Self::F;
    /// Eight little-endian binary32.
    fn load_f32(self, from: &[u8; 32]) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// The larger of non-negative numbers by their bits: every NaN counts as larger than infinity.
    fn largest(self, a: Self::F, b: Self::F) -> Self::F;

    /// `((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7))`.
    fn reduce_add(self, x: Self::F) -> f32;
    /// The largest lane, in the order of [`Lanes::largest`].
    fn reduce_largest(self, x: Self::F) -> f32;

    /// Number of [`nf4::MIDPOINTS`] strictly below each lane.
    fn codes(self, s: Self::F) -> Self::C;
    /// [`nf4::CODEBOOK`] of each code.
    fn values(self, codes: Self::C) -> Self::F;
    /// Thirty-two codes as the file packs them.
    fn pack(self, codes: [Self::C; 4]) -> [u8; 16];

    /// Each lane rounded to the nearest integer, ties to even, and held to -128..=127; lanes are
    /// within the range of i32.
    fn to_i8(self, x: [Self::F; 4], to: &mut [i8; GROUP]);
    /// The sums that [`Search`](super::search::Search) ranks candidates by, for two grids, each
    /// with weights times 1 or -1: `[<q,w>, <q,q>]` of the first, then of the second. See [`Grid`].
    fn dots(self, weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4];
}

/// Work that can run on any backend.
pub(super) trait Task {
    type Output;

    /// Does the work with the vector operations of `lanes`. Implementations are
    /// `#[inline(always)]`, so that they are compiled with the target features of the backend's
    /// entry point.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}
