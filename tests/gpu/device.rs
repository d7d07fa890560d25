//! Tests the device layer on any GPU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nf4pack::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Options, Shader, adapters};

/// `out[i] = i * 3 + add` for `count` words, in workgroups of two threads.
const TRIPLE: &str = "
    struct Params { count: u32, add: u32, pad0: u32, pad1: u32 }
    @group(0) @binding(0) var<storage, read_write> out: array<u32>;
    @group(1) @binding(0) var<uniform> params: Params;
    @compute @workgroup_size(2)
    fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
        let i = (wid.x + wid.y * n.x) * 2u + lid.x;
        if (i < params.count) { out[i] = i * 3u + params.add; }
    }";

/// `out[i] = old[i] + 1`, without parameters. The length of `out` is the count.
const NEXT: &str = "
    @group(0) @binding(0) var<storage, read> old: array<u32>;
    @group(0) @binding(1) var<storage, read_write> out: array<u32>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3<u32>) {
        if (id.x < arrayLength(&out)) { out[id.x] = old[id.x] + 1u; }
    }";

fn spec(name: &'static str, source: &'static str) -> KernelSpec {
    KernelSpec { shader: Shader::checked(name, source), entry: "main", constants: vec![] }
}

fn kernel(gpu: &Gpu, name: &'static str, source: &'static str) -> Kernel {
    gpu.kernel(&spec(name, source)).unwrap()
}

/// A buffer of `count` words of 0xaa bytes.
fn poisoned(gpu: &Gpu, count: u32) -> BufferRange {
    let bytes = 4 * u64::from(count);
    BufferRange::whole(gpu.storage_with("out", &vec![0xaa; bytes as usize]).unwrap()).slice(0, bytes)
}

fn triple(gpu: &Gpu, commands: &mut Commands, out: &BufferRange, add: u32) {
    let count = (out.size / 4) as u32;
    let params = [count, add, 0, 0].map(u32::to_le_bytes).concat();
    let triple = kernel(gpu, "triple", TRIPLE);
    commands.dispatch(&triple, std::slice::from_ref(out), &params, gpu.grid(u64::from(count).div_ceil(2)), out.size);
}

fn words(gpu: &Gpu, range: &BufferRange) -> Vec<u32> {
    gpu.read(range).unwrap().as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Asserts that the device still works.
fn assert_usable(gpu: &Gpu) {
    let out = poisoned(gpu, 1001);
    let mut commands = gpu.commands("usable");
    triple(gpu, &mut commands, &out, 5);
    commands.submit().unwrap();
    assert_eq!(words(gpu, &out), (0..1001).map(|i| i * 3 + 5).collect::<Vec<_>>());
    gpu.fault().unwrap();
}

#[test]
fn adapters_are_listed_and_found_by_index_and_name() {
    let Some(gpu) = common::gpu_with(|options| options.adapter = None) else { return };
    let listed = adapters();
    assert_eq!(&listed[0], gpu.adapter());
    assert!(listed.iter().enumerate().all(|(i, adapter)| adapter.index == i));
    let open = |requested: &str| Gpu::open(&Options { adapter: Some(requested.to_owned()), ..Options::default() });
    assert_eq!(open("0").unwrap().adapter(), gpu.adapter());
    assert_eq!(open(&gpu.adapter().name.to_uppercase()).unwrap().adapter(), gpu.adapter());
    match open("no such thing") {
        Err(GpuError::NoSuchAdapter { present, .. }) => assert_eq!(present.len(), listed.len()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_runs_on_more_than_65535_workgroups() {
    let Some(gpu) = common::gpu() else { return };
    let count = 200_003;
    let out = poisoned(&gpu, count);
    let mut commands = gpu.commands("triple");
    triple(&gpu, &mut commands, &out, 7);
    commands.submit().unwrap();
    assert!(gpu.grid(u64::from(count).div_ceil(2))[1] > 1);
    for (i, word) in words(&gpu, &out).into_iter().enumerate() {
        assert_eq!(word, i as u32 * 3 + 7, "element {i}");
    }
}

#[test]
fn grids_cover_what_is_asked_and_too_large_ones_are_refused() {
    let Some(gpu) = common::gpu() else { return };
    let most = u64::from(gpu.limits().max_compute_workgroups_per_dimension.min(65_535));
    for groups in [0, 1, most - 1, most, most + 1, 2 * most + 1, most * most - 1, most * most] {
        let [x, y, z] = gpu.grid(groups).map(u64::from);
        assert!(x * y >= groups && x * y < groups.max(1) + y, "{groups}: {x} x {y}");
        assert!(x <= most && y <= most && z == 1);
    }
    let out = poisoned(&gpu, 4);
    for groups in [most * (most + 1) * 2, u64::MAX] {
        let mut commands = gpu.commands("too many");
        commands.dispatch(&kernel(&gpu, "triple", TRIPLE), std::slice::from_ref(&out), &[0; 16], gpu.grid(groups), 0);
        match commands.submit() {
            Err(GpuError::KernelLimit { kernel, limit_name: "maxComputeWorkgroupsPerDimension", .. }) => {
                assert_eq!(kernel, "triple:main");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_usable(&gpu);
}

#[test]
fn commands_see_what_the_ones_before_them_wrote() {
    // In one submission, and in 101 submissions. The last one has no dispatch, and the list is cut
    // again after it.
    for operations in [0, u64::MAX] {
        check_chain(operations);
    }
}

/// Checks a list of dispatches with `operations` operations each.
fn check_chain(operations: u64) {
    let Some(gpu) = common::gpu() else { return };
    let next = kernel(&gpu, "next", NEXT);
    let count = 70_001;
    let (a, b) = (poisoned(&gpu, count), poisoned(&gpu, count));
    let groups = gpu.grid(u64::from(count).div_ceil(64));
    let mut commands = gpu.commands("chain");
    commands.clear(&a);
    for _ in 0..50 {
        for (from, to) in [(&a, &b), (&b, &a)] {
            commands.dispatch(&next, &[from.clone(), to.clone()], &[], groups, 8 * u64::from(count));
            commands.add_operations(operations);
        }
    }
    commands.copy(&a, &b);
    commands.add_operations(operations);
    let timed = commands.submit_timed().unwrap();
    assert!(words(&gpu, &b).iter().all(|&word| word == 100));
    let elapsed = timed.elapsed(&gpu).unwrap();
    assert!(elapsed > Duration::ZERO && elapsed < Duration::from_secs(60), "{elapsed:?}");
    assert_eq!(timed.by_timestamps, gpu.feature_names().contains(&"TIMESTAMP_QUERY"));
}

#[test]
fn a_list_without_dispatches_is_timed_by_the_clock() {
    let Some(gpu) = common::gpu() else { return };
    let range = poisoned(&gpu, 8);
    let mut commands = gpu.commands("clear");
    commands.clear(&range);
    let timed = commands.submit_timed().unwrap();
    assert!(!timed.by_timestamps && timed.elapsed(&gpu).unwrap() > Duration::ZERO);
    assert_eq!(words(&gpu, &range), [0; 8]);
}

#[test]
fn large_ranges_are_read_in_chunks() {
    let Some(gpu) = common::gpu_with(|options| options.max_buffer = Some(1 << 20)) else { return };
    let Some(large) = common::gpu() else { return };
    for (gpu, count) in [(gpu, (1 << 18) - 1), (large, (17 << 20) + 3)] {
        let out = poisoned(&gpu, count);
        let mut commands = gpu.commands("triple");
        triple(&gpu, &mut commands, &out, 1);
        commands.submit().unwrap();
        for (start, len) in [(0, count), (1, count - 1), (count / 2, 17), (count - 1, 1), (3, 0)] {
            let found = words(&gpu, &out.slice(4 * u64::from(start), 4 * u64::from(len)));
            assert!(found.into_iter().eq((start..start + len).map(|i| i * 3 + 1)), "{len} words from {start} on");
        }
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let Some(gpu) = common::gpu() else { return };
    let range = poisoned(&gpu, 8);
    let mut short = [0; 28];
    let refused = [
        gpu.read(&range.slice(2, 4)).map(drop),
        gpu.read(&range.slice(0, 6)).map(drop),
        gpu.read(&range.slice(28, 16)).map(drop),
        gpu.read(&range.slice(u64::MAX - 3, 16)).map(drop),
        gpu.read_into(&range, &mut short),
    ];
    for result in refused {
        assert!(matches!(result, Err(GpuError::Invalid { .. })), "{result:?}");
    }
    assert_usable(&gpu);
}

#[test]
fn buffers_past_the_limits_are_refused_by_size() {
    let Some(gpu) = common::gpu_with(|options| options.max_buffer = Some(1 << 20)) else { return };
    assert!(gpu.storage("fits", 1 << 20).is_ok());
    for size in [(1 << 20) + 1, u64::MAX] {
        match gpu.storage("weights", size) {
            Err(GpuError::TooLarge { what, requested, limit: 1_048_576, limit_name: "maxBufferSize" }) => {
                assert_eq!((what.as_str(), requested), ("weights", size));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_usable(&gpu);
}

/// For real devices only: a software device overcommits the system memory, and the test must not
/// exhaust it.
#[test]
#[ignore = "takes all of the GPU's memory, so run it alone"]
fn memory_runs_out_in_an_error_that_says_how_much_was_asked() {
    let Some(gpu) = common::own_gpu() else { return };
    if gpu.adapter().kind != "discrete" {
        eprintln!("SKIPPED: {} has no memory of its own", gpu.adapter());
        return;
    }
    let size = gpu.limits().max_buffer_size.min(2 << 30) / 16 * 16;
    let total = gpu.memory().map_or(1 << 40, |memory| memory.total);
    let mut held = Vec::new();
    let error = loop {
        match gpu.storage("weights", size) {
            Ok(buffer) => held.push(buffer),
            Err(e) => break e,
        }
        assert!(held.len() as u64 * size <= total, "more buffers than memory");
    };
    match error {
        GpuError::OutOfMemory { what, requested, in_use } => {
            assert_eq!((what.as_str(), requested), ("weights", size));
            assert!(in_use.is_none_or(|bytes| bytes >= size * held.len() as u64), "{in_use:?}");
        }
        other => panic!("{other:?}"),
    }
    drop(held);
    gpu.wait().unwrap();
    assert_usable(&gpu);
}

#[test]
fn bytes_in_use_go_up_and_down() {
    let Some(gpu) = common::own_gpu() else { return };
    let Some(before) = gpu.bytes_in_use() else {
        eprintln!("SKIPPED: {} does not report memory in use", gpu.adapter());
        return;
    };
    let buffer = gpu.storage("weights", 32 << 20).unwrap();
    assert!(gpu.bytes_in_use().unwrap() >= before + (32 << 20));
    drop(buffer);
    gpu.wait().unwrap();
    assert!(gpu.bytes_in_use().unwrap() < before + (32 << 20));
}

/// Kept bind groups contain buffers, but do not keep them alive.
#[test]
fn memory_of_a_bound_buffer_is_free_after_its_last_use() {
    let Some(gpu) = common::own_gpu() else { return };
    let Some(before) = gpu.bytes_in_use() else {
        eprintln!("SKIPPED: {} does not report memory in use", gpu.adapter());
        return;
    };
    let next = kernel(&gpu, "next", NEXT);
    let kept = poisoned(&gpu, 8 << 20);
    for _ in 0..3 {
        let out = poisoned(&gpu, 8 << 20);
        let mut commands = gpu.commands("bound");
        commands.dispatch(&next, &[kept.slice(0, 256), out.slice(0, 256)], &[], [1, 1, 1], 0);
        commands.dispatch(&next, &[out.slice(256, 256), kept.slice(512, 256)], &[], [1, 1, 1], 0);
        commands.submit().unwrap();
        drop(out);
        gpu.wait().unwrap();
        let used = gpu.bytes_in_use().unwrap();
        assert!(used < before + (48 << 20), "{used} bytes after {before}");
    }
    drop(kept);
    gpu.wait().unwrap();
    assert!(gpu.bytes_in_use().unwrap() < before + (32 << 20));
}

/// The device copies to a buffer in host memory and back, in the order of its queue.
#[test]
fn buffers_in_host_memory_keep_what_is_copied_to_them() {
    let Some(gpu) = common::gpu() else { return };
    if !gpu.has_host_buffers() {
        assert!(matches!(gpu.host_buffer("host", 16), Err(GpuError::NoFeature { .. })));
        return;
    }
    let count = 70_001;
    let host = BufferRange::whole(gpu.host_buffer("host", 4 * u64::from(count)).unwrap()).slice(0, 4 * u64::from(count));
    let (out, back) = (poisoned(&gpu, count), poisoned(&gpu, count));
    let mut commands = gpu.commands("host");
    triple(&gpu, &mut commands, &out, 7);
    commands.copy(&out, &host);
    triple(&gpu, &mut commands, &out, 0);
    commands.copy(&host, &back);
    commands.submit().unwrap();
    assert_eq!(words(&gpu, &back), (0..count).map(|i| 3 * i + 7).collect::<Vec<_>>());
    assert_eq!(words(&gpu, &out)[1], 3);
}

/// Parts of lists, and lists of several threads, share a buffer for their parameters.
#[test]
fn every_dispatch_gets_its_own_parameters() {
    let Some(gpu) = common::own_gpu() else { return };
    let check = |thread: u32, dispatches: u32, operations: u64| {
        let out = poisoned(&gpu, 64 * dispatches);
        let mut commands = gpu.commands("parameters");
        for i in 0..dispatches {
            triple(&gpu, &mut commands, &out.slice(256 * u64::from(i), 12), 1000 * thread + i);
            commands.add_operations(operations);
        }
        commands.submit().unwrap();
        let words = words(&gpu, &out);
        for (i, part) in (0..dispatches).zip(words.chunks(64)) {
            let add = 1000 * thread + i;
            assert_eq!(part[..4], [add, add + 3, add + 6, 0xaaaa_aaaa], "dispatch {i} of {dispatches}");
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let check = &check;
            scope.spawn(move || {
                for dispatches in [1, 2, 70, 300] {
                    check(thread, dispatches, 0);
                }
                check(thread, 70, 1 << 37);
            });
        }
    });
    // More parameters than the buffer has at first.
    check(9, 9_000, 0);
    check(9, 3, 0);
}

/// A buffer is not taken for an earlier one with the same size, and an error leaves no bind group.
#[test]
fn bind_groups_are_those_of_present_buffers() {
    let Some(gpu) = common::own_gpu() else { return };
    let next = kernel(&gpu, "next", NEXT);
    let from = poisoned(&gpu, 64);
    for round in 0..20 {
        let out = poisoned(&gpu, 64);
        let mut commands = gpu.commands("present");
        commands.dispatch(&next, &[from.clone(), out.clone()], &[], [1, 1, 1], 0);
        commands.submit().unwrap();
        assert!(words(&gpu, &out).iter().all(|&word| word == 0xaaaa_aaab), "round {round}");
        let mut commands = gpu.commands("alias");
        commands.dispatch(&next, &[from.clone(), out.clone()], &[], [1, 1, 1], 0);
        commands.dispatch(&next, &[out.clone(), out.clone()], &[], [1, 1, 1], 0);
        assert!(matches!(commands.submit(), Err(GpuError::Invalid { .. })));
    }
}

#[test]
fn bindings_are_checked_against_limits_and_the_kernel() {
    let Some(gpu) = common::gpu_with(|options| options.max_binding = Some(4096)) else { return };
    let next = kernel(&gpu, "next", NEXT);
    let (a, b) = (poisoned(&gpu, 2048), poisoned(&gpu, 2048));
    let submit = |bindings: &[BufferRange], params: &[u8]| {
        let mut commands = gpu.commands("bindings");
        commands.dispatch(&next, bindings, params, [1, 1, 1], 0);
        commands.submit().map(drop)
    };
    let part = |range: &BufferRange| range.slice(0, 4096);
    submit(&[part(&a), part(&b)], &[]).unwrap();
    match submit(&[part(&a), b.clone()], &[]) {
        Err(GpuError::TooLarge { what, requested: 8192, limit: 4096, limit_name: "maxStorageBufferBindingSize" }) => {
            assert_eq!(what, "kernel next:main, binding 1");
        }
        other => panic!("{other:?}"),
    }
    let binding_1 = "kernel next:main, binding 1";
    let whole = "kernel next:main";
    for (bindings, params, culprit) in [
        (vec![part(&a), b.slice(4, 64)], 0, binding_1),
        (vec![part(&a), b.slice(0, 0)], 0, binding_1),
        (vec![part(&a), b.slice(0, 6)], 0, binding_1),
        (vec![part(&a), b.slice(8192 - 256, 512)], 0, binding_1),
        (vec![part(&a), b.slice(u64::MAX - 255, 512)], 0, binding_1),
        (vec![part(&a)], 0, whole),
        (vec![part(&a), part(&b), part(&a)], 0, whole),
        (vec![part(&a), part(&b)], 16, whole),
    ] {
        match submit(&bindings, &vec![0; params]) {
            Err(GpuError::Invalid { what, .. }) => assert_eq!(what, culprit),
            other => panic!("{other:?}"),
        }
    }
    assert_usable(&gpu);
}

#[test]
fn parameters_are_checked_against_the_kernel() {
    let Some(gpu) = common::gpu() else { return };
    let out = poisoned(&gpu, 4);
    for params in [0, 4, 20] {
        let mut commands = gpu.commands("parameters");
        commands.dispatch(&kernel(&gpu, "triple", TRIPLE), std::slice::from_ref(&out), &vec![0; params], [1, 1, 1], 0);
        assert!(matches!(commands.submit(), Err(GpuError::Invalid { .. })), "{params} bytes");
    }
    assert_usable(&gpu);
}

#[test]
fn errors_of_wgpu_are_typed_and_the_device_stays_usable() {
    let Some(gpu) = common::gpu() else { return };
    // Only wgpu detects a buffer that is written and read in one dispatch.
    let range = poisoned(&gpu, 64);
    let mut commands = gpu.commands("alias");
    commands.dispatch(&kernel(&gpu, "next", NEXT), &[range.clone(), range.clone()], &[], [1, 1, 1], 0);
    match commands.submit() {
        Err(GpuError::Invalid { what, .. }) => assert_eq!(what, "alias"),
        other => panic!("{other:?}"),
    }
    assert_usable(&gpu);
    let (a, b) = (poisoned(&gpu, 8), poisoned(&gpu, 4));
    let mut commands = gpu.commands("copy");
    commands.copy(&a, &b);
    assert!(matches!(commands.submit(), Err(GpuError::Invalid { .. })));
    let mut commands = gpu.commands("clear");
    commands.clear(&a.slice(1, 4));
    assert!(matches!(commands.submit(), Err(GpuError::Invalid { .. })));
    assert_usable(&gpu);
}

#[test]
fn errors_that_no_call_returns_are_kept_for_the_next_wait() {
    let Some(gpu) = common::own_gpu() else { return };
    let usage = wgpu_usages();
    let device = gpu.device().clone();
    let bad = move || {
        let descriptor =
            nf4pack::gpu::wgpu::BufferDescriptor { label: Some("bad"), size: 16, usage, mapped_at_creation: false };
        drop(device.create_buffer(&descriptor));
    };
    // On another thread, outside of any scope, while this thread is in its own scope.
    std::thread::spawn(bad).join().unwrap();
    let buffer = gpu.storage("good", 16);
    assert!(buffer.is_ok(), "{buffer:?}");
    assert!(matches!(gpu.wait(), Err(GpuError::Invalid { .. })));
    gpu.wait().unwrap();
    assert_usable(&gpu);
}

/// Invalid: a buffer without a use.
fn wgpu_usages() -> nf4pack::gpu::wgpu::BufferUsages {
    nf4pack::gpu::wgpu::BufferUsages::empty()
}

#[test]
fn threads_do_not_see_each_others_errors() {
    let Some(gpu) = common::gpu() else { return };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let gpu = &gpu;
            scope.spawn(move || {
                for _ in 0..20 {
                    if thread % 2 == 0 {
                        assert_usable(gpu);
                    } else {
                        let usage = wgpu_usages();
                        assert!(matches!(gpu.buffer("bad", 16, usage), Err(GpuError::Invalid { .. })));
                    }
                }
            });
        }
    });
    gpu.wait().unwrap();
}

#[test]
fn kernels_past_the_limits_are_refused_before_the_driver_sees_them() {
    let Some(gpu) = common::gpu() else { return };
    let refused = |name: &'static str, source: String, constants: Vec<(&'static str, f64)>| {
        let spec = KernelSpec { shader: Shader::checked(name, source), entry: "main", constants };
        match gpu.kernel(&spec) {
            Err(GpuError::KernelLimit { kernel, needed, limit, limit_name }) => {
                assert_eq!(kernel, format!("{name}:main"));
                (needed, limit, limit_name)
            }
            other => panic!("{name}: {other:?}"),
        }
    };
    let limits = gpu.limits().clone();
    let shared = limits.max_compute_workgroup_storage_size;
    let words = shared / 4 - 3;
    let tile = |size: &str| {
        format!(
            "override WORDS: u32 = 8u;
             var<workgroup> tile: array<u32, {size}>;
             var<workgroup> three: array<u32, 3>;
             var<workgroup> unused: array<u32, 100000>;
             @group(0) @binding(0) var<storage, read_write> out: array<u32>;
             @compute @workgroup_size(8) fn main(@builtin(local_invocation_id) lid: vec3<u32>) {{
                 tile[lid.x] = lid.x; three[lid.x % 3u] = lid.x;
                 workgroupBarrier();
                 out[lid.x] = tile[7u - lid.x] + three[0];
             }}"
        )
    };
    let over = (u64::from(shared) + 16, u64::from(shared), "maxComputeWorkgroupStorageSize");
    assert_eq!(refused("tile", tile(&format!("{}", words + 3)), vec![]), over);
    assert_eq!(refused("override", tile("WORDS"), vec![("WORDS", f64::from(words + 3))]), over);
    let fitting = Shader::checked("fitting", tile("WORDS"));
    let fitting = KernelSpec { shader: fitting, entry: "main", constants: vec![("WORDS", f64::from(shared / 4 - 4))] };
    assert!(gpu.kernel(&fitting).is_ok());

    let sized = |size: String| format!("@compute @workgroup_size({size}) fn main() {{}}");
    let x = u64::from(limits.max_compute_workgroup_size_x);
    assert_eq!(refused("x", sized(format!("{}", x + 1)), vec![]), (x + 1, x, "maxComputeWorkgroupSizeX"));
    let z = u64::from(limits.max_compute_workgroup_size_z);
    assert_eq!(refused("z", sized(format!("1, 1, {}", z + 1)), vec![]), (z + 1, z, "maxComputeWorkgroupSizeZ"));
    let most = u64::from(limits.max_compute_invocations_per_workgroup);
    let (x, y) = (limits.max_compute_workgroup_size_x, limits.max_compute_workgroup_size_y);
    let (needed, limit, name) = refused("xy", sized(format!("{x}, {y}")), vec![]);
    assert_eq!((needed, limit, name), (u64::from(x) * u64::from(y), most, "maxComputeInvocationsPerWorkgroup"));
    assert_usable(&gpu);
}

#[test]
fn kernels_with_more_buffers_than_a_stage_has_are_refused() {
    let Some(gpu) = common::gpu() else { return };
    let most = u64::from(gpu.limits().max_storage_buffers_per_shader_stage);
    if most > 1000 {
        eprintln!("SKIPPED: naga would take minutes for this many buffers");
        return;
    }
    let buffer = |i| format!("@group(0) @binding({i}) var<storage, read_write> b{i}: array<u32>;\n");
    let buffers: String = (0..=most).map(buffer).collect();
    let uses: String = (0..=most).map(|i| format!("b{i}[0] = 1u;")).collect();
    let source = format!("{buffers}@compute @workgroup_size(1) fn main() {{ {uses} }}");
    let spec = KernelSpec { shader: Shader::checked("many", source), entry: "main", constants: vec![] };
    match gpu.kernel(&spec) {
        Err(GpuError::KernelLimit { needed, limit, limit_name: "maxStorageBuffersPerShaderStage", .. }) => {
            assert_eq!((needed, limit), (most + 1, most));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    let Some(gpu) = common::gpu() else { return };
    let cases = [
        ("syntax", "fn main( {", "main", vec![]),
        ("types", "@compute @workgroup_size(1) fn main() { let a: u32 = 1.5; }", "main", vec![]),
        ("entry", "@compute @workgroup_size(1) fn main() {}", "other", vec![]),
        ("constant", "@compute @workgroup_size(1) fn main() {}", "main", vec![("WORDS", 1.0)]),
        ("missing", "override N: u32; @compute @workgroup_size(N) fn main() {}", "main", vec![]),
        (
            "group",
            "@group(2) @binding(0) var<storage, read_write> a: array<u32>;
             @compute @workgroup_size(1) fn main() { a[0] = 1u; }",
            "main",
            vec![],
        ),
    ];
    for (name, source, entry, constants) in cases {
        match gpu.kernel(&KernelSpec { shader: Shader::checked(name, source), entry, constants }) {
            Err(GpuError::Invalid { what, reason }) => {
                assert!(what.contains(name) && !reason.is_empty(), "{what}: {reason}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    assert_usable(&gpu);
}

#[test]
fn bindings_that_an_entry_point_does_not_use_are_left_out() {
    let Some(gpu) = common::gpu() else { return };
    let source = "
        @group(0) @binding(0) var<storage, read> unused: array<u32>;
        @group(0) @binding(1) var<storage, read_write> out: array<u32>;
        @compute @workgroup_size(8) fn main(@builtin(local_invocation_id) lid: vec3<u32>) { out[lid.x] = lid.x; }
        @compute @workgroup_size(8) fn both(@builtin(local_invocation_id) lid: vec3<u32>) { out[lid.x] = unused[lid.x]; }";
    let (unused, out) = (poisoned(&gpu, 8), poisoned(&gpu, 8));
    let mut commands = gpu.commands("left out");
    commands.dispatch(&kernel(&gpu, "left_out", source), &[unused, out.clone()], &[], [1, 1, 1], 0);
    commands.submit().unwrap();
    assert_eq!(words(&gpu, &out), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn trusted_kernels_are_checked_if_the_options_request_it() {
    let source = "
        @group(0) @binding(0) var<storage, read_write> out: array<u32>;
        @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) { out[id.x] = id.x; }";
    for (checked, groups) in [(false, 1), (true, 1), (true, 3)] {
        let Some(gpu) = common::gpu_with(|options| options.checked = checked) else { return };
        assert_eq!(gpu.is_checked(), checked);
        // SAFETY: accesses past the bound range run only with checks, and there is no loop.
        let shader = unsafe { Shader::trusted("trusted", source) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: vec![] }).unwrap();
        let out = poisoned(&gpu, 192);
        let mut commands = gpu.commands("trusted");
        commands.dispatch(&kernel, &[out.slice(0, 256)], &[], [groups, 1, 1], 256);
        commands.submit().unwrap();
        let found = words(&gpu, &out);
        assert!(found[..63].iter().copied().eq(0..63), "{found:?}");
        assert!(found[64..].iter().all(|&word| word == 0xaaaa_aaaa), "written past the end: {found:?}");
    }
}

#[test]
fn kernels_are_compiled_once() {
    let Some(gpu) = common::own_gpu() else { return };
    let started = Instant::now();
    let first = kernel(&gpu, "triple", TRIPLE);
    let compiling = started.elapsed();
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(kernel(&gpu, "triple", TRIPLE).name(), first.name());
    }
    assert!(started.elapsed() < 50 * compiling, "100 more took {:?}, the first {compiling:?}", started.elapsed());
    assert_eq!(first.workgroup_size(), [2, 1, 1]);
}

#[test]
fn a_lost_device_is_an_error_everywhere_and_nothing_hangs() {
    let Some(gpu) = common::own_gpu() else { return };
    assert_usable(&gpu);
    let out = poisoned(&gpu, 64);
    let recorded = |gpu: &Gpu| {
        let mut commands = gpu.commands("late");
        triple(gpu, &mut commands, &out, 5);
        commands
    };
    let (late, timed) = (recorded(&gpu), recorded(&gpu));
    let submission = recorded(&gpu).submit().unwrap();
    gpu.wait().unwrap();
    gpu.device().destroy();
    let results = [
        late.submit().map(drop),
        timed.submit_timed().map(drop),
        gpu.wait_for(&submission),
        gpu.wait(),
        gpu.fault(),
        gpu.read(&out).map(drop),
        gpu.storage("late", 64).map(drop),
        gpu.storage_with("late", &[1, 2, 3]).map(drop),
        gpu.kernel(&spec("next", NEXT)).map(drop),
        gpu.wait(),
    ];
    for (i, result) in results.into_iter().enumerate() {
        assert!(matches!(result, Err(GpuError::DeviceLost { .. })), "call {i}: {result:?}");
    }
    assert_usable(&common::gpu().unwrap());
}

#[test]
fn a_device_that_is_lost_while_it_works_is_an_error_too() {
    type Call = fn(&Gpu, &BufferRange) -> Result<(), GpuError>;
    let calls: [Call; 4] = [
        |gpu, _| gpu.wait(),
        |gpu, out| gpu.read(out).map(drop),
        |gpu, out| {
            let mut commands = gpu.commands("late");
            triple(gpu, &mut commands, out, 5);
            commands.submit().and_then(|submission| gpu.wait_for(&submission))
        },
        |gpu, out| {
            let mut commands = gpu.commands("late");
            commands.clear(out);
            commands.submit_timed().and_then(|timed| timed.elapsed(gpu)).map(drop)
        },
    ];
    for (i, call) in calls.into_iter().enumerate() {
        let Some(gpu) = common::own_gpu() else { return };
        let out = poisoned(&gpu, 1 << 20);
        let mut commands = gpu.commands("work");
        for _ in 0..20 {
            triple(&gpu, &mut commands, &out, 5);
        }
        commands.submit().unwrap();
        gpu.device().destroy();
        let result = call(&gpu, &out);
        assert!(matches!(result, Err(GpuError::DeviceLost { .. })), "call {i}: {result:?}");
        assert!(matches!(gpu.fault(), Err(GpuError::DeviceLost { .. })));
    }
}

#[test]
fn profiles_count_calls_bytes_and_time() {
    let Some(gpu) = common::gpu_with(|options| options.profile = true) else { return };
    assert!(gpu.profile().unwrap().0.is_empty());
    let (a, b) = (poisoned(&gpu, 1000), poisoned(&gpu, 1000));
    let next = kernel(&gpu, "next", NEXT);
    // More dispatches than one query set holds, then more submissions than the limit of unread
    // times.
    let mut commands = gpu.commands("many");
    for _ in 0..2500 {
        commands.dispatch(&next, &[a.clone(), b.clone()], &[], [16, 1, 1], 8000);
    }
    let timed = commands.submit_timed().unwrap();
    for _ in 0..300 {
        let mut commands = gpu.commands("few");
        triple(&gpu, &mut commands, &a, 5);
        commands.copy(&a, &b);
        commands.submit().unwrap();
    }
    assert_eq!(words(&gpu, &b)[999], 999 * 3 + 5);
    let table = gpu.profile().unwrap();
    assert_eq!(gpu.profile().unwrap(), table, "reading changes nothing");
    let mut rows: Vec<_> = table.0.iter().map(|row| (row.kernel.as_str(), row.calls, row.bytes)).collect();
    assert!(table.0.is_sorted_by(|a, b| a.seconds >= b.seconds));
    rows.sort_unstable();
    assert_eq!(rows, [("next:main", 2500, 2500 * 8000), ("triple:main", 300, 300 * 4000)]);
    assert!(table.0.iter().all(|row| row.seconds > 0.0));
    let elapsed = timed.elapsed(&gpu).unwrap().as_secs_f64();
    let passes = table.0.iter().find(|row| row.kernel == "next:main").unwrap().seconds;
    assert!(elapsed >= 0.999 * passes, "{elapsed} s from first to last, {passes} s in passes");
    let total = table.total();
    assert_eq!((total.calls, total.bytes), (2800, 2500 * 8000 + 300 * 4000));
    let text = table.to_string();
    assert_eq!(text.lines().count(), 4);
    assert!(text.lines().next().unwrap().ends_with("GB/s") && text.contains("total"), "{text}");
}

#[test]
fn compiled_kernels_are_kept_and_garbage_in_their_place_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let open = || common::gpu_with(|options| options.cache = Some(folder.path().to_owned()));
    let Some(gpu) = open() else { return };
    let kept = gpu.feature_names().contains(&"PIPELINE_CACHE");
    assert_usable(&gpu);
    drop(gpu);
    let key: Vec<PathBuf> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(key.len(), usize::from(kept));
    let Some(file) = key.first().map(|key| key.join("pipelines")) else { return };
    let good = fs::read(&file).unwrap();
    let sealed = |bytes: &[u8]| [bytes, &nf4pack::format::crc32(bytes).to_le_bytes()].concat();
    let payload = &good[..good.len() - 4];
    assert_eq!(sealed(payload), good);
    let flipped = |at: usize| payload.iter().enumerate().map(|(i, b)| if i == at { b ^ 1 } else { *b }).collect::<Vec<_>>();
    let cases = [
        good.clone(),
        vec![],
        b"garbage".to_vec(),
        good[..good.len() / 2].to_vec(),
        // The checksum is right, but wgpu refuses the data: no magic, another version, adapter or
        // driver, truncated.
        sealed(b"garbage"),
        sealed(&vec![0xaa; 4096]),
        sealed(&flipped(0)),
        sealed(&flipped(11)),
        sealed(&flipped(22)),
        sealed(&flipped(40)),
        sealed(&payload[..payload.len() - 1]),
    ];
    for (i, bytes) in cases.into_iter().enumerate() {
        fs::write(&file, bytes).unwrap();
        let gpu = open().unwrap();
        gpu.fault().unwrap();
        assert_usable(&gpu);
        drop(gpu);
        let after = fs::read(&file).unwrap();
        assert_eq!(sealed(&after[..after.len() - 4]), after, "case {i}: a valid file remains");
    }
}

#[test]
fn records_are_kept_per_device() {
    let folder = tempfile::tempdir().unwrap();
    let open = || common::gpu_with(|options| options.cache = Some(folder.path().to_owned()));
    let Some(gpu) = open() else { return };
    assert_eq!(gpu.cached_record("self-test"), None);
    gpu.cache_record("self-test", b"passed");
    assert_eq!(open().unwrap().cached_record("self-test").as_deref(), Some(&b"passed"[..]));
    let none = common::gpu_with(|options| options.cache = None).unwrap();
    none.cache_record("self-test", b"passed");
    assert_eq!(none.cached_record("self-test"), None);
}

#[test]
fn the_device_names_itself() {
    let Some(gpu) = common::gpu() else { return };
    let (least, most) = gpu.subgroup_sizes();
    assert!(least <= most);
    let timestamps = gpu.features().contains(nf4pack::gpu::wgpu::Features::TIMESTAMP_QUERY);
    assert_eq!(gpu.feature_names().contains(&"TIMESTAMP_QUERY"), timestamps);
    if let Some(memory) = gpu.memory() {
        assert!(memory.total > 1 << 20, "{memory:?}");
        assert!(memory.available.is_none_or(|available| available > 0), "{memory:?}");
    }
}
