// The f16 copies for attention on matrix units. A workgroup has BLOCK rows of a head of a tensor.
// Maxima ignore infinity and NaN, which stay what they are in a copy.

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;       // [queries, heads * HEAD]
@group(0) @binding(1) var<storage, read> keys: array<vec4<f32>>;          // [tokens, kv_heads * HEAD]
@group(0) @binding(2) var<storage, read> values: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_out: array<vec4<f32>>;        // the gradient of the output
@group(0) @binding(4) var<storage, read> out: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;              // first token of the sample of each token
@group(0) @binding(6) var<storage, read> lse: array<f32>;                 // [queries, heads]
@group(0) @binding(7) var<storage, read_write> delta: array<f32>;         // [queries, heads]
@group(0) @binding(8) var<storage, read_write> halves: array<vec4<u32>>;  // the copies
@group(0) @binding(9) var<storage, read_write> maxima: array<u32>;        // [4, heads, blocks]: bits of magnitudes
@group(0) @binding(10) var<storage, read_write> row_maxima: array<u32>;   // [heads, query_rows] of the d_out
@group(0) @binding(11) var<storage, read_write> exponents: array<i32>;    // [4, kv_heads]
@group(0) @binding(12) var<storage, read_write> of_queries: array<vec4<u32>>;   // [heads, query_rows], see `place_d_out`

override HEAD: u32 = 32u;     // vec4s of a head
override VECS: u32 = 16u;     // vec4<u32>s of a row of a copy
override PRODUCTS: u32 = BLOCK * VECS;
const LANES = 8u;             // threads of a row of `measure`

var<workgroup> partial: array<u32, BLOCK * LANES>;
var<workgroup> row_partial: array<u32, BLOCK>;
var<workgroup> products: array<f32, PRODUCTS>;

// A head of a tensor.
struct Part {
    tensor: u32,
    head: u32,
    heads: u32,   // of the tensor
}

// The columns of the grid: the heads of queries, keys, values and d_out.
fn part_of(column: u32) -> Part {
    let heads = params.heads;
    let kv_heads = params.kv_heads;
    if (column < heads) {
        return Part(QUERIES, column, heads);
    }
    if (column < heads + kv_heads) {
        return Part(KEYS, column - heads, kv_heads);
    }
    if (column < heads + 2u * kv_heads) {
        return Part(VALUES, column - heads - kv_heads, kv_heads);
    }
    return Part(D_OUT, column - heads - 2u * kv_heads, heads);
}

fn is_of_queries(part: Part) -> bool {
    return part.tensor == QUERIES || part.tensor == D_OUT;
}

// The tokens of the tensor.
fn tokens_of(part: Part) -> u32 {
    return select(params.tokens, params.tokens - params.first, is_of_queries(part));
}

// Rows of a head in the copy of the tensor.
fn rows_of(part: Part) -> u32 {
    return select(params.rows, params.query_rows, is_of_queries(part));
}

// The first row of the head in the copies, which follow one another: queries, keys, values.
fn base_of(part: Part) -> u32 {
    switch part.tensor {
        case KEYS: {
            return params.heads * params.query_rows + part.head * params.rows;
        }
        case VALUES: {
            return params.heads * params.query_rows + (params.kv_heads + part.head) * params.rows;
        }
        default: {
            return part.head * params.query_rows;
        }
    }
}

// A vec4 of a row. Zero past the last row and past the last element of a head.
fn element(part: Part, row: u32, column: u32) -> vec4<f32> {
    if (row >= tokens_of(part) || column >= HEAD) {
        return vec4<f32>();
    }
    let i = (row * part.heads + part.head) * HEAD + column;
    switch part.tensor {
        case QUERIES: {
            return queries[i];
        }
        case KEYS: {
            return keys[i];
        }
        case VALUES: {
            return values[i];
        }
        default: {
            return d_out[i];
        }
    }
}

// The bits of the largest finite magnitude: as integers, bits of positive floats have their order.
fn magnitude(x: vec4<f32>) -> u32 {
    let bits = bitcast<vec4<u32>>(x) & vec4(0x7fffffffu);
    let finite = select(vec4<u32>(), bits, bits < vec4(0x7f800000u));
    return max(max(finite.x, finite.y), max(finite.z, finite.w));
}

// The maximum of each block, and of each row of the d_out.
@compute @workgroup_size(THREADS)
fn measure(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let part = part_of(group.x);
    if (group.y * BLOCK >= rows_of(part)) {
        return;
    }
    for (var row = t / LANES; row < BLOCK; row += THREADS / LANES) {
        var highest = 0u;
        for (var column = t % LANES; column < HEAD; column += LANES) {
            highest = max(highest, magnitude(element(part, group.y * BLOCK + row, column)));
        }
        partial[row * LANES + t % LANES] = highest;
    }
    workgroupBarrier();
    if (t < BLOCK) {
        var highest = 0u;
        for (var lane = 0u; lane < LANES; lane++) {
            highest = max(highest, partial[t * LANES + lane]);
        }
        row_partial[t] = highest;
        if (part.tensor == D_OUT) {
            row_maxima[part.head * params.query_rows + group.y * BLOCK + t] = highest;
        }
    }
    workgroupBarrier();
    if (t == 0u) {
        var highest = 0u;
        for (var row = 0u; row < BLOCK; row++) {
            highest = max(highest, row_partial[row]);
        }
        maxima[(part.tensor * params.heads + part.head) * (params.rows / BLOCK) + group.y] = highest;
    }
}

// The maximum of the heads of a tensor that have the same factor. All threads of a workgroup call
// it.
fn maximum(part: Part, kv_head: u32, t: u32) -> u32 {
    let count = part.heads / params.kv_heads;
    let stride = params.rows / BLOCK;
    let blocks = rows_of(part) / BLOCK;
    let first = (part.tensor * params.heads + kv_head * count) * stride;
    var highest = 0u;
    for (var i = t; i < count * blocks; i += THREADS) {
        highest = max(highest, maxima[first + i / blocks * stride + i % blocks]);
    }
    workgroupBarrier();
    partial[t] = highest;
    workgroupBarrier();
    for (var i = 0u; i < THREADS; i++) {
        highest = max(highest, partial[i]);
    }
    return highest;
}

fn packed(x: vec4<f32>) -> vec2<u32> {
    return vec2(pack2x16float(x.xy), pack2x16float(x.zw));
}

fn unpacked(x: vec2<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(x.x), unpack2x16float(x.y));
}

// The copies of queries, keys and values.
@compute @workgroup_size(THREADS)
fn place(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let part = part_of(group.x);
    if (group.y * BLOCK >= rows_of(part)) {
        return;
    }
    let kv_head = part.head / (part.heads / params.kv_heads);
    let exponent = exponent_of(maximum(part, kv_head, t));
    // The first of the heads that share the factor writes it.
    if (group.y == 0u && t == 0u && part.head % (part.heads / params.kv_heads) == 0u) {
        exponents[part.tensor * params.kv_heads + kv_head] = exponent;
    }
    let balanced = part.tensor == QUERIES && params.training != 0u;
    var d_out_maximum = 0u;
    if (balanced) {
        d_out_maximum = maximum(Part(D_OUT, part.head, part.heads), kv_head, t);
    }
    for (var n = t; n < BLOCK * VECS; n += THREADS) {
        let row = group.y * BLOCK + n / VECS;
        let column = 2u * (n % VECS);
        var balance = 0;
        if (balanced) {
            balance = balance_of(drop_of(d_out_maximum, row_maxima[part.head * params.query_rows + row]));
        }
        let factor = power(exponent - balance);
        let low = packed(element(part, row, column) * factor);
        let high = packed(element(part, row, column + 1u) * factor);
        halves[(base_of(part) + group.y * BLOCK) * VECS + n] = vec4(low, high);
    }
}

// The copy of the d_out; `delta`, the sums of output times slope; and what the backward kernels
// need of each query: the first token that it sees, its log-sum-exp to the base 2, `delta` times
// the factors of d_out and values, and the drop of its slope.
//
// `delta` takes the d_out of the copy, not of the input: so their rounding cancels in the
// difference to the products of d_out and values.
@compute @workgroup_size(THREADS)
fn place_d_out(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let heads = params.heads;
    let part = Part(D_OUT, group.x, heads);
    let kv_head = part.head / (heads / params.kv_heads);
    let highest = maximum(part, kv_head, t);
    let exponent = exponent_of(highest);
    if (group.y == 0u && t == 0u && part.head % (heads / params.kv_heads) == 0u) {
        exponents[D_OUT * params.kv_heads + kv_head] = exponent;
    }
    let queries = tokens_of(part);
    for (var n = t; n < BLOCK * VECS; n += THREADS) {
        let row = group.y * BLOCK + n / VECS;
        let column = 2u * (n % VECS);
        let low = packed(element(part, row, column) * power(exponent));
        let high = packed(element(part, row, column + 1u) * power(exponent));
        halves[(base_of(part) + group.y * BLOCK) * VECS + n] = vec4(low, high);
        var product = 0.0;
        let i = (row * heads + part.head) * HEAD + column;
        if (row < queries && column < HEAD) {
            product = dot(out[i], unpacked(low) * power(-exponent));
        }
        if (row < queries && column + 1u < HEAD) {
            product += dot(out[i + 1u], unpacked(high) * power(-exponent));
        }
        products[n] = product;
    }
    workgroupBarrier();
    if (t < BLOCK) {
        let row = group.y * BLOCK + t;
        var facts = vec4(0xffffffffu, 0u, 0u, 0u);
        if (row < queries) {
            var sum = 0.0;
            for (var i = 0u; i < VECS; i++) {
                sum += products[t * VECS + i];
            }
            delta[row * heads + part.head] = sum;
            let start = first_key_of(params.first + row, starts[params.first + row]);
            let scaled = sum * power(exponent + exponents[VALUES * params.kv_heads + kv_head]);
            let drop = drop_of(highest, row_maxima[part.head * params.query_rows + row]);
            facts = vec4(start, bitcast<u32>(lse[row * heads + part.head] * LOG2_E), bitcast<u32>(scaled), drop);
        }
        of_queries[part.head * params.query_rows + row] = facts;
    }
}
