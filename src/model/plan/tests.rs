//! Plans of a small model with made-up devices.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::*;
use crate::format::nf4::ScaleType;
use crate::format::{Entry, FloatType, Layout, Role, Shape, Storage};

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
        keep_activations: KeepActivations::None,
        offload_activations: OffloadActivations::Off,
        offload_vocabulary: OffloadVocabulary::Off,
        host_buffers: true,
        host_memory: None,
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

/// Bytes of the kept activations of a layer.
fn kept_bytes(demand: &Demand<'_>) -> u64 {
    let of =
        |kept| plan(&Demand { keep_activations: KeepActivations::Layers(kept), ..*demand }, MicroBatch::Rows(1)).total();
    of(2) - of(1)
}

#[test]
fn as_many_layers_keep_their_activations_as_fit() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig { layers: 6, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let none = demand(&index, &model);
    let auto = Demand { keep_activations: KeepActivations::Auto, ..none };
    let needed = plan(&none, MicroBatch::Rows(1)).total();
    let layer = kept_bytes(&none);
    let heads = model.q_k_norm.then_some(2 * (model.queries() + model.keys())).unwrap();
    let row = heads + 2 * model.hidden + 4 * model.intermediate;
    assert!(layer >= 2 * 64 * u64::from(row) && layer < 4 * 64 * u64::from(row), "{layer} bytes");
    for (budget, kept) in [
        (needed, 0),
        (needed + layer - 1, 0),
        (needed + layer, 1),
        (needed + 4 * layer + 1, 4),
        (needed + 6 * layer - 1, 5),
        (u64::MAX, 6),
    ] {
        let fitting = plan(&Demand { budget: Some(budget), ..auto }, MicroBatch::Rows(1));
        assert_eq!(fitting.kept_layers(), kept, "{budget}");
        assert!(fitting.total() <= budget && fitting.stream.resident);
        assert_eq!(fitting.total(), needed + u64::from(kept) * layer);
        let parts: u64 = fitting.parts().iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(parts, fitting.total());
        assert!(fitting.parts().contains(&("activations kept", u64::from(kept) * layer)));
    }
    // An unknown budget, a ring of layers, and a run without gradients.
    assert_eq!(plan(&auto, MicroBatch::Rows(1)).kept_layers(), 0);
    let all = Demand { keep_activations: KeepActivations::All, budget: Some(u64::MAX), ..none };
    assert_eq!(plan(&all, MicroBatch::Rows(1)).kept_layers(), 6);
    assert_eq!(plan(&Demand { training: false, ..all }, MicroBatch::Rows(1)).kept_layers(), 0);
    let many = Demand { keep_activations: KeepActivations::Layers(99), ..all };
    assert_eq!(plan(&many, MicroBatch::Rows(1)).kept_layers(), 6);
}

#[test]
fn fewer_kept_layers_are_the_first_remedy() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig { layers: 6, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let none = demand(&index, &model);
    let (needed, layer) = (plan(&none, MicroBatch::Rows(1)).total(), kept_bytes(&none));
    for keep_activations in [KeepActivations::All, KeepActivations::Layers(3)] {
        let requested = keep_activations.requested(6).unwrap();
        for (budget, fitting, flag) in
            [(needed + 2 * layer, 2, "--keep-activations 2"), (needed + 1, 0, "--keep-activations none")]
        {
            let tight = Demand { keep_activations, budget: Some(budget), ..none };
            let error = refused(&tight, MicroBatch::Rows(1));
            let MemoryError::Budget { needed: all, remedy: Some(Remedy::Keep(kept)), .. } = error else { panic!("{error}") };
            assert_eq!((kept, all), (fitting, needed + u64::from(requested) * layer));
            assert!(error.to_string().ends_with(&format!("; {flag} would fit")), "{error}");
            let fewer = Demand { keep_activations: KeepActivations::Layers(kept), ..tight };
            assert!(plan(&fewer, MicroBatch::Rows(1)).total() <= budget);
        }
        // Nothing fits with no kept layer, so the remedy is another one.
        let small = Demand { keep_activations, budget: Some(1), ..none };
        assert_eq!(refused(&small, MicroBatch::Rows(1)).remedy(), None);
    }
}

#[test]
fn rows_and_kept_activations_are_weighed() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig { layers: 6, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let none = Demand { length: 2048, positions: 2048, ..demand(&index, &model) };
    let auto = Demand { keep_activations: KeepActivations::Auto, ..none };
    let most = plan(&none, MicroBatch::Rows(MAX_AUTO_ROWS)).total();
    let full = plan(&Demand { budget: Some(u64::MAX), ..auto }, MicroBatch::Auto);
    assert_eq!((full.micro_batch, full.kept_layers(), full.slower), (MAX_AUTO_ROWS, 6, None));
    // With this memory, fewer rows of many tokens are faster than most rows without kept layers.
    let chosen = plan(&Demand { budget: Some(most), ..auto }, MicroBatch::Auto);
    assert!(chosen.micro_batch < MAX_AUTO_ROWS && chosen.kept_layers() > 3, "{chosen:?}");
    let Some(Slower { micro_batch: MAX_AUTO_ROWS, kept_layers: 0, percent: 70..=99 }) = chosen.slower else {
        panic!("{:?}", chosen.slower);
    };
    for rows in 1..=MAX_AUTO_ROWS {
        let other = plan(&Demand { budget: Some(most), ..auto }, MicroBatch::Rows(rows));
        assert!(other.speed(6) <= chosen.speed(6) && other.total() <= most);
    }
    // Rows of few tokens do not keep the device busy.
    let short = Demand { length: 16, positions: 16, ..auto };
    let most = plan(&Demand { keep_activations: KeepActivations::None, ..short }, MicroBatch::Rows(MAX_AUTO_ROWS)).total();
    let chosen = plan(&Demand { budget: Some(most), ..short }, MicroBatch::Auto);
    assert_eq!((chosen.micro_batch, chosen.kept_layers(), chosen.slower), (MAX_AUTO_ROWS, 0, None));
    // Without kept activations, the maximum that fits.
    let unlimited = Demand { budget: Some(u64::MAX), ..none };
    assert_eq!(plan(&unlimited, MicroBatch::Auto).micro_batch, MAX_AUTO_ROWS);
}

#[test]
fn as_few_residual_streams_as_possible_are_in_host_memory() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig { layers: 6, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let off = demand(&index, &model);
    let needed = plan(&off, MicroBatch::Rows(1)).total();
    let stream = 4 * 64 * u64::from(model.hidden);
    let auto = Demand { offload_activations: OffloadActivations::Auto, ..off };
    let offloaded = |demand: &Demand<'_>| {
        let found = plan(demand, MicroBatch::Rows(1));
        let (streams, bytes) = found.offloaded();
        assert_eq!(bytes, u64::from(streams) * stream);
        assert_eq!(found.total() + bytes, needed);
        streams
    };
    // Two of seven streams stay on the device.
    for (budget, streams) in [(needed, 0), (needed - 1, 1), (needed - stream - 1, 2), (needed - 5 * stream, 5)] {
        assert_eq!(offloaded(&Demand { budget: Some(budget), ..auto }), streams, "{budget} of {needed}");
    }
    let small = Demand { budget: Some(needed - 5 * stream - 1), ..auto };
    let error = refused(&small, MicroBatch::Rows(1));
    let MemoryError::Budget { needed: least, remedy: Some(_), .. } = error else { panic!("{error}") };
    assert_eq!(least, needed - 5 * stream);
    // An unknown budget; on request; nothing to offload; no memory for it.
    assert_eq!(offloaded(&auto), 0);
    assert_eq!(offloaded(&Demand { offload_activations: OffloadActivations::On, ..off }), 5);
    let few = ModelConfig { layers: 1, ..model.clone() };
    let on = Demand { model: &few, offload_activations: OffloadActivations::On, ..off };
    assert_eq!(plan(&on, MicroBatch::Rows(1)).offloaded(), (0, 0));
    let less = Demand { budget: Some(needed - 1), ..auto };
    assert!(matches!(refused(&Demand { host_buffers: false, ..less }, MicroBatch::Rows(1)), MemoryError::Budget { .. }));
    assert!(matches!(refused(&Demand { budget: Some(needed - 1), ..off }, MicroBatch::Rows(1)), MemoryError::Budget { .. }));
    // Fewer rows are better than streams in host memory, and those leave no memory for activations.
    let two = plan(&off, MicroBatch::Rows(2)).total();
    let tight = Demand { budget: Some(two - 1), keep_activations: KeepActivations::Auto, ..auto };
    assert_eq!(plan(&tight, MicroBatch::Auto).offloaded(), (0, 0));
    let both = plan(&tight, MicroBatch::Rows(2));
    assert!(both.offloaded().0 > 0 && both.kept_layers() == 0, "{both:?}");
}

/// With less host memory, the layers stream where that fits, and else the run is refused. It names
/// both figures, and a change that makes it fit.
#[test]
fn streams_in_host_memory_fit_there() {
    let index = Index::parse(PACK, PACK.len() as u64).unwrap();
    let model = ModelConfig { layers: 6, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let off = demand(&index, &model);
    let needed = plan(&off, MicroBatch::Rows(1)).total();
    let stream = 4 * 64 * u64::from(model.hidden);
    let auto = Demand { offload_activations: OffloadActivations::Auto, ..off };
    let three = Demand { budget: Some(needed - 3 * stream), ..auto };
    let enough = plan(&Demand { host_memory: Some(3 * stream), ..three }, MicroBatch::Rows(1));
    assert_eq!(enough.offloaded(), (3, 3 * stream));
    for available in [3 * stream - 1, 0] {
        let error = refused(&Demand { host_memory: Some(available), ..three }, MicroBatch::Rows(1));
        let MemoryError::Host { available: found, needed, remedy: Some(remedy) } = error else { panic!("{error}") };
        assert_eq!((found, needed), (available, 3 * stream));
        let Remedy::Length(length) = remedy else { panic!("{remedy:?}") };
        let shorter = Demand { length, positions: length, host_memory: Some(available), ..three };
        assert!(plan(&shorter, MicroBatch::Rows(1)).offloaded().1 <= available);
    }
    // All streams, on request; no streams in host memory need none.
    let on = Demand { offload_activations: OffloadActivations::On, host_memory: Some(5 * stream - 1), ..off };
    let error = refused(&on, MicroBatch::Rows(1));
    assert!(matches!(error, MemoryError::Host { needed, .. } if needed == 5 * stream), "{error}");
    assert!(error.to_string().contains(&format!("{} bytes of host memory", 5 * stream)), "{error}");
    assert_eq!(plan(&Demand { host_memory: Some(5 * stream), ..on }, MicroBatch::Rows(1)).offloaded().0, 5);
    assert_eq!(plan(&Demand { host_memory: Some(0), ..auto }, MicroBatch::Rows(1)).offloaded().0, 0);
    // Too little GPU memory stays the error, with any host memory.
    let small = Demand { budget: Some(needed - 5 * stream - 1), host_memory: Some(stream), ..auto };
    assert!(matches!(refused(&small, MicroBatch::Rows(1)), MemoryError::Budget { .. }));
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

/// An index with a matrix in each layer, an embedding and a norm, and maybe an output projection.
fn index_of(model: &ModelConfig, with_head: bool) -> Index {
    let entry = |name: String, role, layer, shape: &[u64], storage| {
        let shape = Shape::new(shape).unwrap();
        Entry { name, role, layer, expert: None, shape, storage }
    };
    let (raw, nf4) = (Storage::Raw(FloatType::Bf16), Storage::Nf4 { scale_type: ScaleType::F32, block_size: 64 });
    let (hidden, table) = (u64::from(model.hidden), [u64::from(model.vocab), u64::from(model.hidden)]);
    let globals = [(Role::Embedding, &table[..]), (Role::FinalNorm, &[hidden]), (Role::LmHead, &table)];
    let count = if with_head { 3 } else { 2 };
    let globals = globals.into_iter().take(count).map(|(role, shape)| entry(role.to_string(), role, None, shape, raw));
    let layer = |number: u32| entry(format!("{number}"), Role::DownProj, Some(number), &[512, hidden], nf4);
    let layout = Layout::new(globals.chain((0..model.layers).map(layer)).collect(), model.layers, 2).unwrap();
    let crcs = vec![0; layout.sections().len()];
    Index::parse(&layout.front(&crcs, 0, "{}").unwrap(), layout.file_len()).unwrap()
}

/// A vocabulary whose tables are large compared to a layer: they leave GPU memory where nothing
/// else has to be copied for that.
#[test]
fn the_vocabulary_leaves_gpu_memory_where_the_budget_demands_it() {
    let model = ModelConfig { vocab: 1 << 18, ..ModelConfig::parse(CONFIG, None).unwrap() };
    let (index, tied_index) = (index_of(&model, true), index_of(&model, false));
    // 64 chunks of 4,096 columns, for each of two windows.
    let tokens = 1 << 14;
    let off = Demand { length: tokens, positions: tokens, budget: Some(u64::MAX), ..demand(&index, &model) };
    let with = |demand: Demand<'_>, offload_vocabulary| plan(&Demand { offload_vocabulary, ..demand }, MicroBatch::Rows(1));
    let plans = [OffloadVocabulary::Off, OffloadVocabulary::Embedding, OffloadVocabulary::All].map(|v| with(off, v));
    assert_eq!(plans.each_ref().map(MemoryPlan::offloaded_vocabulary), [(false, 0), (true, 0), (true, 64)]);
    let [all, without_embedding, in_parts] = plans.each_ref().map(|plan| plan.parts()[1].1);
    let table = u64::from(2 * model.hidden) << 18;
    assert_eq!(all - without_embedding, table);
    assert!(in_parts > table / 32 && in_parts < table / 32 + 4096, "{in_parts} of {table}");
    // Only as far as the budget demands.
    let auto = Demand { offload_vocabulary: OffloadVocabulary::Auto, ..off };
    let unknown = plan(&Demand { budget: None, ..auto }, MicroBatch::Rows(1));
    assert_eq!(unknown.offloaded_vocabulary(), (false, 0));
    for expected in &plans {
        assert_eq!(expected.parts().iter().map(|(_, bytes)| bytes).sum::<u64>(), expected.total());
        let found = plan(&Demand { budget: Some(expected.total()), ..auto }, MicroBatch::Rows(1));
        assert!(found.total() <= expected.total() && found.stream.resident, "{found:?}");
        assert_eq!(found.offloaded_vocabulary(), expected.offloaded_vocabulary());
    }
    // A tied output projection stays or leaves with the embedding.
    let tied = |offload| with(Demand { index: &tied_index, ..off }, offload).offloaded_vocabulary();
    assert_eq!(tied(OffloadVocabulary::Embedding), (false, 0));
    assert_eq!(tied(OffloadVocabulary::All), (true, 64));
}

/// Matrices beyond 4 GiB, and beyond what a binding or a buffer may have: only keys and values have
/// the rows of all tokens.
#[test]
fn the_length_of_a_sample_is_limited_by_its_keys_and_by_memory() {
    // The shape of Llama-3.1-8B.
    let model = ModelConfig {
        hidden: 4096,
        intermediate: 14_336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        q_k_norm: false,
        ..ModelConfig::parse(CONFIG, None).unwrap()
    };
    let index = index_of(&model, true);
    // As NVIDIA's driver has them.
    let (max_binding, max_buffer) = (i32::MAX as u64, (1 << 32) - (2 << 20));
    let of = |tokens, units| {
        let demand = Demand {
            length: tokens,
            positions: tokens,
            budget: Some(u64::MAX),
            max_binding,
            max_buffer,
            units,
            ..demand(&index, &model)
        };
        MemoryPlan::new(&demand, MicroBatch::Rows(1))
    };
    for units in [None, Some(MatrixUnits::Hardware)] {
        let [short, long] = [131_072, 344_064].map(|tokens| of(tokens, units).unwrap());
        assert!(long.workspace.largest < max_binding && mat_bytes(344_064, 4096) > max_buffer);
        // Each token has residual streams, their gradient, keys, values and their gradients, and
        // the low-rank products of keys and values; on matrix units, copies of keys and values.
        let per_token = 4 * (u64::from(model.layers + 2) * 4096 + 4 * 1024 + 2 * 16) + Angles::bytes(&model);
        let copies = if units.is_some() { 2 * 2 * 1024 } else { 0 };
        let difference = long.total() - short.total();
        let expected = (344_064 - 131_072) * (per_token + copies);
        assert!(difference.abs_diff(expected) < expected / 10_000, "{difference}, expected {expected}");
        let error = of(1 << 19, units).unwrap_err();
        let MemoryError::Matrix { limit, needed, .. } = error else { panic!("{error}") };
        // The copies of queries, keys and values are one binding.
        let copies = if units.is_some() { 2 * (u64::from(WINDOW) + 64) * 4096 + 64 * 4096 } else { 0 };
        assert_eq!((limit, needed), (max_binding, mat_bytes(1 << 19, 1024) + copies));
    }
}
