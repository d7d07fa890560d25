// Floats of 32 or 16 bits as the right operand of a product. Included by those kernels.

@group(0) @binding(0) var<storage, read> b: array<u32>;     // one float of 32 bits, or two of 16 bits, the first in the low half

override FLOATS: u32 = 0u;          // 0 f32, 1 f16, 2 bf16

fn float_at(at: u32) -> f32 {
    if (FLOATS == 0u) {
        return bitcast<f32>(b[at]);
    }
    let half = (b[at >> 1u] >> (16u * (at & 1u))) & 0xffffu;
    if (FLOATS == 1u) {
        return unpack2x16float(half).x;
    }
    return bitcast<f32>(half << 16u);
}

fn prepare_b(thread: u32) {}
