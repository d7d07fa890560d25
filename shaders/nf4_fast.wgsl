// NF4 codes to floats at the speed of memory. Runs unchecked: `dequant::plan` proves on the host that every index is in its binding.
// No subgroup operations: nothing here depends on the size of a subgroup.

struct Params {
    words: u32,         // codes words (8 elements each) to turn into floats
    codes_first: u32,   // the first of them in `codes`
    block_phase: u32,   // words of its block that lie before it
    block_shift: u32,   // log2 of the words in a block
    scales_first: u32,  // its scale in `scales`, counted in scales
    supers_first: u32,  // dq8: its scale, counted from the first one of `supers[0]`
    out_first: u32,     // its first vec4 in `out`
    zero: u32,          // 0, which the compiler does not know
    codebook: array<vec4<f32>, 4>,
}

@group(0) @binding(0) var<storage, read> codes: array<u32>;             // 8 codes a word, low nibble first
@group(0) @binding(1) var<storage, read> head: array<f32>;              // dq8: offset, then the map [256]
@group(0) @binding(2) var<storage, read> supers: array<f32>;            // dq8: one for 256 scales
@group(0) @binding(3) var<storage, read> scales: array<u32>;            // one f32, half (bf16) or byte (dq8) a block
@group(0) @binding(4) var<storage, read_write> out: array<vec4<u32>>;   // 4 f32, or 8 f16 or bf16
@group(1) @binding(0) var<uniform> params: Params;

override WORKGROUP: u32 = 256u;
override ITEMS: u32 = 4u;           // vec4s that a thread writes, WORKGROUP apart
override SCALES: u32 = 0u;          // 0 f32, 1 bf16, 2 dq8
override BF16: bool = false;        // `to_16` writes bf16 in place of f16
override LOCAL_MAP: bool = true;    // dq8: the map is looked up in workgroup memory

// Workgroup memory, because a dynamically indexed constant would be spilled to memory by every thread.
var<workgroup> codebook: array<f32, 16>;
var<workgroup> map: array<f32, 256>;

fn fill_tables(thread: u32) {
    for (var i = thread; i < 16u; i += WORKGROUP) {
        codebook[i] = params.codebook[i >> 2u][i & 3u];
    }
    if (SCALES == 2u && LOCAL_MAP) {
        for (var i = thread; i < 256u; i += WORKGROUP) {
            map[i] = head[1u + i];
        }
    }
    workgroupBarrier();
}

// The scale of the block `block` blocks after the first one.
fn scale_of(block: u32) -> f32 {
    let i = params.scales_first + block;
    if (SCALES == 0u) {
        return bitcast<f32>(scales[i]);
    }
    if (SCALES == 1u) {
        let pair = scales[i >> 1u];
        return bitcast<f32>(select(pair << 16u, pair & 0xffff0000u, (i & 1u) == 1u));
    }
    let code = (scales[i >> 2u] >> (8u * (i & 3u))) & 255u;
    var unit: f32;
    if (LOCAL_MAP) { unit = map[code]; } else { unit = head[1u + code]; }
    let product = unit * supers[(params.supers_first + block) >> 8u];
    // The format rounds the product before the sum; an unknown bit pattern in between forbids a fused multiply-add.
    return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + head[0];
}

fn scale_of_word(word: u32) -> f32 {
    return scale_of((params.block_phase + word) >> params.block_shift);
}

// The four lowest codes of `word`.
fn four(word: u32, scale: f32) -> vec4<f32> {
    let values = vec4(codebook[word & 15u], codebook[(word >> 4u) & 15u], codebook[(word >> 8u) & 15u], codebook[(word >> 12u) & 15u]);
    return values * scale;
}

// The first item of a thread; its others follow WORKGROUP apart.
fn first_item(group: u32, thread: u32) -> u32 {
    return group * (WORKGROUP * ITEMS) + thread;
}

fn is_whole(group: u32, count: u32) -> bool {
    return (group + 1u) * (WORKGROUP * ITEMS) <= count;
}

// Item `i` is half a word, so that neighbouring threads write neighbouring vec4s.
fn write_f32(i: u32) {
    let word = i >> 1u;
    let half = codes[params.codes_first + word] >> (16u * (i & 1u));
    out[params.out_first + i] = bitcast<vec4<u32>>(four(half, scale_of_word(word)));
}

@compute @workgroup_size(WORKGROUP)
fn to_f32(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_tables(thread);
    let group = id.x + id.y * grid.x;
    let first = first_item(group, thread);
    let count = 2u * params.words;
    if (is_whole(group, count)) {
        for (var k = 0u; k < ITEMS; k++) { write_f32(first + k * WORKGROUP); }
    } else {
        for (var i = first; i < min(count, (group + 1u) * (WORKGROUP * ITEMS)); i += WORKGROUP) { write_f32(i); }
    }
}

// Each to the nearest bf16, ties to even, in the high half.
fn round_bf16(values: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(values);
    let rounded = bits + 0x7fffu + ((bits >> vec4(16u)) & vec4(1u));
    return select(rounded, bits | vec4(0x400000u), (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u));
}

fn pack_16(values: vec4<f32>) -> vec2<u32> {
    if (BF16) {
        let high = round_bf16(values);
        return (high.xz >> vec2(16u)) | (high.yw & vec2(0xffff0000u));
    }
    return vec2(pack2x16float(values.xy), pack2x16float(values.zw));
}

fn write_16(word: u32) {
    let eight = codes[params.codes_first + word];
    let scale = scale_of_word(word);
    out[params.out_first + word] = vec4(pack_16(four(eight, scale)), pack_16(four(eight >> 16u, scale)));
}

@compute @workgroup_size(WORKGROUP)
fn to_16(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_tables(thread);
    let group = id.x + id.y * grid.x;
    let first = first_item(group, thread);
    let count = params.words;
    if (is_whole(group, count)) {
        for (var k = 0u; k < ITEMS; k++) { write_16(first + k * WORKGROUP); }
    } else {
        for (var i = first; i < min(count, (group + 1u) * (WORKGROUP * ITEMS)); i += WORKGROUP) { write_16(i); }
    }
}
