#!/usr/bin/env bash
# From a fresh clone to a verified pack: builds nf4pack, converts the bundled model, shows the pack, verifies it, and looks for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

pack=target/demo/tiny-qwen3.nf4pack
source=tests/fixtures/tiny-qwen3
mkdir -p target/demo
cargo build --release --locked
run() {
    printf '\n$ nf4pack %s\n' "$*"
    target/release/nf4pack "$@"
}
run convert "$source" "$pack" --force
run inspect "$pack"
run verify "$pack" --against "$source"
run doctor "$pack" || echo "(All but doctor and the GPU's benchmarks work without a GPU.)"
printf '\nThe pack is %s; the program is target/release/nf4pack (try --help).\n' "$pack"
