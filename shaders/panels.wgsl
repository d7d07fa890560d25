// Panels: f16 operands of products on matrix units. `ops::matmul::panels` describes the layout.
// Included by the kernels that write panels, with 256 threads per workgroup.
//
// Elements are scaled by a power of two, so that the largest magnitude lies in 512..1024. Then no
// f16 overflows, and elements down to 2^-23 of the largest keep all bits of an f16.

var<workgroup> maxima: array<u32, 256>;

// The largest `bits` of a workgroup. As integers, the bits of magnitudes are in order: NaN is
// larger than infinity, and infinity larger than every finite number.
fn largest_of(thread: u32, bits: u32) -> u32 {
    maxima[thread] = bits;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half /= 2u) {
        if (thread < half) {
            maxima[thread] = max(maxima[thread], maxima[thread + half]);
        }
        workgroupBarrier();
    }
    return maxima[0];
}

fn magnitude_bits(value: f32) -> u32 {
    return bitcast<u32>(value) & 0x7fffffffu;
}

// The exponent e for numbers of at most this magnitude: x * 2^-e is stored. 0 for magnitudes that
// are not finite, and the smallest one for zeros, so that they never decide a common exponent.
fn exponent_of(largest: u32) -> i32 {
    if (largest >= 0x7f800000u) {
        return 0;
    }
    // 2^126 is the largest power of two whose inverse is a normal number.
    return max(i32(largest >> 23u) - 136, -126);
}

// 2^e, for e from -126 to 127.
fn power(e: i32) -> f32 {
    return bitcast<f32>(u32(e + 127) << 23u);
}

// The f16 bits of a number that may not be finite: NaN and infinity stay visible.
fn half_of_any(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) {
        return select(((bits >> 16u) & 0x8000u) | 0x7c00u, 0x7e00u, magnitude > 0x7f800000u);
    }
    return pack2x16float(vec2(clamp(value, -65504.0, 65504.0), 0.0));
}

// Four numbers as f16. `largest` is the largest magnitude that `exponent_of` got for them.
fn four_halves(values: vec4<f32>, scale: f32, largest: u32) -> vec2<u32> {
    if (largest < 0x7f800000u) {
        let scaled = values * scale;
        return vec2(pack2x16float(scaled.xy), pack2x16float(scaled.zw));
    }
    return vec2(
        half_of_any(values.x) | (half_of_any(values.y) << 16u),
        half_of_any(values.z) | (half_of_any(values.w) << 16u),
    );
}
