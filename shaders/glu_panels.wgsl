// h = f(gate) * up and its gradients, written as packed operands of products. It is combined with
// panels.wgsl, panels_tile.wgsl, glu_function.wgsl and glu_fours.wgsl. gate and up are stored as
// halves.wgsl stores them, with the exponent of h after that of gate.
//
//     measure              gate, up         -> exponents of stored gate and up, and of h
//     keep                 gate, up         -> stored gate and up, h
//     again                stored gate, up  -> h
//     measure_gradients    the same and dh  -> exponents of dgate and dup
//     gradients            the same and dh  -> dgate, dup
//
// Runs unchecked: the host proves that matrices have `rows * cols` floats, with columns in groups
// of eight, that stored ones have `rows * pairs` times 8 bytes, and panels their padded sides.

struct Params {
    rows: u32,
    cols: u32,
    pairs: u32,         // of 8 bytes of a stored row
    padded_rows: u32,   // padded rows: those past the last one are zeros
    padded_cols: u32,   // padded columns: those past the last one are zeros
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> stored_gate: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> stored_up: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read> dh: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> exponents: array<i32>;       // of h, or of dgate
@group(0) @binding(6) var<storage, read_write> out: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> exponents_of_up: array<i32>; // of dup
@group(0) @binding(8) var<storage, read_write> out_of_up: array<vec4<u32>>;
@group(1) @binding(0) var<uniform> params: Params;

// The rows of stored gate and up.
struct Stored {
    scales: vec2<f32>,
    exponent: i32,      // of h
}

fn stored_of(row: u32) -> Stored {
    let of_gate = stored_gate[row * params.pairs];
    let of_up = stored_up[row * params.pairs];
    return Stored(vec2(power(bitcast<i32>(of_gate.x)), power(bitcast<i32>(of_up.x))), bitcast<i32>(of_gate.y));
}

// Where four columns of a row are stored.
fn stored_at(row: u32, four: u32) -> u32 {
    return row * params.pairs + 2u + four;
}

fn gradients_at(row: u32, four: u32, scales: vec2<f32>) -> Gradients {
    let at = stored_at(row, four);
    let x = unpacked(stored_gate[at], scales.x);
    let y = unpacked(stored_up[at], scales.y);
    return gradients_of(x, y, dh[row * (params.cols / 4u) + four]);
}

// A workgroup takes a padded row.
@compute @workgroup_size(256)
fn measure(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.padded_rows) {
        return;
    }
    if (row >= params.rows) {
        if (thread == 0u) {
            exponents[row] = exponent_of(0u);
        }
        return;
    }
    let start = row * (params.cols / 4u);
    var of_gate = 0u;
    var of_up = 0u;
    var of_h = 0u;
    for (var four = thread; four < params.cols / 4u; four += 256u) {
        let x = gate[start + four];
        let y = up[start + four];
        of_gate = max(of_gate, magnitudes(x));
        of_up = max(of_up, magnitudes(y));
        of_h = max(of_h, magnitudes(activated(x, y)));
    }
    of_gate = largest_of(thread, of_gate);
    workgroupBarrier();
    of_up = largest_of(thread, of_up);
    workgroupBarrier();
    of_h = largest_of(thread, of_h);
    if (thread == 0u) {
        let e = exponent_of(of_h);
        exponents[row] = e;
        let at = row * params.pairs;
        stored_gate[at] = vec2(bitcast<u32>(exponent_of(of_gate)), bitcast<u32>(e));
        stored_gate[at + 1u] = vec2<u32>();
        stored_up[at] = vec2(bitcast<u32>(exponent_of(of_up)), 0u);
        stored_up[at + 1u] = vec2<u32>();
    }
}

// Stores four columns of a row, and returns those of h.
fn kept_at(row: u32, column: u32) -> vec2<u32> {
    if (row >= params.rows || column >= params.cols) {
        return vec2<u32>();
    }
    let four = column / 4u;
    let x = gate[row * (params.cols / 4u) + four];
    let y = up[row * (params.cols / 4u) + four];
    let of_gate = bitcast<i32>(stored_gate[row * params.pairs].x);
    let of_up = bitcast<i32>(stored_up[row * params.pairs].x);
    let of_h = exponents[row];
    let at = stored_at(row, four);
    stored_gate[at] = four_halves(x, power(-of_gate), largest_with(of_gate));
    stored_up[at] = four_halves(y, power(-of_up), largest_with(of_up));
    return four_halves(activated(x, y), power(-of_h), largest_with(of_h));
}

// A workgroup writes a tile, also in `again` and `gradients`.
@compute @workgroup_size(256)
fn keep(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let corner = corner_of(id.x + id.y * grid.x);
    if (corner.x >= params.padded_rows) {
        return;
    }
    let column = column_of(thread);
    for (var i = 0u; i < 2u; i++) {
        let pair = pair_of_rows(thread, i);
        let row = corner.x + 2u * pair;
        put(pair, column, kept_at(row, corner.y + column), kept_at(row + 1u, corner.y + column));
    }
    store_tile(thread, corner);
}

fn again_at(row: u32, column: u32) -> vec2<u32> {
    if (row >= params.rows || column >= params.cols) {
        return vec2<u32>();
    }
    let stored = stored_of(row);
    let at = stored_at(row, column / 4u);
    let h = activated(unpacked(stored_gate[at], stored.scales.x), unpacked(stored_up[at], stored.scales.y));
    return four_halves(h, power(-stored.exponent), largest_with(stored.exponent));
}

@compute @workgroup_size(256)
fn again(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let corner = corner_of(id.x + id.y * grid.x);
    if (corner.x >= params.padded_rows) {
        return;
    }
    if (corner.y == 0u && thread < TILE) {
        let row = corner.x + thread;
        var e = exponent_of(0u);
        if (row < params.rows) {
            e = bitcast<i32>(stored_gate[row * params.pairs].y);
        }
        exponents[row] = e;
    }
    let column = column_of(thread);
    for (var i = 0u; i < 2u; i++) {
        let pair = pair_of_rows(thread, i);
        let row = corner.x + 2u * pair;
        put(pair, column, again_at(row, corner.y + column), again_at(row + 1u, corner.y + column));
    }
    store_tile(thread, corner);
}

// A workgroup takes a padded row.
@compute @workgroup_size(256)
fn measure_gradients(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.padded_rows) {
        return;
    }
    if (row >= params.rows) {
        if (thread == 0u) {
            exponents[row] = exponent_of(0u);
            exponents_of_up[row] = exponent_of(0u);
        }
        return;
    }
    let scales = stored_of(row).scales;
    var of_gate = 0u;
    var of_up = 0u;
    for (var four = thread; four < params.cols / 4u; four += 256u) {
        let gradients = gradients_at(row, four, scales);
        of_gate = max(of_gate, magnitudes(gradients.gate));
        of_up = max(of_up, magnitudes(gradients.up));
    }
    of_gate = largest_of(thread, of_gate);
    workgroupBarrier();
    of_up = largest_of(thread, of_up);
    if (thread == 0u) {
        exponents[row] = exponent_of(of_gate);
        exponents_of_up[row] = exponent_of(of_up);
    }
}

// Four columns of a row of dgate, and those of dup.
fn both_at(row: u32, column: u32) -> vec4<u32> {
    if (row >= params.rows || column >= params.cols) {
        return vec4<u32>();
    }
    let gradients = gradients_at(row, column / 4u, stored_of(row).scales);
    let e = vec2(exponents[row], exponents_of_up[row]);
    return vec4(
        four_halves(gradients.gate, power(-e.x), largest_with(e.x)),
        four_halves(gradients.up, power(-e.y), largest_with(e.y)),
    );
}

@compute @workgroup_size(256)
fn gradients(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let corner = corner_of(id.x + id.y * grid.x);
    if (corner.x >= params.padded_rows) {
        return;
    }
    let column = column_of(thread);
    let low = pair_of_rows(thread, 0u);
    let high = pair_of_rows(thread, 1u);
    let a = both_at(corner.x + 2u * low, corner.y + column);
    let b = both_at(corner.x + 2u * low + 1u, corner.y + column);
    let c = both_at(corner.x + 2u * high, corner.y + column);
    let d = both_at(corner.x + 2u * high + 1u, corner.y + column);
    put(low, column, a.xy, b.xy);
    put(high, column, c.xy, d.xy);
    store_tile(thread, corner);
    workgroupBarrier();
    put(low, column, a.zw, b.zw);
    put(high, column, c.zw, d.zw);
    workgroupBarrier();
    for (var piece = thread; piece < 512u; piece += 256u) {
        out_of_up[place_of(piece, corner)] = piece_of(piece);
    }
}
