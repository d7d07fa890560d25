#!/usr/bin/env bash
# From a fresh clone to a trained adapter: builds nf4pack, converts the bundled model, shows the
# pack, verifies it, looks for a GPU, and trains an adapter on it.
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
# Training needs a driver; all else does without.
(need_vulkan) || true
if run doctor "$pack"; then
    rm -rf target/demo/adapter
    run train "$pack" --data tests/fixtures/chat.jsonl --out target/demo/adapter \
        --epochs 20 --micro-batch 8 --max-length 64 --lr 1e-2 --save-every 10
    # Without the adapter, and with it.
    question="What is a shader?"
    run generate "$pack" --chat --max-tokens 16 <<< "$question"
    run generate "$pack" --adapter target/demo/adapter --chat --max-tokens 16 <<< "$question"
else
    echo "(Conversion, verify, export and merge work without a GPU; training needs one. Debian: apt-get install mesa-vulkan-drivers libvulkan1)"
fi
printf '\nThe pack is %s; the program is target/release/nf4pack (try --help).\n' "$pack"
