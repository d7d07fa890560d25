// Sums the chunks of x A^T or dy B, and writes the sums twice: in float32, and as panels for the
// product that adds the terms of an adapter. It is combined with panels.wgsl. Runs unchecked:
// `ops::matmul` proves on the host that every index is in its binding.
//
// In panels, a row has the exponent of the row of x, plus one that is common to all rows. The
// operands have magnitudes below 1024 there, so a sum of K terms is below 2^20 K. The common
// exponent brings it below 1024: it is that of the right operand, plus `shift`.

struct Params {
    rows: u32,
    rank: u32,          // columns
    chunks: u32,        // partial sums of each element
    panel_rows: u32,    // rows of a panel; rows past the last one are zeros
    panels: u32,        // panels; columns past the last one are zeros
    shift: i32,
    scale: f32,         // the factor of the sums in float32
    pad: u32,
}

@group(0) @binding(0) var<storage, read> parts: array<f32>;                     // [chunks, rows, rank]
@group(0) @binding(1) var<storage, read> left_exponents: array<i32>;            // of each row of x
@group(0) @binding(2) var<storage, read_write> right_exponents: array<i32>;     // [1] is written
@group(0) @binding(3) var<storage, read_write> low: array<f32>;                 // [rows, rank]
@group(0) @binding(4) var<storage, read_write> out: array<vec2<u32>>;           // four f16
@group(1) @binding(0) var<uniform> params: Params;

fn sum_at(row: u32, column: u32) -> f32 {
    let at = row * params.rank + column;
    if (row >= params.rows || column >= params.rank) {
        return 0.0;
    }
    var sum = 0.0;
    for (var chunk = 0u; chunk < params.chunks; chunk++) {
        sum += parts[chunk * params.rows * params.rank + at];
    }
    low[at] = params.scale * sum;
    return sum;
}

// A thread writes four columns of a row.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * 256u + thread;
    let panel = i / 8u / params.panel_rows;
    if (panel >= params.panels) {
        return;
    }
    let row = i / 8u % params.panel_rows;
    let common_exponent = right_exponents[0] + params.shift;
    if (i == 0u) {
        right_exponents[1] = common_exponent;
    }
    let column = panel * 32u + i % 8u * 4u;
    let sums = vec4(sum_at(row, column), sum_at(row, column + 1u), sum_at(row, column + 2u), sum_at(row, column + 3u));
    var exponent = common_exponent;
    if (row < params.rows) {
        exponent += left_exponents[row];
    }
    let half = clamp(exponent >> 1u, -126, 126);
    let scaled = sums * power(-half) * power(clamp(half - exponent, -126, 127));
    let bits = bitcast<vec4<u32>>(scaled) & vec4(0x7fffffffu);
    let largest = max(max(bits.x, bits.y), max(bits.z, bits.w));
    out[i] = four_halves(scaled, 1.0, largest);
}
