#!/usr/bin/env bash
# Tests under AddressSanitizer, ThreadSanitizer and Miri; docs/reliability.md has the results.
#   scripts/sanitize.sh [address] [thread] [miri]      all three by default
#   NF4PACK_SANITIZE_KEEP=1                            keeps the builds in target/sanitize
#   NF4PACK_SANITIZE_ONLY=gpu                          one group of tests: lib, convert, gpu; for
#                                                      miri lib, format, encode
# Fails if a test fails, none runs, or anything is reported. Needs a nightly toolchain with rust-src
# (and miri), a Vulkan driver (Mesa's software one suffices), and some 3 GB of disk for each.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

[ "$#" -gt 0 ] || set -- address thread miri
rustup +nightly component add miri rust-src >/dev/null || {
    echo "sanitize: rustup toolchain install nightly --component miri --component rust-src" >&2
    exit 1
}
host=$(rustc -vV | sed -n 's/^host: //p')
folder=$PWD/target/sanitize
log=$folder/log
mkdir -p "$folder"
export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=line-tables-only

# The tests of one group: test_group NAME FLAGS... -- FILTERS...
test_group() {
    [ "${NF4PACK_SANITIZE_ONLY:-$1}" = "$1" ] || return 0
    printf '\n-- %s\n' "$1"
    "${cargo[@]}" "${@:2}" 2>&1 | tee -a "$log" || failed=1
}

# A program with a race and a read past the end of an allocation, which the sanitizer must report.
prove() {
    cat >"$folder/fault.rs" <<'RUST'
static mut RACE: [u8; 64] = [0; 64];
fn main() {
    let read = || for _ in 0..1000 {
        let bytes: &mut [u8] = unsafe { &mut *(&raw mut RACE) };
        std::io::Read::read_exact(&mut std::io::repeat(7), std::hint::black_box(bytes)).unwrap();
    };
    let threads: Vec<_> = (0..2).map(|_| std::thread::spawn(read)).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let bytes = std::hint::black_box(vec![1_u8; 64]);
    println!("{}", unsafe { *bytes.as_ptr().add(64) });
}
RUST
    rustc +nightly -O --edition 2024 "-Zsanitizer=$1" -Cunsafe-allow-abi-mismatch=sanitizer \
        -o "$folder/fault" "$folder/fault.rs"
    ! "$folder/fault" >/dev/null 2>&1 || { echo "sanitize: $1 does not see a fault" >&2; exit 1; }
}

# What has unsafe code or runs on several threads.
run_sanitizer() {
    prove "$1"
    # With --target the flags are not those of build scripts and macros.
    cargo=(env RUSTFLAGS="-Zsanitizer=$1" cargo +nightly test --locked --target "$host" --target-dir "$folder/$1")
    # Optimised a little: the searches of the encoders would take hours.
    export CARGO_PROFILE_DEV_OPT_LEVEL=1 NF4PACK_REQUIRE_GPU=1 NF4PACK_ADAPTER="${NF4PACK_ADAPTER:-llvmpipe}"
    local to=log_path=$reports/report
    # Leaks are left out: the threads of rayon's global pool are never joined, and count as leaks.
    export TSAN_OPTIONS=$to:history_size=4
    export ASAN_OPTIONS=$to:allocator_may_return_null=1:detect_leaks=0
    # Operations and whole models work in the driver, which has no sanitizer; the others that are
    # skipped have one thread and no unsafe code.
    local skip=(--skip ops:: --skip tests::architectures --skip tests::oracle --skip arch:: --skip fuzzing::
        --skip jinja::hostile)
    case $1 in
        # Else the locks and channels of the standard library are not seen.
        thread) cargo+=(-Zbuild-std) && skip+=(--skip convert::encode --skip convert::nesting) ;;
        address) cargo+=(--config 'profile.dev.package."*".opt-level=0') ;;
    esac
    test_group lib --lib -- "${skip[@]}"
    test_group convert --test convert
    # Mesa's driver frees memory for each workgroup. AddressSanitizer keeps what is freed up to a
    # limit, and more of it than it counts: that took 21 GB.
    ASAN_OPTIONS+=:quarantine_size_mb=1:thread_local_quarantine_size_kb=16
    test_group gpu --test gpu -- "${skip[@]}" stream dequant device::threads device::large device::a_lost device::commands \
        device::errors device::compiled device::profiles
}

# The format, checksums, decoders and encoders (Miri emulates AVX2). It is some 1000 times as slow:
# what changes every byte of a pack, or encodes many weights, would take days.
run_miri() {
    cargo=(env MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=4
        cargo +nightly miri test --locked --target-dir "$folder/miri" --no-default-features)
    test_group lib --lib -- format:: dequant::
    test_group format --test format -- golden:: reject:: roundtrip:: flip::bytes flip::a_pack_twice fuzz_regressions::parse \
        --skip parse_edits --skip every_error
    test_group encode --lib --features convert -- few_weights_on_all_backends
}

# The tests with this result.
count() {
    { grep -E '^test result:' "$log" || true; } | { grep -oE "[0-9]+ $1" || true; } | awk '{ sum += $1 } END { print sum + 0 }'
}

failed=0
for sanitizer in "$@"; do
    printf '\n== %s\n' "$sanitizer"
    reports=$folder/reports-$sanitizer
    rm -rf "$reports" && mkdir -p "$reports"
    : >"$log"
    start=$SECONDS
    case $sanitizer in
        miri) run_miri ;;
        address | thread) run_sanitizer "$sanitizer" ;;
        *) echo "sanitize: there is no $sanitizer; miri, address and thread are there" >&2; exit 1 ;;
    esac
    found=$(find "$reports" -type f | wc -l)
    [ "$found" = 0 ] || { head -n 60 "$reports"/* && failed=1; }
    echo "$sanitizer: $(count passed) tests passed, $(count failed) failed, $found reports, $((SECONDS - start)) s"
    [ "$(count passed)" != 0 ] || failed=1
    [ -n "${NF4PACK_SANITIZE_KEEP:-}" ] || rm -rf "${folder:?}/$sanitizer"
done
exit "$failed"
