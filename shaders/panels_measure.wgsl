// Adds the largest magnitudes of 256 parts of a weight to its largest magnitude. It is combined
// with panels.wgsl. Runs unchecked: `ops::matmul` proves on the host that every index is in its
// binding.

struct Params {
    at: u32,            // index of the weight
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> extents: array<u32>;
@group(0) @binding(1) var<storage, read_write> largest: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
    let found = largest_of(thread, extents[thread]);
    if (thread == 0u) {
        largest[params.at] = max(largest[params.at], found);
    }
}
