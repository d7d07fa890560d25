#!/usr/bin/env bash
# From a fresh clone to a trained adapter: builds nf4pack, converts the bundled model, shows the pack, verifies it, looks for a GPU, and
# trains an adapter on it.
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
if run doctor "$pack"; then
    rm -rf target/demo/adapter
    run train "$pack" --data tests/fixtures/corpus/train.txt --eval-data tests/fixtures/corpus/valid.txt --out target/demo/adapter \
        --steps 20 --micro-batch 1 --max-length 128 --lr 1e-3
    run generate "$pack" --adapter target/demo/adapter --prompt "This error occurs when" --max-tokens 24
else
    echo "(Conversion, verify, export and merge work without a GPU; training needs one. Debian: apt-get install mesa-vulkan-drivers libvulkan1)"
fi
printf '\nThe pack is %s; the program is target/release/nf4pack (try --help).\n' "$pack"
