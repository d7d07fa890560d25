// NF4 as the storage of the weights of matmul_wide.wgsl: 32 codes per vec4. A block has at least
// 32.

override SCALES: u32 = 0u;      // 0 f32, 1 bf16, 2 dq8
override MAPS: u32 = 1u;        // dq8: 768, else 1

const CHUNK = 32u;

// In workgroup memory: with a dynamically indexed constant, every thread would spill the table to
// memory.
var<workgroup> codebook: array<f32, 16>;
// The map of scales of each weight.
var<workgroup> maps: array<f32, MAPS>;

fn prepare(thread: u32, threads: u32) {
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

// The vec4s of four columns, and what is stored of their scales.
struct Loaded {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
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

fn load(columns: Columns, chunk: u32) -> Loaded {
    var loaded: Loaded;
    let at = columns.starts + chunk;
    loaded.a = weights[at.x];
    loaded.b = weights[at.y];
    loaded.c = weights[at.z];
    loaded.d = weights[at.w];
    let n = columns.numbers;
    let block = (columns.elements + CHUNK * chunk) >> vec4(params.block_bits);
    loaded.scales = vec4(scale_word(n.x, block.x), scale_word(n.y, block.y), scale_word(n.z, block.z), scale_word(n.w, block.w));
    if (SCALES == 2u) {
        loaded.supers = vec4(super_of(n.x, block.x), super_of(n.y, block.y), super_of(n.z, block.z), super_of(n.w, block.w));
    }
    return loaded;
}

fn nested_scale(number: u32, code: u32, super_scale: f32) -> f32 {
    let product = maps[256u * number + code] * super_scale;
    // The format rounds the product before the sum. A bit pattern that the compiler does not know
    // prevents a fused multiply-add.
    return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + bitcast<f32>(words[params.places[number].w]);
}

fn scales_of(columns: Columns, chunk: u32, loaded: Loaded) -> vec4<f32> {
    if (SCALES == 0u) {
        return bitcast<vec4<f32>>(loaded.scales);
    }
    let block = (columns.elements + CHUNK * chunk) >> vec4(params.block_bits);
    if (SCALES == 1u) {
        let odd = (block & vec4(1u)) == vec4(1u);
        return bitcast<vec4<f32>>(select(loaded.scales << vec4(16u), loaded.scales & vec4(0xffff0000u), odd));
    }
    let codes = (loaded.scales >> (8u * (block & vec4(3u)))) & vec4(255u);
    let n = columns.numbers;
    let supers = loaded.supers;
    return vec4(
        nested_scale(n.x, codes.x, supers.x),
        nested_scale(n.y, codes.y, supers.y),
        nested_scale(n.z, codes.z, supers.z),
        nested_scale(n.w, codes.w, supers.w),
    );
}

fn look_up(codes: vec4<u32>) -> vec4<f32> {
    let i = codes & vec4(15u);
    return vec4(codebook[i.x], codebook[i.y], codebook[i.z], codebook[i.w]);
}

fn decode(codes: vec4<u32>) -> Eight {
    return Eight(
        look_up(codes),
        look_up(codes >> vec4(4u)),
        look_up(codes >> vec4(8u)),
        look_up(codes >> vec4(12u)),
        look_up(codes >> vec4(16u)),
        look_up(codes >> vec4(20u)),
        look_up(codes >> vec4(24u)),
        look_up(codes >> vec4(28u)),
    );
}

fn add_chunk(sums: Sums, c: u32, chunk: u32, columns: Columns, loaded: Loaded) -> Sums {
    let l = loaded;
    var terms: Sums;
    terms = add_eight(terms, c, 0u, decode(vec4(l.a.x, l.b.x, l.c.x, l.d.x)));
    terms = add_eight(terms, c, 1u, decode(vec4(l.a.y, l.b.y, l.c.y, l.d.y)));
    terms = add_eight(terms, c, 2u, decode(vec4(l.a.z, l.b.z, l.c.z, l.d.z)));
    terms = add_eight(terms, c, 3u, decode(vec4(l.a.w, l.b.w, l.c.w, l.d.w)));
    return add_scaled(sums, terms, scales_of(columns, chunk, loaded));
}
