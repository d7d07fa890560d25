#!/usr/bin/env bash
# Tests under AddressSanitizer, ThreadSanitizer and Miri; docs/reliability.md has the results.
#   scripts/sanitize.sh [address] [thread] [miri]      all three by default
#   NF4PACK_SANITIZE_KEEP=1                            keeps the builds in target/sanitize
#   NF4PACK_SANITIZE_ONLY=cli                          one group of tests: lib, format, convert, gpu, cli
# Fails if a test fails or if anything was reported, also by a process that a test started. Needs a
# nightly toolchain with rust-src (and miri), a Vulkan driver (Mesa's software one suffices), some
# 6 GB of disk for each sanitizer. The standard library is compiled with the sanitizer, too:
# ThreadSanitizer would otherwise not see its locks and channels.
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
# Optimised a little: the searches of the encoders would take hours.
export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=line-tables-only CARGO_PROFILE_DEV_OPT_LEVEL=1

# Tests of one group: test_group NAME FLAGS... -- FILTERS...
test_group() {
    [ "${NF4PACK_SANITIZE_ONLY:-$1}" = "$1" ] || return 0
    printf '\n-- %s\n' "$1"
    "${cargo[@]}" "${@:2}" 2>&1 | tee -a "$log" || failed=1
}

# Everything with unsafe code, and everything that runs on several threads. Operations and whole
# models are left out: their work is done by the driver, which has no sanitizer.
run_sanitizer() {
    local sanitizer=$1
    # With --target the flags are not those of build scripts and macros.
    cargo=(env RUSTFLAGS="-Zsanitizer=$sanitizer" cargo +nightly test --locked -Zbuild-std
        --target "$host" --target-dir "$folder/$sanitizer")
    export NF4PACK_REQUIRE_GPU=1 NF4PACK_ADAPTER="${NF4PACK_ADAPTER:-llvmpipe}"
    # A report ends the process that it is about, except in the ThreadSanitizer, which goes on.
    export ASAN_OPTIONS="log_path=$reports/report:allocator_may_return_null=1:detect_leaks=1"
    export LSAN_OPTIONS="suppressions=$PWD/scripts/sanitize-leaks.txt:print_suppressions=0"
    export TSAN_OPTIONS="log_path=$reports/report:suppressions=$PWD/scripts/sanitize-races.txt:history_size=4"
    local slow=(--skip ops:: --skip tests::architectures --skip tests::oracle)
    test_group lib --lib -- "${slow[@]}"
    [ "$sanitizer" = thread ] || test_group format --test format
    test_group convert --test convert
    test_group gpu --test gpu -- stream dequant device
    test_group cli --test cli -- commands damage kills runs adapters merge train generate
}

# What has no system calls: the format, checksums, the CPU's encoders and decoders (Miri emulates
# AVX2), headers of safetensors files.
run_miri() {
    cargo=(env MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=4 CARGO_PROFILE_DEV_OPT_LEVEL=0
        cargo +nightly miri test --locked --target-dir "$folder/miri" --no-default-features --features convert)
    test_group lib --lib -- format:: dequant::
}

count() {
    grep -E '^test result:' "$log" | grep -oE "[0-9]+ $1" | awk '{ sum += $1 } END { print sum + 0 }'
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
    [ -n "${NF4PACK_SANITIZE_KEEP:-}" ] || rm -rf "${folder:?}/$sanitizer"
done
exit "$failed"
