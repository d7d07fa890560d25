// Parameters of the kernels that decode NF4 codes to floats: nf4_fast.wgsl and nf4_plain.wgsl.

struct Params {
    words: u32,         // words of codes to decode, 8 elements each
    codes_first: u32,   // index of the first word in `codes`
    block_phase: u32,   // offset of the first word in its block, in words
    block_shift: u32,   // log2 of the words per block
    scales_first: u32,  // index of its scale in `scales`
    supers_first: u32,  // dq8: index of its scale, from the first scale of `supers[0]`
    out_first: u32,     // index of its first 16 bytes in `out`
    zero: u32,          // 0; the compiler does not know its value
    codebook: array<vec4<f32>, 4>,
}

@group(1) @binding(0) var<uniform> params: Params;

