// Gated activations of four elements, and what glu_halves.wgsl and glu_panels.wgsl share. It is
// combined with glu_function.wgsl.

fn magnitudes(values: vec4<f32>) -> u32 {
    let bits = bitcast<vec4<u32>>(values) & vec4(0x7fffffffu);
    return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

fn activated(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
    var values = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
        values[i] = gate[i] * sigmoids(argument(gate[i]).x).x * up[i];
    }
    return values;
}

struct Gradients {
    gate: vec4<f32>,
    up: vec4<f32>,
}

fn gradients_of(gate: vec4<f32>, up: vec4<f32>, dh: vec4<f32>) -> Gradients {
    var gradients = Gradients();
    for (var i = 0u; i < 4u; i++) {
        let z = argument(gate[i]);
        let s = sigmoids(z.x);
        gradients.gate[i] = dh[i] * up[i] * s.x * (1.0 + gate[i] * s.y * z.y);
        gradients.up[i] = dh[i] * gate[i] * s.x;
    }
    return gradients;
}

// Four stored elements.
fn unpacked(four: vec2<u32>, scale: f32) -> vec4<f32> {
    return vec4(unpack2x16float(four.x), unpack2x16float(four.y)) * scale;
}
