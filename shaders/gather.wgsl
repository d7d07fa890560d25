// Gathers rows of a table as float32. This file is combined with a file for the storage of the
// table, which has `prepare` and `element`. The table is bound in windows that may start and end
// inside a row. The dispatch with the window of an element writes that element. Runs unchecked: the
// host proves that the window holds `count` elements (at most 2^30), `ids` one id per token, and
// `out` `tokens * width` words.

struct Params {
    tokens: u32,
    width: u32,         // elements of a row, at most 2^29
    rows: u32,          // of the whole table
    count: u32,         // elements of the window
    first_row: u32,     // row and column of the window's first element
    first_column: u32,
    poison: u32,        // 1 if the window writes NaN for ids without a row
    first: u32,         // index of the first element of the window in the binding
    block_first: u32,   // quantised: offset of that element in its block
    block_bits: u32,    // quantised: log2 of the block size
    scales_first: u32,  // quantised: see the codec
    supers_first: u32,
    zero: u32,
    first_id: u32,      // of the table's first row
    pad0: u32,
    pad1: u32,
    codebook: array<vec4<f32>, 4>,
}

// Bindings 0 to 3 hold the table.
@group(0) @binding(4) var<storage, read> ids: array<u32>;           // [tokens]
@group(0) @binding(5) var<storage, read_write> out: array<u32>;     // [tokens, width], the bits of float32
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const NAN = 0x7fc00000u;

@compute @workgroup_size(WORKGROUP)
fn gather(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    prepare(thread);
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i >= params.tokens * params.width) { return; }
    let row = ids[i / params.width] - params.first_id;
    if (row >= params.rows) {
        if (params.poison != 0u) { out[i] = NAN; }
        return;
    }
    // The window has parts of at most `count / width + 2` rows. This check keeps the product below
    // within 32 bits.
    let rows_in = row - params.first_row;
    if (row < params.first_row || rows_in > params.count / params.width + 1u) { return; }
    let from_start = rows_in * params.width + i % params.width;
    let at = from_start - params.first_column;
    if (from_start >= params.first_column && at < params.count) { out[i] = element(at); }
}
