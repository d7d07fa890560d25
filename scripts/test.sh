#!/usr/bin/env bash
# Everything that CI checks, from a fresh clone on a bare Debian machine:
# format, lints, documentation, each feature set alone, all tests (those of the GPU on Mesa's software Vulkan where there is no
# other), the examples, and a minute of each fuzz target.
#   NF4PACK_FUZZ_SECONDS=N    seconds of each fuzz target (default 60; 0 leaves fuzzing out)
#   NF4PACK_REQUIRE_GPU=0     goes on without a GPU; its tests are then skipped
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export NF4PACK_REQUIRE_GPU=${NF4PACK_REQUIRE_GPU:-1}
[ "$NF4PACK_REQUIRE_GPU" = 0 ] || need_vulkan

step() { printf '\n== %s\n' "$*"; }

# --no-default-features with each of these must lint and test by itself.
feature_sets=("" mmap convert gpu train cli)

step "format"
cargo fmt --check
(cd fuzz && cargo fmt --check)

for features in "${feature_sets[@]}"; do
    step "lints with features: ${features:-none}"
    cargo clippy --locked --all-targets --no-default-features --features "$features" -- -D warnings
done

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features

step "tests: everything"
cargo test --locked

step "examples"
cargo run --locked --example read_tensor -- tests/fixtures/golden/v1.0-full.nf4pack
if [ "$NF4PACK_REQUIRE_GPU" = 0 ]; then
    echo "SKIPPED: stream_layer needs a GPU (NF4PACK_REQUIRE_GPU=0)"
else
    cargo run --locked --example stream_layer -- tests/fixtures/golden/v1.0-full.nf4pack
fi

# The tests of the kernels (decoding, gathers, operations), once more with wgpu's runtime checks in them. The runs without are the ones
# that leave workgroup memory uninitialised.
step "GPU tests: checked kernels"
NF4PACK_CHECKED=1 cargo test --locked --lib -- gpu:: dequant:: ops::
NF4PACK_CHECKED=1 cargo test --locked --test gpu -- dequant:: device::

# The same sources under fewer features: what differs is the library. Those of `gpu` and `train` differ in nothing that a test sees.
for features in "" mmap convert; do
    step "library tests with features: ${features:-none}"
    cargo test --locked --lib --no-default-features --features "$features"
done
step "format tests with features: none"
cargo test --locked --no-default-features --test format

step "other systems"
for target in aarch64-unknown-linux-gnu x86_64-pc-windows-gnu aarch64-apple-darwin wasm32-unknown-unknown; do
    if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
        features=cli
        [ "$target" = wasm32-unknown-unknown ] && features=""
        cargo check --locked --target "$target" --no-default-features --features "$features"
    else
        echo "SKIPPED: the standard library of $target is not installed (rustup target add $target)"
    fi
done

step "fuzzing"
seconds=${NF4PACK_FUZZ_SECONDS:-60}
if [ "$seconds" = 0 ]; then
    echo "SKIPPED: NF4PACK_FUZZ_SECONDS=0"
elif ! cargo +nightly --version >/dev/null 2>&1 && ! rustup toolchain install nightly --profile minimal; then
    echo "no nightly toolchain: fuzzing needs one (rustup toolchain install nightly)" >&2
    exit 1
else
    command -v c++ >/dev/null || install_packages g++
    cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
    cargo +nightly fuzz build
    # At the same time: each is one thread.
    targets=(parse roundtrip convert_header)
    logs=$(mktemp -d)
    runs=()
    for target in "${targets[@]}"; do
        cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
            >"$logs/$target" 2>&1 &
        runs+=("$!")
    done
    failed=()
    for i in "${!targets[@]}"; do
        step "fuzzing ${targets[i]} for $seconds s"
        wait "${runs[i]}" || failed+=("${targets[i]}")
        tail -n 40 "$logs/${targets[i]}"
    done
    rm -r "$logs"
    if [ "${#failed[@]}" -gt 0 ]; then
        echo "fuzzing found something: ${failed[*]}" >&2
        exit 1
    fi
fi

step "all checks passed"
