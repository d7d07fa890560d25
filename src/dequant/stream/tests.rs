#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::*;
use crate::format::nf4::ScaleType;
use crate::format::{Entry, Layout, Storage};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// An index with one layer per entry of `rows`, and an embedding. Each layer has a norm and two
/// projections of [rows, 4096].
fn index(rows: &[u64]) -> Index {
    let entry = |name: String, role, layer, shape: &[u64], storage| {
        let shape = Shape::new(shape).unwrap();
        Entry { name, role, layer, expert: None, shape, storage }
    };
    let nf4 = Storage::Nf4 { scale_type: ScaleType::F32, block_size: 64 };
    let raw = Storage::Raw(FloatType::Bf16);
    let mut entries = vec![entry("embedding".to_owned(), Role::Embedding, None, &[700, 1024], raw)];
    for (i, &rows) in rows.iter().enumerate() {
        let layer = Some(i as u32);
        entries.push(entry(format!("{i}.up"), Role::UpProj, layer, &[rows, 4096], nf4));
        entries.push(entry(format!("{i}.down"), Role::DownProj, layer, &[rows, 4096], nf4));
        entries.push(entry(format!("{i}.norm"), Role::InputNorm, layer, &[5], raw));
    }
    let layout = Layout::new(entries, rows.len() as u32, 2).unwrap();
    let crcs = vec![0; layout.sections().len()];
    Index::parse(&layout.front(&crcs, 0, "{}").unwrap(), layout.file_len()).unwrap()
}

#[test]
fn everything_is_resident_without_a_budget_and_with_one_that_is_just_enough() {
    let index = index(&[512; 10]);
    let plan = StreamPlan::new(&index, u64::MAX, None, Globals::All).unwrap();
    assert!(plan.resident);
    assert_eq!(plan.slots, 10);
    assert!(plan.weights_bytes > 10 * 2 * (512 * 4096 / 2 + 512 * 4096 / 16));
    assert!(plan.globals_bytes > 700 * 1024 * 2);
    let same = StreamPlan::new(&index, u64::MAX, Some(plan.needed_bytes), Globals::All).unwrap();
    assert_eq!(plan, same);
}

#[test]
fn a_plan_keeps_to_its_budget_and_uses_it() {
    for rows in [vec![512; 10], vec![40, 900, 512, 3], vec![2000, 10], vec![64]] {
        let index = index(&rows);
        for globals in [Globals::None, Globals::All, Globals::WithoutEmbedding, Globals::HeadInParts { rows: 100 }] {
            let all = StreamPlan::new(&index, u64::MAX, None, globals).unwrap();
            let Err(StreamError::Budget { needed, .. }) = StreamPlan::new(&index, u64::MAX, Some(1), globals) else {
                panic!("one byte is a budget")
            };
            assert_eq!(needed, all.minimum_bytes);
            assert!(StreamPlan::new(&index, u64::MAX, Some(needed - 1), globals).is_err());
            for budget in (needed..all.needed_bytes + MIB).step_by(300 * KIB as usize + 7) {
                let plan = StreamPlan::new(&index, u64::MAX, Some(budget), globals).unwrap();
                assert!(plan.needed_bytes <= budget, "{} of {budget}", plan.needed_bytes);
                assert_eq!(plan.resident, plan.slots == rows.len() as u32);
                assert!(plan.slots >= 2.min(rows.len() as u32));
                let layers: u64 = (0..plan.slots as usize).flat_map(|slot| plan.slot_buffers(slot)).sum();
                assert_eq!(plan.needed_bytes, layers + plan.globals_bytes + plan.head_bytes + plan.staging_bytes);
                assert!(plan.chunk * plan.chunks() as u64 <= plan.staging_bytes);
                if !plan.resident {
                    assert!(budget - plan.needed_bytes < plan.layer_bytes, "another layer would have fitted");
                }
            }
        }
    }
}

#[test]
fn every_byte_of_every_section_has_one_place_in_buffers_of_the_largest_size() {
    let index = index(&[512, 37, 2000]);
    for max_buffer in [600 * KIB, MIB, 5 * MIB, 64 * MIB] {
        let plan = StreamPlan::new(&index, max_buffer, None, Globals::All).unwrap();
        let mut placed = 0;
        for group in plan.groups.iter().chain(&plan.globals) {
            assert!((0..group.buffers.len()).all(|i| group.buffer_len(i) <= max_buffer));
            for section in group.sections.iter().map(|&number| &index.sections()[number]) {
                let inside = |range: &&std::ops::Range<u64>| range.start < section.end() && section.offset < range.end;
                let ranges: Vec<_> = group.buffers.iter().filter(inside).collect();
                assert!(ranges[0].start <= section.offset && ranges.last().unwrap().end >= section.end());
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                if ranges.len() > 1 {
                    let part = ranges[0].end - ranges[0].start;
                    assert_eq!(ranges[0].start, section.offset);
                    assert_eq!(part % 4096, 0);
                    assert!(ranges.iter().rev().skip(1).all(|range| range.end - range.start == part));
                }
                placed += 1;
            }
        }
        assert_eq!(placed, index.sections().len());
    }
}

#[test]
fn scales_that_pass_the_largest_buffer_are_refused() {
    let error = StreamPlan::new(&index(&[2000]), 64 * KIB, None, Globals::None).unwrap_err();
    assert!(matches!(error, StreamError::Gpu(GpuError::TooLarge { .. })), "{error}");
}

#[test]
fn what_comes_next_is_wanted() {
    assert_eq!(wanted(0, Direction::Forward, 5, 2), [0, 1]);
    assert_eq!(wanted(3, Direction::Forward, 5, 3), [3, 4]);
    assert_eq!(wanted(4, Direction::Backward, 5, 2), [4, 3]);
    assert_eq!(wanted(1, Direction::Backward, 5, 3), [1, 0]);
    assert_eq!(wanted(0, Direction::Backward, 1, 1), [0]);
}
