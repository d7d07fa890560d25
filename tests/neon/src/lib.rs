//! The sources of the encoder and the decoder, as they are, without all that the package needs
//! fixed. `scripts/neon.sh` builds their tests for Arm and runs them under qemu.
#![allow(dead_code, reason = "the rest of the package uses it")]

/// A part of the package's module.
#[path = "../../../src/convert"]
pub mod convert {
    pub mod encode;
}
#[path = "../../../src/dequant/mod.rs"]
pub mod dequant;
#[path = "../../../src/format/mod.rs"]
pub mod format;

/// Without NEON the other tests would pass by trying nothing.
#[cfg(all(test, target_arch = "aarch64"))]
#[test]
fn the_processor_has_neon() {
    assert!(std::arch::is_aarch64_feature_detected!("neon"));
}
