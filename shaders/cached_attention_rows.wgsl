// Queries of new tokens, and keys and values of all tokens in the cache, as the inputs of
// cached_attention.wgsl.

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;   // [tokens, heads, HEAD]
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;   // [past + tokens, kv_heads, HEAD]
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;

fn fill_query(row: u32, kv_head: u32, thread: u32, is_last: bool) {
    for (var i = thread; i < GROUP * HEAD; i += WORKGROUP) {
        query[i] = q[row * HEAD + i];
    }
}

fn key_of(number: u32, column: u32, stored: vec4<f32>) -> vec4<f32> {
    return stored;
}

fn value_of(number: u32, stored: vec4<f32>) -> vec4<f32> {
    return stored;
}
