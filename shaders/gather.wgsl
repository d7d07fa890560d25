// Rows of a table of 16-bit or 32-bit floats, as float32. The table comes in windows that may begin and end within a row; each
// element is written by the dispatch whose window holds it. Runs unchecked: the host has proven that `table` holds `count` elements
// from `skip` on, at most 2^30, `ids` one id a token, and `out` `tokens * width` words.

struct Params {
    tokens: u32,
    width: u32,         // elements of a row, at most 2^29
    rows: u32,          // of the whole table
    count: u32,         // elements of the window
    first_row: u32,     // row and column of the window's first element
    first_column: u32,
    poison: u32,        // whether this window is the first, which writes NaN for ids past the table
    pad: u32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;           // [tokens]
@group(0) @binding(1) var<storage, read> table: array<u32>;         // one or two elements a word
@group(0) @binding(2) var<storage, read_write> out: array<u32>;     // [tokens, width], the bits of float32
@group(1) @binding(0) var<uniform> params: Params;

override TYPE: u32 = 0u;    // 0 f32, 1 f16, 2 bf16

const WORKGROUP = 256u;
const NAN = 0x7fc00000u;

// Every binary16 is a binary32, also those too small for a normal binary16.
fn from_f16(half: u32) -> u32 {
    let sign = (half & 0x8000u) << 16u;
    let exponent = (half >> 10u) & 31u;
    let significand = half & 0x3ffu;
    if (exponent == 0u) { return sign | bitcast<u32>(f32(significand) * 0x1p-24f); }
    if (exponent == 31u) { return sign | 0x7f800000u | (significand << 13u); }
    return sign | ((exponent + 112u) << 23u) | (significand << 13u);
}

fn element(i: u32) -> u32 {
    if (TYPE == 0u) { return table[i]; }
    let half = (table[i / 2u] >> (16u * (i % 2u))) & 0xffffu;
    if (TYPE == 1u) { return from_f16(half); }
    return half << 16u;
}

@compute @workgroup_size(WORKGROUP)
fn gather(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i >= params.tokens * params.width) { return; }
    let row = ids[i / params.width];
    if (row >= params.rows) {
        if (params.poison != 0u) { out[i] = NAN; }
        return;
    }
    // The window holds parts of at most `count / width + 2` rows: with those alone, the product below stays within 32 bits.
    let rows_in = row - params.first_row;
    if (row < params.first_row || rows_in > params.count / params.width + 1u) { return; }
    let from_start = rows_in * params.width + i % params.width;
    let at = from_start - params.first_column;
    if (from_start >= params.first_column && at < params.count) { out[i] = element(at); }
}
