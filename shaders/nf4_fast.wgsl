// Decodes NF4 codes to floats at memory speed. It is combined with nf4_params.wgsl,
// nf4_bindings.wgsl and codec_nf4.wgsl. Runs unchecked: `dequant::plan` proves on the host that
// every index is in its binding. It uses no subgroup operations, so it does not depend on the
// subgroup size.

@group(0) @binding(4) var<storage, read_write> out: array<vec4<u32>>;   // 4 f32, or 8 f16 or bf16

override WORKGROUP: u32 = 64u;
override BF16: bool = false;        // `to_16` writes bf16 instead of f16
const ITEMS = 4u;                   // vec4s per thread, WORKGROUP apart

// The scales of the words.
fn scales_of(words: vec4<u32>) -> vec4<f32> {
    let blocks = (params.block_phase + words) >> vec4(params.block_shift);
    return vec4(scale_of(blocks.x), scale_of(blocks.y), scale_of(blocks.z), scale_of(blocks.w));
}

fn codes_of(words: vec4<u32>) -> vec4<u32> {
    let i = params.codes_first + words;
    return vec4(codes[i.x], codes[i.y], codes[i.z], codes[i.w]);
}

// The four lowest codes of `word`.
fn four(word: u32, scale: f32) -> vec4<f32> {
    let values = vec4(codebook[word & 15u], codebook[(word >> 4u) & 15u], codebook[(word >> 8u) & 15u], codebook[(word >> 12u) & 15u]);
    return values * scale;
}

// The items of a thread. All codes and scales are loaded before the first write. A loop that writes
// each item before it loads the next is 1 to 4 % slower.
fn items_of(group: u32, thread: u32) -> vec4<u32> {
    return group * (WORKGROUP * ITEMS) + thread + vec4(0u, WORKGROUP, 2u * WORKGROUP, 3u * WORKGROUP);
}

fn is_whole(group: u32, count: u32) -> bool {
    return (group + 1u) * (WORKGROUP * ITEMS) <= count;
}

// Item `i` is half a word, so adjacent threads write adjacent vec4s.
fn write_f32(i: u32, word: u32, scale: f32) {
    out[params.out_first + i] = bitcast<vec4<u32>>(four(word >> (16u * (i & 1u)), scale));
}

@compute @workgroup_size(WORKGROUP)
fn to_f32(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_tables(thread, WORKGROUP);
    let group = id.x + id.y * grid.x;
    let count = 2u * params.words;
    let i = items_of(group, thread);
    if (is_whole(group, count)) {
        let words = codes_of(i >> vec4(1u));
        let scale = scales_of(i >> vec4(1u));
        write_f32(i.x, words.x, scale.x);
        write_f32(i.y, words.y, scale.y);
        write_f32(i.z, words.z, scale.z);
        write_f32(i.w, words.w, scale.w);
    } else {
        for (var k = i.x; k < min(count, i.w + 1u); k += WORKGROUP) {
            let word = k >> 1u;
            write_f32(k, codes[params.codes_first + word], scale_of((params.block_phase + word) >> params.block_shift));
        }
    }
}

// Rounds to the nearest bf16, ties to even, in the high half. For finite values.
fn round_bf16(values: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(values);
    return bits + 0x7fffu + ((bits >> vec4(16u)) & vec4(1u));
}

// The high half of each value. NaN stays NaN.
fn keep_nan(values: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(values);
    return select(bits, bits | vec4(0x400000u), (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u));
}

fn pack_16(values: vec4<f32>, finite: bool) -> vec2<u32> {
    if (BF16) {
        var high: vec4<u32>;
        if (finite) { high = round_bf16(values); } else { high = keep_nan(values); }
        return (high.xz >> vec2(16u)) | (high.yw & vec2(0xffff0000u));
    }
    return vec2(pack2x16float(values.xy), pack2x16float(values.zw));
}

fn write_16(i: u32, word: u32, scale: f32) {
    // No weight exceeds its scale in magnitude, so only a non-finite scale gives a non-finite
    // weight.
    let finite = (bitcast<u32>(scale) & 0x7f800000u) != 0x7f800000u;
    out[params.out_first + i] = vec4(pack_16(four(word, scale), finite), pack_16(four(word >> 16u, scale), finite));
}

@compute @workgroup_size(WORKGROUP)
fn to_16(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_tables(thread, WORKGROUP);
    let group = id.x + id.y * grid.x;
    let count = params.words;
    let i = items_of(group, thread);
    if (is_whole(group, count)) {
        let words = codes_of(i);
        let scale = scales_of(i);
        write_16(i.x, words.x, scale.x);
        write_16(i.y, words.y, scale.y);
        write_16(i.z, words.z, scale.z);
        write_16(i.w, words.w, scale.w);
    } else {
        for (var k = i.x; k < min(count, i.w + 1u); k += WORKGROUP) {
            write_16(k, codes[params.codes_first + k], scale_of((params.block_phase + k) >> params.block_shift));
        }
    }
}
