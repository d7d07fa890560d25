//! Checkpoints as packs and back.

mod conversion;
mod encode_vectors;
mod families;
mod resume;
mod strays;
