// Counts the NaN and infinite floats, and finds the first one. Runs unchecked: the host proves that
// `x` holds `count` words, `found` one entry for each of the GROUPS workgroups, and `report` an
// entry at `slot`.

struct Params {
    count: u32,
    first: u32,     // index of the first element in the whole matrix
    slot: u32,
    pad: u32,
}

struct Found {
    first: u32,     // its index, or 0xffffffff for none
    count: u32,
}

@group(0) @binding(0) var<storage, read> x: array<u32>;                 // bits of floats
@group(0) @binding(1) var<storage, read_write> found: array<Found>;     // [GROUPS]
@group(0) @binding(2) var<storage, read_write> report: array<Found>;    // [slots]
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const GROUPS = 256u;
const NONE = Found(0xffffffffu, 0u);

var<workgroup> partial: array<Found, WORKGROUP>;

fn both(a: Found, b: Found) -> Found {
    return Found(min(a.first, b.first), a.count + b.count);
}

fn group_of(thread: u32, value: Found) -> Found {
    partial[thread] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (thread < half) { partial[thread] = both(partial[thread], partial[thread + half]); }
        workgroupBarrier();
    }
    return partial[0];
}

@compute @workgroup_size(WORKGROUP)
fn search(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var value = NONE;
    for (var i = id.x * WORKGROUP + thread; i < params.count; i += GROUPS * WORKGROUP) {
        if ((x[i] & 0x7f800000u) == 0x7f800000u) { value = both(value, Found(params.first + i, 1u)); }
    }
    let all = group_of(thread, value);
    if (thread == 0u) {
        if (params.first > 0u) { found[id.x] = both(found[id.x], all); } else { found[id.x] = all; }
    }
}

@compute @workgroup_size(WORKGROUP)
fn gather(@builtin(local_invocation_index) thread: u32) {
    let all = group_of(thread, found[thread]);
    if (thread == 0u) { report[params.slot] = all; }
}
