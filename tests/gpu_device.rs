//! The device layer on whatever GPU there is.
#![cfg(feature = "gpu")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/gpu.rs"]
mod common;

use nf4pack::gpu::{BufferRange, KernelSpec, Shader};

#[test]
fn a_kernel_runs_on_more_than_65535_workgroups() {
    let Some(gpu) = common::gpu() else { return };
    let source = "
        struct Params { count: u32, add: u32, pad0: u32, pad1: u32 }
        @group(0) @binding(0) var<storage, read_write> out: array<u32>;
        @group(1) @binding(0) var<uniform> params: Params;
        @compute @workgroup_size(2)
        fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
            let i = (wid.x + wid.y * n.x) * 2u + lid.x;
            if (i < params.count) { out[i] = i * 3u + params.add; }
        }";
    let kernel =
        gpu.kernel(&KernelSpec { shader: Shader::checked("triple", source), entry: "main", constants: vec![] }).unwrap();
    let count = 200_003_u32;
    let out = BufferRange::whole(gpu.storage_with("out", &vec![0xaa; 4 * count as usize]).unwrap());
    let params = [count, 7, 0, 0].map(u32::to_le_bytes).concat();
    let mut commands = gpu.commands("triple");
    commands.dispatch(
        &kernel,
        std::slice::from_ref(&out),
        &params,
        gpu.grid(u64::from(count).div_ceil(2)),
        4 * u64::from(count),
    );
    commands.submit().unwrap();
    let found = gpu.read(&out.slice(0, 4 * u64::from(count))).unwrap();
    for (i, word) in found.chunks(4).enumerate() {
        assert_eq!(u32::from_le_bytes(word.try_into().unwrap()), i as u32 * 3 + 7, "element {i}");
    }
}
