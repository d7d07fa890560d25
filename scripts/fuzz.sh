#!/usr/bin/env bash
# Fuzzes the readers and the writer: all targets at the same time, or those that are named. Without
# cargo-fuzz: libFuzzer is a crate, and the flags are the compiler's own.
#   scripts/fuzz.sh [TARGET...]        parse, parse_edits, roundtrip, convert_header,
#                                      convert_header_edits
#   NF4PACK_FUZZ_SECONDS=N             seconds of each target (default 3600)
#   NF4PACK_FUZZ_SANITIZER=none        without AddressSanitizer, which needs a nightly toolchain
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
command -v c++ >/dev/null || install_packages g++ || { echo "fuzz: install a C++ compiler (Debian: apt-get install g++)" >&2; exit 1; }

seconds=${NF4PACK_FUZZ_SECONDS:-3600}
sanitizer=${NF4PACK_FUZZ_SANITIZER:-address}
[ "$#" -gt 0 ] || set -- parse parse_edits roundtrip convert_header convert_header_edits
host=$(rustc -vV | sed -n 's/^host: //p')

# What cargo-fuzz passes: coverage of edges and comparisons; arithmetic that overflows panics.
flags="--cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares"
toolchain=()
options_of_cargo=()
case $sanitizer in
    # For runs of seconds, for which a build of minutes does not pay.
    none)
        export CARGO_PROFILE_RELEASE_OPT_LEVEL=1
        options_of_cargo=(--config 'profile.release.package."*".opt-level=0' --config 'profile.release.package.nf4pack.opt-level=1')
        ;;
    address)
        toolchain=(+nightly)
        flags+=" -Zsanitizer=address"
        if ! cargo +nightly --version >/dev/null 2>&1 && ! rustup toolchain install nightly --profile minimal; then
            echo "fuzz: AddressSanitizer needs a nightly toolchain (rustup toolchain install nightly)" >&2
            exit 1
        fi
        ;;
    *) echo "fuzz: NF4PACK_FUZZ_SANITIZER is $sanitizer, neither address nor none" >&2; exit 1 ;;
esac
# With --target the flags are those of the targets, not of build scripts.
RUSTFLAGS=$flags cargo "${toolchain[@]}" build "${options_of_cargo[@]}" --locked --release --manifest-path fuzz/Cargo.toml --target-dir "fuzz/target/$sanitizer" \
    --target "$host" "${@/#/--bin=}"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
runs=()
for target in "$@"; do
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/")
    [ "$target" != parse ] || options+=(-dict=fuzz/pack.dict)
    # Each is one thread.
    "fuzz/target/$sanitizer/$host/release/$target" "fuzz/corpus/$target" "${options[@]}" >"$logs/$target" 2>&1 &
    runs+=("$!")
done
failed=()
number=0
for target in "$@"; do
    printf '\n-- fuzzing %s for %s s\n' "$target" "$seconds"
    wait "${runs[number]}" || failed+=("$target")
    tail -n 30 "$logs/$target"
    number=$((number + 1))
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "fuzzing found something: ${failed[*]} (see fuzz/artifacts)" >&2
    exit 1
fi
