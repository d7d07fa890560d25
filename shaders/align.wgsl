// Packs a narrow float32 matrix into panels with one exponent: the right operand of a product whose
// sums run over the rows of two matrices. The left operand is packed already, with an exponent for
// each row. Sums cannot undo these, so the rows of the narrow matrix are multiplied by them. It is
// combined with panels.wgsl. Runs unchecked: `ops::matmul` proves on the host that every index is
// in its binding.

struct Params {
    rows: u32,
    cols: u32,
    panel_rows: u32,    // rows of a panel; rows past the last one are zeros
    panels: u32,        // panels; columns past the last one are zeros
}

@group(0) @binding(0) var<storage, read> x: array<f32>;                     // [rows, cols]
@group(0) @binding(1) var<storage, read> row_exponents: array<i32>;         // of the left operand
@group(0) @binding(2) var<storage, read_write> new_extents: array<u32>;
@group(0) @binding(3) var<storage, read> extents: array<u32>;
@group(0) @binding(4) var<storage, read_write> exponents: array<i32>;       // [0] is written
@group(0) @binding(5) var<storage, read_write> out: array<vec2<u32>>;       // four f16
@group(1) @binding(0) var<uniform> params: Params;

const EXTENTS = 256u;       // workgroups of `extent`
const BIAS = 0x8000;

// The exponent of a magnitude as in its bits, plus that of its row, plus BIAS. 0 for zero and for
// what is not finite: they have no part in the common exponent.
fn level_of(value: f32, row_exponent: i32) -> u32 {
    let bits = magnitude_bits(value);
    if (bits == 0u || bits >= 0x7f800000u) {
        return 0u;
    }
    return u32(i32(bits >> 23u) + row_exponent + BIAS);
}

// The largest level in each of 256 parts.
@compute @workgroup_size(256)
fn extent(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var largest = 0u;
    for (var i = id.x * 256u + thread; i < params.rows * params.cols; i += EXTENTS * 256u) {
        largest = max(largest, level_of(x[i], row_exponents[i / params.cols]));
    }
    largest = largest_of(thread, largest);
    if (thread == 0u) {
        new_extents[id.x] = largest;
    }
}

// An element times 2^shift.
fn scaled_at(row: u32, column: u32, shift: i32) -> f32 {
    if (row >= params.rows || column >= params.cols) {
        return 0.0;
    }
    let half = clamp(shift >> 1u, -126, 126);
    return x[row * params.cols + column] * power(half) * power(clamp(shift - half, -126, 126));
}

// A thread writes four columns of a row.
@compute @workgroup_size(256)
fn align(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let largest = largest_of(thread, extents[thread]);
    let exponent = select(i32(largest) - BIAS - 136, 0, largest == 0u);
    let i = (id.x + id.y * grid.x) * 256u + thread;
    if (i == 0u) {
        exponents[0] = exponent;
    }
    let panel = i / 8u / params.panel_rows;
    if (panel >= params.panels) {
        return;
    }
    let row = i / 8u % params.panel_rows;
    var shift = -exponent;
    if (row < params.rows) {
        shift += row_exponents[row];
    }
    let column = panel * 32u + i % 8u * 4u;
    let four = vec4(scaled_at(row, column, shift), scaled_at(row, column + 1u, shift), scaled_at(row, column + 2u, shift), scaled_at(row, column + 3u, shift));
    let bits = bitcast<vec4<u32>>(four) & vec4(0x7fffffffu);
    out[i] = four_halves(four, 1.0, max(max(bits.x, bits.y), max(bits.z, bits.w)));
}
