// Packs a float32 matrix into panels, with a power of two for each row: the left operand of a
// product on matrix units. It is combined with panels.wgsl. A workgroup packs a row. Runs
// unchecked: `ops::matmul` proves on the host that every index is in its binding.

struct Params {
    rows: u32,
    cols: u32,
    first: u32,         // index of x[0, 0]
    row: u32,           // elements from x[i, j] to x[i + 1, j]
    panel_rows: u32,    // rows of a panel; rows past the last one of x are zeros
    panel_cols: u32,    // columns of all panels; columns past the last one of x are zeros
    pad0: u32,
    pad1: u32,
}

override WHOLE: bool = true;    // first, row and cols are multiples of 4

// Both are the same buffer.
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> x_fours: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec2<u32>>;       // four f16
@group(0) @binding(3) var<storage, read_write> exponents: array<i32>;
@group(1) @binding(0) var<uniform> params: Params;

fn element_at(start: u32, column: u32) -> f32 {
    if (column < params.cols) {
        return x[start + column];
    }
    return 0.0;
}

// Columns `column..column + 4` of the row.
fn four_at(row: u32, column: u32) -> vec4<f32> {
    if (row >= params.rows || column >= params.cols) {
        return vec4<f32>();
    }
    let start = params.first + row * params.row;
    if (WHOLE) {
        return x_fours[(start + column) / 4u];
    }
    return vec4(x[start + column], element_at(start, column + 1u), element_at(start, column + 2u), element_at(start, column + 3u));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.panel_rows) {
        return;
    }
    var bits = vec4<u32>();
    for (var column = 4u * thread; column < params.cols; column += 1024u) {
        bits = max(bits, bitcast<vec4<u32>>(four_at(row, column)) & vec4(0x7fffffffu));
    }
    let largest = largest_of(thread, max(max(bits.x, bits.y), max(bits.z, bits.w)));
    let exponent = exponent_of(largest);
    if (thread == 0u) {
        exponents[row] = exponent;
    }
    let scale = power(-exponent);
    for (var column = 4u * thread; column < params.panel_cols; column += 1024u) {
        let at = (column / 32u * params.panel_rows + row) * 8u + column % 32u / 4u;
        out[at] = four_halves(four_at(row, column), scale, largest);
    }
}
