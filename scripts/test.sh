#!/usr/bin/env bash
# Everything that CI checks, from a fresh clone on a bare Debian machine: format, lints,
# documentation, each feature set alone, all tests (those of the GPU on Mesa's software Vulkan where
# there is no other), the examples, the NEON backends under qemu, and some seconds of each fuzz
# target. At the end it prints how long each step took.
#   NF4PACK_FUZZ_SECONDS=N    seconds of each fuzz target (default 5; 0 leaves fuzzing out;
#                             scripts/fuzz.sh fuzzes for longer)
#   NF4PACK_REQUIRE_GPU=0     continues without a GPU; its tests are then skipped
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export NF4PACK_REQUIRE_GPU=${NF4PACK_REQUIRE_GPU:-1}
# Nothing here is compiled a second time after an edit, and files of incremental compilation cost
# time to write.
export CARGO_INCREMENTAL=0
# Where RUST_BACKTRACE is set, a debug build of wgpu would take a backtrace at each lock. Panics
# keep theirs.
export RUST_LIB_BACKTRACE=0
# Tests sync thousands of small files, which takes a minute on a disk. What a disk may lose is
# tested with recorded steps (src/io/crash.rs), not with the disk.
memory_has_room() {
    [ -w /dev/shm ] && ! grep -q ' /dev/shm .*noexec' /proc/mounts &&
        [ "$(df --output=avail /dev/shm | tail -n 1)" -ge $((4 << 20)) ]
}
if [ -z "${TMPDIR:-}" ] && memory_has_room; then
    export TMPDIR=/dev/shm
fi

steps=()
# Ends the previous step, whose seconds go into the table, and starts another.
step() {
    [ "${#steps[@]}" = 0 ] || steps[-1]="$((SECONDS - began)) ${steps[-1]}"
    began=$SECONDS
    steps+=("$*")
    printf '\n== %s\n' "$*"
}

step "packages"
[ "$NF4PACK_REQUIRE_GPU" = 0 ] || need_vulkan
bash scripts/neon.sh prepare

# The logs of steps and of what runs in the background.
logs=$(mktemp -d)
neon=
trap '[ -z "$neon" ] || kill -- "-$neon" 2>/dev/null || true; rm -rf "$logs"' EXIT
# It has a target folder of its own, so it runs at the same time as the lints, the documentation and
# the build, which use one core for much of their time. Its step waits for it.
set -m
nice bash scripts/neon.sh >"$logs/neon" 2>&1 &
neon=$!
set +m

step "format"
cargo fmt --check
cargo fmt --check -p nf4pack-fuzz

# A feature only adds code (tests/format/layering.rs), so lints of no feature and of all features
# find everything. Each set between must still compile alone.
step "lints: all features"
cargo clippy --locked --all-targets --all-features -- -D warnings
step "lints: no feature"
cargo clippy --locked --all-targets --no-default-features -- -D warnings
step "each feature alone"
for feature in mmap convert gpu train; do
    cargo check --locked --lib --no-default-features --features "$feature" 2>&1 | tee "$logs/check"
    # Flags that deny warnings would check all dependencies again.
    if grep -q '^warning' "$logs/check"; then
        echo "warnings with the feature $feature alone" >&2
        exit 1
    fi
done

step "dependencies"
if command -v cargo-deny >/dev/null; then
    cargo deny --workspace --locked --all-features check licenses bans sources
    if cargo deny --workspace --locked --all-features fetch db; then
        cargo deny --workspace --locked --all-features check advisories
    else
        echo "SKIPPED: the list of advisories cannot be fetched"
    fi
else
    echo "SKIPPED: cargo-deny is not installed (cargo install cargo-deny)"
fi

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features

step "tests: build"
cargo test --locked --no-run

step "NEON"
if ! wait "$neon"; then
    neon=
    cat "$logs/neon"
    exit 1
fi
neon=
cat "$logs/neon"

step "tests: everything"
cargo test --locked

step "examples"
cargo run --locked --example read_tensor -- tests/fixtures/golden/v1.0-full.nf4pack
if [ "$NF4PACK_REQUIRE_GPU" = 0 ]; then
    echo "SKIPPED: stream_layer needs a GPU (NF4PACK_REQUIRE_GPU=0)"
else
    cargo run --locked --example stream_layer -- tests/fixtures/golden/v1.0-full.nf4pack
fi

# The tests of kernels, of the device and of decoding, once more with wgpu's runtime checks in the
# kernels. The runs without are the only ones that leave workgroup memory uninitialised.
step "checked kernels"
# Not those of matrix units: with runtime checks, Mesa's software driver ends the loops of a thread
# after 65,535 iterations in all, and matrix operations as loops take more. With eight times fewer
# iterations, the test that showed it passes.
NF4PACK_CHECKED=1 cargo test --locked --lib -- gpu:: dequant:: ops:: --skip mixed --skip matrix_units \
    --skip poison::adapters
NF4PACK_CHECKED=1 cargo test --locked --test gpu -- dequant:: device::

# The same code under fewer features of its dependencies. Without `convert` it has the crates that
# the format needs, with the same features as here: only serde_json loses one, `alloc`, which is
# part of its `std`. The lints of no feature compile these tests.
step "tests: convert alone"
cargo test --locked --no-default-features --features convert --lib --test format

step "other systems"
for target in x86_64-pc-windows-gnu aarch64-apple-darwin wasm32-unknown-unknown; do
    if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
        features=cli
        [ "$target" = wasm32-unknown-unknown ] && features=""
        cargo check --locked --target "$target" --no-default-features --features "$features"
    else
        echo "SKIPPED: the standard library of $target is not installed (rustup target add $target)"
    fi
done

step "fuzzing"
seconds=${NF4PACK_FUZZ_SECONDS:-5}
if [ "$seconds" = 0 ]; then
    echo "SKIPPED: NF4PACK_FUZZ_SECONDS=0"
else
    NF4PACK_FUZZ_SECONDS=$seconds NF4PACK_FUZZ_BUILD=dev bash scripts/fuzz.sh
fi

step "all checks passed"
printf '\n| seconds | step |\n|---:|---|\n'
for line in "${steps[@]::${#steps[@]}-1}"; do
    printf '| %s | %s |\n' "${line%% *}" "${line#* }"
done
printf '| %s | together |\n' "$SECONDS"
