// The joined products of q, k and v of one new token as the inputs of cached_attention.wgsl,
// neither normalised nor rotated. Its key and value go to the cache, but nothing here reads them
// there. HEAD is even.

@group(0) @binding(0) var<storage, read> joined: array<vec4<f32>>;      // [heads + 2 kv_heads, HEAD]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>;     // [past + 1, kv_heads, HEAD]
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> query_gamma: array<vec4<f32>>; // NORM: [HEAD]
@group(0) @binding(6) var<storage, read> key_gamma: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> table: array<vec4<f32>>;       // [.., 2 rotated]: two pairs of cosine and sine

override NORM: bool = false;
const PARTS = 8u;       // of a head, for its sum of squares

// The factor of the RMS norm of a head in `query`.
fn norm_of(head: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < PARTS; i++) {
        sum += dots[head * PARTS + i];
    }
    return inverseSqrt(sum / f32(4u * HEAD) + params.epsilon);
}

// Normalises and rotates a pair of vec4s of a head in `query`. The first pairs turn. Those after
// them are the vec4s that stay.
fn turn(head: u32, pair: u32) {
    let turns = pair < params.rotated;
    let i = pair + select(params.rotated, 0u, turns);
    let j = pair + select(HEAD / 2u, params.rotated, turns);
    var a = query[head * HEAD + i];
    var b = query[head * HEAD + j];
    if (NORM) {
        let factor = norm_of(head);
        if (head < GROUP) {
            a *= factor * query_gamma[i];
            b *= factor * query_gamma[j];
        } else {
            a *= factor * key_gamma[i];
            b *= factor * key_gamma[j];
        }
    }
    if (turns) {
        let t = table[2u * (params.angles * params.rotated + pair)];
        let u = table[2u * (params.angles * params.rotated + pair) + 1u];
        let cosines = vec4(t.x, t.z, u.x, u.z);
        let sines = vec4(t.y, t.w, u.y, u.w);
        let turned = b * cosines + a * sines;
        a = a * cosines - b * sines;
        b = turned;
    }
    query[head * HEAD + i] = a;
    query[head * HEAD + j] = b;
}

// The queries, then the key. The first workgroup of a key head with the last run stores the key and
// the value.
fn fill_query(row: u32, kv_head: u32, thread: u32, is_last: bool) {
    for (var i = thread; i < (GROUP + 1u) * HEAD; i += WORKGROUP) {
        let head = select(params.heads + kv_head, row + i / HEAD, i < GROUP * HEAD);
        query[i] = joined[head * HEAD + i % HEAD];
    }
    workgroupBarrier();
    if (NORM) {
        if (thread < (GROUP + 1u) * PARTS) {
            var sum = 0.0;
            for (var column = thread % PARTS; column < HEAD; column += PARTS) {
                let vector = query[thread / PARTS * HEAD + column];
                sum += dot(vector, vector);
            }
            dots[thread] = sum;
        }
        workgroupBarrier();
    }
    for (var i = thread; i < (GROUP + 1u) * (HEAD / 2u); i += WORKGROUP) {
        turn(i / (HEAD / 2u), i % (HEAD / 2u));
    }
    workgroupBarrier();
    if (is_last && row == kv_head * (params.heads / params.kv_heads)) {
        let place = (params.past * params.kv_heads + kv_head) * HEAD;
        for (var i = thread; i < HEAD; i += WORKGROUP) {
            k[place + i] = query[GROUP * HEAD + i];
            v[place + i] = new_value(kv_head, i);
        }
    }
}

fn new_value(kv_head: u32, column: u32) -> vec4<f32> {
    return joined[(params.heads + params.kv_heads + kv_head) * HEAD + column];
}

fn key_of(number: u32, kv_head: u32, column: u32) -> vec4<f32> {
    if (number == params.past) {
        return query[GROUP * HEAD + column];
    }
    return k[(number * params.kv_heads + kv_head) * HEAD + column];
}

fn value_of(number: u32, kv_head: u32, column: u32) -> vec4<f32> {
    if (number == params.past) {
        return new_value(kv_head, column);
    }
    return v[(number * params.kv_heads + kv_head) * HEAD + column];
}
