//! Runs kernels over poisoned memory: a result that depends on memory that no kernel wrote differs
//! between two poisons.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use super::{BufferRange, Commands, Gpu, KernelSpec, Shader, wgpu};

/// Words that fill memory before a run: a signalling NaN, which arithmetic makes quiet, and a
/// float. A maximum that ignores NaN does not ignore the float.
const POISONS: [u32; 2] = [0x7fa0_0000, 0x4640_e400];

/// Fills 16 KiB of workgroup memory with a word.
const WORKGROUP_MEMORY: &str = "
    override POISON: u32 = 0u;
    var<workgroup> memory: array<u32, 4096>;
    @group(0) @binding(0) var<storage, read_write> out: array<u32>;
    @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) thread: u32) {
        for (var i = thread; i < 4096u; i += 64u) { memory[i] = POISON; }
        workgroupBarrier();
        out[thread] = memory[4095u - thread];
    }";
/// Workgroups of that kernel: several for each core of a large GPU.
const GROUPS: u32 = 1024;

/// Asserts that recorded work gives the same bits with every poison in the memory that it may
/// write, and that it writes nothing else.
///
/// `kernels` are the names of all its kernels, as `tests/gpu/shaders.rs` reads them. Before each
/// run, every buffer with a range that a kernel may write is filled with the poison, and so is
/// workgroup memory. `results` start as poison. `updated` start with their present contents. Other
/// memory of these buffers must keep the poison. In the buffers without results, such as scratch
/// memory, each word must keep the poison or get the same bits.
#[track_caller]
pub(crate) fn assert_written(
    gpu: &Gpu,
    kernels: &[&str],
    results: &[&BufferRange],
    updated: &[&BufferRange],
    record: impl Fn(&mut Commands),
) {
    let recorded = || {
        let mut commands = gpu.commands("poison");
        record(&mut commands);
        commands
    };
    let commands = recorded();
    let (names, ranges) = commands.writes();
    assert!(names.into_iter().eq(kernels.iter().copied()), "the kernels, sorted: {:?}", commands.writes().0);
    let mut buffers: Vec<&wgpu::Buffer> = Vec::new();
    for range in &ranges {
        if !buffers.contains(&&*range.buffer) {
            buffers.push(&range.buffer);
        }
    }
    let of = |buffer: &wgpu::Buffer, all: &[&BufferRange]| -> Vec<BufferRange> {
        all.iter().filter(|range| *range.buffer == *buffer).map(|&range| range.clone()).collect()
    };
    let before: Vec<(BufferRange, Vec<u8>)> =
        updated.iter().map(|&range| (range.clone(), gpu.read(range).unwrap())).collect();
    let runs = POISONS.map(|poison| {
        for buffer in &buffers {
            let mut bytes = poison.to_le_bytes().repeat((buffer.size() / 4) as usize);
            for (range, original) in before.iter().filter(|(range, _)| *range.buffer == **buffer) {
                bytes[span(range)].copy_from_slice(original);
            }
            gpu.queue().write_buffer(buffer, 0, &bytes);
        }
        fill_workgroup_memory(gpu, poison);
        recorded().submit().unwrap();
        buffers.iter().map(|&buffer| gpu.read(&BufferRange::whole(buffer.clone().into())).unwrap()).collect::<Vec<_>>()
    });
    for (i, buffer) in buffers.iter().enumerate() {
        let claimed = [of(buffer, results), of(buffer, updated)].concat();
        let found = [&runs[0][i], &runs[1][i]];
        if claimed.is_empty() {
            assert_used(found, &of(buffer, &ranges));
        } else {
            assert_complete(found, &claimed);
        }
    }
    let all = results.iter().chain(updated);
    all.for_each(|range| assert!(buffers.contains(&&*range.buffer), "no kernel writes a result"));
}

fn span(range: &BufferRange) -> std::ops::Range<usize> {
    range.offset as usize..(range.offset + range.size) as usize
}

/// Results are equal in both runs. All other memory of their buffer has the poison.
#[track_caller]
fn assert_complete(found: [&Vec<u8>; 2], results: &[BufferRange]) {
    let mut rest = found.map(Clone::clone);
    for result in results.iter().map(span) {
        let differs = words(&found[0][result.clone()]).zip(words(&found[1][result.clone()])).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the word of a result of {} bytes that depends on the memory before", result.len());
        for (rest, poison) in rest.iter_mut().zip(POISONS) {
            words_mut(&mut rest[result.clone()]).for_each(|word| word.copy_from_slice(&poison.to_le_bytes()));
        }
    }
    for (rest, poison) in rest.iter().zip(POISONS) {
        assert_eq!(words(rest).position(|word| word != poison), None, "a word outside of the results was written");
    }
}

/// Each word of scratch memory has the poison in both runs, or the same bits. The ranges contain
/// all words that were written.
#[track_caller]
fn assert_used(found: [&Vec<u8>; 2], ranges: &[BufferRange]) {
    const PAGE: usize = 4096;
    let untouched = POISONS.map(|poison| poison.to_le_bytes().repeat(PAGE / 4));
    for (page, (a, b)) in found[0].chunks(PAGE).zip(found[1].chunks(PAGE)).enumerate() {
        if *a == untouched[0][..a.len()] && *b == untouched[1][..b.len()] {
            continue;
        }
        for (i, (a, b)) in words(a).zip(words(b)).enumerate() {
            let at = PAGE * page + 4 * i;
            if [a, b] != POISONS {
                assert_eq!(a, b, "byte {at} of scratch memory depends on the memory before");
                assert!(ranges.iter().any(|range| span(range).contains(&at)), "byte {at} is outside of all bindings");
            }
        }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()))
}

fn words_mut(bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    bytes.chunks_exact_mut(4)
}

fn fill_workgroup_memory(gpu: &Gpu, poison: u32) {
    let shader = Shader::checked("poison", WORKGROUP_MEMORY);
    let spec = KernelSpec { shader, entry: "main", constants: vec![("POISON", poison.into())] };
    let out = BufferRange::whole(gpu.storage("poison", 256).unwrap());
    let mut commands = gpu.commands("poison");
    commands.dispatch(&gpu.kernel(&spec).unwrap(), &[out], &[], [GROUPS, 1, 1], 0);
    commands.submit().unwrap();
}

mod tests {
    use super::*;
    use crate::gpu::Options;

    /// Writes the first `COUNT` words of 8, and adds the word before it to each.
    const PARTIAL: &str = "
        override COUNT: u32 = 8u;
        override ADD: u32 = 0u;
        @group(0) @binding(0) var<storage, read_write> out: array<u32>;
        @compute @workgroup_size(8) fn main(@builtin(local_invocation_index) thread: u32) {
            if (thread < COUNT) { out[thread] = thread + ADD * out[7]; }
        }";

    #[test]
    fn missing_words_words_outside_and_words_that_are_added_to_are_found() {
        let Ok(gpu) = Gpu::open(&Options { cache: None, ..Options::from_env() }) else {
            eprintln!("SKIPPED: no GPU, not even a software one");
            return;
        };
        let failure = |count: u32, add: u32, size: u64, scratch: bool| {
            let shader = Shader::checked("partial", PARTIAL);
            let constants = vec![("COUNT", count.into()), ("ADD", add.into())];
            let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants }).unwrap();
            let out = BufferRange::whole(gpu.storage("out", 64).unwrap());
            let result = out.slice(0, size);
            let results: &[&BufferRange] = if scratch { &[] } else { &[&result] };
            let record = |commands: &mut Commands| {
                commands.dispatch(&kernel, &[out.slice(0, 32)], &[], [1, 1, 1], 0);
            };
            let run = || assert_written(&gpu, &["partial:main"], results, &[], record);
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).err();
            panic.map(|panic| panic.downcast_ref::<String>().unwrap().clone()).unwrap_or_default()
        };
        assert_eq!(failure(8, 0, 32, false), "");
        assert!(failure(7, 0, 32, false).contains("depends on the memory before"));
        assert!(failure(7, 1, 28, false).contains("depends on the memory before"));
        assert!(failure(8, 0, 28, false).contains("outside of the results"));
        assert_eq!(failure(7, 0, 0, true), "");
        assert!(failure(7, 1, 0, true).contains("depends on the memory before"));
    }
}
