// Decodes NF4 codes to floats on any driver: bounds-checked, one thread per word, no workgroup
// memory, integer rounding. It is combined with nf4_params.wgsl and nf4_bindings.wgsl. It does not
// use codec_nf4.wgsl, so that a driver that breaks that file still has a kernel.

@group(0) @binding(4) var<storage, read_write> out: array<u32>;     // one f32, or two f16 or bf16

override OUTPUT: u32 = 0u;  // 0 f32, 1 f16, 2 bf16

// The scale of block `block`, counted from the first one.
fn scale_of(block: u32) -> f32 {
    let i = params.scales_first + block;
    if (SCALES == 0u) {
        return bitcast<f32>(scales[i]);
    }
    if (SCALES == 1u) {
        return bitcast<f32>((scales[i / 2u] >> (16u * (i % 2u))) << 16u);
    }
    let code = (scales[i / 4u] >> (8u * (i % 4u))) & 255u;
    let product = head[1u + code] * supers[(params.supers_first + block) / 256u];
    // The format rounds the product before the sum. A bit pattern that the compiler does not know
    // prevents a fused multiply-add.
    return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + head[0];
}

// Bits of the nearest binary16, ties to even. Infinity beyond 65504.
fn f16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return sign | 0x7e00u;
    }
    if (magnitude >= 0x47800000u) {
        return sign | 0x7c00u;
    }
    if (magnitude >= 0x38800000u) {
        let rebased = magnitude - 0x38000000u;
        return sign | ((rebased + 0xfffu + ((rebased >> 13u) & 1u)) >> 13u);
    }
    // A subnormal is a multiple of 2^-24. From a shift of 25 on, the value is below half of that.
    let shift = min(126u - (magnitude >> 23u), 25u);
    let significand = (magnitude & 0x7fffffu) | 0x800000u;
    let below_half = (1u << (shift - 1u)) - 1u;
    return sign | ((significand + below_half + ((significand >> shift) & 1u)) >> shift);
}

// Bits of the nearest bfloat16, ties to even.
fn bf16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn bits_16(value: f32) -> u32 {
    if (OUTPUT == 1u) {
        return f16_bits(value);
    }
    return bf16_bits(value);
}

fn value_of(code: u32, scale: f32) -> f32 {
    return params.codebook[code / 4u][code % 4u] * scale;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let word = (id.x + id.y * grid.x) * 64u + thread;
    if (word >= params.words) {
        return;
    }
    let scale = scale_of((params.block_phase + word) >> params.block_shift);
    var rest = codes[params.codes_first + word];
    if (OUTPUT == 0u) {
        for (var i = 0u; i < 8u; i++) {
            out[4u * params.out_first + 8u * word + i] = bitcast<u32>(value_of(rest & 15u, scale));
            rest >>= 4u;
        }
    } else {
        for (var i = 0u; i < 4u; i++) {
            let low = bits_16(value_of(rest & 15u, scale));
            let high = bits_16(value_of((rest >> 4u) & 15u, scale));
            out[4u * params.out_first + 4u * word + i] = low | (high << 16u);
            rest >>= 8u;
        }
    }
}
