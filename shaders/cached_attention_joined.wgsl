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
override PAIRS: u32 = (GROUP + 1u) * (HEAD / 2u);
const PARTS = 8u;       // of a head, for its sum of squares

// The column of the new value that a thread adds.
var<private> own_value: vec4<f32>;

// What a pair of vec4s is multiplied by.
struct Turning {
    first_gamma: vec4<f32>,
    second_gamma: vec4<f32>,
    cosines: vec4<f32>,
    sines: vec4<f32>,
}

// The factor of the RMS norm of a head in `query`.
fn norm_of(head: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < PARTS; i++) {
        sum += dots[head * PARTS + i];
    }
    return inverseSqrt(sum / f32(4u * HEAD) + params.epsilon);
}

// The vec4s of a pair. The first pairs turn. Those after them are the vec4s that stay.
fn places_of(pair: u32) -> vec2<u32> {
    let turns = pair < params.rotated;
    return vec2(pair + select(params.rotated, 0u, turns), pair + select(HEAD / 2u, params.rotated, turns));
}

fn load_turning(head: u32, pair: u32) -> Turning {
    var turning: Turning;
    let at = places_of(pair);
    if (NORM) {
        if (head < GROUP) {
            turning.first_gamma = query_gamma[at.x];
            turning.second_gamma = query_gamma[at.y];
        } else {
            turning.first_gamma = key_gamma[at.x];
            turning.second_gamma = key_gamma[at.y];
        }
    }
    if (pair < params.rotated) {
        let t = table[2u * (params.angles * params.rotated + pair)];
        let u = table[2u * (params.angles * params.rotated + pair) + 1u];
        turning.cosines = vec4(t.x, t.z, u.x, u.z);
        turning.sines = vec4(t.y, t.w, u.y, u.w);
    }
    return turning;
}

// Normalises and rotates a pair of vec4s of a head in `query`.
fn turn(head: u32, pair: u32, turning: Turning) {
    let at = places_of(pair);
    var a = query[head * HEAD + at.x];
    var b = query[head * HEAD + at.y];
    if (NORM) {
        let factor = norm_of(head);
        a *= factor * turning.first_gamma;
        b *= factor * turning.second_gamma;
    }
    if (pair < params.rotated) {
        let turned = b * turning.cosines + a * turning.sines;
        a = a * turning.cosines - b * turning.sines;
        b = turned;
    }
    query[head * HEAD + at.x] = a;
    query[head * HEAD + at.y] = b;
}

// The queries, then the key. The first workgroup of a key head with the last run stores the key and
// the value.
fn fill_query(row: u32, kv_head: u32, thread: u32, is_last: bool) {
    for (var i = thread; i < (GROUP + 1u) * HEAD; i += WORKGROUP) {
        let head = select(params.heads + kv_head, row + i / HEAD, i < GROUP * HEAD);
        query[i] = joined[head * HEAD + i % HEAD];
    }
    own_value = new_value(kv_head, thread % HEAD);
    // Loaded before the barriers.
    var turning: Turning;
    if (thread < PAIRS) { turning = load_turning(thread / (HEAD / 2u), thread % (HEAD / 2u)); }
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
    for (var i = thread; i < PAIRS; i += WORKGROUP) {
        if (i > thread) { turning = load_turning(i / (HEAD / 2u), i % (HEAD / 2u)); }
        turn(i / (HEAD / 2u), i % (HEAD / 2u), turning);
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

// The row of the new token in the cache may not be written yet.
fn key_of(number: u32, column: u32, stored: vec4<f32>) -> vec4<f32> {
    return select(stored, query[GROUP * HEAD + column], number == params.past);
}

fn value_of(number: u32, stored: vec4<f32>) -> vec4<f32> {
    return select(stored, own_value, number == params.past);
}
