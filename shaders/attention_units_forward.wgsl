// Forward attention on matrix units (FlashAttention-2). A template: see `ops::attention::source`.
//
// A workgroup has BLOCK queries of a head, 16 for each subgroup, and loops over ROUND keys. Queries
// and sums stay in registers. Keys, then values, go through `tile`; scores and weights go through
// workgroup memory. Two threads have a row of scores, half of the keys each.
//
// Weights are exp2(score - base). The base of a row follows its highest score only when that has
// risen by more than 2^(MAX_WEIGHT - NEW_WEIGHT): sums are then scaled, through workgroup memory.

@group(0) @binding(0) var<storage, read> queries: array<vec4<u32>>;    // copies
@group(0) @binding(1) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> values: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> exponents: array<i32>;        // [4, kv_heads]
@group(0) @binding(4) var<storage, read> starts: array<u32>;           // first token of the sample of each token
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>;  // [queries, heads * HEAD]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;        // [queries, heads]

// Exponents of weights: at a new base, and at most. f16 has 2^15.
const NEW_WEIGHT = 6.0;
const MAX_WEIGHT = 14.0;

// Each variable is a multiple of 16 bytes, as those of attention_units_tile.wgsl.
var<workgroup> of_rows: array<f32, THREADS>;
var<workgroup> again: vec4<u32>;

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
    var start = 0xffffffffu;
    if (query < params.tokens) {
        start = first_key_of(query, starts[query]);
    }
    let first_key = first_key_of(first_query, starts[first_query]);
    let rounds = (min(first_query + BLOCK, params.tokens) - first_key + ROUND - 1u) / ROUND;
    let factor = params.scale * LOG2_E * power(-exponents[QUERIES * params.kv_heads + kv_head] - exponents[KEYS * params.kv_heads + kv_head]);
    let value_factor = power(-exponents[VALUES * params.kv_heads + kv_head]);
    if (t == 0u) {
        again = vec4<u32>();
    }

    // The queries of the subgroup.
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
    //: end

    //: for c in GROUPS
    //: for i in GROUP
    var sum$c_$i: coop_mat16x16<f32, C>;
    //: end
    //: end
    var base = LOWEST;
    var total = 0.0;
    let key_base = (kv_head * params.rows + first_key) * VECS;
    //: for i in LOADS
    place(tile_at(t + THREADS * $i), keys[key_base + t + THREADS * $i]);
    //: end
    //: if PARTIAL
    if (t + THREADS * LOADS < ROUND * VECS) {
        place(tile_at(t + THREADS * LOADS), keys[key_base + t + THREADS * LOADS]);
    }
    //: end
    workgroupBarrier();
    for (var round = 0u; round < rounds; round++) {
        // The values are under way during the products of queries and keys.
        let present = key_base + round * (ROUND * VECS);
        //: for i in LOADS
        let value$i = values[present + t + THREADS * $i];
        //: end
        //: if PARTIAL
        let last_value = values[present + min(t + THREADS * LOADS, ROUND * VECS - 1u)];
        //: end
        //: for n in KEY_FRAGMENTS
        var score$n: coop_mat16x16<f32, C>;
        //: end
        //: for c in CHUNKS
        //: for i in CHUNK
        //: for n in KEY_FRAGMENTS
        {
            let key = coopLoad<coop_mat16x16<f16, B>>(&tile[16u * $n * TILE_STRIDE + 4u * (CHUNK * $c + $i)], TILE_STRIDE);
            score$n = coopMultiplyAdd(q$c_$i, key, score$n);
        }
        //: end
        //: end
        //: end
        //: for n in KEY_FRAGMENTS
        {
            let at = subgroup * 16u * SCORE_STRIDE + 4u * $n;
            coopStoreT(score$n, &scores[at], SCORE_STRIDE);
        }
        //: end
        workgroupBarrier();
        //: for i in LOADS
        place(tile_at(t + THREADS * $i), value$i);
        //: end
        //: if PARTIAL
        if (t + THREADS * LOADS < ROUND * VECS) {
            place(tile_at(t + THREADS * LOADS), last_value);
        }
        //: end
        // The next keys are under way during the softmax and the products of weights and values.
        let next = key_base + min(round + 1u, rounds - 1u) * (ROUND * VECS);
        //: for i in LOADS
        let key$i = keys[next + t + THREADS * $i];
        //: end
        //: if PARTIAL
        let last_key = keys[next + min(t + THREADS * LOADS, ROUND * VECS - 1u)];
        //: end

        let own = row * SCORE_STRIDE + half * OWN;
        let other = row * SCORE_STRIDE + (1u - half) * OWN;
        let own_key = vec4(first_key + round * ROUND + half * (4u * OWN)) + vec4(0u, 1u, 2u, 3u);
        let other_key = vec4(first_key + round * ROUND + (1u - half) * (4u * OWN)) + vec4(0u, 1u, 2u, 3u);
        var top = vec4(LOWEST);
        //: for i in OWN
        let seen$i = (own_key + vec4(4u * $i) >= vec4(start)) & (own_key + vec4(4u * $i) <= vec4(query));
        let own$i = scores[own + $i] * factor;
        top = max(top, select(vec4(LOWEST), own$i, seen$i));
        {
            let seen = (other_key + vec4(4u * $i) >= vec4(start)) & (other_key + vec4(4u * $i) <= vec4(query));
            top = max(top, select(vec4(LOWEST), scores[other + $i] * factor, seen));
        }
        //: end
        let highest = max(max(top.x, top.y), max(top.z, top.w));
        var shrink = 1.0;
        if (highest > base + MAX_WEIGHT) {
            if (base > LOWEST) {
                shrink = exp2(base + NEW_WEIGHT - highest);
                total *= shrink;
                again.x = 1u;
            }
            base = highest - NEW_WEIGHT;
        }
        if (half == 0u) {
            of_rows[row] = shrink;
        }
        //: for i in OWN
        {
            let weight = select(vec4<f32>(), exp2(own$i - base), seen$i);
            total += (weight.x + weight.y) + (weight.z + weight.w);
            weights[row * WEIGHT_STRIDE + half * OWN + $i] = vec4<f16>(weight);
        }
        //: end
        let scale_again = workgroupUniformLoad(&again);
        if (scale_again.x != 0u) {
            let shrink = of_rows[row];
            //: for c in GROUPS
            //: for i in GROUP
            {
                let at = subgroup * 16u * SCORE_STRIDE + 4u * $i;
                coopStoreT(sum$c_$i, &scores[at], SCORE_STRIDE);
            }
            //: end
            workgroupBarrier();
            //: for i in GROUP
            //: for j in TWO
            scores[row * SCORE_STRIDE + half * (2u * GROUP) + 2u * $i + $j] *= shrink;
            //: end
            //: end
            workgroupBarrier();
            //: for i in GROUP
            sum$c_$i = coopLoadT<coop_mat16x16<f32, C>>(&scores[subgroup * 16u * SCORE_STRIDE + 4u * $i], SCORE_STRIDE);
            //: end
            workgroupBarrier();
            //: end
            if (t == 0u) {
                again = vec4<u32>();
            }
            workgroupBarrier();
        }
        //: for k in KEY_FRAGMENTS
        {
            let weight = coopLoadT<coop_mat16x16<f16, A>>(&weights[subgroup * 16u * WEIGHT_STRIDE + 4u * $k], WEIGHT_STRIDE);
            //: for c in GROUPS
            //: for i in GROUP
            {
                let value = coopLoadT<coop_mat16x16<f16, B>>(&tile[16u * $k * TILE_STRIDE + 4u * (GROUP * (GROUPS * group.z + $c) + $i)], TILE_STRIDE);
                sum$c_$i = coopMultiplyAdd(weight, value, sum$c_$i);
            }
            //: end
            //: end
        }
        //: end
        workgroupBarrier();
        //: for i in LOADS
        place(tile_at(t + THREADS * $i), key$i);
        //: end
        //: if PARTIAL
        if (t + THREADS * LOADS < ROUND * VECS) {
            place(tile_at(t + THREADS * LOADS), last_key);
        }
        //: end
        workgroupBarrier();
    }

    // The sums of the weights of a row, and what the row's outputs are multiplied by.
    of_rows[t] = total;
    workgroupBarrier();
    total = of_rows[t] + of_rows[t ^ 1u];
    workgroupBarrier();
    if (half == 0u) {
        of_rows[row] = value_factor / total;
        if (query < params.tokens && group.z == 0u) {
            lse[(first_row + row) * params.heads + head] = (base + log2(total)) * LN_2;
        }
    }
    //: for c in GROUPS
    //: for i in GROUP
    {
        let at = subgroup * 16u * SCORE_STRIDE + 4u * $i;
        coopStoreT(sum$c_$i, &scores[at], SCORE_STRIDE);
    }
    //: end
    workgroupBarrier();
    for (var n = t; n < BLOCK * (4u * GROUP); n += THREADS) {
        let of_row = n / (4u * GROUP);
        let of_query = first_row + of_row;
        let column = 4u * GROUP * (GROUPS * group.z + $c) + n % (4u * GROUP);
        if (params.first + of_query < params.tokens && column < HEAD) {
            out[(of_query * params.heads + head) * HEAD + column] = scores[of_row * SCORE_STRIDE + n % (4u * GROUP)] * of_rows[of_row];
        }
    }
    workgroupBarrier();
    //: end
}
