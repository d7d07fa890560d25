// A product of matrices: out[m, n] = scale * (a[m, k] b[k, n] (+ bias)) (+ out), in float32. This
// file is combined with matmul_params.wgsl and with a file for the storage of b. That file has
// `prepare_b`, `fetch_b`, `place_b` and `columns_of`, the columns of a vec4 in `tile_b`.
//
// A workgroup computes a tile of 8 TY x 8 TX sums, a thread 8 x 8 of them. Threads fetch the next
// terms into registers while they multiply the present ones, to hide the memory latency. Runs
// unchecked: `ops::matmul` proves on the host that every index is in its binding.
//
// The tile. Thread (x, y) has the sums at #: columns x, x+TX, x+2TX .. and rows y, y+TY, y+2TY ..
//
//          columns of b: n
//             x     x+TX  x+2TX x+3TX   x+4TX .. x+7TX
//          +--------------------------+----------------+   tile_a, one term:
//    y     |  #      #      #      #  |   #   ..   #   |     vec4 y: rows y, y+TY, y+2TY, y+3TY
//    y+TY  |  #      #      #      #  |   #   ..   #   |     vec4 y+TY: rows y+4TY .. y+7TY
//    y+2TY |  #      #      #      #  |   #   ..   #   |
//    y+3TY |  #      #      #      #  |   #   ..   #   |   tile_b, one term:
//          +--------------------------+----------------+     vec4 x: columns x, x+TX, x+2TX, x+3TX
//    y+4TY |  #      #      #      #  |   #   ..   #   |     vec4 x+TX: columns x+4TX .. x+7TX
//     ..   |                          |                |
//    y+7TY |  #      #      #      #  |   #   ..   #   |   A box is 4 x 4 sums: one vec4 of tile_a
//          +--------------------------+----------------+   times one vec4 of tile_b.
//    rows of a: m
//
// For one term, a thread loads two vec4s of tile_a and two of tile_b, and adds their 8 x 8 products
// to `sums` with 16 vec4 multiply-adds. Adjacent threads load adjacent vec4s, so there are no bank
// conflicts. Exception: if a codec decodes half a word at once, a vec4 of tile_b has four adjacent
// columns (`columns_of` in matmul_quantized.wgsl), and so does the thread.
override TX: u32 = 8u;              // threads per workgroup along n
override TY: u32 = 16u;             // threads per workgroup along m
override A_BY_TERM: bool = true;    // terms of a row of a are adjacent in memory, else rows of a term
override A_FOURS: u32 = 528u;       // TK * (2 TY + 1)
override B_FOURS: u32 = 272u;       // TK * (2 TX + 1)
const TK = 16u;                     // terms in workgroup memory

// By term, then by vec4 of rows or columns. One spare vec4 per term avoids bank conflicts between
// threads that write the same vec4 of successive terms.
var<workgroup> tile_a: array<vec4<f32>, A_FOURS>;
var<workgroup> tile_b: array<vec4<f32>, B_FOURS>;

// The 8 x 8 sums of the thread: 8 rows of two vec4s. Every index is a constant, so they stay in
// registers.
var<private> sums: array<vec4<f32>, 16>;

// The rows (or columns) of vec4 number `four`. Adjacent vec4s have adjacent rows, so adjacent
// threads access adjacent memory.
fn spread(four: u32, threads: u32) -> vec4<u32> {
    return vec4(four % threads + 4u * threads * (four / threads)) + threads * vec4(0u, 1u, 2u, 3u);
}

// The fetched vec4s of the next terms: 2 TK / TX per thread (TX is at least 4). Indices are
// constants after loop unrolling.
var<private> next_a: array<vec4<f32>, 8>;

// Term and vec4 number of fetch `j` of a thread, in a tile with `fours` vec4s per term. Adjacent
// threads fetch adjacent memory.
fn place_of(j: u32, thread: u32, fours: u32, by_term: bool) -> vec2<u32> {
    let i = thread + j * TX * TY;
    return select(vec2(i / fours, i % fours), vec2(i % TK, i / TK), by_term);
}

// Fetches terms `first..first + TK` of the rows from `row` on. Rows past the last are copies of the
// last row; their sums are not stored. Terms past `end` are zero.
fn fetch_a(row: u32, first: u32, end: u32, thread: u32) {
    for (var j = 0u; j < 2u * TK / TX; j++) {
        let place = place_of(j, thread, 2u * TY, A_BY_TERM);
        let term = first + place.x;
        next_a[j] = vec4<f32>();
        if (term < end) {
            let rows = min(row + spread(place.y, TY), vec4(params.m - 1u));
            let at = params.a_first + rows * params.a_row + term * params.a_term;
            next_a[j] = vec4(a[at.x], a[at.y], a[at.z], a[at.w]);
        }
    }
}

fn place_a(thread: u32) {
    for (var j = 0u; j < 2u * TK / TX; j++) {
        let place = place_of(j, thread, 2u * TY, A_BY_TERM);
        tile_a[place.x * (2u * TY + 1u) + place.y] = next_a[j];
    }
}

// Adds the products of one term.
fn add_term(term: u32, x: u32, y: u32) {
    let row = term * (2u * TY + 1u) + y;
    let column = term * (2u * TX + 1u) + x;
    let a0 = tile_a[row];
    let a1 = tile_a[row + TY];
    let b0 = tile_b[column];
    let b1 = tile_b[column + TX];
    sums[0] += a0.x * b0;
    sums[1] += a0.x * b1;
    sums[2] += a0.y * b0;
    sums[3] += a0.y * b1;
    sums[4] += a0.z * b0;
    sums[5] += a0.z * b1;
    sums[6] += a0.w * b0;
    sums[7] += a0.w * b1;
    sums[8] += a1.x * b0;
    sums[9] += a1.x * b1;
    sums[10] += a1.y * b0;
    sums[11] += a1.y * b1;
    sums[12] += a1.z * b0;
    sums[13] += a1.z * b1;
    sums[14] += a1.w * b0;
    sums[15] += a1.w * b1;
}

// Adds the products of all terms. Partly unrolled by hand: on a driver that does not unroll the
// loop, this saves an eighth of the time.
fn add_terms(x: u32, y: u32) {
    for (var term = 0u; term < TK; term += 8u) {
        add_term(term + 0u, x, y);
        add_term(term + 1u, x, y);
        add_term(term + 2u, x, y);
        add_term(term + 3u, x, y);
        add_term(term + 4u, x, y);
        add_term(term + 5u, x, y);
        add_term(term + 6u, x, y);
        add_term(term + 7u, x, y);
    }
}

fn bias_of(columns: vec4<u32>) -> vec4<f32> {
    if (params.has_bias == 0u) {
        return vec4<f32>();
    }
    let at = params.bias_first + min(columns, vec4(params.n - 1u));
    return vec4(bias[at.x], bias[at.y], bias[at.z], bias[at.w]);
}

fn store(at: u32, value: f32) {
    if (params.add == 1u) { out[at] += value; } else { out[at] = value; }
}

fn store_four(first: u32, columns: vec4<u32>, values: vec4<f32>) {
    if (columns.x < params.n) { store(first + columns.x, values.x); }
    if (columns.y < params.n) { store(first + columns.y, values.y); }
    if (columns.z < params.n) { store(first + columns.z, values.z); }
    if (columns.w < params.n) { store(first + columns.w, values.w); }
}

fn store_row(start: u32, row: u32, left: vec4<u32>, right: vec4<u32>, left_values: vec4<f32>, right_values: vec4<f32>) {
    if (row < params.m) {
        store_four(start + row * params.out_row, left, left_values);
        store_four(start + row * params.out_row, right, right_values);
    }
}

@compute @workgroup_size(TX, TY)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = id.x + id.y * grid.x;
    if (group >= params.groups) {
        return;
    }
    prepare_b(thread);
    // Adjacent workgroups share rows of a, and b fits a cache.
    let columns = (params.n + 8u * TX - 1u) / (8u * TX);
    let rows = (params.m + 8u * TY - 1u) / (8u * TY);
    let column = (group % columns) * 8u * TX;
    let row = (group / columns % rows) * 8u * TY;
    let chunk = group / columns / rows;
    let end = min(params.k, (chunk + 1u) * params.chunk);
    let x = thread % TX;
    let y = thread / TX;
    var first = chunk * params.chunk;
    fetch_a(row, first, end, thread);
    fetch_b(column, first, end, thread);
    loop {
        place_a(thread);
        place_b(thread);
        workgroupBarrier();
        first += TK;
        if (first < end) {
            fetch_a(row, first, end, thread);
            fetch_b(column, first, end, thread);
        }
        add_terms(x, y);
        if (first >= end) {
            break;
        }
        workgroupBarrier();
    }
    let left = column + columns_of(x);
    let right = column + columns_of(x + TX);
    let bias_left = bias_of(left);
    let bias_right = bias_of(right);
    let start = params.out_first + chunk * params.out_chunk;
    let top = row + y;
    store_row(start, top, left, right, params.scale * (sums[0] + bias_left), params.scale * (sums[1] + bias_right));
    store_row(start, top + TY, left, right, params.scale * (sums[2] + bias_left), params.scale * (sums[3] + bias_right));
    store_row(start, top + 2u * TY, left, right, params.scale * (sums[4] + bias_left), params.scale * (sums[5] + bias_right));
    store_row(start, top + 3u * TY, left, right, params.scale * (sums[6] + bias_left), params.scale * (sums[7] + bias_right));
    store_row(start, top + 4u * TY, left, right, params.scale * (sums[8] + bias_left), params.scale * (sums[9] + bias_right));
    store_row(start, top + 5u * TY, left, right, params.scale * (sums[10] + bias_left), params.scale * (sums[11] + bias_right));
    store_row(start, top + 6u * TY, left, right, params.scale * (sums[12] + bias_left), params.scale * (sums[13] + bias_right));
    store_row(start, top + 7u * TY, left, right, params.scale * (sums[14] + bias_left), params.scale * (sums[15] + bias_right));
}
