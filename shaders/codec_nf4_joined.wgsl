// The codec NF4 over the joined weights of matmul_wide.wgsl. A codec has these four functions and a
// struct:
//
//     fill_tables(thread, threads)            fills tables in workgroup memory; all threads call it
//                                             before `scales_from` and `look_up`
//     StoredScales                            what is stored of the scales of four blocks
//     load_scales(numbers, blocks)            loads it, early: `numbers` are those of the weights
//     scales_from(numbers, blocks, stored)    the scales
//     look_up(words)                          the unscaled value of the lowest code of each word

override SCALES: u32 = 0u;      // 0 f32, 1 bf16, 2 dq8
override MAPS: u32 = 1u;        // dq8: 768, else 1

// In workgroup memory: with a dynamically indexed constant, every thread would spill the table to
// memory.
var<workgroup> codebook: array<f32, 16>;
// The map of scales of each weight.
var<workgroup> maps: array<f32, MAPS>;

fn fill_tables(thread: u32, threads: u32) {
    for (var i = thread; i < 16u; i += threads) {
        codebook[i] = params.codebook[i >> 2u][i & 3u];
    }
    if (SCALES == 2u) {
        for (var i = thread; i < 768u; i += threads) {
            maps[i] = bitcast<f32>(words[params.places[i / 256u].w + 1u + i % 256u]);
        }
    }
    workgroupBarrier();
}

struct StoredScales {
    scales: vec4<u32>,
    supers: vec4<f32>,
}

// What is stored of the scale of a block.
fn scale_word(number: u32, block: u32) -> u32 {
    let first = params.places[number].y;
    if (SCALES == 0u) {
        return words[first + block];
    }
    if (SCALES == 1u) {
        return words[first + (block >> 1u)];
    }
    return words[first + (block >> 2u)];
}

fn super_of(number: u32, block: u32) -> f32 {
    return bitcast<f32>(words[params.places[number].z + (block >> 8u)]);
}

fn load_scales(numbers: vec4<u32>, blocks: vec4<u32>) -> StoredScales {
    var stored: StoredScales;
    let n = numbers;
    stored.scales =
        vec4(scale_word(n.x, blocks.x), scale_word(n.y, blocks.y), scale_word(n.z, blocks.z), scale_word(n.w, blocks.w));
    if (SCALES == 2u) {
        stored.supers = vec4(super_of(n.x, blocks.x), super_of(n.y, blocks.y), super_of(n.z, blocks.z), super_of(n.w, blocks.w));
    }
    return stored;
}

fn nested_scale(number: u32, code: u32, super_scale: f32) -> f32 {
    let product = maps[256u * number + code] * super_scale;
    // The format rounds the product before the sum. A bit pattern that the compiler does not know
    // prevents a fused multiply-add.
    return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + bitcast<f32>(words[params.places[number].w]);
}

fn scales_from(numbers: vec4<u32>, blocks: vec4<u32>, stored: StoredScales) -> vec4<f32> {
    if (SCALES == 0u) {
        return bitcast<vec4<f32>>(stored.scales);
    }
    if (SCALES == 1u) {
        let odd = (blocks & vec4(1u)) == vec4(1u);
        return bitcast<vec4<f32>>(select(stored.scales << vec4(16u), stored.scales & vec4(0xffff0000u), odd));
    }
    let codes = (stored.scales >> (8u * (blocks & vec4(3u)))) & vec4(255u);
    let n = numbers;
    let supers = stored.supers;
    return vec4(
        nested_scale(n.x, codes.x, supers.x),
        nested_scale(n.y, codes.y, supers.y),
        nested_scale(n.z, codes.z, supers.z),
        nested_scale(n.w, codes.w, supers.w),
    );
}

fn look_up(words: vec4<u32>) -> vec4<f32> {
    let i = words & vec4(15u);
    return vec4(codebook[i.x], codebook[i.y], codebook[i.z], codebook[i.w]);
}
