#!/usr/bin/env bash
# Tests under Miri, AddressSanitizer and ThreadSanitizer. Needs a nightly toolchain with rust-src
# (and miri); docs/reliability.md has the results.
#   scripts/sanitize.sh [miri] [address] [thread]      all three, where none is named
#   NF4PACK_SANITIZE_KEEP=1                            keeps the builds in target/sanitize
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

[ "$#" -gt 0 ] || set -- miri address thread
rustup +nightly component add miri rust-src >/dev/null || {
    echo "sanitize: rustup toolchain install nightly --component miri --component rust-src" >&2
    exit 1
}
host=$(rustc -vV | sed -n 's/^host: //p')
folder=target/sanitize
export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=line-tables-only

# The CPU code of format and decoding. Miri emulates AVX2.
run_miri() {
    MIRIFLAGS="-Zmiri-disable-isolation" PROPTEST_CASES=4 cargo +nightly miri test --locked --target-dir "$folder/miri" \
        --no-default-features --lib -- format:: dequant::
}

# Conversion, and what reads packs: sources, encoders, targets, maps, positioned reads, verify,
# export. The standard library is compiled with the sanitizer, too.
run_sanitizer() {
    local sanitizer=$1
    # With --target the flags are not those of build scripts and macros.
    RUSTFLAGS="-Zsanitizer=$sanitizer" RUSTDOCFLAGS="-Zsanitizer=$sanitizer" PROPTEST_CASES=32 \
        TSAN_OPTIONS="halt_on_error=1" \
        cargo +nightly test --locked -Zbuild-std --target "$host" --target-dir "$folder/$sanitizer" "${@:2}"
}

for sanitizer in "$@"; do
    printf '\n== %s\n' "$sanitizer"
    case $sanitizer in
        miri) run_miri ;;
        address | thread)
            run_sanitizer "$sanitizer" --no-default-features --features convert --lib --test format --test convert
            run_sanitizer "$sanitizer" --no-default-features --features gpu --lib -- dequant::stream:: mmap:: io::
            ;;
        *) echo "sanitize: there is no $sanitizer; miri, address and thread are there" >&2; exit 1 ;;
    esac
    [ -n "${NF4PACK_SANITIZE_KEEP:-}" ] || rm -rf "${folder:?}/$sanitizer"
done
