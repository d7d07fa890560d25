//! Plans of a small model with made-up devices.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::*;
use crate::format::Role;

const PACK: &[u8] = include_bytes!("../../../tests/fixtures/golden/v1.0-full.nf4pack");
const CONFIG: &[u8] = include_bytes!("../../../tests/fixtures/tiny-qwen3/config.json");
/// Floats of an adapter for each of its rank.
const OF_RANK: u64 = 10_000;

/// Training with rows of 64 tokens, on a device without limits.
fn demand<'a>(index: &'a Index, model: &'a ModelConfig) -> Demand<'a> {
    let rank = 16;
    Demand {
        units: None,
        index,
        model,
        max_buffer: u64::MAX,
        max_binding: u64::MAX,
        budget: None,
        adapter: OF_RANK * u64::from(rank),
        rank,
        dropout: false,
        training: true,
        length: 64,
        positions: 64,
        rows: 100,
        reserved: 0,
    }
}

fn plan(demand: &Demand<'_>, rows: MicroBatch) -> MemoryPlan {
    MemoryPlan::new(demand, rows).unwrap()
}

fn refused(demand: &Demand<'_>, rows: MicroBatch) -> MemoryError {
    MemoryPlan::new(demand, rows).unwrap_err()
}

#[test]
fn no_matrix_is_larger_than_a_binding_or_a_buffer() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig::parse(CONFIG, None).unwrap();
    let unlimited = Demand { budget: Some(u64::MAX), ..demand(&index, &model) };
    // The widest matrix of a row: what is between the feed-forward products, or a chunk of logits.
    let row = plan(&unlimited, MicroBatch::Rows(1)).workspace.largest;
    let widest = model.intermediate.max(model.queries()).max(model.vocab);
    assert_eq!(row, 4 * 64 * u64::from(widest));
    assert_eq!(plan(&unlimited, MicroBatch::Auto).micro_batch, MAX_AUTO_ROWS);
    assert_eq!(plan(&Demand { budget: None, ..unlimited }, MicroBatch::Auto).micro_batch, 1);
    let [by_binding, by_buffer] =
        [Demand { max_binding: 5 * row, ..unlimited }, Demand { max_buffer: 5 * row, ..unlimited }];
    for limited in [by_binding, by_buffer] {
        assert_eq!(plan(&limited, MicroBatch::Auto).micro_batch, 5);
        let error = refused(&limited, MicroBatch::Rows(8));
        let MemoryError::Matrix { limit, needed, remedy: Some(Remedy::Rows(5)) } = error else { panic!("{error}") };
        assert_eq!((limit, needed), (5 * row, 8 * row));
    }
    let narrow = Demand { max_binding: row - 1, ..unlimited };
    let error = refused(&narrow, MicroBatch::Auto);
    assert!(error.to_string().ends_with("; --max-length 32 would fit"), "{error}");
    // More tokens than a u32 counts.
    let error = refused(&Demand { length: 1 << 20, ..by_binding }, MicroBatch::Rows(1 << 20));
    assert!(matches!(error, MemoryError::Matrix { .. }), "{error}");
}

#[test]
fn a_lower_rank_is_the_last_remedy() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig::parse(CONFIG, None).unwrap();
    let large = Demand { length: 2, ..demand(&index, &model) };
    let needed = plan(&large, MicroBatch::Rows(1)).total();
    // Parameter, gradient and two moments of five ranks.
    let budget = needed - 5 * 16 * OF_RANK;
    let error = refused(&Demand { budget: Some(budget), ..large }, MicroBatch::Rows(1));
    assert_eq!(error.remedy(), Some(Remedy::Rank(8)), "{error}");
    let smaller = Demand { budget: Some(budget), rank: 8, adapter: 8 * OF_RANK, ..large };
    assert!(plan(&smaller, MicroBatch::Rows(1)).total() <= budget);
    let error = refused(&Demand { budget: Some(1), ..large }, MicroBatch::Rows(1));
    assert_eq!(error.remedy(), None, "{error}");
}

/// The golden pack has an output projection of its own.
#[test]
fn a_stored_head_has_its_place_whatever_config_json_says() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let globals = |tied| {
        let config = String::from_utf8(CONFIG.to_vec()).unwrap();
        let config = config.replace("\"tie_word_embeddings\": true", &format!("\"tie_word_embeddings\": {tied}"));
        let model = ModelConfig::parse(config.as_bytes(), None).unwrap();
        assert_eq!(model.tied, tied);
        plan(&demand(&index, &model), MicroBatch::Rows(1)).stream.globals_bytes
    };
    let stored: u64 = index.sections().iter().filter(|s| s.layer.is_none() && s.role != Role::Other).map(|s| s.length).sum();
    assert!(index.sections().iter().any(|s| s.role == Role::LmHead) && globals(true) >= stored);
    assert_eq!(globals(true), globals(false));
}
