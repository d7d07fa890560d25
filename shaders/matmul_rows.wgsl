// A product with few rows: out[m, n] = scale * (a[m, k] b[k, n] (+ bias)) (+ out) with m <= M. The
// terms of a column of b are adjacent in memory. This file is combined with matmul_params.wgsl and
// with a file for the storage of b, which has `prepare_b` and `load_b`. LANES threads share a
// column and read b once, eight elements at a time. Runs unchecked: `ops::matmul` proves on the
// host that every index is in its binding.

override M: u32 = 1u;           // rows: 1, 2, 4 or 8
override LANES: u32 = 32u;      // threads per column, a power of two
override COLUMNS: u32 = 8u;     // columns per workgroup
override WHOLE: bool = true;    // every column of b starts and ends on a group of eight elements
override PARTIAL: u32 = 256u;   // M * COLUMNS * LANES

// Partial sums of the threads, by row, column and lane.
var<workgroup> partial: array<f32, PARTIAL>;

// The element range of one column of b in its storage.
struct Terms {
    start: u32,
    end: u32,
}

// Eight adjacent elements.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// The element of a row of a that belongs to element `i` of b. 0 outside of the column.
fn a_at(row: u32, i: u32, terms: Terms) -> f32 {
    if (!WHOLE && (i < terms.start || i >= terms.end)) {
        return 0.0;
    }
    return a[row + i - terms.start];
}

// The product of eight elements of b, from element `i` on, with a row of a.
fn product(row: u32, i: u32, terms: Terms, b: Eight) -> f32 {
    if (row >= M) {
        return 0.0;
    }
    // Rows past the last are copies of the last row. Their sums are not stored.
    let at = params.a_first + min(row, params.m - 1u) * params.a_row;
    let low = vec4(a_at(at, i, terms), a_at(at, i + 1u, terms), a_at(at, i + 2u, terms), a_at(at, i + 3u, terms));
    let high = vec4(a_at(at, i + 4u, terms), a_at(at, i + 5u, terms), a_at(at, i + 6u, terms), a_at(at, i + 7u, terms));
    return dot(low, b.low) + dot(high, b.high);
}

// The share of a thread in a column. Every index is a constant, so the sums stay in registers.
fn add_up(column: u32, lane: u32) -> array<f32, 8> {
    let start = params.b_first + column * params.b_column;
    let terms = Terms(start, start + params.k);
    var sums: array<f32, 8>;
    for (var i = (start & ~7u) + 8u * lane; i < terms.end; i += 8u * LANES) {
        let b = load_b(i, terms);
        sums[0] += product(0u, i, terms, b);
        sums[1] += product(1u, i, terms, b);
        sums[2] += product(2u, i, terms, b);
        sums[3] += product(3u, i, terms, b);
        sums[4] += product(4u, i, terms, b);
        sums[5] += product(5u, i, terms, b);
        sums[6] += product(6u, i, terms, b);
        sums[7] += product(7u, i, terms, b);
    }
    return sums;
}

fn keep(row: u32, thread: u32, sum: f32) {
    if (row < M) {
        partial[row * COLUMNS * LANES + thread] = sum;
    }
}

fn store(row: u32, column: u32, sum: f32) {
    var value = sum;
    if (params.has_bias == 1u) { value += bias[params.bias_first + column]; }
    value *= params.scale;
    let at = params.out_first + row * params.out_row + column;
    if (params.add == 1u) { value += out[at]; }
    out[at] = value;
}

@compute @workgroup_size(LANES, COLUMNS)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let group = id.x + id.y * grid.x;
    if (group >= params.groups) {
        return;
    }
    let lane = local.x;
    let thread = local.y * LANES + lane;
    prepare_b(thread);
    let column = group * COLUMNS + local.y;
    var sums: array<f32, 8>;
    if (column < params.n) {
        sums = add_up(column, lane);
    }
    keep(0u, thread, sums[0]);
    keep(1u, thread, sums[1]);
    keep(2u, thread, sums[2]);
    keep(3u, thread, sums[3]);
    keep(4u, thread, sums[4]);
    keep(5u, thread, sums[5]);
    keep(6u, thread, sums[6]);
    keep(7u, thread, sums[7]);
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        for (var row = 0u; row < M && lane < half; row++) {
            let at = row * COLUMNS * LANES + thread;
            partial[at] += partial[at + half];
        }
    }
    for (var row = 0u; row < min(M, params.m) && lane == 0u && column < params.n; row++) {
        store(row, column, partial[row * COLUMNS * LANES + thread]);
    }
}
