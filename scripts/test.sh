#!/usr/bin/env bash
# Everything that CI checks, from a fresh clone on a bare Debian machine: format, lints,
# documentation, each feature set alone, all tests (those of the GPU on Mesa's software Vulkan where
# there is no other), the examples, the NEON backends under qemu, and some seconds of each fuzz
# target. At the end it prints how long each step took.
#   scripts/test.sh           all steps
#   scripts/test.sh STEP...   these steps alone; their names are those of the functions below
#   NF4PACK_FUZZ_SECONDS=N    seconds of each fuzz target (default 5; 0 leaves fuzzing out;
#                             scripts/fuzz.sh fuzzes for longer)
#   NF4PACK_REQUIRE_GPU=0     continues without a GPU; its tests are then skipped
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export NF4PACK_REQUIRE_GPU=${NF4PACK_REQUIRE_GPU:-1}
export NF4PACK_FUZZ_SECONDS=${NF4PACK_FUZZ_SECONDS:-5} NF4PACK_FUZZ_BUILD=dev
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

# -- The steps

packages() {
    [ "$NF4PACK_REQUIRE_GPU" = 0 ] || need_vulkan
    bash scripts/neon.sh prepare
}

format() {
    cargo fmt --check
    cargo fmt --check -p nf4pack-fuzz
}

# Lints and documentation share nothing with the build of the tests except procedural macros. In a
# folder of their own they do not wait for it.
apart() {
    export CARGO_TARGET_DIR=target/lints
    mkdir -p target/lints
}

# A feature only adds code (tests/format/layering.rs), so lints of no feature and of all features
# find everything, and tests of fewer features would run the same code again. Each set between must
# still compile alone.
lints() {
    apart
    cargo clippy --locked --all-targets --all-features -- -D warnings
    cargo clippy --locked --all-targets --no-default-features -- -D warnings
}

each_feature() {
    apart
    local feature
    for feature in mmap convert gpu train; do
        # Flags that deny warnings would check all dependencies again.
        cargo check --locked --lib --no-default-features --features "$feature" 2>&1 | tee target/lints/warnings
        if grep -q '^warning' target/lints/warnings; then
            echo "warnings with the feature $feature alone" >&2
            exit 1
        fi
    done
}

# Together with the fuzz targets, which have no page, dependencies have the features that they have
# in the tests: the lints have checked them.
documentation() {
    apart
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features -p nf4pack -p nf4pack-fuzz
}

other_systems() {
    apart
    local target features
    for target in x86_64-pc-windows-gnu aarch64-apple-darwin wasm32-unknown-unknown; do
        if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
            features=cli
            [ "$target" = wasm32-unknown-unknown ] && features=""
            cargo check --locked --target "$target" --no-default-features --features "$features"
        else
            echo "SKIPPED: the standard library of $target is not installed (rustup target add $target)"
        fi
    done
}

dependencies() {
    if ! command -v cargo-deny >/dev/null; then
        echo "SKIPPED: cargo-deny is not installed (cargo install cargo-deny)"
        return
    fi
    cargo deny --workspace --locked --all-features check licenses bans sources
    if cargo deny --workspace --locked --all-features fetch db; then
        cargo deny --workspace --locked --all-features check advisories
    else
        echo "SKIPPED: the list of advisories cannot be fetched"
    fi
}

neon() { bash scripts/neon.sh; }

build() { cargo test --locked --no-run; }

# The tests of whole models (src/tests) wait for one queue of the device, so they have a process and
# a device of their own.
models=(tests::{architectures,generation,mixed,oracle,precision,vocabulary,windows}::)

models() { cargo test --locked --lib -- "${models[@]}"; }

library() { cargo test --locked --lib --bins -- "${models[@]/#/--skip=}"; }

documentation_tests() { cargo test --locked --doc; }

cli() { cargo test --locked --test cli; }

gpu() { cargo test --locked --test gpu; }

convert_and_format() { cargo test --locked --test convert --test format; }

examples() {
    cargo run --locked --example read_tensor -- tests/fixtures/golden/v1.0-full.nf4pack
    if [ "$NF4PACK_REQUIRE_GPU" = 0 ]; then
        echo "SKIPPED: stream_layer needs a GPU (NF4PACK_REQUIRE_GPU=0)"
    else
        cargo run --locked --example stream_layer -- tests/fixtures/golden/v1.0-full.nf4pack
    fi
}

# The tests of kernels and of decoding, once more with wgpu's runtime checks in the kernels. The
# runs without are the only ones that leave workgroup memory uninitialised. The kernels of other
# tests, and those that a test breaks (`a_wrong_kernel`), always have the checks.
checked_kernels() {
    export NF4PACK_CHECKED=1
    # Not those of matrix units: they pass with runtime checks, too, but a software driver compiles
    # their loops for 400 s of one core. Nor those of poisoned memory: the checks clear workgroup
    # memory.
    cargo test --locked --lib -- dequant:: ops:: --skip mixed --skip matrix_units --skip poison --skip a_wrong_kernel
    cargo test --locked --test gpu -- dequant::
}

fuzz_build() { NF4PACK_FUZZ_SECONDS=0 bash scripts/fuzz.sh; }

fuzz() {
    if [ "$NF4PACK_FUZZ_SECONDS" = 0 ]; then
        echo "SKIPPED: NF4PACK_FUZZ_SECONDS=0"
    else
        bash scripts/fuzz.sh
    fi
}

if [ "$#" -gt 0 ]; then
    for step in "$@"; do
        # What a step exports is not for the next.
        ("$step")
    done
    exit
fi

# -- All of them. One test, or one crate, often uses one core only. So lanes of steps run at the
# same time.

# Logs of steps, and the rows of the table of seconds.
logs=$(mktemp -d)
lanes=()
# Lanes are background jobs with process groups of their own, and this process only waits for them.
# So a signal ends it at once, and it ends them.
trap 'for lane in ${lanes[@]+"${lanes[@]}"}; do kill -- "-$lane" 2>/dev/null || true; done; rm -rf "$logs"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
# A lane that failed sends this signal.
trap 'exit 1' USR1

# Runs steps one after the other. Prints the output of each when it has ended, so that the output of
# two lanes does not mix.
lane() {
    local step failed TIMEFORMAT='%0R %0U %0S'
    for step in "$@"; do
        failed=0
        { time bash scripts/test.sh "$step" >"$logs/$step" 2>&1 </dev/null; } 2>"$logs/$step.time" || failed=$?
        local real user system
        # The last line: before it, the shell says when a signal has killed the step.
        read -r real user system < <(tail -n 1 "$logs/$step.time")
        echo "| $real | $((user + system)) | ${step//_/ } |" >>"$logs/table"
        printf '\n== %s: %s s\n%s\n' "${step//_/ }" "$real" "$(cat "$logs/$step")"
        if [ "$failed" != 0 ]; then
            printf '\nFAILED: bash scripts/test.sh %s (exit status %s)\n' "$step" "$failed" >&2
            kill -s USR1 $$
            exit 1
        fi
    done
}

start() {
    set -m
    lane "$@" &
    lanes+=($!)
    set +m
}

finish() {
    local lane
    for lane in "${lanes[@]}"; do
        wait "$lane"
    done
    lanes=()
}

start packages format
finish
start lints each_feature documentation other_systems neon dependencies
start build
wait "${lanes[-1]}"
unset 'lanes[-1]'
start library examples
start models gpu
start cli convert_and_format documentation_tests
start checked_kernels fuzz_build
finish
# By itself, so that each target gets its seconds.
start fuzz
finish

printf '\n| seconds | of all cores | step |\n|---:|---:|---|\n'
cat "$logs/table"
printf '| %s | | together |\n' "$SECONDS"
