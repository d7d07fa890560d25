#!/usr/bin/env bash
# Fuzzes the readers and the writer: all targets, or those that are named, as many at a time as the
# machine has cores. Without cargo-fuzz: libFuzzer is a crate, and the flags are the compiler's own.
#   scripts/fuzz.sh [TARGET...]        targets: the names in fuzz/checks/mod.rs
#   NF4PACK_FUZZ_SECONDS=N             seconds of each target (default 3600; 0 only builds them)
#   NF4PACK_FUZZ_BUILD=address         optimised, with AddressSanitizer; needs a nightly toolchain
#                                      (default)
#   NF4PACK_FUZZ_BUILD=fuzz            optimised, without a sanitizer
#   NF4PACK_FUZZ_BUILD=dev             unoptimised, over dependencies that the tests have built; one
#                                      program for all targets, else one for each
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
command -v c++ >/dev/null || install_packages g++ || { echo "fuzz: install a C++ compiler (Debian: apt-get install g++)" >&2; exit 1; }

export seconds=${NF4PACK_FUZZ_SECONDS:-3600}
build=${NF4PACK_FUZZ_BUILD:-address}
mapfile -t all < <(sed -n '/^targets! {$/,/^}$/s/^    \([a-z_]*\),$/\1/p' fuzz/checks/mod.rs)
[ "${#all[@]}" -gt 0 ] || { echo "fuzz: no targets found in fuzz/checks/mod.rs" >&2; exit 1; }
[ "$#" -gt 0 ] || set -- "${all[@]}"
for target in "$@"; do
    [[ " ${all[*]} " = *" $target "* ]] || { echo "fuzz: there is no target $target; targets are ${all[*]}" >&2; exit 1; }
done

# The crates of this workspace are compiled with coverage, by fuzz/rustc.sh.
export RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/rustc.sh
toolchain=()
options=(--locked -p nf4pack-fuzz)
case $build in
    dev) folder=target/debug ;;
    fuzz)
        options+=(--profile fuzz)
        folder=target/fuzz
        ;;
    address)
        toolchain=(+nightly)
        if ! cargo +nightly --version >/dev/null 2>&1 && ! rustup toolchain install nightly --profile minimal; then
            echo "fuzz: AddressSanitizer needs a nightly toolchain (rustup toolchain install nightly)" >&2
            exit 1
        fi
        host=$(rustc -vV | sed -n 's/^host: //p')
        # With --target the flags are not those of build scripts.
        export RUSTFLAGS="-Zsanitizer=address"
        options+=(--profile fuzz --target "$host" --target-dir target/sanitize/fuzz)
        folder=target/sanitize/fuzz/$host/fuzz
        ;;
    *) echo "fuzz: NF4PACK_FUZZ_BUILD is $build; it may be address, fuzz or dev" >&2; exit 1 ;;
esac
# A program with one target is faster: see fuzz/checks/mod.rs.
export programs=$folder/fuzz-targets
rm -rf "$programs" && mkdir -p "$programs"
for target in "$@"; do
    [ "$build" = dev ] || export NF4PACK_FUZZ_ONLY=$target
    cargo "${toolchain[@]}" build "${options[@]}"
    ln "$folder/nf4pack-fuzz" "$programs/$target"
done
[ "$seconds" != 0 ] || exit 0

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export logs

# Fuzzes one target on one thread; its log has the name of the target, and a second file is there
# if it failed.
fuzz() {
    local target=$1 options
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target" "$logs/tmp-$target"
    options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/")
    [ "$target" != parse ] || options+=(-dict=fuzz/pack.dict)
    TMPDIR=$logs/tmp-$target NF4PACK_FUZZ_TARGET=$target RAYON_NUM_THREADS=1 \
        "$programs/$target" "fuzz/corpus/$target" "${options[@]}" >"$logs/$target" 2>&1 || touch "$logs/$target.failed"
    rm -rf "$logs/tmp-$target"
}
export -f fuzz
printf '%s\n' "$@" | xargs -P "$(nproc 2>/dev/null || sysctl -n hw.ncpu)" -I{} bash -c 'fuzz {}'

failed=()
for target in "$@"; do
    printf '\n-- fuzzed %s for %s s\n' "$target" "$seconds"
    if [ -e "$logs/$target.failed" ]; then
        failed+=("$target")
        tail -n 60 "$logs/$target"
    else
        grep -a 'DONE' "$logs/$target" || tail -n 30 "$logs/$target"
    fi
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "fuzzing found something: ${failed[*]} (see fuzz/artifacts)" >&2
    exit 1
fi
