// The gradients of keys and values on matrix units, as a template: see `ops::attention::source`.
//
// A workgroup has BLOCK keys of a head, 16 for each subgroup, and loops over ROUND queries of each
// query head that uses them. Rows are keys. So every subgroup has the sums of its own rows.

@group(0) @binding(0) var<storage, read> queries: array<vec4<u32>>;    // copies
@group(0) @binding(1) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> values: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> d_out: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> exponents: array<i32>;        // [4, kv_heads]
@group(0) @binding(5) var<storage, read> of_queries: array<vec4<u32>>; // [heads, query_rows], by `place_d_out`
@group(0) @binding(6) var<storage, read_write> key_gradient: array<vec4<f32>>;     // [tokens, kv_heads * HEAD]
@group(0) @binding(7) var<storage, read_write> value_gradient: array<vec4<f32>>;

// Weights are multiplied by 2^14: f16 has smaller ones then.
const WEIGHT_EXPONENT = 14;

// Each variable is a multiple of 16 bytes, as those of attention_units_tile.wgsl.
var<workgroup> slopes: array<vec4<f32>, SCORES>;
var<workgroup> score_gradients: array<vec4<f16>, WEIGHTS>;
// Of the queries of a round: the first key, the factor of scores, the log-sum-exp, delta, and the
// factor of score gradients.
var<workgroup> query_start: array<vec4<u32>, QUERY_VECS>;
var<workgroup> query_factor: array<vec4<f32>, QUERY_VECS>;
var<workgroup> query_lse: array<vec4<f32>, QUERY_VECS>;
var<workgroup> query_delta: array<vec4<f32>, QUERY_VECS>;
var<workgroup> query_slope: array<vec4<f32>, QUERY_VECS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let subgroup = t / 32u;
    let row = t / 2u;
    let half = t % 2u;
    let kv_head = group.x;
    let shared_by = params.heads / params.kv_heads;
    let first_key = group.y * BLOCK;
    let key = first_key + row;
    let query_exponent = exponents[QUERIES * params.kv_heads + kv_head];
    let key_exponent = exponents[KEYS * params.kv_heads + kv_head];
    let value_exponent = exponents[VALUES * params.kv_heads + kv_head];
    let d_out_exponent = exponents[D_OUT * params.kv_heads + kv_head];

    // Queries see no later keys. The first keys of queries are in ascending order: the queries from
    // `end` on see no key of the block.
    let first_query = max(first_key, params.first);
    let first_head = kv_head * shared_by;
    let end_key = min(first_key + BLOCK, params.tokens);
    var end = first_query;
    var past = params.tokens;
    while (end < past) {
        let middle = (end + past) / 2u;
        if (of_queries[first_head * params.query_rows + middle - params.first].x < end_key) {
            end = middle + 1u;
        } else {
            past = middle;
        }
    }
    let rounds = (end - first_query + ROUND - 1u) / ROUND * shared_by;
    let first_row = first_query - params.first;

    // The keys and values of the subgroup.
    let key_base = (kv_head * params.rows + first_key) * VECS;
    //: for c in CHUNKS
    //: for i in CHUNK
    {
        let n = t + THREADS * $i;
        place(stage_at(n), keys[key_base + staged(n, $cu)]);
    }
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    let k$c_$i = coopLoadT<coop_mat16x16<f16, A>>(&tile[subgroup * 16u * STAGE_STRIDE + 4u * $i], STAGE_STRIDE);
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    {
        let n = t + THREADS * $i;
        place(stage_at(n), values[key_base + staged(n, $cu)]);
    }
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    let v$c_$i = coopLoadT<coop_mat16x16<f16, A>>(&tile[subgroup * 16u * STAGE_STRIDE + 4u * $i], STAGE_STRIDE);
    //: end
    workgroupBarrier();
    //: end

    //: for c in SUMS
    var key_sum$c: coop_mat16x16<f32, C>;
    var value_sum$c: coop_mat16x16<f32, C>;
    //: end
    let query_base = (first_head * params.query_rows + first_row) * VECS;
    //: for i in LOADS
    place(tile_at(t + THREADS * $i), queries[query_base + t + THREADS * $i]);
    place(VALUE_TILE + tile_at(t + THREADS * $i), d_out[query_base + t + THREADS * $i]);
    //: end
    //: if PARTIAL
    if (t + THREADS * LOADS < ROUND * VECS) {
        place(tile_at(t + THREADS * LOADS), queries[query_base + t + THREADS * LOADS]);
        place(VALUE_TILE + tile_at(t + THREADS * LOADS), d_out[query_base + t + THREADS * LOADS]);
    }
    //: end
    for (var round = 0u; round < rounds; round++) {
        let head = first_head + round % shared_by;
        let first = round / shared_by * ROUND;
        // The next queries are under way during the products.
        let after = min(round + 1u, rounds - 1u);
        let next = ((first_head + after % shared_by) * params.query_rows + first_row + after / shared_by * ROUND) * VECS;
        //: for i in LOADS
        let query$i = queries[next + t + THREADS * $i];
        let d_out$i = d_out[next + t + THREADS * $i];
        //: end
        //: if PARTIAL
        let last_query = queries[next + min(t + THREADS * LOADS, ROUND * VECS - 1u)];
        let last_d_out = d_out[next + min(t + THREADS * LOADS, ROUND * VECS - 1u)];
        //: end
        if (t < ROUND) {
            let of_query = of_queries[head * params.query_rows + first_row + first + t];
            let balance = balance_of(of_query.w);
            query_start[t / 4u][t % 4u] = of_query.x;
            query_factor[t / 4u][t % 4u] = params.scale * LOG2_E * power(balance - query_exponent - key_exponent);
            query_lse[t / 4u][t % 4u] = bitcast<f32>(of_query.y) - f32(WEIGHT_EXPONENT);
            query_delta[t / 4u][t % 4u] = bitcast<f32>(of_query.z);
            query_slope[t / 4u][t % 4u] = power(balance - SLOPE_EXPONENT - WEIGHT_EXPONENT);
        }
        workgroupBarrier();
        //: for n in KEY_FRAGMENTS
        {
            var score: coop_mat16x16<f32, C>;
            var slope: coop_mat16x16<f32, C>;
            //: for c in CHUNKS
            //: for i in CHUNK
            {
                let query = coopLoad<coop_mat16x16<f16, B>>(&tile[16u * $n * TILE_STRIDE + 4u * (CHUNK * $c + $i)], TILE_STRIDE);
                score = coopMultiplyAdd(k$c_$i, query, score);
                let d_out = coopLoad<coop_mat16x16<f16, B>>(&tile[VALUE_TILE + 16u * $n * TILE_STRIDE + 4u * (CHUNK * $c + $i)], TILE_STRIDE);
                slope = coopMultiplyAdd(v$c_$i, d_out, slope);
            }
            //: end
            //: end
            let at = subgroup * 16u * SCORE_STRIDE + 4u * $n;
            coopStoreT(score, &scores[at], SCORE_STRIDE);
            coopStoreT(slope, &slopes[at], SCORE_STRIDE);
        }
        //: end
        workgroupBarrier();
        let query = vec4(first_query + first + half * (4u * OWN)) + vec4(0u, 1u, 2u, 3u);
        //: for i in OWN
        {
            let at = row * SCORE_STRIDE + half * OWN + $i;
            let to = row * WEIGHT_STRIDE + half * OWN + $i;
            let column = half * OWN + $i;
            let seen = (query + vec4(4u * $i) >= vec4(key)) & (query_start[column] <= vec4(key));
            let weight = select(vec4<f32>(), exp2(scores[at] * query_factor[column] - query_lse[column]), seen);
            weights[to] = vec4<f16>(weight);
            score_gradients[to] = vec4<f16>(weight * (slopes[at] - query_delta[column]) * query_slope[column]);
        }
        //: end
        workgroupBarrier();
        //: for k in KEY_FRAGMENTS
        {
            let weight = coopLoadT<coop_mat16x16<f16, A>>(&weights[subgroup * 16u * WEIGHT_STRIDE + 4u * $k], WEIGHT_STRIDE);
            let score_gradient = coopLoadT<coop_mat16x16<f16, A>>(&score_gradients[subgroup * 16u * WEIGHT_STRIDE + 4u * $k], WEIGHT_STRIDE);
            //: for c in SUMS
            {
                let d_out = coopLoadT<coop_mat16x16<f16, B>>(&tile[VALUE_TILE + 16u * $k * TILE_STRIDE + 4u * (SUMS * group.z + $c)], TILE_STRIDE);
                value_sum$c = coopMultiplyAdd(weight, d_out, value_sum$c);
                let query = coopLoadT<coop_mat16x16<f16, B>>(&tile[16u * $k * TILE_STRIDE + 4u * (SUMS * group.z + $c)], TILE_STRIDE);
                key_sum$c = coopMultiplyAdd(score_gradient, query, key_sum$c);
            }
            //: end
        }
        //: end
        workgroupBarrier();
        //: for i in LOADS
        place(tile_at(t + THREADS * $i), query$i);
        place(VALUE_TILE + tile_at(t + THREADS * $i), d_out$i);
        //: end
        //: if PARTIAL
        if (t + THREADS * LOADS < ROUND * VECS) {
            place(tile_at(t + THREADS * LOADS), last_query);
            place(VALUE_TILE + tile_at(t + THREADS * LOADS), last_d_out);
        }
        //: end
    }

    // Two factors: each is in the range of f32, in any combination of the exponents.
    let key_factor = power(-query_exponent - d_out_exponent);
    let slope_factor = params.scale * power(SLOPE_EXPONENT - value_exponent);
    let value_factor = power(-WEIGHT_EXPONENT - d_out_exponent);
    //: for c in SUMS
    {
        let at = subgroup * 16u * SCORE_STRIDE;
        coopStoreT(key_sum$c, &scores[at], SCORE_STRIDE);
        coopStoreT(value_sum$c, &slopes[at], SCORE_STRIDE);
    }
    workgroupBarrier();
    for (var n = t; n < BLOCK * 4u; n += THREADS) {
        let token = first_key + n / 4u;
        let column = 4u * (SUMS * group.z + $c) + n % 4u;
        if (token < params.tokens && column < HEAD) {
            let to = (token * params.kv_heads + kv_head) * HEAD + column;
            var of_key = scores[n / 4u * SCORE_STRIDE + n % 4u] * key_factor * slope_factor;
            var of_value = slopes[n / 4u * SCORE_STRIDE + n % 4u] * value_factor;
            if (params.add != 0u) {
                of_key += key_gradient[to];
                of_value += value_gradient[to];
            }
            key_gradient[to] = of_key;
            value_gradient[to] = of_value;
        }
    }
    workgroupBarrier();
    //: end
}
