// Causal grouped-query attention with an online softmax (FlashAttention-2). No tokens x tokens
// matrix is in memory. A workgroup takes a block of ROWS tokens of one head and loops over blocks
// of COLUMNS tokens of the other head. In `forward` and `query_gradient`, rows are queries and
// columns are keys. In `value_gradient` and `key_gradient`, rows are keys and columns are queries.
// So no two workgroups add to the same element. Matrices of queries start at token `first`, those
// of keys at token 0. Runs unchecked: `ops::attention` proves on the host that every index is in
// its tensor.

struct Params {
    tokens: u32,     // keys; the end of the queries
    heads: u32,      // query heads, a multiple of kv_heads
    kv_heads: u32,
    scale: f32,      // of the scores
    window: u32,     // size of the attention window, including the token itself
    first: u32,      // the first query
    add: u32,        // 1: results are added to `out`
    pad: u32,
}

@group(0) @binding(0) var<storage, read> row_a: array<vec4<f32>>;      // q, or k where rows are keys; delta: out
@group(0) @binding(1) var<storage, read> row_b: array<vec4<f32>>;      // d_out, or v where rows are keys
@group(0) @binding(2) var<storage, read> column_a: array<vec4<f32>>;   // k, or q
@group(0) @binding(3) var<storage, read> column_b: array<vec4<f32>>;   // v, or d_out
@group(0) @binding(4) var<storage, read> starts: array<u32>;           // first token of the sample of each token; read by `start_of`
@group(0) @binding(5) var<storage, read> lse: array<f32>;              // [queries, heads]
@group(0) @binding(6) var<storage, read> delta: array<f32>;            // [queries, heads]
@group(0) @binding(7) var<storage, read_write> out: array<vec4<f32>>;  // out, or the gradient of the rows
@group(0) @binding(8) var<storage, read_write> row_sums: array<f32>;   // output: lse or delta
@group(1) @binding(0) var<uniform> params: Params;

override HEAD: u32 = 32u;     // vec4s of a head: at most TX * MAX_PARTS
override TX: u32 = 8u;        // threads along columns, 4 columns each; also the vec4s of a head per step
override TY: u32 = 16u;       // threads along rows, 4 rows each: at least TX, and a divisor of 4 * TX
override VALUES: u32 = 8u;    // columns per step of the value sums: a divisor of COLUMNS, a multiple of 4
override ROWS: u32 = 4u * TY;
override COLUMNS: u32 = 4u * TX;
override PARTS: u32 = (HEAD + TX - 1u) / TX;   // vec4s of an output row per thread
override WIDTH: u32 = PARTS * TX;
override STRIDE: u32 = TX + 1u;                // odd, so that adjacent rows are in different banks
const MAX_PARTS = 8u;
const LOWEST = -1e38;         // below every score, and far enough from infinity

var<workgroup> row_tile: array<vec4<f32>, ROWS * STRIDE>;     // a part of the rows, or the weights of the columns
var<workgroup> column_tile: array<vec4<f32>, COLUMNS * STRIDE>;   // a part of the columns; at least VALUES * WIDTH vec4s
var<workgroup> partial: array<f32, ROWS * TX>;                // partial results of the threads of a row

// Tokens of one head: element `i` of token `t` is at `t * stride + offset + i`. The offset of
// queries may be negative: u32 wraps.
struct Run {
    first: u32,
    stride: u32,
    offset: u32,
}

// 4 rows of a thread, 4 columns each.
alias Tile = array<vec4<f32>, 4>;
// 4 rows of a thread for each of its parts.
alias Sums = array<vec4<f32>, 4u * MAX_PARTS>;

fn query_run(first: u32, head: u32) -> Run {
    let stride = params.heads * HEAD;
    return Run(first, stride, head * HEAD - params.first * stride);
}

fn key_run(first: u32, head: u32) -> Run {
    return Run(first, params.kv_heads * HEAD, head * HEAD);
}

fn row_of(run: Run, token: u32, column: u32, second: bool) -> vec4<f32> {
    if (token >= params.tokens || column >= HEAD) {
        return vec4<f32>();
    }
    let i = token * run.stride + run.offset + column;
    if (second) {
        return row_b[i];
    }
    return row_a[i];
}

fn column_of(run: Run, token: u32, column: u32, second: bool) -> vec4<f32> {
    if (token >= params.tokens || column >= HEAD) {
        return vec4<f32>();
    }
    let i = token * run.stride + run.offset + column;
    if (second) {
        return column_b[i];
    }
    return column_a[i];
}

// The vec4s that a thread loads into workgroup memory next. They are fetched during the present
// products, to hide the memory latency.
struct Carried {
    rows: Tile,
    columns: Tile,
}

fn carry(rows: Run, columns: Run, depth: u32, second: bool, at: vec2<u32>) -> Carried {
    var carried: Carried;
    for (var i = 0u; i < 4u; i++) {
        carried.rows[i] = row_of(rows, rows.first + at.y + TY * i, depth + at.x, second);
    }
    for (var i = 0u; i < COLUMNS / TY; i++) {
        // Slot TX * j + x has column 4 * x + j: adjacent threads read adjacent slots, and each
        // thread has 4 adjacent columns.
        let slot = at.y + TY * i;
        carried.columns[i] = column_of(columns, columns.first + 4u * (slot % TX) + slot / TX, depth + at.x, second);
    }
    return carried;
}

// The products of the thread's rows and columns: of row_b and column_b, or of row_a and column_a.
fn products(rows: Run, columns: Run, second: bool, at: vec2<u32>) -> Tile {
    var sums = Tile();
    var carried = carry(rows, columns, 0u, second, at);
    for (var depth = 0u; depth < HEAD; depth += TX) {
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            row_tile[(at.y + TY * i) * STRIDE + at.x] = carried.rows[i];
        }
        for (var i = 0u; i < COLUMNS / TY; i++) {
            column_tile[(at.y + TY * i) * STRIDE + at.x] = carried.columns[i];
        }
        workgroupBarrier();
        if (depth + TX < HEAD) {
            carried = carry(rows, columns, depth + TX, second, at);
        }
        for (var d = 0u; d < TX; d++) {
            let b0 = column_tile[at.x * STRIDE + d];
            let b1 = column_tile[(at.x + TX) * STRIDE + d];
            let b2 = column_tile[(at.x + 2u * TX) * STRIDE + d];
            let b3 = column_tile[(at.x + 3u * TX) * STRIDE + d];
            for (var i = 0u; i < 4u; i++) {
                let a = row_tile[(at.y + TY * i) * STRIDE + d];
                sums[i] += a.x * vec4(b0.x, b1.x, b2.x, b3.x);
                sums[i] += a.y * vec4(b0.y, b1.y, b2.y, b3.y);
                sums[i] += a.z * vec4(b0.z, b1.z, b2.z, b3.z);
                sums[i] += a.w * vec4(b0.w, b1.w, b2.w, b3.w);
            }
        }
    }
    return sums;
}

// The share of a thread in VALUES columns of WIDTH vec4s.
fn carry_values(columns: Run, first: u32, second: bool, at: vec2<u32>) -> Tile {
    var carried: Tile;
    for (var i = 0u; i < COLUMNS / TY; i++) {
        let slot = at.x + TX * (at.y + TY * i);
        carried[i] = column_of(columns, columns.first + first + slot / WIDTH, slot % WIDTH, second);
    }
    return carried;
}

// Adds the columns (of column_b, or column_a), times the weights in the row tile, to the sums of
// the rows of the thread.
fn add_weighted(sums: ptr<function, Sums>, columns: Run, second: bool, at: vec2<u32>) {
    var carried = carry_values(columns, 0u, second, at);
    for (var first = 0u; first < COLUMNS; first += VALUES) {
        workgroupBarrier();
        for (var i = 0u; i < COLUMNS / TY; i++) {
            column_tile[at.x + TX * (at.y + TY * i)] = carried[i];
        }
        workgroupBarrier();
        if (first + VALUES < COLUMNS) {
            carried = carry_values(columns, first + VALUES, second, at);
        }
        for (var k = 0u; k < VALUES; k += 4u) {
            var weights: Tile;
            for (var i = 0u; i < 4u; i++) {
                weights[i] = row_tile[(at.y + TY * i) * STRIDE + (first + k) / 4u];
            }
            for (var part = 0u; part < PARTS; part++) {
                let value = k * WIDTH + part * TX + at.x;
                let v0 = column_tile[value];
                let v1 = column_tile[value + WIDTH];
                let v2 = column_tile[value + 2u * WIDTH];
                let v3 = column_tile[value + 3u * WIDTH];
                for (var i = 0u; i < 4u; i++) {
                    var sum = (*sums)[4u * part + i];
                    sum += weights[i].x * v0;
                    sum += weights[i].y * v1;
                    sum += weights[i].z * v2;
                    sum += weights[i].w * v3;
                    (*sums)[4u * part + i] = sum;
                }
            }
        }
    }
}

// Writes the sums of the rows of the thread, each times its factor.
fn store(sums: ptr<function, Sums>, factors: vec4<f32>, rows: Run, at: vec2<u32>) {
    for (var i = 0u; i < 4u; i++) {
        let token = rows.first + at.y + TY * i;
        for (var part = 0u; part < PARTS; part++) {
            let column = part * TX + at.x;
            if (token < params.tokens && column < HEAD) {
                let to = token * rows.stride + rows.offset + column;
                var sum = (*sums)[4u * part + i] * factors[i];
                if (params.add != 0u) {
                    sum += out[to];
                }
                out[to] = sum;
            }
        }
    }
}

// The first token that a token attends to: the start of its sample or of its window. It is
// monotonic in the token. A token past the end gets a start past all tokens.
fn start_of(token: u32) -> u32 {
    if (token < params.tokens) {
        return max(starts[token], token + 1u - min(token + 1u, params.window));
    }
    return 0xffffffffu;
}

// The first workgroup takes the last block of queries. That block has the most columns, and long
// work should start first.
fn query_block(group: vec3<u32>, grid: vec3<u32>) -> Run {
    return query_run(params.first + (grid.y - 1u - group.y) * ROWS, group.x);
}

// The range of keys of a block of queries. It starts at the first key of its first query.
fn keys_of(queries: Run, head: u32) -> Run {
    return key_run(start_of(queries.first), head / (params.heads / params.kv_heads));
}

fn starts_of_rows(rows: Run, at: vec2<u32>) -> vec4<u32> {
    let token = rows.first + at.y;
    return vec4(start_of(token), start_of(token + TY), start_of(token + 2u * TY), start_of(token + 3u * TY));
}

// Which keys (columns) of the thread a query attends to.
fn sees(query: u32, start: u32, keys: Run, at: vec2<u32>) -> vec4<bool> {
    let key = keys.first + 4u * at.x + vec4(0u, 1u, 2u, 3u);
    return (key <= vec4(query)) & (key >= vec4(start));
}

@compute @workgroup_size(TX, TY)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let at = thread.xy;
    let rows = query_block(group, grid);
    let end = min(rows.first + ROWS, params.tokens);
    let start = starts_of_rows(rows, at);
    var columns = keys_of(rows, group.x);
    var sums = Sums();
    var highest = vec4(LOWEST);
    var total = vec4<f32>();    // over the columns of the thread
    for (; columns.first < end; columns.first += COLUMNS) {
        var scores = products(rows, columns, false, at);
        for (var i = 0u; i < 4u; i++) {
            let row = at.y + TY * i;
            let score = select(vec4(LOWEST), scores[i] * params.scale, sees(rows.first + row, start[i], columns, at));
            scores[i] = score;
            partial[row * TX + at.x] = max(max(score.x, score.y), max(score.z, score.w));
        }
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let row = at.y + TY * i;
            var top = highest[i];
            for (var x = 0u; x < TX; x++) {
                top = max(top, partial[row * TX + x]);
            }
            // Before the first key of a row all scores are LOWEST, and exp(LOWEST - LOWEST) is 1,
            // not 0.
            let weights = select(exp(scores[i] - top), vec4<f32>(), scores[i] == vec4(LOWEST));
            let shrink = exp(highest[i] - top);
            row_tile[row * STRIDE + at.x] = weights;
            total[i] = total[i] * shrink + (weights.x + weights.y) + (weights.z + weights.w);
            highest[i] = top;
            for (var part = 0u; part < PARTS; part++) {
                sums[4u * part + i] *= shrink;
            }
        }
        add_weighted(&sums, columns, true, at);
    }
    for (var i = 0u; i < 4u; i++) {
        partial[(at.y + TY * i) * TX + at.x] = total[i];
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        let row = at.y + TY * i;
        total[i] = 0.0;
        for (var x = 0u; x < TX; x++) {
            total[i] += partial[row * TX + x];
        }
        if (at.x == 0u && rows.first + row < params.tokens) {
            row_sums[(rows.first + row - params.first) * params.heads + group.x] = highest[i] + log(total[i]);
        }
    }
    store(&sums, 1.0 / total, rows, at);
}

// The sum of out * d_out over a head: TX threads per row of [queries * heads, HEAD].
@compute @workgroup_size(TX, TY)
fn row_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let row = (group.x + group.y * grid.x) * TY + thread.y;
    let exists = row < (params.tokens - params.first) * params.heads;
    var sum = 0.0;
    for (var column = thread.x; column < HEAD && exists; column += TX) {
        sum += dot(row_a[row * HEAD + column], row_b[row * HEAD + column]);
    }
    partial[thread.y * TX + thread.x] = sum;
    workgroupBarrier();
    if (thread.x == 0u && exists) {
        sum = 0.0;
        for (var x = 0u; x < TX; x++) {
            sum += partial[thread.y * TX + x];
        }
        row_sums[row] = sum;
    }
}

@compute @workgroup_size(TX, TY)
fn query_gradient(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let at = thread.xy;
    let rows = query_block(group, grid);
    let end = min(rows.first + ROWS, params.tokens);
    let start = starts_of_rows(rows, at);
    var row_lse = vec4<f32>();
    var row_delta = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
        let row = (min(rows.first + at.y + TY * i, params.tokens - 1u) - params.first) * params.heads + group.x;
        row_lse[i] = lse[row];
        row_delta[i] = delta[row];
    }
    var columns = keys_of(rows, group.x);
    var sums = Sums();
    for (; columns.first < end; columns.first += COLUMNS) {
        let scores = products(rows, columns, false, at);
        let slopes = products(rows, columns, true, at);
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let row = at.y + TY * i;
            let seen = sees(rows.first + row, start[i], columns, at);
            let weights = exp(select(vec4(LOWEST), scores[i] * params.scale - row_lse[i], seen));
            row_tile[row * STRIDE + at.x] = weights * (slopes[i] - row_delta[i]);
        }
        add_weighted(&sums, columns, false, at);
    }
    store(&sums, vec4(params.scale), rows, at);
}

// The values of the 4 columns of the thread, if columns are queries.
struct Queries {
    start: vec4<u32>,
    lse: vec4<f32>,
}

fn indices_of(columns: Run, head: u32, at: vec2<u32>) -> vec4<u32> {
    let token = min(columns.first + 4u * at.x + vec4(0u, 1u, 2u, 3u), vec4(params.tokens - 1u));
    return (token - params.first) * params.heads + head;
}

fn queries_of(columns: Run, head: u32, at: vec2<u32>) -> Queries {
    let token = columns.first + 4u * at.x;
    let i = indices_of(columns, head, at);
    let start = vec4(start_of(token), start_of(token + 1u), start_of(token + 2u), start_of(token + 3u));
    return Queries(start, vec4(lse[i.x], lse[i.y], lse[i.z], lse[i.w]));
}

// The weights of the queries (columns) of the thread for a key.
fn weights_of(key: u32, scores: vec4<f32>, queries: Queries, columns: Run, at: vec2<u32>) -> vec4<f32> {
    let query = columns.first + 4u * at.x + vec4(0u, 1u, 2u, 3u);
    let seen = (query >= vec4(key)) & (queries.start <= vec4(key));
    return exp(select(vec4(LOWEST), scores * params.scale - queries.lse, seen));
}

// The first query that may attend to keys from `first_key` on.
fn first_query(first_key: u32) -> u32 {
    return max(first_key, params.first);
}

// Whether a query from `query` on attends to a key before `end`. If any does, the first one does.
fn reaches(query: u32, end: u32) -> bool {
    return start_of(query) < end;
}

@compute @workgroup_size(TX, TY)
fn value_gradient(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let at = thread.xy;
    let rows = key_run(group.y * ROWS, group.x);
    let end = min(rows.first + ROWS, params.tokens);
    let shared_by = params.heads / params.kv_heads;
    var sums = Sums();
    for (var head = group.x * shared_by; head < (group.x + 1u) * shared_by; head++) {
        var columns = query_run(first_query(rows.first), head);
        for (; reaches(columns.first, end); columns.first += COLUMNS) {
            let scores = products(rows, columns, false, at);
            let queries = queries_of(columns, head, at);
            workgroupBarrier();
            for (var i = 0u; i < 4u; i++) {
                let row = at.y + TY * i;
                row_tile[row * STRIDE + at.x] = weights_of(rows.first + row, scores[i], queries, columns, at);
            }
            add_weighted(&sums, columns, true, at);
        }
    }
    store(&sums, vec4(1.0), rows, at);
}

@compute @workgroup_size(TX, TY)
fn key_gradient(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let at = thread.xy;
    let rows = key_run(group.y * ROWS, group.x);
    let end = min(rows.first + ROWS, params.tokens);
    let shared_by = params.heads / params.kv_heads;
    var sums = Sums();
    for (var head = group.x * shared_by; head < (group.x + 1u) * shared_by; head++) {
        var columns = query_run(first_query(rows.first), head);
        for (; reaches(columns.first, end); columns.first += COLUMNS) {
            let scores = products(rows, columns, false, at);
            let slopes = products(rows, columns, true, at);
            let queries = queries_of(columns, head, at);
            let query = indices_of(columns, head, at);
            let column_delta = vec4(delta[query.x], delta[query.y], delta[query.z], delta[query.w]);
            workgroupBarrier();
            for (var i = 0u; i < 4u; i++) {
                let row = at.y + TY * i;
                let weights = weights_of(rows.first + row, scores[i], queries, columns, at);
                row_tile[row * STRIDE + at.x] = weights * (slopes[i] - column_delta);
            }
            add_weighted(&sums, columns, false, at);
        }
    }
    store(&sums, vec4(params.scale), rows, at);
}
