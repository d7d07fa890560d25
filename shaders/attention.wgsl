// Causal grouped-query attention with an online softmax: no matrix of tokens x tokens is ever in memory. A workgroup takes a block of
// ROWS tokens of one head and walks over blocks of COLUMNS tokens of another. Rows are queries and columns keys in `forward` and
// `query_gradient`; rows are keys and columns queries in `value_gradient` and `key_gradient`, so that no two workgroups add to the
// same element. Runs unchecked: `ops::attention` proves on the host that every tensor holds what is indexed here.

struct Params {
    tokens: u32,
    heads: u32,      // query heads, a multiple of kv_heads
    kv_heads: u32,
    scale: f32,      // of the scores
    window: u32,     // tokens that a token sees at most, itself among them
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> row_a: array<vec4<f32>>;      // q, or k where rows are keys; delta: out
@group(0) @binding(1) var<storage, read> row_b: array<vec4<f32>>;      // d_out, or v where rows are keys
@group(0) @binding(2) var<storage, read> column_a: array<vec4<f32>>;   // k, or q
@group(0) @binding(3) var<storage, read> column_b: array<vec4<f32>>;   // v, or d_out
@group(0) @binding(4) var<storage, read> starts: array<u32>;           // first token of each token's sample: `start_of` reads it
@group(0) @binding(5) var<storage, read> lse: array<f32>;              // [tokens, heads]
@group(0) @binding(6) var<storage, read> delta: array<f32>;            // [tokens, heads]
@group(0) @binding(7) var<storage, read_write> out: array<vec4<f32>>;  // out, or the gradient of the rows
@group(0) @binding(8) var<storage, read_write> row_sums: array<f32>;   // lse or delta, where it is made
@group(1) @binding(0) var<uniform> params: Params;

override HEAD: u32 = 32u;     // vec4s of a head: at most TX * MAX_PARTS
override TX: u32 = 8u;        // threads along columns, each with 4 of them; also the vec4s of a head that are multiplied at a time
override TY: u32 = 16u;       // threads along rows, each with 4 of them: at least TX, and a divisor of 4 * TX
override VALUES: u32 = 8u;    // columns that are added up at a time: a divisor of COLUMNS, a multiple of 4
override ROWS: u32 = 4u * TY;
override COLUMNS: u32 = 4u * TX;
override PARTS: u32 = (HEAD + TX - 1u) / TX;   // vec4s of an output row that a thread has
override WIDTH: u32 = PARTS * TX;
override STRIDE: u32 = TX + 1u;                // odd, so that neighbouring rows lie in different banks
const MAX_PARTS = 8u;
const LOWEST = -1e38;         // below every score, and far enough from infinity

var<workgroup> row_tile: array<vec4<f32>, ROWS * STRIDE>;     // a part of the rows, or the weights of the columns
var<workgroup> column_tile: array<vec4<f32>, COLUMNS * STRIDE>;   // a part of the columns: VALUES * WIDTH is not more
var<workgroup> partial: array<f32, ROWS * TX>;                // what each thread has of a row

// Tokens of one head: element `i` of token `t` is at `t * stride + offset + i`.
struct Run {
    first: u32,
    stride: u32,
    offset: u32,
}

// 4 rows of a thread, each with 4 columns.
alias Tile = array<vec4<f32>, 4>;
// 4 rows of a thread for each of its parts.
alias Sums = array<vec4<f32>, 4u * MAX_PARTS>;

fn query_run(first: u32, head: u32) -> Run {
    return Run(first, params.heads * HEAD, head * HEAD);
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

// What a thread carries to workgroup memory. It is read while the part before it is multiplied, to hide the way from memory.
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
        // Slot TX * j + x has column 4 * x + j: neighbouring threads read neighbouring slots, and yet each has 4 columns in a row.
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

// The thread's share of VALUES columns, all WIDTH vec4s of them.
fn carry_values(columns: Run, first: u32, second: bool, at: vec2<u32>) -> Tile {
    var carried: Tile;
    for (var i = 0u; i < COLUMNS / TY; i++) {
        let slot = at.x + TX * (at.y + TY * i);
        carried[i] = column_of(columns, columns.first + first + slot / WIDTH, slot % WIDTH, second);
    }
    return carried;
}

// Adds the columns (of column_b, or column_a), with the weights that lie in the row tile, to the sums of the thread's rows.
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

// Writes the sums of the thread's rows, each times its factor.
fn store(sums: ptr<function, Sums>, factors: vec4<f32>, rows: Run, at: vec2<u32>) {
    for (var i = 0u; i < 4u; i++) {
        let token = rows.first + at.y + TY * i;
        for (var part = 0u; part < PARTS; part++) {
            let column = part * TX + at.x;
            if (token < params.tokens && column < HEAD) {
                out[token * rows.stride + rows.offset + column] = (*sums)[4u * part + i] * factors[i];
            }
        }
    }
}

// The first token that a token sees: the start of its sample or of its window. It never falls from one token to the next. A token past
// the end has a start that no token reaches.
fn start_of(token: u32) -> u32 {
    if (token < params.tokens) {
        return max(starts[token], token + 1u - min(token + 1u, params.window));
    }
    return 0xffffffffu;
}

// The first block is the last one of the queries: it has the most columns, and what starts last should be short.
fn query_block(group: vec3<u32>, grid: vec3<u32>) -> Run {
    return query_run((grid.y - 1u - group.y) * ROWS, group.x);
}

// The keys of a block of queries: from the first one that its first query sees.
fn keys_of(queries: Run, head: u32) -> Run {
    return key_run(start_of(queries.first), head / (params.heads / params.kv_heads));
}

fn starts_of_rows(rows: Run, at: vec2<u32>) -> vec4<u32> {
    let token = rows.first + at.y;
    return vec4(start_of(token), start_of(token + TY), start_of(token + 2u * TY), start_of(token + 3u * TY));
}

// Which of the thread's keys, in columns, a query sees.
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
    var total = vec4<f32>();    // of the thread's own columns
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
            // Before a row's first key all is LOWEST, and exp(0) is not 0.
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
            row_sums[(rows.first + row) * params.heads + group.x] = highest[i] + log(total[i]);
        }
    }
    store(&sums, 1.0 / total, rows, at);
}

// The sum of out * d_out over a head: TX threads a row of [tokens * heads, HEAD].
@compute @workgroup_size(TX, TY)
fn row_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) thread: vec3<u32>) {
    let row = (group.x + group.y * grid.x) * TY + thread.y;
    let exists = row < params.tokens * params.heads;
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
        let row = min(rows.first + at.y + TY * i, params.tokens - 1u) * params.heads + group.x;
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

// What the thread's 4 columns have, where columns are queries.
struct Queries {
    start: vec4<u32>,
    lse: vec4<f32>,
}

fn indices_of(columns: Run, head: u32, at: vec2<u32>) -> vec4<u32> {
    let token = min(columns.first + 4u * at.x + vec4(0u, 1u, 2u, 3u), vec4(params.tokens - 1u));
    return token * params.heads + head;
}

fn queries_of(columns: Run, head: u32, at: vec2<u32>) -> Queries {
    let token = columns.first + 4u * at.x;
    let i = indices_of(columns, head, at);
    let start = vec4(start_of(token), start_of(token + 1u), start_of(token + 2u), start_of(token + 3u));
    return Queries(start, vec4(lse[i.x], lse[i.y], lse[i.z], lse[i.w]));
}

// The weights that the thread's queries, in columns, give to a key.
fn weights_of(key: u32, scores: vec4<f32>, queries: Queries, columns: Run, at: vec2<u32>) -> vec4<f32> {
    let query = columns.first + 4u * at.x + vec4(0u, 1u, 2u, 3u);
    let seen = (query >= vec4(key)) & (queries.start <= vec4(key));
    return exp(select(vec4(LOWEST), scores * params.scale - queries.lse, seen));
}

// Whether a block of queries from `query` on has any that sees a key before `end`: if any does, the first one does.
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
        var columns = query_run(rows.first, head);
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
        var columns = query_run(rows.first, head);
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
