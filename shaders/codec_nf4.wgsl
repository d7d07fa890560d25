// The codec NF4: how a kernel reads quantised weights. A codec has these four functions, and the
// bindings 0 to 3 (here in nf4_bindings.wgsl):
//
//     fill_tables(thread, threads)  fills tables in workgroup memory; all threads call it first
//     codes_at(at)                  the codes from element `at` to the end of its word
//     look_up(words)                the unscaled value of the lowest code of each word
//     scale_of(block)               the scale of the block `block` blocks after the first one
//
// Every fast decoding kernel includes this file. The rest of the kernel has `params` with the
// fields used here.

// In workgroup memory: with a dynamically indexed constant, every thread would spill the table to
// memory.
var<workgroup> codebook: array<f32, 16>;
var<workgroup> map: array<f32, 256>;

// Called by all `threads` threads of the workgroup.
fn fill_tables(thread: u32, threads: u32) {
    for (var i = thread; i < 16u; i += threads) {
        codebook[i] = params.codebook[i >> 2u][i & 3u];
    }
    if (SCALES == 2u) {
        for (var i = thread; i < 256u; i += threads) {
            map[i] = head[1u + i];
        }
    }
    workgroupBarrier();
}

// The first code is in the lowest bits.
fn codes_at(at: u32) -> u32 {
    return codes[at >> 3u] >> (4u * (at & 7u));
}

fn look_up(words: vec4<u32>) -> vec4<f32> {
    let i = words & vec4(15u);
    return vec4(codebook[i.x], codebook[i.y], codebook[i.z], codebook[i.w]);
}

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
    let product = map[code] * supers[(params.supers_first + block) >> 8u];
    // The format rounds the product before the sum. A bit pattern that the compiler does not know
    // prevents a fused multiply-add.
    return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + head[0];
}
