// Floats of 32 or 16 bits as the table of gather.wgsl.

@group(0) @binding(0) var<storage, read> table: array<u32>;     // one or two elements per word

override FLOATS: u32 = 0u;      // 0 f32, 1 f16, 2 bf16

fn prepare(thread: u32) {}

// Every binary16 converts exactly to binary32, including subnormals.
fn from_f16(half: u32) -> u32 {
    let sign = (half & 0x8000u) << 16u;
    let exponent = (half >> 10u) & 31u;
    let significand = half & 0x3ffu;
    if (exponent == 0u) { return sign | bitcast<u32>(f32(significand) * 0x1p-24f); }
    if (exponent == 31u) { return sign | 0x7f800000u | (significand << 13u); }
    return sign | ((exponent + 112u) << 23u) | (significand << 13u);
}

// The bits of element `at` of the window.
fn element(at: u32) -> u32 {
    let i = params.first + at;
    if (FLOATS == 0u) { return table[i]; }
    let half = (table[i / 2u] >> (16u * (i % 2u))) & 0xffffu;
    if (FLOATS == 1u) { return from_f16(half); }
    return half << 16u;
}
