// The gradient of the queries on matrix units, as a template: see `ops::attention::source`.
//
// A workgroup has BLOCK queries of a head, 16 for each subgroup, and loops over ROUND keys. It
// computes scores and weights again. A weight times the difference of `slope` (the product of d_out
// and value) and the row's `delta` is the gradient of a score.

@group(0) @binding(0) var<storage, read> queries: array<vec4<u32>>;    // copies
@group(0) @binding(1) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> values: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> d_out: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> exponents: array<i32>;        // [4, kv_heads]
@group(0) @binding(5) var<storage, read> of_queries: array<vec4<u32>>; // [heads, query_rows], by `place_d_out`
@group(0) @binding(6) var<storage, read_write> gradient: array<vec4<f32>>;   // [queries, heads * HEAD]

// Each variable is a multiple of 16 bytes, as those of attention_units_tile.wgsl.
var<workgroup> slopes: array<vec4<f32>, SCORES>;
var<workgroup> of_rows: array<f32, BLOCK>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let subgroup = t / 32u;
    let row = t / 2u;
    let half = t % 2u;
    let head = group.x;
    let kv_head = head / (params.heads / params.kv_heads);
    // The first workgroup takes the last block, which has the most keys.
    let first_row = (grid.y - 1u - group.y) * BLOCK;
    let first_query = params.first + first_row;
    let query = first_query + row;
    let of_query = of_queries[head * params.query_rows + first_row + row];
    let row_lse = bitcast<f32>(of_query.y);
    let row_delta = bitcast<f32>(of_query.z);
    let first_key = of_queries[head * params.query_rows + first_row].x;
    let rounds = (min(first_query + BLOCK, params.tokens) - first_key + ROUND - 1u) / ROUND;
    let query_exponent = exponents[QUERIES * params.kv_heads + kv_head] - balance_of(of_query.w);
    let key_exponent = exponents[KEYS * params.kv_heads + kv_head];
    let value_exponent = exponents[VALUES * params.kv_heads + kv_head];
    let factor = params.scale * LOG2_E * power(-query_exponent - key_exponent);
    let drop = i32(of_query.w);
    let slope_factor = power(drop - SLOPE_EXPONENT);

    // The queries of the subgroup, and their d_out.
    let query_base = (head * params.query_rows + first_row) * VECS;
    //: for c in CHUNKS
    //: for i in CHUNK
    {
        let n = t + THREADS * $i;
        place(stage_at(n), queries[query_base + staged(n, $cu)]);
    }
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    let q$c_$i = coopLoadT<coop_mat16x16<f16, A>>(&tile[subgroup * 16u * STAGE_STRIDE + 4u * $i], STAGE_STRIDE);
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    {
        let n = t + THREADS * $i;
        place(stage_at(n), d_out[query_base + staged(n, $cu)]);
    }
    //: end
    workgroupBarrier();
    //: for i in CHUNK
    let d$c_$i = coopLoadT<coop_mat16x16<f16, A>>(&tile[subgroup * 16u * STAGE_STRIDE + 4u * $i], STAGE_STRIDE);
    //: end
    workgroupBarrier();
    //: end

    //: for c in SUMS
    var sum$c: coop_mat16x16<f32, C>;
    //: end
    for (var round = 0u; round < rounds; round++) {
        let first = first_key + round * ROUND;
        let base = (kv_head * params.rows + first) * VECS;
        {
            //: for i in LOADS
            let key$i = keys[base + t + THREADS * $i];
            let value$i = values[base + t + THREADS * $i];
            //: end
            //: for i in LOADS
            place(tile_at(t + THREADS * $i), key$i);
            place(VALUE_TILE + tile_at(t + THREADS * $i), value$i);
            //: end
            //: if PARTIAL
            if (t + THREADS * LOADS < ROUND * VECS) {
                place(tile_at(t + THREADS * LOADS), keys[base + t + THREADS * LOADS]);
                place(VALUE_TILE + tile_at(t + THREADS * LOADS), values[base + t + THREADS * LOADS]);
            }
            //: end
        }
        workgroupBarrier();
        //: for n in KEY_FRAGMENTS
        {
            var score: coop_mat16x16<f32, C>;
            var slope: coop_mat16x16<f32, C>;
            //: for c in CHUNKS
            //: for i in CHUNK
            {
                let key = coopLoad<coop_mat16x16<f16, B>>(&tile[16u * $n * TILE_STRIDE + 4u * (CHUNK * $c + $i)], TILE_STRIDE);
                score = coopMultiplyAdd(q$c_$i, key, score);
                let value = coopLoad<coop_mat16x16<f16, B>>(&tile[VALUE_TILE + 16u * $n * TILE_STRIDE + 4u * (CHUNK * $c + $i)], TILE_STRIDE);
                slope = coopMultiplyAdd(d$c_$i, value, slope);
            }
            //: end
            //: end
            let at = subgroup * 16u * SCORE_STRIDE + 4u * $n;
            coopStoreT(score, &scores[at], SCORE_STRIDE);
            coopStoreT(slope, &slopes[at], SCORE_STRIDE);
        }
        //: end
        workgroupBarrier();
        let key = vec4(first + half * (4u * OWN)) + vec4(0u, 1u, 2u, 3u);
        //: for i in OWN
        {
            let at = row * SCORE_STRIDE + half * OWN + $i;
            let seen = (key + vec4(4u * $i) >= vec4(of_query.x)) & (key + vec4(4u * $i) <= vec4(query));
            let weight = select(vec4<f32>(), exp2(scores[at] * factor - row_lse), seen);
            weights[row * WEIGHT_STRIDE + half * OWN + $i] = vec4<f16>(weight * (slopes[at] - row_delta) * slope_factor);
        }
        //: end
        workgroupBarrier();
        //: for k in KEY_FRAGMENTS
        {
            let weight = coopLoadT<coop_mat16x16<f16, A>>(&weights[subgroup * 16u * WEIGHT_STRIDE + 4u * $k], WEIGHT_STRIDE);
            //: for c in SUMS
            {
                let key = coopLoadT<coop_mat16x16<f16, B>>(&tile[16u * $k * TILE_STRIDE + 4u * (SUMS * group.z + $c)], TILE_STRIDE);
                sum$c = coopMultiplyAdd(weight, key, sum$c);
            }
            //: end
        }
        //: end
        workgroupBarrier();
    }

    if (half == 0u) {
        of_rows[row] = power(SLOPE_EXPONENT - drop - exponents[D_OUT * params.kv_heads + kv_head]);
    }
    let all_rows = params.scale * power(-key_exponent - value_exponent);
    //: for c in SUMS
    {
        let at = subgroup * 16u * SCORE_STRIDE;
        coopStoreT(sum$c, &scores[at], SCORE_STRIDE);
    }
    workgroupBarrier();
    for (var n = t; n < BLOCK * 4u; n += THREADS) {
        let of_query = first_row + n / 4u;
        let column = 4u * (SUMS * group.z + $c) + n % 4u;
        if (params.first + of_query < params.tokens && column < HEAD) {
            gradient[(of_query * params.heads + head) * HEAD + column] = scores[n / 4u * SCORE_STRIDE + n % 4u] * of_rows[n / 4u] * all_rows;
        }
    }
    workgroupBarrier();
    //: end
}
