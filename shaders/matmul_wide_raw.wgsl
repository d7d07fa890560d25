// Floats of 16 bits as the storage of the weights of matmul_wide.wgsl: 8 per vec4.

override FLOATS: u32 = 1u;      // 1 f16, 2 bf16

const CHUNK = 8u;

fn prepare(thread: u32, threads: u32) {}

// The vec4s of four columns.
struct Loaded {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

fn load(columns: Columns, chunk: u32) -> Loaded {
    let at = columns.starts + chunk;
    return Loaded(weights[at.x], weights[at.y], weights[at.z], weights[at.w]);
}

// The first float of each word.
fn first_of(pairs: vec4<u32>) -> vec4<f32> {
    if (FLOATS == 1u) {
        return vec4(unpack2x16float(pairs.x).x, unpack2x16float(pairs.y).x, unpack2x16float(pairs.z).x, unpack2x16float(pairs.w).x);
    }
    return bitcast<vec4<f32>>(pairs << vec4(16u));
}

// The second float of each word.
fn second_of(pairs: vec4<u32>) -> vec4<f32> {
    if (FLOATS == 1u) {
        return vec4(unpack2x16float(pairs.x).y, unpack2x16float(pairs.y).y, unpack2x16float(pairs.z).y, unpack2x16float(pairs.w).y);
    }
    return bitcast<vec4<f32>>(pairs & vec4(0xffff0000u));
}

fn add_chunk(sums: Sums, c: u32, chunk: u32, columns: Columns, loaded: Loaded) -> Sums {
    let p0 = vec4(loaded.a.x, loaded.b.x, loaded.c.x, loaded.d.x);
    let p1 = vec4(loaded.a.y, loaded.b.y, loaded.c.y, loaded.d.y);
    let p2 = vec4(loaded.a.z, loaded.b.z, loaded.c.z, loaded.d.z);
    let p3 = vec4(loaded.a.w, loaded.b.w, loaded.c.w, loaded.d.w);
    let eight = Eight(
        first_of(p0),
        second_of(p0),
        first_of(p1),
        second_of(p1),
        first_of(p2),
        second_of(p2),
        first_of(p3),
        second_of(p3),
    );
    return add_eight(sums, c, 0u, eight);
}
