// Quantised weights as bound to a kernel: bindings 0 to 3 of every kernel that decodes NF4.

@group(0) @binding(0) var<storage, read> codes: array<u32>;     // 8 codes per word, low nibble first
@group(0) @binding(1) var<storage, read> head: array<f32>;      // dq8: offset, then the map [256]
@group(0) @binding(2) var<storage, read> supers: array<f32>;    // dq8: one per 256 scales
@group(0) @binding(3) var<storage, read> scales: array<u32>;    // one f32, half (bf16) or byte (dq8) per block

override SCALES: u32 = 0u;  // 0 f32, 1 bf16, 2 dq8

