// Chooses the next token from its logits, by the rules of `model::generate::sampling`. `scan`
// describes each chunk of the vocabulary; `choose`, one workgroup, makes the choice from these
// descriptions and from few chunks. Sums are in float32: a choice that another order or rounding of
// the sums might change is not certain, and the host then makes it. Runs unchecked: `ops::sample`
// proves on the host that every index is in its binding.

struct Params {
    vocab: u32,         // tokens
    chunk: u32,         // tokens of a chunk, a multiple of WORKGROUP
    chunks: u32,        // at most CANDIDATES
    mode: u32,          // GREEDY, ALL or FILTERED
    top_k: u32,         // 0: all
    top_chunks: u32,    // FILTERED: chunks with the likeliest tokens, whose tokens are candidates
    top_p: f32,
    draw: f32,          // uniform in [0, 1)
    temperature: f32,
    margin: f32,        // of sums of weights, relative to their total
    min_p: f32,         // 0: all
    pad: u32,
}

const GREEDY = 0u;
const ALL = 1u;

// The words of a part, and of the choice.
const KEY = 0u;         // of the likeliest token
const TOKEN = 1u;       // the likeliest token
const WEIGHT = 2u;      // the sum of weights, relative to the likeliest token
const INFINITE = 3u;    // 1 if a logit is not finite

@group(0) @binding(0) var<storage, read> logits: array<f32>;            // [vocab]
@group(0) @binding(1) var<storage, read_write> parts: array<vec4<u32>>; // [chunks]
@group(0) @binding(2) var<storage, read_write> choice: array<u32>;      // [4]: the token, 1 if it is certain
@group(0) @binding(3) var<storage, read_write> token: array<u32>;       // [1]: the input of the next pass
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const CANDIDATES = 1024u;
const EACH = CANDIDATES / WORKGROUP;

// Sorted by `sort`: keys with the highest first, and of equal keys the lowest id.
var<workgroup> keys: array<u32, CANDIDATES>;
var<workgroup> ids: array<u32, CANDIDATES>;
var<workgroup> list: array<u32, CANDIDATES>;
var<workgroup> shared_sums: array<f32, WORKGROUP>;
var<workgroup> counter: atomic<u32>;
var<workgroup> shared_values: array<f32, 4>;

// A number that orders as the logit does. Zeros of either sign are equal.
fn key_of(logit: f32) -> u32 {
    let bits = bitcast<u32>(logit);
    if (bits == 0x80000000u) { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn logit_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u));
}

fn is_infinite(logit: f32) -> bool {
    return (bitcast<u32>(logit) & 0x7f800000u) == 0x7f800000u;
}

fn weight_of(logit: f32, highest: f32) -> f32 {
    return exp((logit - highest) / params.temperature);
}

// Whether the first of two keys and ids comes first.
fn before(key: u32, id: u32, other_key: u32, other_id: u32) -> bool {
    return key > other_key || (key == other_key && id < other_id);
}

// The maximum of all threads, at index 0 of `keys` and `ids`.
fn reduce_best(thread: u32, key: u32, id: u32) {
    keys[thread] = key;
    ids[thread] = id;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half && before(keys[thread + half], ids[thread + half], keys[thread], ids[thread])) {
            keys[thread] = keys[thread + half];
            ids[thread] = ids[thread + half];
        }
    }
    workgroupBarrier();
}

// The sum of the values of the threads before this one; the sum of all is in `shared_sums[255]`.
fn sum_before(thread: u32, value: f32) -> f32 {
    workgroupBarrier();
    shared_sums[thread] = value;
    for (var step = 1u; step < WORKGROUP; step *= 2u) {
        workgroupBarrier();
        var other = 0.0;
        if (thread >= step) { other = shared_sums[thread - step]; }
        workgroupBarrier();
        shared_sums[thread] += other;
    }
    workgroupBarrier();
    return shared_sums[thread] - value;
}

@compute @workgroup_size(WORKGROUP)
fn scan(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let number = group.x + group.y * grid.x;
    if (number >= params.chunks) { return; }
    let start = number * params.chunk;
    let end = min(start + params.chunk, params.vocab);
    var key = 0u;
    var id = 0xffffffffu;
    var infinite = 0.0;
    for (var i = start + thread; i < end; i += WORKGROUP) {
        if (is_infinite(logits[i])) {
            infinite = 1.0;
        } else if (before(key_of(logits[i]), i, key, id)) {
            key = key_of(logits[i]);
            id = i;
        }
    }
    reduce_best(thread, key, id);
    let best = keys[0];
    let best_id = ids[0];
    _ = sum_before(thread, infinite);
    let any = shared_sums[WORKGROUP - 1u] > 0.0;
    var weight = 0.0;
    if (params.mode != GREEDY && !any) {
        let highest = logit_of(best);
        for (var i = start + thread; i < end; i += WORKGROUP) { weight += weight_of(logits[i], highest); }
    }
    _ = sum_before(thread, weight);
    if (thread == 0u) {
        let sum = shared_sums[WORKGROUP - 1u];
        parts[number] = vec4(best, best_id, bitcast<u32>(sum), select(0u, 1u, any));
    }
}

fn decide(token_chosen: u32, certain: bool) {
    choice[0] = token_chosen;
    choice[1] = select(0u, 1u, certain);
    choice[2] = 0u;
    choice[3] = 0u;
    token[0] = token_chosen;
}

// Sorts all CANDIDATES keys and ids.
fn sort(thread: u32) {
    for (var size = 2u; size <= CANDIDATES; size *= 2u) {
        for (var step = size / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            for (var i = thread; i < CANDIDATES / 2u; i += WORKGROUP) {
                let a = 2u * i - (i & (step - 1u));
                let b = a + step;
                let forward = (a & size) == 0u;
                if (before(keys[b], ids[b], keys[a], ids[a]) == forward) {
                    let key = keys[a];
                    let id = ids[a];
                    keys[a] = keys[b];
                    ids[a] = ids[b];
                    keys[b] = key;
                    ids[b] = id;
                }
            }
        }
    }
    workgroupBarrier();
}

// Chooses from all tokens, in the order of their ids.
fn choose_of_all(thread: u32, highest: f32, first: u32) {
    var own = 0.0;
    for (var i = 0u; i < EACH; i++) { own += chunk_weight(EACH * thread + i, highest); }
    let earlier = sum_before(thread, own);
    let total = shared_sums[WORKGROUP - 1u];
    let wanted = params.draw * total;
    if (thread == 0u) {
        atomicStore(&counter, 0xffffffffu);
        shared_values[0] = 0.0;
    }
    workgroupBarrier();
    // The first chunk whose end is past the wanted sum. Rounding may give none.
    var at = earlier;
    for (var i = 0u; i < EACH; i++) {
        let next = at + chunk_weight(EACH * thread + i, highest);
        if (next > wanted) { atomicMin(&counter, EACH * thread + i); }
        at = next;
    }
    workgroupBarrier();
    let number = atomicLoad(&counter);
    at = earlier;
    for (var i = 0u; i < EACH; i++) {
        if (EACH * thread + i == number) { shared_values[0] = at; }
        at += chunk_weight(EACH * thread + i, highest);
    }
    workgroupBarrier();
    let start = min(number, params.chunks - 1u) * params.chunk;
    let each = params.chunk / WORKGROUP;
    own = 0.0;
    for (var i = 0u; i < each; i++) { own += token_weight(start + thread * each + i, highest); }
    at = sum_before(thread, own) + shared_values[0];
    if (thread == 0u) { atomicStore(&counter, 0xffffffffu); }
    workgroupBarrier();
    let start_sum = at;
    for (var i = 0u; i < each; i++) {
        at += token_weight(start + thread * each + i, highest);
        if (at > wanted) { atomicMin(&counter, start + thread * each + i); }
    }
    workgroupBarrier();
    let chosen = atomicLoad(&counter);
    if (chosen == 0xffffffffu) {
        if (thread == 0u) { decide(first, false); }
        return;
    }
    at = start_sum;
    for (var i = 0u; i < each; i++) {
        let next = at + token_weight(start + thread * each + i, highest);
        if (start + thread * each + i == chosen) {
            let margin = params.margin * total;
            decide(chosen, wanted - at > margin && next - wanted > margin);
        }
        at = next;
    }
}

// The weight of a chunk's tokens. 0 past the last chunk.
fn chunk_weight(number: u32, highest: f32) -> f32 {
    if (number >= params.chunks) { return 0.0; }
    let part = parts[number];
    return bitcast<f32>(part[WEIGHT]) * weight_of(logit_of(part[KEY]), highest);
}

// The weight of a token. 0 past the last.
fn token_weight(id: u32, highest: f32) -> f32 {
    if (id >= params.vocab) { return 0.0; }
    return weight_of(logits[id], highest);
}

// Chooses from the likeliest tokens, the likeliest first. It gives up if these do not fit.
fn choose_of_likeliest(thread: u32, highest: f32, first: u32) {
    var own = 0.0;
    for (var i = 0u; i < EACH; i++) { own += chunk_weight(EACH * thread + i, highest); }
    _ = sum_before(thread, own);
    let all = shared_sums[WORKGROUP - 1u];
    // The chunks by their likeliest tokens. The k likeliest tokens are in chunks whose likeliest
    // token is at least as likely as the kth of these.
    for (var i = thread; i < CANDIDATES; i += WORKGROUP) {
        keys[i] = 0u;
        ids[i] = i;
        if (i < params.chunks) { keys[i] = parts[i][KEY]; }
    }
    sort(thread);
    let threshold = keys[min(params.top_chunks, params.chunks) - 1u];
    let every = params.top_chunks >= params.chunks;
    if (thread == 0u) { atomicStore(&counter, 0u); }
    for (var i = thread; i < CANDIDATES; i += WORKGROUP) { list[i] = ids[i]; }
    workgroupBarrier();
    for (var i = thread; i < params.chunks; i += WORKGROUP) {
        if (keys[i] >= threshold) { atomicAdd(&counter, 1u); }
    }
    workgroupBarrier();
    let listed = atomicLoad(&counter);
    workgroupBarrier();
    if (thread == 0u) { atomicStore(&counter, 0u); }
    for (var i = thread; i < CANDIDATES; i += WORKGROUP) {
        keys[i] = 0u;
        ids[i] = 0xffffffffu;
    }
    workgroupBarrier();
    for (var i = thread; i < listed * params.chunk; i += WORKGROUP) {
        let id = list[i / params.chunk] * params.chunk + i % params.chunk;
        if (id < params.vocab) {
            let key = key_of(logits[id]);
            if (key >= threshold || every) {
                let at = atomicAdd(&counter, 1u);
                if (at < CANDIDATES) {
                    keys[at] = key;
                    ids[at] = id;
                }
            }
        }
    }
    workgroupBarrier();
    let found = atomicLoad(&counter);
    if (found > CANDIDATES) {
        if (thread == 0u) { decide(first, false); }
        return;
    }
    sort(thread);
    var kept = found;
    if (params.top_k > 0u && params.top_k < found) {
        // Tokens equal to the kth are kept.
        let last = keys[params.top_k - 1u];
        if (thread == 0u) { atomicStore(&counter, 0u); }
        workgroupBarrier();
        for (var i = thread; i < found; i += WORKGROUP) {
            if (keys[i] >= last) { atomicAdd(&counter, 1u); }
        }
        workgroupBarrier();
        kept = atomicLoad(&counter);
    }
    own = 0.0;
    for (var i = 0u; i < EACH; i++) { own += candidate_weight(EACH * thread + i, kept, highest); }
    var at = sum_before(thread, own);
    let listed_weight = shared_sums[WORKGROUP - 1u];
    let total = select(all, listed_weight, params.top_k > 0u || every);
    // The first candidate that is not kept: the sum of those before it reaches the share.
    let share = params.top_p * total;
    let margin = params.margin * total;
    var unclear = false;
    if (thread == 0u) {
        atomicStore(&counter, kept);
        shared_values[1] = listed_weight;
        shared_values[2] = 0.0;
    }
    workgroupBarrier();
    let start_sum = at;
    for (var i = 0u; i < EACH && params.min_p > 0.0; i++) {
        let place = EACH * thread + i;
        if (place > 0u && place < kept) {
            let weight = candidate_weight(place, kept, highest);
            if (weight < params.min_p) { atomicMin(&counter, place); }
            if (abs(weight - params.min_p) <= params.margin * params.min_p) { unclear = true; }
        }
    }
    if (params.top_p < 1.0) {
        for (var i = 0u; i < EACH; i++) {
            let place = EACH * thread + i;
            if (place > 0u && place < kept && at >= share) { atomicMin(&counter, place); }
            if (place > 0u && place < kept && abs(at - share) <= margin) { unclear = true; }
            at += candidate_weight(place, kept, highest);
        }
    }
    workgroupBarrier();
    let left = atomicLoad(&counter);
    at = start_sum;
    for (var i = 0u; i < EACH; i++) {
        if (EACH * thread + i == left) { shared_values[1] = at; }
        at += candidate_weight(EACH * thread + i, kept, highest);
    }
    if (unclear) { shared_values[2] = 1.0; }
    workgroupBarrier();
    let lacking = left == kept && total > listed_weight && params.top_k == 0u && !every;
    let wanted = params.draw * shared_values[1];
    if (thread == 0u) { atomicStore(&counter, 0xffffffffu); }
    workgroupBarrier();
    at = start_sum;
    for (var i = 0u; i < EACH; i++) {
        let place = EACH * thread + i;
        at += candidate_weight(place, kept, highest);
        if (place < left && at > wanted) { atomicMin(&counter, place); }
    }
    workgroupBarrier();
    let chosen = atomicLoad(&counter);
    if (lacking || chosen == 0xffffffffu) {
        if (thread == 0u) { decide(first, false); }
        return;
    }
    at = start_sum;
    for (var i = 0u; i < EACH; i++) {
        let place = EACH * thread + i;
        let next = at + candidate_weight(place, kept, highest);
        if (place == chosen) {
            // A single candidate is certain, wherever the draw is.
            let clear = wanted - at > margin && next - wanted > margin && shared_values[2] == 0.0;
            decide(ids[place], clear || (left == 1u && shared_values[2] == 0.0));
        }
        at = next;
    }
}

// The weight of a sorted candidate. 0 past the last.
fn candidate_weight(place: u32, count: u32, highest: f32) -> f32 {
    if (place >= count) { return 0.0; }
    return weight_of(logit_of(keys[place]), highest);
}

@compute @workgroup_size(WORKGROUP)
fn choose(@builtin(local_invocation_index) thread: u32) {
    var key = 0u;
    var id = 0xffffffffu;
    var infinite = 0.0;
    for (var i = thread; i < params.chunks; i += WORKGROUP) {
        let part = parts[i];
        infinite += f32(part[INFINITE]);
        if (before(part[KEY], part[TOKEN], key, id)) {
            key = part[KEY];
            id = part[TOKEN];
        }
    }
    reduce_best(thread, key, id);
    let highest = logit_of(keys[0]);
    let first = ids[0];
    _ = sum_before(thread, infinite);
    let any = shared_sums[WORKGROUP - 1u] > 0.0;
    workgroupBarrier();
    if (any) {
        if (thread == 0u) { decide(0u, false); }
        return;
    }
    if (params.mode == GREEDY) {
        if (thread == 0u) { decide(first, true); }
    } else if (params.mode == ALL) {
        choose_of_all(thread, highest, first);
    } else {
        choose_of_likeliest(thread, highest, first);
    }
}
