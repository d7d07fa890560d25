//! No byte of a pack is free: every change of any byte, every truncation and every byte too many is
//! found, by opening or by the full check.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::{Item, bf16_scales, dq8_scales, f32_scales, faults, pack, small_pack};
use nf4pack::format::nf4::ScaleType;
use nf4pack::format::{FormatError, Role};

/// All three scale types, in one layer.
fn scales_pack() -> Vec<u8> {
    let dq8 = dq8_scales(-0.25, &[1.0], &[3, 200]);
    pack(
        &[
            Item::nf4("q", &[33], 32, ScaleType::F32, f32_scales(&[1.0, 2.0])).role(Role::QProj).layer(0),
            Item::nf4("k", &[40], 32, ScaleType::Bf16, bf16_scales(&[-1.0, 2.0])).role(Role::KProj).layer(0),
            Item::nf4("v", &[8, 8], 32, ScaleType::Dq8, dq8).role(Role::VProj).layer(0),
        ],
        1,
        "{}",
    )
}

/// Changes each byte in turn with each mask; gives the changes that nobody notices.
fn unnoticed(mut bytes: Vec<u8>, masks: impl Iterator<Item = u8> + Clone) -> Vec<(usize, u8)> {
    assert_eq!(faults(&bytes), []);
    let mut free = Vec::new();
    for offset in 0..bytes.len() {
        for mask in masks.clone() {
            bytes[offset] ^= mask;
            if faults(&bytes).is_empty() {
                free.push((offset, mask));
            }
            bytes[offset] ^= mask;
        }
    }
    free
}

#[test]
fn a_change_of_any_byte_is_found() {
    assert_eq!(unnoticed(small_pack(), [0x01, 0xff].into_iter()), []);
}

#[test]
fn a_change_of_any_bit_of_the_tiny_golden_pack_is_found() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/v1.0.nf4pack");
    assert_eq!(unnoticed(std::fs::read(path).unwrap(), (0..8).map(|bit| 1 << bit)), []);
}

#[test]
fn a_change_of_any_byte_of_any_scale_type_is_found() {
    assert_eq!(unnoticed(scales_pack(), [0x01, 0x80, 0xff].into_iter()), []);
}

/// Any shorter file is refused on opening, for being too short.
#[test]
fn truncation_at_every_length_is_refused() {
    for bytes in [small_pack(), scales_pack()] {
        for len in 0..bytes.len() {
            let found = faults(&bytes[..len]);
            assert!(
                matches!(*found, [FormatError::TooShort { found, .. } | FormatError::FileLength { found, .. }] if found == len as u64),
                "cut at {len}: {found:?}"
            );
        }
    }
}

#[test]
fn bytes_behind_the_end_are_refused() {
    let len = small_pack().len() as u64;
    for (more, byte) in [(1, 0), (1, 0xff), (256, 0), (4096, 0)] {
        let mut bytes = small_pack();
        bytes.resize(bytes.len() + more, byte);
        assert_eq!(faults(&bytes), [FormatError::FileLength { expected: len, found: len + more as u64 }]);
    }
}

/// Two packs one behind the other are not one pack.
#[test]
fn a_pack_twice_is_refused() {
    let len = small_pack().len() as u64;
    assert_eq!(faults(&[small_pack(), small_pack()].concat()), [FormatError::FileLength { expected: len, found: 2 * len }]);
}
