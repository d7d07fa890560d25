// Decodes a matrix into panels, with one power of two for all elements: frozen weights, and dense
// operands whose rows are the terms of the sums. It is combined with panels.wgsl and with a file
// for the storage of the matrix. That file has `prepare`, `magnitude_of` (the bits of the largest
// magnitude of item i) and `eight_at` (eight elements of a row). Runs unchecked: `ops::matmul`
// proves on the host that every index is in its binding.

struct Params {
    rows: u32,
    cols: u32,
    row: u32,           // elements from one row to the next
    items: u32,         // blocks of the quantised elements, or raw elements
    b_first: u32,       // index of the first element
    block_first: u32,   // quantised: offset of the first element in its block
    block_bits: u32,    // quantised: log2 of the block size
    scales_first: u32,  // quantised: see the codec
    supers_first: u32,
    zero: u32,
    panel_rows: u32,    // rows of a panel; rows past the last one are zeros
    panel_cols: u32,    // columns of all panels; columns past the last one are zeros
    exponent_at: u32,   // index of the exponent
    extent_at: u32,     // index of the largest magnitude, if it is known
    pad0: u32,
    pad1: u32,
    codebook: array<vec4<f32>, 4>,
}

override WHOLE: bool = true;        // every row starts on a group of eight elements, and cols are a multiple of 8

override KNOWN: bool = false;       // `extents` has the largest magnitude of the matrix, else those of its parts

const EXTENTS = 256u;               // workgroups of `extent`

// Bindings 0 to 3 hold the matrix.
@group(0) @binding(4) var<storage, read_write> new_extents: array<u32>;
@group(0) @binding(5) var<storage, read> extents: array<u32>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<u32>>;       // eight f16
@group(0) @binding(7) var<storage, read_write> exponents: array<i32>;
@group(1) @binding(0) var<uniform> params: Params;

struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// The largest magnitude in each of 256 parts.
@compute @workgroup_size(256)
fn extent(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    prepare(thread);
    var largest = 0u;
    for (var i = id.x * 256u + thread; i < params.items; i += EXTENTS * 256u) {
        largest = max(largest, magnitude_of(i));
    }
    largest = largest_of(thread, largest);
    if (thread == 0u) {
        new_extents[id.x] = largest;
    }
}

fn halves_at(row: u32, column: u32, scale: f32, largest: u32) -> vec4<u32> {
    if (row >= params.rows || column >= params.cols) {
        return vec4<u32>();
    }
    let values = eight_at(row * params.row + column, min(params.cols - column, 8u));
    return vec4(four_halves(values.low, scale, largest), four_halves(values.high, scale, largest));
}

// A workgroup decodes 128 rows of four panels.
@compute @workgroup_size(256)
fn decode(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = id.x + id.y * grid.x;
    let across = params.panel_cols / 128u;
    let top = group / across * 128u;
    if (top >= params.panel_rows) {
        return;
    }
    prepare(thread);
    var largest: u32;
    if (KNOWN) {
        workgroupBarrier();
        largest = extents[params.extent_at];
    } else {
        largest = largest_of(thread, extents[thread]);
    }
    let e = exponent_of(largest);
    if (group == 0u && thread == 0u) {
        exponents[params.exponent_at] = e;
    }
    let scale = power(-e);
    let panel = group % across * 4u;
    let column = panel * 32u + thread % 4u * 8u;
    for (var row = top + thread / 4u; row < top + 128u; row += 64u) {
        // All elements are loaded before the first write.
        let first = halves_at(row, column, scale, largest);
        let second = halves_at(row, column + 32u, scale, largest);
        let third = halves_at(row, column + 64u, scale, largest);
        let fourth = halves_at(row, column + 96u, scale, largest);
        let at = (panel * params.panel_rows + row) * 4u + thread % 4u;
        out[at] = first;
        out[at + 4u * params.panel_rows] = second;
        out[at + 8u * params.panel_rows] = third;
        out[at + 12u * params.panel_rows] = fourth;
    }
}
