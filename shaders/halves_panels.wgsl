// A matrix that halves.wgsl stored, written as the packed operand of a product: the elements and
// exponents are the same, in another order. It is combined with panels.wgsl and panels_tile.wgsl. A
// workgroup writes a tile. Runs unchecked: the host proves that stored rows have `pairs` times 8
// bytes, with columns in groups of eight and zeros past the last one.

struct Params {
    rows: u32,
    pairs: u32,         // of 8 bytes of a stored row
    padded_rows: u32,   // padded rows: those past the last one are zeros
    padded_cols: u32,   // padded columns: those past the last one are zeros
}

@group(0) @binding(0) var<storage, read> stored: array<vec2<u32>>;
@group(0) @binding(1) var<storage, read_write> exponents: array<i32>;       // of each padded row
@group(0) @binding(2) var<storage, read_write> out: array<vec4<u32>>;       // eight f16
@group(1) @binding(0) var<uniform> params: Params;

fn halves_at(row: u32, column: u32) -> vec2<u32> {
    let at = 2u + column / 4u;
    if (row >= params.rows || at >= params.pairs) {
        return vec2<u32>();
    }
    return stored[row * params.pairs + at];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let corner = corner_of(id.x + id.y * grid.x);
    if (corner.x >= params.padded_rows) {
        return;
    }
    if (corner.y == 0u && thread < TILE) {
        let row = corner.x + thread;
        var e = exponent_of(0u);
        if (row < params.rows) {
            e = bitcast<i32>(stored[row * params.pairs].x);
        }
        exponents[row] = e;
    }
    let column = column_of(thread);
    for (var i = 0u; i < 2u; i++) {
        let pair = pair_of_rows(thread, i);
        let row = corner.x + 2u * pair;
        put(pair, column, halves_at(row, corner.y + column), halves_at(row + 1u, corner.y + column));
    }
    store_tile(thread, corner);
}
