// y = x * rsqrt(mean(x^2) + epsilon) * gamma per row, written as the packed operand of a product.
// It is combined with panels.wgsl and panels_tile.wgsl. `measure` finds the factor of each row and
// the exponent of its y, and `write` writes panels. Sums have the order of rms_norm.wgsl. Runs
// unchecked: the host proves that `x` has `rows * cols` floats, `gamma` `cols`, `factors` `rows`,
// and that columns are in groups of four.

struct Params {
    rows: u32,
    cols: u32,
    padded_rows: u32,   // padded rows: those past the last one of x are zeros
    padded_cols: u32,   // padded columns: those past the last one of x are zeros
    epsilon: f32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

// Both are the same buffer.
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> x_fours: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> factors: array<f32>;         // of each row
@group(0) @binding(4) var<storage, read_write> exponents: array<i32>;       // of each padded row
@group(0) @binding(5) var<storage, read_write> out: array<vec4<u32>>;       // eight f16
@group(1) @binding(0) var<uniform> params: Params;

override NARROW: bool = false; // columns: at most 256, which 32 threads sum in rms_norm.wgsl, else 256

const LANES = 32u;             // threads of a row in `measure`
const ROWS = 256u / LANES;

var<workgroup> partial: array<vec4<f32>, 256>;

// The sum of a row. A thread has those of 8 of 256 threads in rms_norm.wgsl: the first half of
// these was added to the second one. Further sums have the same order, too.
fn row_sum(thread: u32, value: vec4<f32>) -> f32 {
    let lane = thread % LANES;
    partial[thread] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            partial[thread] += partial[thread + half];
        }
        workgroupBarrier();
    }
    let four = partial[thread - lane];
    let two = four.xy + four.zw;
    return select(two.x + two.y, four.x, NARROW);
}

// The largest `bits` of a row.
fn row_largest(thread: u32, bits: u32) -> u32 {
    let lane = thread % LANES;
    maxima[thread] = bits;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            maxima[thread] = max(maxima[thread], maxima[thread + half]);
        }
        workgroupBarrier();
    }
    return maxima[thread - lane];
}

// The squares of a row, summed by threads.
fn squares_of(row: u32, lane: u32, cols: u32) -> vec4<f32> {
    let start = row * params.cols;
    if (NARROW) {
        var squares = 0.0;
        for (var i = lane; i < cols; i += LANES) {
            let value = x[start + i];
            squares += value * value;
        }
        return vec4(squares, 0.0, 0.0, 0.0);
    }
    var low = vec4<f32>();
    var high = vec4<f32>();
    for (var i = 4u * lane; i < cols; i += 256u) {
        let first = x_fours[(start + i) / 4u];
        low += first * first;
        if (i + 128u < cols) {
            let second = x_fours[(start + i + 128u) / 4u];
            high += second * second;
        }
    }
    return low + high;
}

// Four elements of y.
fn normed_at(row: u32, four: u32, r: f32) -> vec4<f32> {
    return x_fours[row * (params.cols / 4u) + four] * r * gamma[four];
}

// A workgroup takes eight padded rows.
@compute @workgroup_size(256)
fn measure(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let top = (id.x + id.y * grid.x) * ROWS;
    if (top >= params.padded_rows) {
        return;
    }
    let row = top + thread / LANES;
    let lane = thread % LANES;
    // Rows past the end have no elements, but their threads take part in the barriers.
    let cols = select(0u, params.cols, row < params.rows);
    let r = inverseSqrt(row_sum(thread, squares_of(row, lane, cols)) / f32(params.cols) + params.epsilon);
    var bits = vec4<u32>();
    for (var four = lane; four < cols / 4u; four += LANES) {
        bits = max(bits, bitcast<vec4<u32>>(normed_at(row, four, r)) & vec4(0x7fffffffu));
    }
    let largest = row_largest(thread, max(max(bits.x, bits.y), max(bits.z, bits.w)));
    if (lane == 0u) {
        exponents[row] = exponent_of(largest);
        if (row < params.rows) {
            factors[row] = r;
        }
    }
}

fn halves_at(row: u32, column: u32) -> vec2<u32> {
    if (row >= params.rows || column >= params.cols) {
        return vec2<u32>();
    }
    let e = exponents[row];
    return four_halves(normed_at(row, column / 4u, factors[row]), power(-e), largest_with(e));
}

// A workgroup writes a tile.
@compute @workgroup_size(256)
fn write(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let corner = corner_of(id.x + id.y * grid.x);
    if (corner.x >= params.padded_rows) {
        return;
    }
    let column = column_of(thread);
    for (var i = 0u; i < 2u; i++) {
        let pair = pair_of_rows(thread, i);
        let row = corner.x + 2u * pair;
        put(pair, column, halves_at(row, corner.y + column), halves_at(row + 1u, corner.y + column));
    }
    store_tile(thread, corner);
}
